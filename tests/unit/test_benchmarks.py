"""The benchmarks run, compare like with like, and the documentation shows what they found."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from blobpipe.detection.detectors import Peaks
from blobpipe.images.clip import clip_image
from blobpipe.networks import report_network
from blobpipe.params import Clip
from blobpipe.simulation import render
from blobpipe.simulation.recipes import STEP

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_ext")]
import timed  # noqa: E402
from benchmarks import __main__ as command  # noqa: E402
from benchmarks import images, material, measure, network, peer_frames, peers, report  # noqa: E402


def bench(*arguments: str, out: Path) -> tuple[str, dict[str, Any]]:
    words = [sys.executable, "-m", "benchmarks", "--quick", "--out", str(out), *arguments]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # progress is for terminals
    return done.stdout, json.loads((out / "results.json").read_text())


def check_shape(content: dict[str, Any], parts: list[str]) -> None:
    assert list(content) == ["machine", "quick", "seconds", "parts"]
    assert {"cpu", "cores", "memory_gib", "python", "versions"} <= set(content["machine"])
    assert content["quick"]
    assert list(content["parts"]) == parts
    for part in content["parts"].values():
        assert set(part) == {"title", "figures", "remarks", "seconds", "others_frac"}
        for figure in part["figures"].values():
            assert {"what", "unit", "median", "low", "high", "n"} <= set(figure)
            assert 0 < figure["low"] <= figure["median"] <= figure["high"]
            assert ("reached" in figure) == ("at_least" in figure or "at_most" in figure)


def check_paths(content: dict[str, Any]) -> None:
    text = json.dumps(content)
    assert str(ROOT) not in text
    assert not re.search(r"/(home|root|tmp|work|usr)/", text)


@pytest.fixture(scope="module")
def some(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any], Path]:
    """Standard output, JSON, and folder of the parts that take no long time."""
    out = tmp_path_factory.mktemp("benchmarks")
    return *bench("--only", "render", "clip", "median", "gpu", out=out), out


def test_one_command_measures_and_writes(some: tuple[str, dict[str, Any], Path]) -> None:
    printed, content, out = some
    check_shape(content, ["render", "clip", "median", "gpu"])
    check_paths(content)
    assert (out / "speed.png").exists()
    for part in content["parts"].values():
        assert all(figure["what"] in printed for figure in part["figures"].values())


def test_the_documentation_shows_it(
    some: tuple[str, dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(timed, "RESULTS", some[2] / "results.json")
    ratio = some[1]["parts"]["render"]["figures"]["ours_over_one"]
    assert timed.number("render", "ours_over_one") == f"{ratio['median']:.3g} times"
    assert "| blobpipe / one at a time | " in timed.table("render")
    assert "at least 10: " in timed.table("render")
    assert some[1]["machine"]["cpu"] in timed.machine()
    assert timed.number("train", "ours_over_plain") == timed.UNKNOWN
    monkeypatch.setattr(timed, "RESULTS", tmp_path / "none.json")
    assert timed.table("render") == timed.machine() == f"*{timed.UNKNOWN}*"


def test_the_documentation_names_what_is_measured() -> None:
    page = (ROOT / "docs" / "speed.md").read_text()
    assert sorted(re.findall(r"^```\{timed\} (\w+)$", page, re.MULTILINE)) == sorted(command.PARTS)
    source = (ROOT / "benchmarks" / "network.py").read_text()
    for part, name in re.findall(r"\{timed\}`(\w+) (\w+)`", page):
        assert part in command.PARTS
        assert f'"{name}"' in source


@pytest.mark.long
def test_every_part_runs(tmp_path: Path) -> None:
    parts = [part for part in command.PARTS if part not in ("render", "clip", "median", "gpu")]
    _, content = bench("--only", *parts, out=tmp_path)
    check_shape(content, parts)
    check_paths(content)


def test_a_part_that_fails_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(size: material.Size) -> measure.Part:
        raise RuntimeError("out of patience")

    monkeypatch.setattr(images, "clipping", fail)
    monkeypatch.setattr(images, "median", lambda size: measure.Part("Running median"))
    assert command.main(["--quick", "--only", "clip", "median"]) == 1
    printed = capsys.readouterr().out
    assert "RuntimeError: out of patience" in printed
    assert "Running median" in printed
    assert "nothing written" in printed


def test_works_are_done_in_turn_and_the_first_turn_does_not_count() -> None:
    done: list[str] = []

    def work(name: str) -> float:
        done.append(name)
        return 1.0

    rates = measure.interleave(
        {"a": lambda: work("a"), "b": lambda: work("b")}, least=2, most=3, seconds=60
    )
    assert "".join(done) == "ab" + "ab" + "ba" + "ab"
    assert {name: len(values) for name, values in rates.items()} == {"a": 3, "b": 3}
    assert len(measure.interleave({"a": lambda: work("a")}, least=2, most=9, seconds=0)["a"]) == 2


def test_figures_are_medians_and_know_their_targets() -> None:
    part = measure.Part("A part")
    part.add("rate", "a rate", "frames/s", [1.0, 2.0, 9.0], at_least=2)
    part.add_ratio(
        "ours_over_other", "a ratio", np.array([4.0, 6.0]), np.array([2.0, 2.0]), at_most=2
    )
    rate, ratio = part.figures.values()
    assert (rate.median, rate.low, rate.high, rate.n, rate.reached) == (2.0, 1.5, 5.5, 3, True)
    assert (ratio.median, ratio.unit, ratio.reached) == (2.5, measure.TIMES, False)
    assert "at most 2: NOT reached" in report.table("name", part)
    part.others_frac = 0.5
    assert "Not a quiet machine" in report.table("name", part)


def test_both_ways_of_rendering_give_the_same() -> None:
    made = material.make_recipes(replace(material.QUICK, n_differences=1))
    backgrounds = [image.astype(np.float32) / STEP for image in made.scene.backgrounds]
    rows = np.flatnonzero((made.recipes.dip == 0).all(axis=1))[:12]
    ours = render.render_subframes(made.scene, made.recipes, rows)
    for row, subframe in zip(rows, ours, strict=True):
        other = images.one_subframe(made, backgrounds, row, noise_sigma=0.0)
        np.testing.assert_allclose(other, subframe, atol=1e-4)


def test_both_ways_of_clipping_give_the_same() -> None:
    [image], _ = material.differences(1)
    params = Clip(border_px=0)
    part = image[200:300]
    np.testing.assert_allclose(
        images.clip_by_loop(part, params), clip_image(part, params)[0], rtol=1e-6
    )


def test_recipes_are_like_those_of_the_pipeline() -> None:
    recipes = material.make_recipes(material.QUICK).recipes
    assert 0 < (recipes.dip != 0).any(axis=1).mean() < 0.3
    n_blobs = np.diff(recipes.first_blob)
    assert ((n_blobs > 0) == (recipes.label == 1)).all()
    assert n_blobs.max() == 5
    assert recipes.label.mean() == 0.5


def test_the_plain_network_is_the_report_s() -> None:
    plain = [tuple(weight.shape) for weight in network.plain_network().parameters()]
    assert plain == [tuple(weight.shape) for weight in report_network.ReportNetwork().parameters()]


def test_operations_are_those_of_the_documentation() -> None:
    page = (ROOT / "docs" / "fused.md").read_text()
    for name, row in (
        ("convolution 1", "conv1"),
        ("convolution 2", "conv2"),
        ("dense", "dense"),
        ("together", "together"),
    ):
        [line] = re.findall(rf"^\| {name}.*$", page, re.MULTILINE)
        counts = network.operations()[row]
        columns = ("forward_as_defined", "forward", "backward_everywhere", "backward")
        numbers = [int(word.replace(",", "")) for word in re.findall(r"\b\d[\d,]{5,}\b", line)]
        assert numbers == [counts[column] for column in columns]


# --- other detectors -------------------------------------------------------------------------------------------------

NOWHERE = Path("nowhere.safetensors")


def test_one_command_compares_the_detectors(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "benchmarks.peers", "--frames", "2", "--side", "256"]
    words += ["--kinds", "one_over_f", "--report", str(NOWHERE), "--out", str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "skipped: report's network (nowhere.safetensors not found" in done.stdout
    assert (tmp_path / "peers.png").exists()
    table = pd.read_csv(tmp_path / "peers.csv")
    assert set(table["kind"]) == {"one_over_f", peers.ALL}
    assert {"matched_filter", "whitened", "dense"} <= set(table["detector"]) <= set(peers.NAMES)
    assert (table["n_frames"] == 2).all()
    assert (table["n_blobs"] == 2).all()
    recalls = table[[f"recall_at_{rate:g}" for rate in peers.RATES]].to_numpy()
    assert (np.diff(recalls, axis=1) >= 0).all()
    assert (recalls >= 0).all()
    assert (recalls <= 1).all()
    assert (table["ms_per_frame"] > 0).all()


def test_the_comparison_is_the_same_each_time_but_for_times() -> None:
    searches, _ = peers.make_searches(NOWHERE)
    tables = [peers.compare(searches, ["soft_clusters"], 2, seed=1, side=256) for _ in range(2)]
    pd.testing.assert_frame_equal(*(table.drop(columns="ms_per_frame") for table in tables))
    other = peers.compare(searches, ["soft_clusters"], 2, seed=2, side=256)
    assert len(other) == len(tables[0])


def test_a_detector_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda name: None if name == "sep" else object())
    searches, skipped = peers.make_searches(NOWHERE)
    assert set(skipped) == {"sep", "report"}
    assert skipped["sep"].startswith("sep is not installed; pip install")
    assert set(searches) == set(peers.NAMES) - {"sep", "report"}


def test_recall_is_that_above_the_false_alarms_that_are_not_accepted() -> None:
    """Two blobs to a frame, one found with a score of 5, one with 1; a false alarm of 3 on each of four frames."""
    frames = [peer_frames.make_frame("white", index, seed=3, side=512) for index in range(4)]
    answers = []
    for frame in frames:
        x, y = frame.blobs[["x_px", "y_px"]].to_numpy().T
        peaks = Peaks(np.append(x, -99), np.append(y + 5.9, -99), np.array([5.0, 1.0, 3.0]))
        answers.append(peers._answer(lambda image, peaks=peaks: peaks, frame.image, frame.blobs))
    row = peers._summarise("white", "perfect", answers)
    assert [row["recall_at_0.05"], row["recall_at_0.25"], row["recall_at_1"]] == [0.5, 0.5, 1.0]
    nothing = Peaks(np.zeros(0), np.zeros(0), np.zeros(0))
    blind = peers._answer(lambda image: nothing, frames[0].image, frames[0].blobs)
    assert peers._summarise("white", "blind", [blind])["recall_at_1"] == 0


@pytest.mark.parametrize("kind", peer_frames.KINDS)
def test_frames_of_the_comparison_are_what_they_say(kind: str) -> None:
    frame = peer_frames.make_frame(kind, 0, seed=1, side=512)
    again = peer_frames.make_frame(kind, 0, seed=1, side=512)
    np.testing.assert_array_equal(frame.image, again.image)
    assert np.isnan(frame.image[:5]).all()
    assert np.isnan(frame.image[:, -5:]).all()
    assert np.isfinite(frame.image[5:-5, 5:-5]).all()
    assert len(frame.blobs) == 2
    assert frame.blobs["snr"].between(4, 20).all()
    white = peer_frames.make_frame("white", 0, seed=1, side=512)
    pd.testing.assert_frame_equal(frame.blobs, white.blobs)
    if kind != "resampled":
        expected = 0.0101 * {"halved": 0.5, "doubled": 2.0}.get(kind, 1.0)
        assert peers._noise(frame.image[5:-5, 5:-5]) == pytest.approx(expected, rel=0.03)


def test_whitening_makes_noise_white() -> None:
    rng = np.random.default_rng(1)
    noise = peer_frames.read_noise(rng, 512) + 0.5 * rng.normal(size=(512, 512))
    white = peers.whiten(noise.astype(np.float32))
    for axis, lag in ((0, 1), (0, 3), (1, 1), (1, 3)):
        before = np.corrcoef(noise.ravel(), np.roll(noise, lag, axis).ravel())[0, 1]
        after = np.corrcoef(white.ravel(), np.roll(white, lag, axis).ravel())[0, 1]
        assert abs(after) < 0.1
        assert axis == 0 or before > 0.3


def test_the_documentation_shows_the_comparison(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert set(timed.PEER_NAMES) == set(peers.NAMES)
    page = (ROOT / "docs" / "comparison.md").read_text()
    assert "```{peers}" in page
    assert all(f"`{kind}`" in page for kind in (*peer_frames.KINDS, peers.ALL))
    rows = ["kind,detector,n_frames,n_blobs,recall_at_0.05,recall_at_0.25,recall_at_1,ms_per_frame"]
    rows += ["white,sep,6,48,0.5,0.75,1.0,90.4", "all,sep,6,48,0.25,0.5,0.75,91.4"]
    monkeypatch.setattr(timed, "PEERS", tmp_path / "peers.csv")
    assert timed.peers() == f"*{timed.UNKNOWN}*"
    (tmp_path / "peers.csv").write_text("\n".join(rows))
    assert timed.peers().splitlines() == [
        "| | SEP |",
        "|---|---|",
        "| `white` | 0.50 0.75 1.00 |",
        "| `all` | 0.25 0.50 0.75 |",
        "| ms per frame | 91 |",
    ]
