"""Positions in, landing dates out."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from astropy.io import fits
from tests.unit.detection.blobs import blob

from blobpipe.errors import FrameError, TableError
from blobpipe.history import archive as module
from blobpipe.history.archive import date_catalogue
from blobpipe.params import Difference

SIDE = 256
N = 24
FIRST = 14
PARAMS = Difference(stack_size=8)


def write(folder: Path, day: int, *, units: float = 1.0) -> None:
    """An image with an old blob, and from one day on with a new one."""
    image = np.random.default_rng([3, day]).normal(0, 0.0076, (SIDE, SIDE)).astype(np.float32)
    image += blob(80, 90, 6.0, 0.05, side=SIDE)
    if day >= FIRST:
        image += blob(170, 160, 5.0, 0.02, side=SIDE)
    header = fits.Header({"EXPSTART": 56_000.0 + 10 * day})
    fits.writeto(folder / f"day{day:02d}.fits", units * image, header)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for day in range(N):
        write(folder, day)
    positions = {"x_px": [80.0, 170.0, 40.0], "y_px": [90.0, 160.0, 200.0], "radius_px": [6, 5, 5]}
    pd.DataFrame(positions).to_csv(tmp_path / "positions.csv", index=False)
    return tmp_path


def dated(archive: Path) -> pd.DataFrame:
    return pd.read_csv(archive / "out" / "blobs.csv", keep_default_na=False).set_index("blob")


def test_a_landing_is_dated_from_its_position(archive: Path) -> None:
    status = date_catalogue(archive / "images", archive / "positions.csv", archive / "out", PARAMS)
    found = dated(archive)
    assert status == 0
    assert found["history"].tolist() == ["older", "landed", "nothing"]
    assert found["first_frame"].tolist() == ["", f"day{FIRST}", ""]
    assert float(found.loc["b0002", "step_frac"]) == pytest.approx(0.02, rel=0.1)
    after, before = (float(found.loc["b0002", name]) for name in ("after_mjd", "before_mjd"))
    assert 56_000 + 10 * (FIRST - 1) <= after < before <= 56_000 + 10 * FIRST
    assert found.loc["b0002", "after_frame"] == f"day{FIRST - 1}"
    assert found.loc["b0002", "before_frame"] == f"day{FIRST}"
    depths = pd.read_csv(archive / "out" / "history.csv")
    assert len(depths) == 3 * N
    assert (archive / "out" / "history.png").stat().st_size > 1000


def test_a_bad_image_is_rejected_and_the_others_are_used(
    archive: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(archive / "images", 30, units=1000.0)
    (archive / "images" / "none.fits").write_bytes(b"no image")
    status = date_catalogue(archive / "images", archive / "positions.csv", archive / "out", PARAMS)
    assert status == 1
    assert dated(archive).loc["b0002", "first_frame"] == f"day{FIRST}"
    frames = pd.read_csv(archive / "out" / "frames.csv")
    assert (frames["status"] == "rejected").sum() == 2
    assert caplog.text.count("(rejected)") == 2


def test_an_image_that_vanishes_or_changes_after_it_was_looked_at_is_rejected_alone(
    archive: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = module._make_reference

    def taken_away(*given: Any) -> module.Reference:
        (archive / "images" / "day10.fits").unlink()
        (archive / "images" / "day12.fits").write_bytes(b"half")
        return real(*given)

    monkeypatch.setattr(module, "_make_reference", taken_away)
    status = date_catalogue(archive / "images", archive / "positions.csv", archive / "out", PARAMS)
    assert (status, caplog.text.count("(rejected)")) == (1, 2)
    assert dated(archive).loc["b0002", "first_frame"] == f"day{FIRST}"
    frames = pd.read_csv(archive / "out" / "frames.csv").set_index("frame")
    assert frames.index[frames["status"] == "rejected"].tolist() == ["day10", "day12"]
    assert len(pd.read_csv(archive / "out" / "history.csv")) == 3 * (N - 2)


def test_an_image_that_vanishes_before_the_first_ones_are_read_is_rejected_alone(
    archive: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = module._list_images

    def taken_away(*given: Any) -> pd.DataFrame:
        frames = real(*given)
        (archive / "images" / "day02.fits").unlink()
        (archive / "images" / "day05.fits").write_bytes(b"half")
        return frames

    monkeypatch.setattr(module, "_list_images", taken_away)
    status = date_catalogue(archive / "images", archive / "positions.csv", archive / "out", PARAMS)
    assert (status, caplog.text.count("(rejected)")) == (1, 2)
    assert dated(archive)["history"].tolist() == ["older", "landed", "nothing"]
    frames = pd.read_csv(archive / "out" / "frames.csv").set_index("frame")
    assert frames.index[frames["status"] == "rejected"].tolist() == ["day02", "day05"]


def test_images_of_another_suffix_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.FITS", "b.fits.bz2", "frames.txt", ".c.FITS"):
        (tmp_path / name).touch()
    (tmp_path / "positions.csv").write_text("x_px,y_px\n80,90\n")
    with caplog.at_level("INFO"), pytest.raises(FrameError, match="found 0 usable images"):
        date_catalogue(tmp_path, tmp_path / "positions.csv", tmp_path / "out", PARAMS)
    assert caplog.messages == ["skipped, expected .fits.fz, .fits, .fits.gz: a.FITS, b.fits.bz2"]


def test_dates_are_those_of_the_list_where_there_is_one(archive: Path) -> None:
    names = [f"day{day:02d}" for day in range(N)]
    listed = pd.DataFrame({"frame": names, "mjd": 57_000.0 + np.arange(N)})
    listed.to_csv(archive / "images" / "frames.csv", index=False)
    date_catalogue(archive / "images", archive / "positions.csv", archive / "out", PARAMS)
    assert float(dated(archive).loc["b0002", "first_mjd"]) == 57_000 + FIRST


def test_results_do_not_depend_on_the_number_of_threads(archive: Path) -> None:
    for threads in (1, 3):
        date_catalogue(
            archive / "images",
            archive / "positions.csv",
            archive / f"out{threads}",
            PARAMS,
            threads=threads,
        )
    for name in ("blobs.csv", "history.csv", "frames.csv", "history.png"):
        one, three = ((archive / f"out{n}" / name).read_bytes() for n in (1, 3))
        assert one == three, name


def test_faults_of_the_input_are_named(archive: Path) -> None:
    empty = archive / "empty"
    empty.mkdir()
    with pytest.raises(FrameError, match="found 0 usable images, expected at least 4"):
        date_catalogue(empty, archive / "positions.csv", archive / "out", PARAMS)
    (archive / "wrong.csv").write_text("x_px,y_px\n1,words\n")
    with pytest.raises(TableError, match=r"wrong\.csv"):
        date_catalogue(archive / "images", archive / "wrong.csv", archive / "out", PARAMS)
    assert not (archive / "out").exists()


def test_a_catalogue_without_a_row_is_named(archive: Path) -> None:
    (archive / "positions.csv").write_text("x_px,y_px\n")
    with pytest.raises(TableError, match=r"positions\.csv: found no row below its header"):
        date_catalogue(archive / "images", archive / "positions.csv", archive / "out", PARAMS)


def test_each_exposure_counts_once(archive: Path) -> None:
    images = archive / "images"
    content = (images / "day15.fits").read_bytes()
    for name in ("day15.fits.gz", "copy.fits", "day15.fits.part", ".day15.fits"):
        (images / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    status = date_catalogue(images, archive / "positions.csv", archive / "out", PARAMS)
    frames = pd.read_csv(archive / "out" / "frames.csv", keep_default_na=False)
    assert status == 1
    assert (frames["status"] == "ok").sum() == N
    assert len(frames) == N + 2
    reasons = frames.loc[frames["status"] == "rejected", "reason"]
    assert reasons.str.contains("another version of an exposure").all()


def test_a_folder_that_is_not_there_is_named(archive: Path) -> None:
    with pytest.raises(FrameError, match="nowhere: not found, expected a folder"):
        date_catalogue(archive / "nowhere", archive / "positions.csv", archive / "out", PARAMS)
