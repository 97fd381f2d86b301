"""The first page of the report: what it says of a run that passed, of one that did not, and of none."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.unit.review.test_pages import checked

from blobpipe import cli
from blobpipe.errors import BlobpipeError
from blobpipe.params import Params, to_yaml
from blobpipe.validation import gate, regression, report_page

METRICS = {
    "n_cases": 110,
    "n_blobs": 181,
    "recall": 0.78453,
    "recall_snr_gt_7": 0.85625,
    "n_blobs_snr_gt_7": 160,
    "false_alarms_per_frame": 1.527273,
    "dense_recall_snr_gt_7": 0.9625,
    "dense_recall_snr_gt_7_interval": [0.92061, 0.982702],
    "dense_false_alarms_per_100_frames": 7.272727,
}
HERE = Path(__file__).parents[3]
PIPELINE = """stages:
  campaign: {outs: [data/raw]}
  difference: {deps: [data/raw], outs: [data/difference: {cache: false}]}
  train: {deps: [data/raw, data/difference], outs: [results/train]}
"""
CASE = dict.fromkeys(regression.CASE_COLUMNS, 1) | {"frame": "f1", "blob": "b1"}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run, committed to git."""
    monkeypatch.chdir(tmp_path)
    for stage in report_page.MEASURED:
        (tmp_path / "results" / stage).mkdir(parents=True)
    write(tmp_path, METRICS)
    (tmp_path / "params.yaml").write_text(to_yaml(Params()))
    (tmp_path / "dvc.yaml").write_text(PIPELINE)
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "a run"]):
        names = ("-c", "user.name=A", "-c", "user.email=a@example.org")
        subprocess.run(["git", *names, *command], check=True)
    return tmp_path


def write(root: Path, metrics: dict[str, object]) -> None:
    (root / "results/regression/metrics.json").write_text(json.dumps(metrics))


def page(root: Path) -> str:
    assert cli.main(["report"]) == 0
    return checked((root / "results/report.html").read_text())


def test_a_run_that_passed(root: Path) -> None:
    for name in ("regression/detectors.png", "evaluate/roc.png"):
        (root / "results" / name).parent.mkdir(exist_ok=True)
        Image.new("L", (4, 4)).save(root / "results" / name)
    (root / "results/stages.html").write_text("x")
    html = page(root)
    assert "<strong>Passed</strong> the regression test, on 110 images that were the first" in html
    assert '<td>0.963 <span class="interval">(0.921 to 0.983)</span></td>' in html
    assert (
        '<td>0.856 <span class="interval">(0.794 to 0.902)</span></td>' in html
    )  # 137 of 160, computed
    assert "False alarms per 100 images, measured; the budget is 5</th>" in html
    assert html.count("<figure>") == html.count('src="data:image/png;base64,') == 2
    assert html.count("None has changed.") == 2
    assert 'href="stages.html"' in html
    assert "cases.html" not in html
    assert not re.findall(r'src="(?!data:)', html)


def test_a_run_that_did_not_pass_says_what_is_missing(root: Path) -> None:
    write(root, METRICS | {"recall": 0.2})
    assert "<li>recall (report&#x27;s network): found 0.2, expected at least 0.6</li>" in page(root)


def test_settings_and_numbers_that_have_changed_are_listed(root: Path) -> None:
    write(root, METRICS | {"recall": 0.9, "seconds": 7, "new_one": 3, "sha256": "ab" * 32})
    text = (root / "params.yaml").read_text().replace("clip_sigma:", "clip_sigma: 9.0 #")
    (root / "params.yaml").write_text(text)
    html = page(root)
    assert "<code>regression.<wbr>new_<wbr>one</code>" in html
    html = html.replace("<wbr>", "")
    assert "<td>abababababab</td>" in html
    assert "<code>regression.recall</code></th><td>0.78453</td><td>0.9</td>" in html
    assert "<code>regression.new_one</code></th><td>\N{EN DASH}</td><td>3</td>" in html
    assert "seconds" not in html.split("Numbers, without times")[1].split("<h2>")[0]
    assert re.search(r"<code>scale\.clip_sigma</code></th><td>[\d.]+</td><td>9\.0</td>", html)


def test_outside_of_git_nothing_is_compared(
    root: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    (root / ".git").rename(tmp_path_factory.mktemp("git") / "git")
    assert "Git has no results at HEAD to compare with." in page(root)


def test_stages_are_drawn_each_after_what_it_needs(root: Path) -> None:
    html = page(root)
    drawn = html.split("<svg")[1]
    boxes = dict(re.findall(r'<rect x="([\d.]+)".*?>(\w+)</text>', drawn))
    assert [name for _, name in sorted((float(x), name) for x, name in boxes.items())] == [
        *("campaign", "difference", "train")
    ]
    # the way from campaign to train leads over difference
    assert drawn.count("marker-end") == 2
    assert "train after campaign, difference" in html


def test_arrows_pass_between_the_boxes(root: Path) -> None:
    (root / "dvc.yaml").write_text((HERE / "dvc.yaml").read_text())
    drawn = page(root).split("<svg")[1]
    boxes = re.findall(r'<rect x="([\d.]+)" y="(\d+)" width="(\d+)" height="(\d+)"', drawn)
    ways = re.findall(r'<path d="M([^"]+)" marker-end', drawn)
    assert len(boxes) == 12
    assert any("H" in way for way in ways)
    for way in ways:
        for place in points(way):
            for box in boxes:
                x, y, width, height = (float(number) for number in box)
                assert not (x < place[0] < x + width and y < place[1] < y + height)


def points(way: str) -> Iterator[tuple[float, float]]:
    """Yield points along an SVG path of cubic and horizontal lines."""
    x, y = (float(number) for number in way.split("C")[0].split())
    for kind, numbers in re.findall(r"([CH])([\d. ]+)", way):
        ends = [float(number) for number in numbers.split()]
        *controls, x1, y1 = ends if kind == "C" else (x, y, ends[0], y, ends[0], y)
        curve = np.array([(x, y), controls[:2], controls[2:], (x1, y1)])
        for t in np.linspace(0.02, 0.98, 49):
            weights = [(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3]
            yield tuple(weights @ curve)
        x, y = x1, y1


def test_metrics_that_are_no_numbers_have_a_dash_and_no_interval(root: Path) -> None:
    wrong: dict[str, object] = {
        "n_cases": "<script>",
        "recall_snr_gt_7": float("nan"),
        "report_recall_snr_gt_7": "high",
        "dense_recall_snr_gt_7_interval": ["low", None],
        "false_alarms_per_frame": float("inf"),
    }
    write(root, METRICS | wrong)
    html = page(root)
    assert "<script>" not in html
    row = html.split("Recall of new blobs")[1].split("</tr>")[0]
    assert re.findall("<td>(.*?)</td>", row)[1:] == [gate.NO_VALUE, "0.963", gate.NO_VALUE]
    write(root, METRICS | {"n_blobs_snr_gt_7": "many"})
    assert "0.856" in page(root)


@pytest.mark.parametrize(
    "text",
    [
        *("- campaign", "stages:\n- campaign", "stages:\n  campaign:", "campaign: {}", "stages: {"),
        "stages: {a: {deps: [y], outs: [x]}, b: {deps: [x], outs: [y]}}",
    ],
)
def test_a_damaged_list_of_stages_is_one_line_and_leaves_no_page(
    root: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    (root / "dvc.yaml").write_text(text)
    assert cli.main(["report"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("blobpipe: dvc.yaml: ")
    assert not list(root.glob("results/*.html"))


def test_without_a_run_there_is_no_page(tmp_path: Path) -> None:
    with pytest.raises(BlobpipeError, match="not found; run the stage regression first"):
        report_page.write_report(
            tmp_path, tmp_path / "a.html", Params(), pipeline=tmp_path / "x", stages="s"
        )
    assert not list(tmp_path.iterdir())
