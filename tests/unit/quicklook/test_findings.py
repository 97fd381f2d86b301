"""What the log keeps of a search, and what a threshold can rest on later."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from tests.unit.quicklook.days import MODEL, NEW, SETTINGS, SIDE, candidates, deep_log, deep_row

from blobpipe.errors import LogError
from blobpipe.history import deep
from blobpipe.history.depths import Depths
from blobpipe.monitor import logbook
from blobpipe.monitor.scan import calibrate_log
from blobpipe.quicklook import findings
from blobpipe.quicklook import search as searching


def test_subframes_and_pictures_are_kept(month: Path) -> None:
    log = logbook.connect(month / "out" / "log.sqlite")
    assert log.execute("SELECT count(*) FROM subframes").fetchone()[0] == 5 * (SIDE // 256) ** 2
    best = log.execute(
        "SELECT row, col FROM subframes ORDER BY probability DESC LIMIT 1"
    ).fetchone()
    assert tuple(best) == (NEW[1] // 256, NEW[0] // 256)
    kinds = log.execute(
        "SELECT kind, count(*) FROM pictures WHERE detection IS NOT NULL GROUP BY kind"
    ).fetchall()
    assert dict(kinds) == dict.fromkeys(("difference", "map", "stack", "surface"), 2)
    assert log.execute("SELECT count(*) FROM pictures WHERE detection IS NULL").fetchone()[0] == 5
    for (data,) in log.execute("SELECT bytes FROM pictures WHERE type = 'image/png'"):
        assert data.startswith(b"\x89PNG")


def find_together(
    log: sqlite3.Connection, nearly: Sequence[dict[str, object]] = (), **measured: float
) -> pd.DataFrame:
    """What the log has of candidates when the latest images show one together, on the second of them."""
    settled = deep.SettledImage(np.zeros((SIDE, SIDE), np.int16), 0.01)
    found = pd.DataFrame([deep_row(8) | measured])
    places = found[["x_px", "y_px", "radius_px"]]
    depths = Depths(np.full((1, 1), 0.01), np.full((1, 1), 0.001))
    just_below = pd.DataFrame(nearly, columns=list(found))
    result = searching.DeepResult(found, [f"{2:064}"], places, depths, settled, None, just_below)
    findings._log_deep(2, result, SimpleNamespace(connection=log, params=SETTINGS))  # type: ignore[arg-type]
    return candidates(log)


def test_what_people_have_rejected_does_not_come_back_with_the_latest_images_together(
    tmp_path: Path,
) -> None:
    log, candidate = deep_log(tmp_path, "rejected", "seen_again")
    found = find_together(log)
    assert found["id"].tolist() == [candidate]
    assert found["sightings"].tolist() == [1]


def test_a_blob_deeper_than_what_was_rejected_there_is_told_by_the_latest_images_together(
    tmp_path: Path,
) -> None:
    log, candidate = deep_log(tmp_path, "rejected", "seen_again")
    rejected = {"depth_frac": 0.02, "depth_err_frac": 0.002, "radius_px": 6.0}
    logbook.update(log, "detections", 1, rejected)
    found = find_together(log, depth_frac=0.08, depth_err_frac=0.002)
    assert found["id"].tolist() == [candidate, candidate + 1]
    assert found["decision"].tolist() == ["rejected", ""]


def test_what_an_image_shows_alone_and_with_those_before_it_is_one_sighting(
    tmp_path: Path,
) -> None:
    """It had faded; on this image it is below the threshold, so that the latest images are searched there too."""
    log, candidate = deep_log(tmp_path, "", "seen_again")
    logbook.insert(log, "detections", deep_row(1) | {"image": 2, "candidate": candidate})
    found = find_together(log)
    assert found["id"].tolist() == [candidate]
    assert found["sightings"].tolist() == [2]


def test_a_faded_candidate_that_the_latest_images_show_together_is_there_after_all(
    tmp_path: Path,
) -> None:
    log, candidate = deep_log(tmp_path, "", "faded")
    found = find_together(log)
    assert found["id"].tolist() == [candidate]
    assert found["status"].tolist() == ["seen_again"]
    assert found["sightings"].tolist() == [2]


def test_the_log_keeps_all_peaks_and_a_threshold_can_rest_on_them(
    month: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = logbook.connect(month / "out" / "log.sqlite")
    images = logbook.table(log, "images")
    peaks = logbook.table(log, "peaks")
    searched = images[images["outcome"] == "searched"]
    assert searched["n_peaks"].sum() == len(peaks) > 0
    assert images.loc[images["outcome"] == "stack", "n_peaks"].isna().all()
    assert (peaks["score"] >= 0.05).all()

    # The new blob was seen again, so it is no false peak
    out = tmp_path / "point.yaml"
    point = calibrate_log(month / "out" / "log.sqlite", out, MODEL, budget=5.0, confidence=0.9)
    assert (point.n_images, point.n_alarms, point.subtracted) == (5, 0, "running stack")
    is_blob = np.hypot(peaks["x_px"] - NEW[0], peaks["y_px"] - NEW[1]) < 6
    assert is_blob.any()
    highest = peaks.loc[~is_blob, "score"].max() if (~is_blob).any() else 0.05
    assert point.threshold == pytest.approx(max(highest, 0.05), abs=2e-6)
    assert "5 images promise at most 46.06 false alarms per 100" in caplog.text


def test_a_rejected_candidate_is_false_for_the_calibration(again: Path, tmp_path: Path) -> None:
    path = again / "out" / "log.sqlite"
    chosen = {"budget": 5.0, "confidence": 0.9}
    before = calibrate_log(path, tmp_path / "a.yaml", MODEL, **chosen)
    log = logbook.connect(path)
    review = {"candidate": 1, "decision": "rejected", "reviewer": "Ada", "at": logbook.now()}
    with logbook.writing(log):
        logbook.insert(log, "reviews", review)
    after = calibrate_log(path, tmp_path / "b.yaml", MODEL, **chosen)
    assert after.threshold > before.threshold


def test_a_log_without_peaks_of_the_model_is_refused(again: Path, tmp_path: Path) -> None:
    path = again / "out" / "log.sqlite"
    log = logbook.connect(path)
    with logbook.writing(log):
        log.execute("UPDATE images SET n_peaks = NULL")
    with pytest.raises(LogError, match="name a folder of images instead of --log"):
        calibrate_log(path, tmp_path / "a.yaml", MODEL, budget=5.0, confidence=0.9)
    assert not (tmp_path / "a.yaml").exists()


def test_what_is_nearly_found_is_kept_and_no_candidate(tmp_path: Path) -> None:
    log, _ = deep_log(tmp_path, "", "new")
    row = deep_row(16) | {"x_px": 40.0, "y_px": 50.0, "snr": 4.8, "score": 0.7}
    candidates = find_together(log, [row])
    assert not ((candidates["x_px"] == 40.0) & (candidates["y_px"] == 50.0)).any()
    [kept] = map(dict, log.execute("SELECT * FROM nearly_found"))
    names = ("image", "x_px", "y_px", "n_images", "snr", "score")
    assert [kept[name] for name in names] == [2, 40.0, 50.0, 16, 4.8, 0.7]
