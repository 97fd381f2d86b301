"""The regression test of the network: historical cases, false alarms, the gate, and the comparison of two runs."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from blobpipe.core import blob_shapes, files, tables
from blobpipe.core.detector import read_detector
from blobpipe.detection import matched_filter
from blobpipe.detection.operating_point import logit
from blobpipe.errors import BlobpipeError, ModelError, TableError
from blobpipe.images import tiles
from blobpipe.params import Regression
from blobpipe.validation import gate, regression

PARAMS = Regression(n_gallery=3, min_cases=1)
ORIGINS = tiles.tile(np.zeros((1024, 1024), np.float32))[1]
BLOB_COLUMNS = ["blob", "x_px", "y_px", "radius_px", "depth_frac", "shape", "first_frame"]


Made = tuple[Path, Path]


@pytest.fixture
def made(detect_dir: Path, model: Path) -> Made:
    """What the stage detect has made, and the report's network."""
    return detect_dir, model


def _regress(
    project: Path, made: Made, out: str = "results/regression", params: Regression = PARAMS
) -> Path:
    data = project / "data"
    folders = (data / "raw", data / "difference", data / "scale", project / "results/cutout")
    regression.score_batches(folders, made[1], project / out, radii_px=(4.0, 6.0))
    regression.regress(
        folders, *made, project / out, params, radii_px=(4.0, 6.0), per_100_frames=5.0
    )
    return project / out


def _metrics(out: Path) -> dict[str, object]:
    content = json.loads(
        (out / "metrics.json").read_text(),
        parse_constant=lambda name: pytest.fail(f"{name} in JSON"),
    )
    assert isinstance(content, dict)
    return content


def _blobs(*rows: tuple[str, float, float, str]) -> pd.DataFrame:
    full = [(name, x, y, 6.0, 0.03, "disc", first) for name, x, y, first in rows]
    return pd.DataFrame(full, columns=BLOB_COLUMNS)


def _case(new: pd.DataFrame, known: pd.DataFrame | None = None, **image: object) -> regression.Case:
    usual = {"frame": "f", "mjd": 1.0, "status": "ok", "reason": "", "noise_frac": 0.01}
    known = _blobs() if known is None else known
    row = SimpleNamespace(**{**usual, "shift_x_px": 0.0, "shift_y_px": 0.0, **image})
    return regression.Case(row, new, known, known[known["first_frame"] != ""])


def _answers(*positive: tuple[int, float, float]) -> regression.Answers:
    peaks = np.full((16, 2), np.nan)
    for index, x, y in positive:
        peaks[index] = x, y
    probability = np.where(np.isfinite(peaks[:, 0]), 0.9, 0.1)
    nowhere = matched_filter.Match(np.zeros(16), *(np.full(16, -99),) * 2, np.zeros(16))
    return regression.Answers(ORIGINS, logit(probability), nowhere, peaks)


def _judge(case: regression.Case, answers: regression.Answers) -> regression.Result:
    return regression.match_subframes(case, answers, answers.odds >= 0)


def _claims(*rows: tuple[float, float, float, str]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["x_px", "y_px", "score", "status"])


THRESHOLDS = {"isr": 0.0, "dense": 0.6, "report": 4.0, "matched_filter": 9.0}
NO_ANSWERS = regression.Answers(
    np.zeros((0, 4), np.int64),
    np.zeros(0),
    matched_filter.filter_subframes(np.zeros((0, 9, 9), np.float32), (4.0,)),
    np.zeros((0, 2)),
)


def _compare(case: regression.Case, answers: regression.Answers) -> regression.Result:
    nothing = pd.DataFrame({column: [] for column in regression.CANDIDATE_COLUMNS})
    return regression.compare(case, answers, nothing, THRESHOLDS)


# --- one image -------------------------------------------------------------------------------------------------------


def test_a_blob_counts_where_its_centre_is() -> None:
    new = _blobs(("in", 300, 300, "f"), ("edge", 255.4, 100, "f"), ("over", 255.6, 100, "f"))
    result = _judge(_case(new), _answers((5, 303, 300), (0, 250, 100)))
    assert result.cases["status"].tolist() == ["found", "found", "missed"]
    assert result.cases[["row", "col"]].to_numpy().tolist() == [[1, 1], [0, 0], [0, 1]]
    assert result.cases["saliency_px"].iloc[0] == pytest.approx(3)
    assert result.frames.iloc[0][["new_blobs", "found", "positive", "false_alarms"]].tolist() == [
        3,
        2,
        2,
        0,
    ]


def test_a_subframe_that_a_new_blob_reaches_into_is_no_false_alarm() -> None:
    new = _blobs(("b", 252, 100, "f"))
    assert _judge(_case(new), _answers((1, 257, 100))).frames["false_alarms"].item() == 0
    assert _judge(_case(new), _answers((4, 100, 300))).frames["false_alarms"].item() == 1


@pytest.mark.parametrize(
    ("shift", "peak", "kind"),
    [
        (0.5, (600, 609), "dip"),
        (0.5, (600, 612), "artefact"),
        (0.2, (600, 600), "artefact"),
        (0.2, (700, 705), "recent"),
        (0.5, (700, 705), "dip"),
    ],
)
def test_false_alarms_are_put_down_to_what_the_network_looks_at(
    shift: float, peak: tuple[float, float], kind: str
) -> None:
    known = _blobs(("old", 600, 600, ""), ("young", 700, 700, "e"))
    result = _judge(_case(_blobs(("b", 9, 9, "f")), known, shift_x_px=shift), _answers((10, *peak)))
    assert result.alarms["kind"].tolist() == [kind]
    assert result.alarms[["x_px", "y_px", "x0_px", "y0_px"]].iloc[0].tolist() == [*peak, 512, 512]
    assert result.frames[f"{kind}_alarms"].item() == 1


def test_blobs_of_a_rejected_image_or_off_it_are_not_usable() -> None:
    rejected = _compare(
        _case(_blobs(("a", 5, 5, "f")), status="rejected", reason="all NaN"), NO_ANSWERS
    )
    assert rejected.cases[["status", "reason"]].iloc[0].tolist() == [
        "unusable",
        "rejected: all NaN",
    ]
    off = _compare(_case(_blobs(("a", 1500, 5, "f"))), _answers())
    assert off.cases["reason"].item() == "its centre is outside the image"
    summary = regression.summarise(regression.gather([rejected, off]))
    assert (
        summary["n_cases"],
        summary["n_blobs"],
        summary["n_unusable_frames"],
        summary["n_unusable_blobs"],
    ) == (
        1,
        0,
        1,
        2,
    )
    assert summary["recall"] is None


def test_a_place_near_a_new_blob_finds_it_and_any_other_is_false() -> None:
    """Near is within 6 px, or within the radius; what is vetoed or too low neither finds nor disturbs."""
    new = _blobs(
        ("a", 100, 100, "f"), ("wide", 300, 300, "f"), ("c", 500, 500, "f"), ("d", 700, 700, "f")
    )
    new.loc[1, "radius_px"] = 9.0
    claims = _claims(
        *(
            (100, 105.9, 0.8, "new"),
            (100, 101, 0.9, "dip"),
            (308, 300, 0.7, "new"),
            (500, 500, 0.4, "new"),
        ),
        *((700, 706.1, 0.9, "new"), (900, 900, 0.3, "new"), (900, 100, 0.9, "known")),
    )
    best, false = regression.match_places(_case(new), claims, 0.5)
    assert best["found"].tolist() == [1, 1, 0, 0]
    assert best["score"].tolist()[:3] == [0.8, 0.7, 0.4]
    assert np.isnan(best["score"][3])
    assert best["status"].tolist() == ["new", "new", "new", ""]
    assert false[["x_px", "y_px"]].to_numpy().tolist() == [[700, 706.1]]


def test_detectors_are_compared_on_the_same_blobs_and_images() -> None:
    new = _blobs(("a", 100, 100, "f"), ("b", 300, 300, "f"))
    candidates = _claims((100, 100, 0.9, "new"), (600, 600, 0.9, "new")).assign(
        frame="f",
        probability=0.5,
        radius_px=6.0,
        depth_frac=0.03,
        depth_err_frac=0.01,
        is_blob=[1, 0],
    )
    match = matched_filter.Match(
        np.where(np.arange(16) == 5, 20.0, 1.0), *(np.full(16, 301),) * 2, np.full(16, 6.0)
    )
    answers = _answers((0, 100, 100), (9, 400, 600))
    answers = answers._replace(match=match)
    result = regression.compare(_case(new), answers, candidates, THRESHOLDS)
    assert tuple(result.cases) == regression.CASE_COLUMNS
    assert tuple(result.frames) == regression.FRAME_COLUMNS
    assert tuple(result.alarms) == regression.ALARM_COLUMNS
    assert result.cases["status"].tolist() == ["found", "missed"]
    found = result.cases[["found_dense", "found_report", "found_matched_filter"]]
    assert found.to_numpy().tolist() == [[1, 0, 0], [0, 0, 1]]
    assert result.alarms[
        ["detector", "operating_point", "x_px", "y_px", "row", "col"]
    ].to_numpy().tolist() == [
        ["report", "isr", 400, 600, 2, 1],
        ["dense", "budget", 600, 600, 2, 2],
    ]
    table = regression.compare_detectors(result, THRESHOLDS).set_index(
        ["detector", "operating_point"]
    )
    assert table["recall"].tolist() == [0.5, 0.5, 0.0, 0.5]
    assert table["false_alarms_per_100_frames"].tolist() == [100, 100, 0, 0]
    assert table["threshold"].tolist() == pytest.approx([0.5, 0.6, 1 / (1 + np.exp(-4)), 9.0])
    metrics = regression.side_by_side(table.reset_index())
    assert metrics["dense_recall_snr_gt_7"] == 0.5
    assert metrics["dense_recall_snr_5_to_7"] is None
    assert metrics["dense_recall_snr_5_to_7_interval"] is None
    assert metrics["report_false_alarms_per_100_frames"] == 0
    accuracy = regression.accuracy(result.cases)
    assert (accuracy["dense_position_error_px"], accuracy["dense_depth_bias"]) == (0, 0)
    assert accuracy["dense_depth_pull_sd"] is None


def test_snr_is_that_of_the_profile_in_the_noise() -> None:
    blob = SimpleNamespace(x_px=100.3, y_px=50.8, radius_px=6.0, depth_frac=0.03, shape="disc")
    expected = 3 * np.sqrt((blob_shapes.blob_profile("disc", 6.0, 0.3, -0.2, 81) ** 2).sum())
    assert regression.blob_snr(blob, 0.01) == pytest.approx(expected, rel=1e-3)
    blob.shape = "smudge"
    assert regression.blob_snr(blob, 0.01) == pytest.approx(expected, rel=1e-3)
    blob.radius_px = 40.0
    assert regression.blob_snr(blob, 0.01) == pytest.approx(expected * 40 / 6, rel=0.15)


def test_recent_blobs_are_those_of_the_stack() -> None:
    images = pd.DataFrame({"frame": list("abcdef"), "n_stack": [0, 0, 2, 2, 2, np.nan]})
    blobs = _blobs(
        ("old", 1, 1, ""),
        ("b1", 2, 2, "b"),
        ("c1", 3, 3, "c"),
        ("d1", 4, 4, "d"),
        ("e1", 5, 5, "e"),
    )
    cases = regression.historical_cases(images, blobs)
    assert [case.image.frame for case in cases] == ["b", "c", "d", "e"]
    assert cases[3].new["blob"].tolist() == ["e1"]
    assert cases[3].known["blob"].tolist() == ["old", "b1", "c1", "d1"]
    assert cases[3].recent["blob"].tolist() == ["c1", "d1"]


# --- the stage -------------------------------------------------------------------------------------------------------


def test_stage_finds_the_new_blob(project: Path, made: Made) -> None:
    out = _regress(project, made)
    tables = {f"{name}.csv" for name in ("cases", "frames", "alarms", "detectors", "recall")}
    pictures = {f"{name}.png" for name in ("cases", "dense_cases", "detectors", "gallery")}
    names = {"metrics.json", *tables, *pictures}
    assert {path.name for path in out.iterdir()} == names | {"batches"}
    metrics = _metrics(out)
    expected = {
        "n_cases": 1,
        "n_blobs": 1,
        "recall": 1.0,
        "recall_snr_gt_7": 1.0,
        "false_alarms_per_frame": 0.0,
    }
    assert {key: metrics[key] for key in expected} == expected
    assert metrics["passed"] is True
    assert metrics["dense_sha256"] == files.sha256(made[0] / "model.safetensors")
    cases = pd.read_csv(out / "cases.csv")
    assert cases["status"].tolist() == ["found"]
    assert cases[["row", "col"]].iloc[0].tolist() == [1, 0]
    assert cases["saliency_px"].item() < 9
    assert cases[["found_dense", "found_report", "found_matched_filter"]].to_numpy().tolist() == [
        [1, 1, 1]
    ]
    assert (
        np.hypot(cases["x_found_px"] - cases["x_px"], cases["y_found_px"] - cases["y_px"]).item()
        < 0.5
    )
    assert metrics["dense_recall_snr_gt_7"] == metrics["matched_filter_recall_snr_gt_7"] == 1
    assert metrics["dense_position_error_px"] < 0.5
    recall = (
        pd.read_csv(out / "recall.csv")
        .groupby(["detector", "operating_point", "quantity"])["n"]
        .sum()
    )
    assert recall.tolist() == [1] * 12
    assert pd.read_csv(out / "detectors.csv")["recall"].tolist() == [1] * 4


def test_same_bytes_each_time(project: Path, made: Made) -> None:
    first = _regress(project, made)
    second = _regress(project, made, "results/again")
    for path in first.rglob("*.*"):
        again = second / path.relative_to(first)
        assert path.read_bytes() == again.read_bytes(), path.name


@pytest.mark.parametrize("fault", ["no catalogue", "no new blobs"])
def test_nothing_to_test_is_no_crash(project: Path, made: Made, fault: str) -> None:
    path = project / "data/raw/blobs.csv"
    if fault == "no catalogue":
        path.unlink()
    else:
        tables.write_table(path, pd.read_csv(path).assign(first_frame=""))
    metrics = _metrics(_regress(project, made))
    assert (metrics["n_cases"], metrics["recall"], metrics["passed"]) == (0, None, False)
    assert (
        gate.check_gate(project / "results/regression/metrics.json", PARAMS)[0]
        == "n_cases: found 0, expected at least 1"
    )


@pytest.mark.parametrize("stage", ["difference", "scale", "clip"])
def test_a_rejected_historical_image_is_listed(project: Path, made: Made, stage: str) -> None:
    folder = project / "data" / ("scale" if stage == "clip" else stage)
    table = tables.read_table(folder / "frames-000.csv", ("frame", "reason"))
    case = table["frame"] == "frame5"
    if stage == "clip":  # what clip rejects never comes to scale
        table = table[~case]
    else:
        table.loc[case, ["status", "reason"]] = "rejected", "mostly NaN"
    if stage == "difference":
        scaled = project / "data/scale/frames-000.csv"
        tables.write_table(scaled, pd.read_csv(scaled).query("frame != 'frame5'"))
    tables.write_table(folder / "frames-000.csv", table)
    out = _regress(project, made)
    metrics = _metrics(out)
    assert (metrics["n_cases"], metrics["n_unusable_frames"], metrics["n_unusable_blobs"]) == (
        0,
        1,
        1,
    )
    reason = pd.read_csv(out / "cases.csv")["reason"].item()
    assert reason.startswith("rejected: ")
    assert ("stage clip" if stage == "clip" else "mostly NaN") in reason


@pytest.mark.parametrize("missing", ["detect", "train"])
def test_without_a_model_one_line_and_no_output(project: Path, made: Made, missing: str) -> None:
    nowhere = project / "nowhere"
    with pytest.raises(ModelError, match="not found"):
        _regress(project, (nowhere, made[1]) if missing == "detect" else (made[0], nowhere))
    assert not list((project / "results/regression").glob("*.*"))


# --- gate and comparison ---------------------------------------------------------------------------------------------

GOOD = {
    **{"n_cases": 120, "recall": 0.9, "recall_snr_gt_7": 0.95, "false_alarms_per_frame": 1.0},
    **{"dense_recall_snr_gt_7": 0.95, "dense_false_alarms_per_100_frames": 2.0},
}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"n_cases": 3}, "n_cases: found 3, expected at least 100"),
        ({"recall": 0.1}, "recall (report's network): found 0.1, expected at least 0.6"),
        ({"recall": None}, "recall (report's network): found none, expected at least 0.6"),
        (
            {"recall_snr_gt_7": 0.7},
            "recall_snr_gt_7 (report's network): found 0.7, expected at least 0.8",
        ),
        (
            {"false_alarms_per_frame": 3.5},
            "false_alarms_per_frame (report's network): found 3.5, expected at most 3.0",
        ),
        (
            {"dense_recall_snr_gt_7": 0.8},
            "dense_recall_snr_gt_7 (dense network): found 0.8, expected at least 0.85",
        ),
        (
            {"dense_false_alarms_per_100_frames": 11.0},
            "dense_false_alarms_per_100_frames (dense network): found 11.0, expected at most 10.0",
        ),
    ],
)
def test_gate_names_what_is_not_kept(
    tmp_path: Path, change: dict[str, float | None], line: str
) -> None:
    path = tmp_path / "metrics.json"
    tables.write_json(path, GOOD)
    assert gate.check_gate(path, Regression()) == []
    tables.write_json(path, GOOD | change)
    assert gate.check_gate(path, Regression()) == [line]


@pytest.mark.parametrize(
    ("content", "found"),
    [(None, "not found"), ("{", "cannot be read as JSON"), ("[1]", "found list")],
)
def test_gate_without_readable_metrics(tmp_path: Path, content: str | None, found: str) -> None:
    path = tmp_path / "metrics.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(BlobpipeError, match=found):
        gate.check_gate(path, Regression())


def _cases(**answer: str) -> pd.DataFrame:
    """Make cases with an answer of the report's network and, after a slash, one of the dense network."""
    rows = []
    for name, both in answer.items():
        status, _, dense = both.partition("/")
        found = int((dense or status) == "found")
        rows.append({"frame": "f", "blob": name, "status": status, "found_dense": found})
    return pd.DataFrame(rows).assign(
        x_px=1.0, y_px=2.0, radius_px=5.0, snr=9.0, probability=0.5, dense_score=0.25
    )


def test_cases_won_and_lost() -> None:
    old = _cases(a="found", b="found", c="missed", d="missed", e="unusable", f="found")
    new = _cases(a="found", b="missed", c="found", d="missed", e="found", g="missed")
    for detector in gate.ANSWERS:
        changed, n_both = gate.compare_cases(old, new, detector)
        assert changed[["blob", "change"]].to_numpy().tolist() == [["c", "won"], ["b", "lost"]]
        assert n_both == 4
        assert gate.compare_cases(new, new, detector)[0].empty


@pytest.mark.parametrize(
    ("change", "n_both"),
    [({"x_px": 1.5}, 2), ({"snr": 8.0}, 2), ({"x_px": 900.0}, 0), ({"snr": 30.0}, 0)],
)
def test_blobs_of_one_name_are_the_same_only_at_one_place(
    change: dict[str, float], n_both: int
) -> None:
    old = _cases(a="found", b="missed")
    new = _cases(a="missed", b="missed").assign(**change)
    changed, found = gate.compare_cases(old, new)
    assert found == n_both
    assert changed["change"].tolist() == ["lost"] * (n_both > 0)


def test_each_network_has_its_own_cases() -> None:
    old = _cases(a="found/missed", b="missed/missed")
    new = _cases(a="found/found", b="found/missed")
    dense, _ = gate.compare_cases(old, new, "dense")
    report, _ = gate.compare_cases(old, new, "report")
    assert dense[["blob", "answer"]].to_numpy().tolist() == [["a", 0.25]]
    assert report[["blob", "answer"]].to_numpy().tolist() == [["b", 0.5]]


@pytest.mark.parametrize(
    ("won", "lost", "chance"),
    [(0, 0, 1), (1, 0, 1), (3, 3, 1), (5, 0, 2 / 32), (0, 5, 2 / 32), (4, 1, 12 / 32)],
)
def test_chance_of_a_split_by_hand(won: int, lost: int, chance: float) -> None:
    assert gate.chance_of_split(won, lost) == pytest.approx(chance)


def test_against_an_older_revision(project: Path, made: Made) -> None:
    out = _regress(project, made)
    path = out / "cases.csv"
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
    for command in (["init", "-q"], ["add", str(path)], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], cwd=project, check=True)
    n = len(pd.read_csv(path).query("status != 'unusable'"))
    assert gate.against(path, "HEAD") == [
        f"dense network: 0 won, 0 lost of {n} since HEAD",
        f"report's network: 0 won, 0 lost of {n} since HEAD",
    ]
    text = path.read_text()
    path.write_text(text.replace(",found,", ",missed,"))
    lines = gate.against("results/regression/cases.csv", "main")
    assert lines[1] == (
        f"report's network: 0 won, 1 lost of {n} since main; "
        "chance alone gives a split at least as uneven with a probability of 1"
    )
    assert lines[2].startswith("  lost: frame5 b4, S/N ")

    # Two programs wrote it, or an editor repeated a row
    path.write_text(text + text.splitlines(keepends=True)[1])
    with pytest.raises(TableError, match=r"cases\.csv: row \d+: found frame\d+ b\d+ again"):
        gate.against(path, "main")
    path.write_text(text)

    # Another seed draws other blobs of the same names
    pd.read_csv(path).assign(x_px=1.0).to_csv(path, index=False)
    assert gate.against(path, "main") == [
        f"different images since main: only 0 of {n} cases are of the same blob; cases cannot be paired"
    ]
    with pytest.raises(BlobpipeError, match="no-such-branch"):
        gate.against(path, "no-such-branch")
    path.unlink()
    with pytest.raises(TableError, match="not found"):
        gate.against(path, "HEAD")


def test_the_baselines_read_the_blobs_of_any_detector(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    _blobs(("b1", 1500.0, 1800.0, "")).to_csv(raw / "blobs.csv", index=False)
    pd.DataFrame({"frame": ["a"], "mjd": [60000.0]}).to_csv(raw / "frames.csv", index=False)
    (raw / "a.fits").touch()
    monkeypatch.setattr(tables, "stage_tables", lambda folder, batch: [])
    regression.score_batches(
        (raw, raw, raw, raw),
        model,
        tmp_path / "out",
        radii_px=(4.0,),
        detector=read_detector("nircam_lw"),
    )
    assert not (tmp_path / "out").exists()
