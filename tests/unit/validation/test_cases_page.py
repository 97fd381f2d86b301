"""The page of cases: every case once, the wrong ones first, a sentence for each detector, and nothing that needs a network."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from blobpipe.params import Regression
from blobpipe.validation import cases_page, regression

THRESHOLDS = {
    ("dense", "budget"): 0.958,
    ("report", "isr"): 0.5,
    ("report", "budget"): 0.9914,
    ("matched_filter", "budget"): 17.0,
}
IMAGE = {"frame": "f", "shift_px": 0.7, "noise_frac": 0.0101}
BLOB = {
    **{
        "frame": "f",
        "blob": "b<1>",
        "x_px": 100.0,
        "y_px": 50.0,
        "radius_px": 5.0,
        "depth_frac": 0.02,
        "shape": "disc",
    },
    **{
        "snr": 4.1,
        "probability": 0.8,
        "saliency_px": 3.0,
        "status": "found",
        "reason": "",
        "row": 0,
        "col": 0,
    },
    **{
        "found_dense": 0,
        "found_report": 0,
        "found_matched_filter": 0,
        "dense_score": 0.83,
        "dense_probability": 0.1,
    },
    **{"dense_status": "new", "x_found_px": 100.3, "y_found_px": 50.4, "radius_found_px": 5.2},
    **{"depth_found_frac": 0.021, "depth_err_frac": 0.002, "matched_filter_snr": 12.0},
}
CASE = cases_page.Case(
    "missed", "f", "A <b>", "facts & figures", {"dense": "score < threshold"}, 100.0, 50.0, 5.0
)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            {"dense_status": np.nan, "dense_score": np.nan},
            "missed: no candidate within 6 px; S/N 4.1",
        ),
        ({}, "missed: score 0.830 below the threshold 0.958"),
        (
            {"dense_status": "dip"},
            "missed: vetoed as dip (a shifted blob explains it), score 0.830; measured shift 0.70 px",
        ),
        ({"dense_status": "bad_pixels"}, "missed: vetoed as bad pixels"),
        (
            {"found_dense": 1, "dense_score": 0.99},
            "found: score 0.990, threshold 0.958; 0.5 px off, radius 5.2 px",
        ),
    ],
)
def test_why_the_dense_network_finds_or_misses(change: dict[str, object], why: str) -> None:
    assert cases_page.dense_reason({**BLOB, **change}, IMAGE, 0.958).startswith(why)


def test_why_the_others_find_or_miss() -> None:
    said = cases_page.report_reason(BLOB, THRESHOLDS)
    assert said.startswith(
        "found: probability 0.8000 of its subframe, threshold 0.5, its saliency peak 3 px off; missed at"
    )
    assert cases_page.filter_reason(BLOB, 17.0) == "missed: S/N 12.0, below the threshold 17.0"
    assert cases_page.filter_reason({**BLOB, "matched_filter_snr": np.nan}, 17.0).endswith(
        "lies elsewhere"
    )
    assert cases_page.filter_reason(
        {**BLOB, "found_matched_filter": 1, "matched_filter_snr": 20.0}, 17.0
    ).startswith("found")


def test_every_case_once_and_the_wrong_ones_first() -> None:
    alarms = [("report", "isr", 0.995), ("report", "budget", 0.995), ("dense", "budget", 0.97)]
    tables = {
        "cases": pd.DataFrame([{**BLOB, "found_dense": 1}, BLOB, {**BLOB, "status": "unusable"}]),
        "frames": pd.DataFrame([IMAGE]),
        "alarms": pd.DataFrame(alarms, columns=["detector", "operating_point", "score"]).assign(
            frame="f", x_px=300.0, y_px=[200.0, 200.0, 700.0], kind=["recent", "recent", "artefact"]
        ),
        "detectors": pd.DataFrame(
            [(*key, level) for key, level in THRESHOLDS.items()],
            columns=cases_page.TABLES["detectors"],
        ),
    }
    candidate = {
        "frame": "f",
        "x_px": 301.0,
        "y_px": 203.0,
        "score": 0.5,
        "status": "new",
        "is_blob": 0,
        "snr": 6.0,
    }
    candidates = pd.DataFrame(
        [{**candidate, "radius_px": 4.0, "depth_frac": 0.01, "depth_err_frac": 0.002}]
    )
    cases = cases_page.collect(tables, candidates)
    assert [case.group for case in cases] == ["missed", "false", "others", "found"]
    assert cases[1].reasons == {
        "dense": "raised: score 0.97, threshold 0.958; the catalogue has nothing there"
    }
    assert (
        cases[2]
        .reasons["report"]
        .startswith("raised: probability of its subframe 0.995, threshold 0.5 and 0.9914; a blob")
    )
    assert cases[2].reasons["dense"] == "not raised: score 0.500 below the threshold 0.958"
    assert "measured S/N 6.0" in cases[2].facts


def test_a_cut_out_has_its_case_in_the_middle_and_is_grey_off_the_image() -> None:
    image = np.zeros((512, 512), np.float32)
    image[50, 100] = 1
    picture = cases_page.cut_out(image, CASE, 1, 0.0, 1.0)
    x0, y0 = cases_page.corner(CASE)
    assert picture.shape == (96, 96)
    assert picture[50 - y0, 100 - x0] == 255
    assert abs(100 - x0 - 48) <= 2
    near_edge = cases_page.cut_out(image, CASE._replace(y_px=10.0), 1, 0.0, 1.0)
    assert 100 < near_edge[0, 0] < 150
    assert near_edge[-1, 0] == 0


def test_text_is_escaped() -> None:
    html = cases_page.article(CASE, [cases_page.View("view", np.zeros((96, 96), np.uint8))])
    assert "A &lt;b&gt;" in html
    assert "facts &amp; figures" in html
    assert "score &lt; threshold" in html


class _Page(HTMLParser):
    """Counts what there is and insists that tags are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.images.append(dict(attrs))
        elif tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag == "circle"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_of_a_run_is_whole_and_offline(
    project: Path, detect_dir: Path, model: Path
) -> None:
    data = project / "data"
    out = project / "results/regression"
    folders = (data / "raw", data / "difference", data / "scale", project / "results/cutout")
    params = Regression(n_gallery=3, min_cases=1)
    regression.score_batches(folders, model, out, radii_px=(4.0, 6.0))
    regression.regress(
        folders, detect_dir, model, out, params, radii_px=(4.0, 6.0), per_100_frames=5.0
    )
    for _ in range(2):
        cases_page.write_cases(data / "difference", data / "scale", detect_dir, model, out)
        html = (out / "cases.html").read_text()
        (out / "cases.html").rename(out / f"{_}.html")
    assert (out / "0.html").read_bytes() == (out / "1.html").read_bytes()
    page = _Page()
    page.feed(html)
    assert page.open == []
    cases = len(pd.read_csv(out / "cases.csv")) + len(
        pd.read_csv(out / "alarms.csv").drop_duplicates(["detector", "x_px", "y_px"])
    )
    assert html.count("<article>") == cases >= 1
    assert len(page.images) == 4 * cases
    assert all(
        image["alt"] and str(image["src"]).startswith("data:image/png;base64,")
        for image in page.images
    )
    assert "prefers-color-scheme: dark" in html
    assert not re.search(r"https?://|<script", html)
