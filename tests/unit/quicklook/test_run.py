"""The daily routine: each image exactly once, whatever comes, and new blobs followed from image to image."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from astropy.io import fits
from tests.servers import Mailbox, MailServer
from tests.unit.monitor import masked

import blobpipe
from blobpipe.core import files, fits_images, tables
from blobpipe.core.blob_shapes import blob_profile
from blobpipe.core.detector import Detector
from blobpipe.detection.fit import DETECTION_COLUMNS
from blobpipe.detection.promise import write_promised_point
from blobpipe.detection.search import Observation, observe
from blobpipe.errors import BlobpipeError, FrameError, LogError, ModelError, TableError
from blobpipe.history import deep
from blobpipe.history.depths import Depths
from blobpipe.images import difference
from blobpipe.monitor import catalogue, logbook, notices, thumbnails
from blobpipe.monitor.inbox import Inbox, Stamp
from blobpipe.monitor.scan import calibrate_log
from blobpipe.params import Campaign, Difference, Notices, Params, Quicklook, to_yaml
from blobpipe.quicklook import arrivals, findings, processing, running_stack
from blobpipe.quicklook import search as searching
from blobpipe.quicklook.candidates import _recount
from blobpipe.quicklook.options import Options
from blobpipe.quicklook.run import _open_run, quicklook
from blobpipe.quicklook.running_stack import Cache
from blobpipe.simulation import campaign

SIDE = 512
STACK = 4
MODEL = Path(blobpipe.__file__).with_name("model.safetensors")
SETTINGS = Params().model_copy(
    update={
        "difference": Difference(stack_size=STACK),
        "quicklook": Quicklook(settle_s=0.0),
    }
)
NEW = (300.0, 200.0, 6.0, 0.08)
KNOWN = ((100.0, 120.0, 6.5, 0.08), (400.0, 380.0, 5.5, 0.1), (220.0, 400.0, 7.0, 0.06))


def long(*values: object) -> object:
    """A case that only the whole of the tests tries."""
    return pytest.param(*values, marks=pytest.mark.long)


PATIENT = Quicklook(settle_s=0.0, fade_after=10)

Blob = tuple[float, float, float, float]


def pixels(day: int, blobs: Sequence[Blob]) -> np.ndarray:
    image = np.random.default_rng([7, day]).normal(0, 0.0076, (SIDE, SIDE)).astype(np.float32)
    for x, y, radius, depth in blobs:
        row = round(y)
        col = round(x)
        image[row - 20 : row + 21, col - 20 : col + 21] += depth * blob_profile(
            "disc", radius, x - col, y - row
        )
    return image


def write(folder: Path, day: int, *blobs: Blob, name: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name or f'day{day:03d}'}.fits"
    header = fits.Header({"EXPSTART": 60000.0 + day, "FILTER": "F153M"})
    hdu = fits.PrimaryHDU(pixels(day, (*KNOWN, *blobs)), header)
    hdu.writeto(folder / f".{path.name}.part")
    os.replace(folder / f".{path.name}.part", path)
    return path


def options(tmp_path: Path, **more: object) -> Options:
    return Options(tmp_path / "out" / "log.sqlite", MODEL, SETTINGS, **more)  # type: ignore[arg-type]


def run(tmp_path: Path, **more: object) -> sqlite3.Connection:
    made = options(tmp_path, **more)
    quicklook(tmp_path / "in", made)
    return logbook.connect(made.log_path)


def outcomes(log: sqlite3.Connection) -> dict[str, str]:
    return {row["name"]: row["outcome"] for row in log.execute("SELECT name, outcome FROM images")}


def candidates(log: sqlite3.Connection) -> pd.DataFrame:
    return logbook.table(log, "candidate_list")


@pytest.fixture(scope="module")
def month(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the log of a stack and five images after it, of which all but the first show a new blob."""
    root = tmp_path_factory.mktemp("month")
    for day in range(STACK + 1):
        write(root / "in", day)
    for day in range(STACK + 1, STACK + 5):
        write(root / "in", day, NEW)
    run(root).close()
    return root


@pytest.fixture
def again(month: Path, tmp_path: Path) -> Path:
    """A copy of it to go on with."""
    shutil.copytree(month, tmp_path, dirs_exist_ok=True)
    log = logbook.connect(tmp_path / "out" / "log.sqlite")
    with logbook.writing(log):
        log.execute("UPDATE files SET path = replace(path, ?, ?)", (str(month), str(tmp_path)))
        for path in (tmp_path / "in").iterdir():
            stamp = Stamp.of(path.stat())
            log.execute(
                "UPDATE files SET size_bytes = ?, modified_ns = ?, changed_ns = ?, inode = ? WHERE path = ?",
                (*stamp, str(path)),
            )
    return tmp_path


def test_the_pixels_that_were_searched_are_kept_for_the_newest_images(
    again: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = again / "out" / "pixels"
    with logbook.connect(again / "out" / "log.sqlite") as log:
        searched = log.execute(
            "SELECT sha256, noise_frac FROM images WHERE outcome = 'searched' ORDER BY mjd"
        ).fetchall()
    names = {path.name for path in folder.iterdir()}
    assert names == {f"{row['sha256']}.{p}" for row in searched for p in ("difference", "map")}
    content = (folder / f"{searched[-1]['sha256']}.difference").read_bytes()
    difference, step = thumbnails.unpack(content)
    assert difference.shape == (SIDE, SIDE)
    assert step < searched[-1]["noise_frac"] / 30
    assert fits_images.median_and_noise(difference)[1] == pytest.approx(
        searched[-1]["noise_frac"], rel=0.05
    )

    # what a killed run left is cleared, and the oldest give way
    (folder / ".torn.1.tmp.difference").write_bytes(b"x")
    monkeypatch.setattr(thumbnails, "KEPT", 2)
    path = write(again / "in", STACK + 5, NEW)
    run(again).close()
    kept = {path.name.partition(".")[0] for path in folder.iterdir()}
    assert kept == {files.sha256(path), searched[-1]["sha256"]}


def test_an_exposure_is_taken_as_it_is(tmp_path: Path) -> None:
    """As FLT files come from the archive: in electrons, with flags, and not a blob image yet."""
    rng = np.random.default_rng(3)
    science = rng.normal(20_000, 150, (1014, 1014)).astype(np.float32)
    (tmp_path / "in").mkdir()
    hdus = [fits.PrimaryHDU(header=fits.Header({"EXPSTART": 60000.0, "FLATCORR": "COMPLETE"}))]
    for name, image in (("SCI", science), ("DQ", np.zeros((1014, 1014), np.int16))):
        hdus.append(fits.ImageHDU(image, fits.Header({"BUNIT": "ELECTRONS"}), name))
    fits.HDUList(hdus).writeto(tmp_path / "in" / "a_flt.fits")
    log = run(tmp_path)
    [row] = log.execute("SELECT outcome, reason, nx_px, ny_px FROM images").fetchall()
    assert (row["outcome"], row["nx_px"], row["ny_px"]) == ("stack", 1024, 1024)
    assert "it waits for the first stack" in row["reason"]

    # the stack reads it as the search does
    cache = Cache(tmp_path / "stack")
    [member] = running_stack.members_before(log, 70000.0, 1)
    data = running_stack._read(member, cache)
    assert abs(np.nanmedian(data)) < 0.001
    assert np.isnan(data[:5]).all()


def test_a_new_blob_is_found_on_its_day_and_seen_again_on_the_next(month: Path) -> None:
    log = logbook.connect(month / "out" / "log.sqlite")
    assert list(outcomes(log).values()) == ["stack"] * STACK + ["searched"] * 5
    found = candidates(log)
    assert len(found) == 1
    only = found.iloc[0]
    assert (only["first_frame"], only["status"]) == (f"day{STACK + 1:03d}", "seen_again")
    assert np.hypot(only["x_px"] - NEW[0], only["y_px"] - NEW[1]) < 0.5
    assert abs(only["depth_frac"] - NEW[3]) < 4 * only["depth_err_frac"]
    first = log.execute("SELECT status, probability FROM detections ORDER BY id").fetchone()
    assert first["status"] == "new"
    assert first["probability"] > 0.9


def test_every_row_says_what_it_was_judged_against(month: Path) -> None:
    log = logbook.connect(month / "out" / "log.sqlite")
    row = log.execute("SELECT * FROM candidate_list").fetchone()
    assert all(len(row[name]) == 64 for name in ("model_sha256", "params_sha256", "stack_sha256"))
    assert (
        log.execute(
            "SELECT count(DISTINCT stack_sha256) FROM images WHERE n_stack = ?", (STACK,)
        ).fetchone()[0]
        == 5
    )
    run_row = log.execute("SELECT * FROM runs").fetchone()
    assert run_row["version"] == blobpipe.__version__
    assert 0 < run_row["threshold"] < 1


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


def test_a_second_run_changes_nothing(again: Path) -> None:
    before = logbook.connect(again / "out" / "log.sqlite")
    rows = {
        name: logbook.table(before, name)
        for name in ("images", "files", "candidates", "detections")
    }
    before.close()
    after = run(again)
    for name, table in rows.items():
        pd.testing.assert_frame_equal(logbook.table(after, name), table)


def test_a_corrupt_image_is_rejected_with_its_reason_and_the_rest_goes_on(again: Path) -> None:
    whole = write(again / "in", STACK + 5)
    (again / "in" / "cut.fits").write_bytes(whole.read_bytes()[:200_000])
    (again / "in" / "text.fits").write_text("not an image")
    log = run(again)
    assert outcomes(log)[f"day{STACK + 5:03d}"] == "searched"
    rows = log.execute(
        "SELECT name, reason FROM images WHERE outcome = 'rejected' ORDER BY name"
    ).fetchall()
    assert [row["name"] for row in rows] == ["cut", "text"]
    assert "truncated" in rows[0]["reason"]
    assert "not a whole FITS file" in rows[1]["reason"]


def test_an_image_without_a_date_is_rejected(again: Path) -> None:
    fits.PrimaryHDU(pixels(90, KNOWN)).writeto(again / "in" / "undated.fits")
    reason = (
        run(again).execute("SELECT reason FROM images WHERE name = 'undated'").fetchone()["reason"]
    )
    assert "no date of the exposure, expected EXPSTART" in reason


def test_the_same_bytes_under_another_name_are_one_image(again: Path) -> None:
    last = again / "in" / f"day{STACK + 4:03d}.fits"
    shutil.copy(last, again / "in" / "copy.fits")
    first = again / "in" / "day000.fits"
    first.rename(again / "in" / "moved.fits")
    log = run(again)
    assert len(outcomes(log)) == STACK + 5
    known = {
        Path(row["path"]).name: row["outcome"]
        for row in log.execute("SELECT path, outcome FROM files")
    }
    assert (known["copy.fits"], known["moved.fits"], known["day001.fits"]) == (
        "duplicate",
        "renamed",
        "logged",
    )


def test_other_bytes_under_the_same_name_are_another_image(again: Path) -> None:
    path = again / "in" / f"day{STACK + 4:03d}.fits"
    path.unlink()
    write(again / "in", STACK + 5, NEW, name=f"day{STACK + 4:03d}")
    log = run(again)
    assert (
        log.execute("SELECT count(*) FROM images WHERE name = ?", (path.stem,)).fetchone()[0] == 2
    )
    assert [
        row["outcome"]
        for row in log.execute("SELECT outcome FROM files WHERE path = ? ORDER BY id", (str(path),))
    ] == [
        "logged",
        "changed",
    ]


def test_a_late_image_is_searched_against_the_images_before_it(again: Path) -> None:
    write(again / "in", STACK + 2, NEW, name="late")
    with fits.open(again / "in" / "late.fits", mode="update") as hdus:
        hdus[0].header["EXPSTART"] += 0.5
    log = run(again)
    row = log.execute("SELECT outcome, late, n_stack FROM images WHERE name = 'late'").fetchone()
    assert tuple(row) == ("searched", 1, STACK)
    on_time = log.execute("SELECT max(late) FROM images WHERE name != 'late'").fetchone()[0]
    assert on_time == 0


def test_a_late_image_that_shows_the_blob_first_dates_it(again: Path) -> None:
    write(again / "in", STACK, NEW, name="late")
    with fits.open(again / "in" / "late.fits", mode="update") as hdus:
        hdus[0].header["EXPSTART"] += 0.5
    assert candidates(run(again))["first_frame"].tolist() == ["late"]


def test_a_growing_file_is_left_until_it_is_whole(again: Path) -> None:
    made = options(again)
    patient = Options(
        made.log_path, MODEL, SETTINGS.model_copy(update={"quicklook": Quicklook(settle_s=600.0)})
    )
    whole = write(again, STACK + 5)
    growing = again / "in" / "growing.fits"
    growing.write_bytes(whole.read_bytes()[:200_000])
    inbox = Inbox(again / "in", patient.params.quicklook.settle_s)
    assert all(inbox.unsettled_s(file) > 590 for file in inbox.look())
    growing.write_bytes(whole.read_bytes())
    assert outcomes(run(again))["growing"] == "searched"


def test_a_file_that_was_cut_and_is_then_whole_is_searched(again: Path) -> None:
    whole = write(again, STACK + 5)
    path = again / "in" / "slow.fits"
    path.write_bytes(whole.read_bytes()[:200_000])
    run(again).close()
    path.write_bytes(whole.read_bytes())
    log = run(again)
    rows = log.execute("SELECT outcome FROM images WHERE name = 'slow' ORDER BY id").fetchall()
    assert [row["outcome"] for row in rows] == ["rejected", "searched"]


def test_a_file_that_grows_while_it_is_looked_at_is_left_for_the_next_look(
    again: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = write(again, STACK + 5).read_bytes()
    growing = again / "in" / "growing.fits"
    growing.write_bytes(whole[:200_000])
    hashed = files.sha256

    def hash_while_it_grows(path: Path) -> str:
        found = hashed(path)
        if Path(path).name == "growing.fits":
            growing.write_bytes(whole)
        return found

    monkeypatch.setattr(files, "sha256", hash_while_it_grows)
    assert "growing" not in outcomes(run(again))
    monkeypatch.undo()
    log = run(again)
    assert outcomes(log)["growing"] == "searched"
    row = log.execute("SELECT outcome FROM files WHERE path = ?", (str(growing),)).fetchone()
    assert row["outcome"] == "logged"


@pytest.mark.parametrize("fate", ["moved", "replaced", "gone"])
def test_a_file_that_is_moved_or_replaced_before_its_turn_is_not_lost(
    again: Path, monkeypatch: pytest.MonkeyPatch, fate: str
) -> None:
    path = write(again / "in", STACK + 5, NEW)
    other = write(again, STACK + 6, NEW)
    search = processing.search

    def search_too_late(arrival: arrivals.Arrival, *rest: object) -> searching.ImageResult:
        match fate:
            case "moved":
                path.rename(again / "in" / "moved.fits")
            case "replaced":
                os.replace(other, path)
            case "gone":
                path.unlink()
        return search(arrival, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(processing, "search", search_too_late)
    assert len(outcomes(run(again))) == STACK + 5
    monkeypatch.undo()
    log = run(again)
    assert len(outcomes(log)) == STACK + 5 + (fate != "gone")
    assert "rejected" not in outcomes(log).values()
    if fate == "replaced":
        row = log.execute("SELECT mjd FROM images WHERE name = ?", (path.stem,)).fetchone()
        assert row["mjd"] == 60000 + STACK + 6


def test_what_one_image_alone_shows_fades(again: Path) -> None:
    fake = (150.0, 300.0, 6.0, 0.08)
    write(again / "in", STACK + 5, NEW, fake)
    for day in range(STACK + 6, STACK + 9):
        write(again / "in", day, NEW)
    found = candidates(run(again))
    assert found["status"].tolist() == ["seen_again", "faded"]
    assert found["missed"].tolist() == [0, 3]


def test_a_candidate_is_followed_wherever_the_mirror_puts_it(tmp_path: Path) -> None:
    """It is logged where it would be without a shift, each sighting where the image shows it."""
    shifts = [(0, 0)] * STACK + [(4, -3), (0, 0), (-3, 2)]
    for day, (dx, dy) in enumerate(shifts):
        moved = [
            (x + dx, y + dy, radius, depth)
            for x, y, radius, depth in (*KNOWN, NEW)[: 4 if day >= STACK else 3]
        ]
        path = write(tmp_path / "in", day)
        fits.PrimaryHDU(pixels(day, moved), fits.getheader(path)).writeto(path, overwrite=True)
    log = run(tmp_path)
    [only] = candidates(log).to_dict("records")
    assert np.hypot(only["x_px"] - NEW[0], only["y_px"] - NEW[1]) < 0.7
    seen = log.execute(
        "SELECT x_px, y_px FROM detections WHERE candidate = ? ORDER BY image", (only["id"],)
    ).fetchall()
    expected = [(NEW[0] + dx, NEW[1] + dy) for dx, dy in shifts[STACK:]]
    assert np.abs(np.array([tuple(row) for row in seen]) - expected).max() < 1
    logged = log.execute(
        "SELECT shift_x_px, shift_y_px FROM images WHERE outcome = 'searched' ORDER BY mjd"
    ).fetchall()
    assert np.abs(np.array([tuple(row) for row in logged]) - shifts[STACK:]).max() < 0.3


def test_a_blob_of_the_catalogue_is_known(tmp_path: Path) -> None:
    for day in range(STACK):
        write(tmp_path / "in", day)
    write(tmp_path / "in", STACK, NEW)
    table = pd.DataFrame(
        {"blob": ["b0001"], "x_px": [NEW[0]], "y_px": [NEW[1]], "radius_px": [6.0]}
    )
    table.to_csv(tmp_path / "known.csv", index=False)
    log = run(tmp_path, catalogue=tmp_path / "known.csv")
    assert candidates(log).empty
    assert [row["status"] for row in log.execute("SELECT status FROM detections")] == ["known"]


def test_a_stack_can_be_named_for_the_first_images(tmp_path: Path) -> None:
    write(tmp_path, 1, name="stack")
    write(tmp_path / "in", 2, NEW)
    log = run(tmp_path, reference=tmp_path / "stack.fits")
    assert outcomes(log) == {"day002": "searched"}
    assert len(candidates(log)) == 1


def test_ready_differences_are_searched_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    image = pixels(1, (*KNOWN, NEW)) - pixels(2, KNOWN)
    fits.PrimaryHDU(image, fits.Header({"EXPSTART": 60000.0})).writeto(
        tmp_path / "in" / "difference.fits"
    )
    log = run(tmp_path, difference=True)
    assert candidates(log)["first_frame"].tolist() == ["difference"]
    assert log.execute("SELECT kind, n_stack FROM images").fetchone()["kind"] == "difference"


def test_what_happens_to_an_image_is_one_transaction(
    again: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(again / "in", STACK + 5, NEW)

    def fail(*_: object) -> None:
        raise SystemExit("killed at the last moment")

    monkeypatch.setattr(notices, "queue", fail)
    with pytest.raises(SystemExit):
        run(again)
    monkeypatch.undo()
    assert len(outcomes(logbook.connect(options(again).log_path))) == STACK + 5
    assert outcomes(run(again))[f"day{STACK + 5:03d}"] == "searched"


def test_the_stack_does_not_hang_on_the_cache(again: Path) -> None:
    log = logbook.connect(again / "out" / "log.sqlite")
    params = SETTINGS.difference
    once = running_stack.stack_before(log, Cache(again / "out" / "empty"), 60000.0 + STACK, params)
    part = sorted((again / "out" / "empty").glob("*.npy"))[0]
    part.unlink()
    twice = running_stack.stack_before(log, Cache(again / "out" / "empty"), 60000.0 + STACK, params)
    assert once is not None
    assert twice is not None
    assert once.sha256 == twice.sha256


def test_the_stack_finds_an_image_wherever_it_still_is(again: Path) -> None:
    log = logbook.connect(again / "out" / "log.sqlite")
    once = running_stack.stack_before(
        log, Cache(again / "out" / "empty"), 60000.0 + STACK, SETTINGS.difference
    )
    copy = again / "in" / "copy.fits"
    first = again / "in" / "day001.fits"
    shutil.copy(first, copy)
    write(again / "in", STACK + 5, NEW, name="day002")  # other bytes under its name
    run(again)
    copy.unlink()  # the place where it was seen last
    shutil.rmtree(again / "out" / "empty")
    with pytest.raises(
        FrameError,
        match=r"day002.fits: not found, or changed, expected the image \w{12} of the log",
    ):
        running_stack.stack_before(
            log, Cache(again / "out" / "empty"), 60000.0 + STACK, SETTINGS.difference
        )
    write(again / "in", 2)
    twice = running_stack.stack_before(
        log, Cache(again / "out" / "empty"), 60000.0 + STACK, SETTINGS.difference
    )
    assert once is not None
    assert twice is not None
    assert once.sha256 == twice.sha256


@pytest.mark.parametrize("left", ["cut off", "empty", "of another registration"])
def test_what_a_kill_or_a_power_failure_leaves_in_the_cache_does_not_matter(
    again: Path, left: str
) -> None:
    log = logbook.connect(again / "out" / "log.sqlite")
    cache = again / "out" / "other"
    date = 60000.0 + STACK
    params = SETTINGS.difference
    once = running_stack.stack_before(log, Cache(cache), date, params)
    first, second, *_ = sorted(cache.glob("*.npy"))
    match left:
        case "cut off":
            first.write_bytes(first.read_bytes()[:1000])
        case "empty":
            first.write_bytes(b"")
        case _:
            first.unlink()
            np.save(second, np.zeros((SIDE, SIDE), np.float16))
    twice = running_stack.stack_before(log, Cache(cache), date, params)
    assert once is not None
    assert twice is not None
    assert once.sha256 == twice.sha256


@pytest.mark.parametrize("harm", ["deleted", long("half deleted"), long("mixed up")])
def test_every_image_has_the_same_stack_with_the_cache_and_without(
    tmp_path: Path, harm: str
) -> None:
    found = []
    for root, harmed in ((tmp_path / "one", False), (tmp_path / "other", True)):
        for day in range(STACK + 6):
            write_small(root / "in", day) if day else (root / "in").mkdir(parents=True)
            cached = sorted((root / "out" / "stack").glob("*.npy"))
            if harmed and day in (STACK + 2, STACK + 3, STACK + 5):
                match harm:
                    case "deleted":
                        shutil.rmtree(root / "out" / "stack")
                    case "half deleted":
                        for path in cached[::2]:
                            path.unlink()
                    case _:
                        for path, other in pairwise(cached):
                            shutil.copy(other, path)
            run(root).close()
        log = logbook.connect(root / "out" / "log.sqlite")
        found.append(
            [
                row["stack_sha256"]
                for row in log.execute("SELECT stack_sha256 FROM images ORDER BY id")
            ]
        )
    assert found[0] == found[1]
    assert len(set(found[0])) == 6


def test_an_absurd_pixel_does_no_harm(again: Path) -> None:
    for day, value in (
        (STACK + 5, 1e38),
        (STACK + 6, -1e38),
        (STACK + 7, np.inf),
        (STACK + 8, 0.0),
    ):
        with fits.open(write(again / "in", day, NEW), mode="update") as hdus:
            hdus[0].data[40, 50] = value
    log = run(again)
    assert log.execute("SELECT count(*) FROM images WHERE outcome = 'searched'").fetchone()[0] == 9
    assert len(candidates(log)) == 1


def test_a_stack_is_of_the_last_images_before_a_date(again: Path) -> None:
    log = logbook.connect(again / "out" / "log.sqlite")
    by_day = {row["mjd"]: row["sha256"] for row in log.execute("SELECT mjd, sha256 FROM images")}
    with logbook.writing(log):
        log.execute("UPDATE images SET outcome = 'rejected' WHERE mjd = 60003")
    found = [member.sha256 for member in running_stack.members_before(log, 60005.0, 3)]
    # not the day itself, nor what was rejected
    assert found == [by_day[60000.0 + day] for day in (1, 2, 4)]
    assert (
        running_stack.stack_before(log, Cache(again / "cache"), 60002.0, Difference(stack_size=3))
        is None
    )


def test_the_median_of_a_stack_is_that_of_each_pixel() -> None:
    """Of every block of rows, missing values left out."""
    images = np.random.default_rng(1).normal(0, 1, (5, 2 * 64 + 7, 9)).astype(np.float32)
    images[0, :, 3], images[:4, 70, 5] = np.nan, np.nan
    np.testing.assert_array_equal(running_stack._median(images), np.nanmedian(images, axis=0))


def test_the_cache_hangs_on_the_log_alone(again: Path) -> None:
    cache = again / "out" / "stack"
    before = {path.name for path in cache.iterdir()}
    for name in (".left-by-a-kill.123.tmp.npy", f"{'0' * 64}.npy", f"{'0' * 64}-settled.npy"):
        (cache / name).write_bytes(b"half an image")
    # what others keep in a folder of that name is theirs
    (cache / "mine.npy").write_bytes(b"an image")
    kept = Cache(cache)
    kept.settled["0" * 64] = deep.SettledImage(np.zeros((SIDE, SIDE), np.int16), 0.01)
    running_stack.prune(logbook.connect(again / "out" / "log.sqlite"), kept, STACK)
    assert {path.name for path in cache.iterdir()} == before | {"mine.npy"}
    assert not kept.settled


def test_the_cache_keeps_two_stacks_and_the_latest_settled_images(again: Path) -> None:
    for day in range(STACK + 5, STACK + 10):
        write(again / "in", day, NEW)
    run(again)
    cached = {path.name for path in (again / "out" / "stack").glob("*.npy")}
    settled = {name for name in cached if name.endswith("-settled.npy")}
    assert len(cached - settled) == running_stack.KEPT * STACK
    assert len(settled) == STACK + 10


LONG_STACK = 10  # images: what lands on one of them is in the RMS map before the median has it
# day, x, y, radius (px), depth: strong, faint, strong beside another, and on the image after it
LANDED = (
    *((LONG_STACK + 1, 90.0, 80.0, 6.0, 0.2), (LONG_STACK + 1, 180.0, 90.0, 6.0, 0.02)),
    *((LONG_STACK + 3, 106.0, 84.0, 5.0, 0.1), (LONG_STACK + 4, 200.0, 190.0, 3.5, 0.08)),
)
OLD = ((60, 200, 6.5, 0.08), (130, 150, 5.5, 0.1), (40, 40, 7.0, 0.06), (215, 30, 6.0, 0.08))


def write_small(folder: Path, day: int) -> Path:
    """An image of 256 x 256 pixels with what has landed so far; on every fourth the mirror has stopped elsewhere."""
    folder.mkdir(exist_ok=True)
    image = np.random.default_rng([17, day]).normal(0, 0.0076, (256, 256)).astype(np.float32)
    shift_x, shift_y = (1.4, -0.9) if day % 4 == 2 else (0.0, 0.0)
    for x, y, radius, depth in (*OLD, *(blob[1:] for blob in LANDED if blob[0] <= day)):
        row = round(y)
        col = round(x)
        stamp = blob_profile("disc", radius, x - col + shift_x, y - row + shift_y)
        image[row - 20 : row + 21, col - 20 : col + 21] += depth * stamp
    path = folder / f"day{day:03d}.fits"
    fits.PrimaryHDU(image, fits.Header({"EXPSTART": 60000.0 + day})).writeto(path)
    return path


@pytest.mark.parametrize(
    "known",
    [
        "by the log",
        *(long(way) for way in ("by a person", "by a catalogue", "by a dated catalogue")),
    ],
)
def test_what_has_landed_is_never_taken_for_bad_pixels_later(tmp_path: Path, known: str) -> None:
    params = SETTINGS.model_copy(update={"difference": Difference(stack_size=LONG_STACK)})
    more = {}
    if "catalogue" in known:
        table = pd.DataFrame(LANDED, columns=["first", "x_px", "y_px", "radius_px", "depth_frac"])
        table["first_frame"] = [f"day{day:03d}" for day in table.pop("first")]
        table = table.drop(columns="first_frame") if known == "by a catalogue" else table
        table.to_csv(tmp_path / "known.csv", index=False)
        more["catalogue"] = tmp_path / "known.csv"
    made = Options(tmp_path / "out" / "log.sqlite", MODEL, params, **more)
    for day in range(LONG_STACK):
        write_small(tmp_path / "in", day)
    quicklook(tmp_path / "in", made)
    log = logbook.connect(made.log_path)
    for day in range(LONG_STACK, LONG_STACK + 10):
        write_small(tmp_path / "in", day)
        quicklook(tmp_path / "in", made)
        if known == "by a person":
            with logbook.writing(log):
                log.execute(
                    "INSERT INTO reviews (candidate, decision, reviewer, at) SELECT id, 'confirmed', 'A', '' FROM candidates"
                )
        _require_sightings(log, day, catalogued="catalogue" in known)
    assert len(candidates(log)) == (0 if "catalogue" in known else len(LANDED))


def _require_sightings(log: sqlite3.Connection, day: int, *, catalogued: bool) -> None:
    """What has landed is on the image of a day, until half of the stack shows it, as what it is."""
    image = log.execute("SELECT * FROM images ORDER BY id DESC LIMIT 1").fetchone()
    found = pd.read_sql_query(
        "SELECT * FROM detections WHERE image = ?", log, params=(image["id"],)
    )
    for first, x, y, _, depth in LANDED:
        apart = np.hypot(
            found["x_px"] - image["shift_x_px"] - x, found["y_px"] - image["shift_y_px"] - y
        )
        there = found[apart < 3.0]
        assert "bad_pixels" not in set(there["status"]), (day, x, y)
        if first <= day < first + LONG_STACK // 2 and depth > 0.05:
            assert len(there) == 1, (day, x, y)
            assert (
                there["status"]
                .isin(["known", "dip"] if catalogued else ["new", "known", "dip"])
                .all()
            ), (day, x, y)
            assert there["candidate"].notna().all() != catalogued, (day, x, y)


def test_pixels_that_flicker_do_not_become_a_blob_by_having_been_a_candidate(
    tmp_path: Path,
) -> None:
    """A cluster reads high on one day and is a candidate; it does so again while it waits to be confirmed."""
    params = SETTINGS.model_copy(
        update={"difference": Difference(stack_size=12), "quicklook": PATIENT}
    )
    made = Options(tmp_path / "out" / "log.sqlite", MODEL, params)
    for day in range(22):
        path = write_small(tmp_path / "in", day)
        if day in (13, 19):
            with fits.open(path, mode="update") as hdus:
                hdus[0].data[200 - 20 : 200 + 21, 140 - 20 : 140 + 21] += 0.1 * blob_profile(
                    "disc", 5.0, 0, 0
                )
    quicklook(tmp_path / "in", made)
    log = logbook.connect(made.log_path)
    found = candidates(log)
    flickering = found[np.hypot(found["x_px"] - 140, found["y_px"] - 200) < 3]
    assert flickering["sightings"].tolist() == [1]
    statuses = log.execute(
        "SELECT i.name, d.status FROM detections d JOIN images i ON i.id = d.image "
        "WHERE abs(d.x_px - 140) < 3 AND abs(d.y_px - 200) < 3 ORDER BY i.id"
    ).fetchall()
    assert [tuple(row) for row in statuses] == [("day013", "new"), ("day019", "bad_pixels")]


@pytest.mark.long
@pytest.mark.parametrize("begun", ["by its own stack", "by a named stack"])
def test_every_blob_of_a_simulated_month_keeps_its_candidate(tmp_path: Path, begun: str) -> None:
    size = 20
    raw = tmp_path / "raw"
    inbox = tmp_path / "in"
    settings = Campaign(seed=5, n_frames=54, first_frames=size, n_cases=20)
    campaign.simulate(raw, settings)
    params = SETTINGS.model_copy(update={"difference": Difference(stack_size=size)})
    listed = tables.read_frame_list(raw)
    named = None
    if begun == "by a named stack":
        difference.reference(raw, tmp_path, params.difference)
        listed = listed[size - 5 :].reset_index(drop=True)
        named = tmp_path / "reference.fits.fz"
    inbox.mkdir()
    for name in listed["frame"]:
        shutil.move(fits_images.find_image(raw, name), inbox)
    made = Options(tmp_path / "out" / "log.sqlite", MODEL, params, reference=named)
    quicklook(inbox, made)
    log = logbook.connect(made.log_path)
    found = pd.read_sql_query(
        "SELECT d.*, i.name, i.mjd, d.x_px - i.shift_x_px AS x, d.y_px - i.shift_y_px AS y "
        "FROM detections d JOIN images i ON i.id = d.image",
        log,
    )
    blobs = [blob for blob in campaign.population(settings) if blob.first >= size]
    names = campaign.frame_names(settings)
    followed = 0
    on_blobs = set()
    for blob in blobs:
        there = found[
            np.hypot(found["x"] - blob.x_px, found["y"] - blob.y_px) <= max(3.0, blob.radius_px / 2)
        ]
        on_blobs |= set(there["candidate"].dropna())
        if not (there["snr"] >= 12).any():
            continue
        followed += 1
        for name in names[blob.first : blob.first + size // 2 - 1]:
            today = there[there["name"] == name]
            assert today["candidate"].notna().any(), (blob.blob, name, list(today["status"]))
    assert followed >= 12
    false = candidates(log).query("id not in @on_blobs")
    assert len(false) <= 0.15 * len(listed)
    assert not (false["status"] == "seen_again").any()


def reprocess(path: Path, name: str = "", seed: int = 1, **cards: object) -> Path:
    """Write another version of an image beside it: pixels that differ a little, and other cards."""
    with fits.open(path) as hdus:
        data = np.array(hdus[0].data, np.float32)
        header = hdus[0].header.copy()
    data += np.random.default_rng([9, seed]).normal(0, 1e-4, data.shape).astype(np.float32)
    for card, value in cards.items():
        header["DATE-OBS" if card == "DATE_OBS" else card] = value
    new = path.with_name(name or path.name)
    fits.PrimaryHDU(data, header).writeto(new, overwrite=True)
    return new


FALSE = (150.0, 300.0, 6.0, 0.08)
NOTIFIED = SETTINGS.model_copy(
    update={
        "notices": Notices(
            mail_to=("a@b.org",), mail_from="c@d.org", smtp_host="127.0.0.1", smtp_port=1
        )
    }
)


def run_notified(tmp_path: Path) -> sqlite3.Connection:
    """A run whose notices stay in the outbox: nobody listens at that port."""
    made = Options(tmp_path / "out" / "log.sqlite", MODEL, NOTIFIED)
    quicklook(tmp_path / "in", made)
    return logbook.connect(made.log_path)


def superseded(log: sqlite3.Connection) -> dict[str, str]:
    """Which image counts in the place of which."""
    rows = log.execute(
        "SELECT i.id, i.name, n.id, n.name FROM images i JOIN images n ON n.id = i.superseded_by"
    )
    return {f"{row[0]} {row[1]}": f"{row[2]} {row[3]}" for row in rows}


@pytest.mark.parametrize("way", ["same name", "other name", "gzipped", "ROOTNAME"])
def test_a_second_version_of_an_exposure_confirms_nothing(again: Path, way: str) -> None:
    path = write(again / "in", STACK + 5, NEW, FALSE)
    if way == "ROOTNAME":
        reprocess(path, ROOTNAME="IABC05Q")
    log = run_notified(again)
    last = outcomes(log) | {"": len(outcomes(log))}
    told = [tuple(row) for row in log.execute("SELECT key, channel FROM notices")]
    assert ("candidate-2-new", "mail") in told
    match way:
        case "same name":
            reprocess(path, CAL_VER="3.7.2")
        case "other name":
            reprocess(path, "anew.fits", CAL_VER="3.7.2")
        case "gzipped":
            reprocess(path, path.name + ".gz")
        case _:
            reprocess(path, "anew.fits", ROOTNAME="iabc05q", EXPSTART=60000.003 + STACK + 5)
    log = run_notified(again)
    assert len(log.execute("SELECT 1 FROM images").fetchall()) == last[""] + 1
    newest = log.execute("SELECT id, name FROM images ORDER BY id DESC LIMIT 1").fetchone()
    assert superseded(log) == {
        f"{newest['id'] - 1} {path.stem}": f"{newest['id']} {newest['name']}"
    }
    found = candidates(log)
    assert found["status"].tolist() == ["seen_again", "new"]
    assert found["sightings"].tolist()[1] == 1
    assert found["first_image"].tolist()[1] == newest["id"]
    assert [
        tuple(row)
        for row in log.execute("SELECT key, channel FROM notices WHERE candidate IS NOT NULL")
    ] == told
    members = running_stack.members_before(log, 70000.0, STACK)
    assert len({member.mjd for member in members}) == STACK
    assert (
        log.execute("SELECT sha256 FROM images WHERE id = ?", (newest["id"],)).fetchone()[0]
        == members[-1].sha256
    )


def deep_log(tmp_path: Path, decision: str, status: str) -> tuple[sqlite3.Connection, int]:
    """A log of two images and a candidate of the first, decided on."""
    log = logbook.connect(tmp_path / "log.sqlite", make=True)
    fixed = {"version": "0", "model": "m", "model_sha256": "", "params_sha256": ""}
    logbook.insert(log, "runs", fixed | {"started": "", "catalogue_sha256": "", "threshold": 0.9})
    for k in (1, 2):
        row = {"run": 1, "sha256": f"{k:064}", "name": f"day{k}", "kind": "image"}
        row |= {"mjd": 60000.0 + k, "logged": "", "outcome": "searched"}
        logbook.insert(log, "images", row)
    candidate = logbook.insert(
        log, "candidates", {"image": 1, "status": status, "x_px": 100.0, "y_px": 90.0}
    )
    logbook.insert(log, "detections", deep_row(1) | {"image": 1, "candidate": candidate})
    if decision:
        review = {"candidate": candidate, "decision": decision, "reviewer": "me", "at": ""}
        logbook.insert(log, "reviews", review)
    return log, candidate


def deep_row(n_images: int) -> dict[str, object]:
    """What is measured of a blob."""
    measured = dict.fromkeys(DETECTION_COLUMNS, 1.0)
    place = {"x_px": 100.5, "y_px": 90.0, "radius_px": 6.0, "status": "new"}
    return measured | place | {"probability": 0.9, "n_images": n_images}


def find_together(log: sqlite3.Connection) -> pd.DataFrame:
    """What the log has of candidates when the latest images show one together, on the second of them."""
    settled = deep.SettledImage(np.zeros((SIDE, SIDE), np.int16), 0.01)
    found = pd.DataFrame([deep_row(8)])
    places = found[["x_px", "y_px", "radius_px"]]
    depths = Depths(np.full((1, 1), 0.01), np.full((1, 1), 0.001))
    result = searching.DeepResult(found, [f"{2:064}"], places, depths, settled, None)
    findings._log_deep(2, result, SimpleNamespace(connection=log, params=SETTINGS))  # type: ignore[arg-type]
    return candidates(log)


def test_what_people_have_rejected_does_not_come_back_with_the_latest_images_together(
    tmp_path: Path,
) -> None:
    log, candidate = deep_log(tmp_path, "rejected", "seen_again")
    found = find_together(log)
    assert found["id"].tolist() == [candidate]
    assert found["sightings"].tolist() == [1]


def test_a_faded_candidate_that_the_latest_images_show_together_is_there_after_all(
    tmp_path: Path,
) -> None:
    log, candidate = deep_log(tmp_path, "", "faded")
    found = find_together(log)
    assert found["id"].tolist() == [candidate]
    assert found["status"].tolist() == ["seen_again"]
    assert found["sightings"].tolist() == [2]


def test_what_the_latest_images_show_together_outlives_a_version_of_one_of_them(
    tmp_path: Path,
) -> None:
    log, candidate = deep_log(tmp_path, "", "seen_again")
    log.execute("UPDATE detections SET n_images = 8")
    log.execute("UPDATE images SET superseded_by = 2 WHERE id = 1")
    _recount(log, candidate, fade_after=3)
    assert candidates(log)["status"].tolist() == ["seen_again"]
    assert candidates(log)["n_images"].tolist() == [8]


def test_pruning_leaves_the_files_of_others(tmp_path: Path) -> None:
    log, _ = deep_log(tmp_path, "", "new")
    folder = tmp_path / "pixels"
    folder.mkdir()
    names = ["notes.txt", "old.map", f"{1:064}.difference", f"{7:064}.map", ".x.12.tmp.map"]
    for name in names:
        (folder / name).write_bytes(b"x")
    processing._prune_pixels(log, tmp_path / "log.sqlite")
    assert {path.name for path in folder.iterdir()} == set(names[:3])


def test_the_next_exposure_still_confirms(again: Path) -> None:
    path = write(again / "in", STACK + 5, NEW, FALSE)
    run(again).close()
    reprocess(path)
    run(again).close()
    write(again / "in", STACK + 6, NEW, FALSE)
    found = candidates(run(again))
    assert found["status"].tolist() == ["seen_again", "seen_again"]
    assert found["sightings"].tolist()[1] == 2
    assert found["first_frame"].tolist()[1] == path.stem


def test_what_the_newer_version_does_not_show_has_faded_and_counts_for_nothing(again: Path) -> None:
    write(again / "in", STACK + 5, NEW, FALSE)
    run(again).close()
    write(again / "in", STACK + 5, NEW)
    log = run(again)
    found = candidates(log)
    assert found["status"].tolist() == ["seen_again", "faded"]
    assert found["sightings"].tolist()[1] == 1  # those who look back find it
    write(again / "in", STACK + 6, NEW, FALSE)
    found = candidates(run(again))
    assert found["status"].tolist() == ["seen_again", "new"]
    assert found["sightings"].tolist()[1] == 1
    assert found["first_frame"].tolist()[1] == f"day{STACK + 6:03d}"


def test_what_only_an_older_version_confirmed_is_new_again(again: Path) -> None:
    write(again / "in", STACK + 5, NEW, FALSE)
    write(again / "in", STACK + 6, NEW, FALSE)
    assert candidates(run(again))["status"].tolist() == ["seen_again", "seen_again"]
    write(again / "in", STACK + 6, NEW)
    found = candidates(run(again))
    assert found["status"].tolist() == ["seen_again", "new"]
    assert found["missed"].tolist() == [0, 1]


def test_two_versions_of_a_later_image_let_a_candidate_fade_by_one(again: Path) -> None:
    write(again / "in", STACK + 5, NEW, FALSE)
    later = write(again / "in", STACK + 6, NEW)
    run(again).close()
    for seed in range(3):
        reprocess(later, seed=seed)
        found = candidates(run(again))
        assert (found["status"].tolist()[1], found["missed"].tolist()[1]) == ("new", 1)


@pytest.mark.parametrize(
    ("first", "second", "older"),
    [
        ({"DATE": "2024-05-02"}, {"DATE": "2023-01-01T10:00:00"}, True),
        ({"DATE": "2023-01-01"}, {"DATE": "2024-05-02"}, False),
        ({"CAL_VER": "3.10.1(28-Oct-2020)"}, {"CAL_VER": "3.9.2(01-Jan-2021)"}, True),
        ({"DATE": "2024-05-02", "CAL_VER": "3.5"}, {"DATE": "2024-05-03", "CAL_VER": "3.4"}, False),
        ({"CAL_VER": "3.5"}, {}, False),
    ],
)
def test_an_older_version_that_comes_late_replaces_nothing(
    again: Path, first: dict[str, object], second: dict[str, object], older: bool
) -> None:
    path = reprocess(write(again / "in", STACK + 5, FALSE), **first)
    run(again).close()
    with fits.open(path) as hdus:
        hdus[0].header.remove("CAL_VER", ignore_missing=True)
        hdus.writeto(again / "in" / "other.fits")
    reprocess(again / "in" / "other.fits", **second)
    log = run(again)
    (old, new) = ("other", path.stem) if older else (path.stem, "other")
    assert [(key.split()[1], value.split()[1]) for key, value in superseded(log).items()] == [
        (old, new)
    ]
    row = log.execute("SELECT outcome, reason FROM images WHERE name = 'other'").fetchone()
    assert row["outcome"] == ("rejected" if older else "searched")
    assert ("an older version of the exposure" in row["reason"]) == older
    assert candidates(log)[["sightings", "first_frame"]].to_numpy().tolist()[1] == [1, new]


def test_different_exposures_are_not_taken_for_versions(again: Path) -> None:
    inbox = again / "in"
    one = write(inbox, STACK + 5, NEW)
    reprocess(one, "second.fits", EXPSTART=60000.0 + STACK + 5 + 2 / 86400)  # two seconds later
    reprocess(one, "filter.fits", FILTER="F105W")
    for number, name in enumerate(("iabc01q", "iabc02q")):  # one date, two names
        reprocess(one, f"{name}.fits", seed=number, ROOTNAME=name, EXPSTART=60000.0 + STACK + 6)
    for day in (7, 9):  # a header that was copied from image to image
        reprocess(
            one, f"copied{day}.fits", seed=day, ROOTNAME="template", EXPSTART=60000.0 + STACK + day
        )
    for number in range(2):  # nobody knows when on that day
        bare = reprocess(one, f"bare{number}.fits", seed=20 + number, DATE_OBS="2023-03-20")
        with fits.open(bare, mode="update") as hdus:
            del hdus[0].header["EXPSTART"]
    log = run(again)
    assert superseded(log) == {}
    assert set(outcomes(log).values()) == {"stack", "searched"}


def test_a_version_that_cannot_be_used_replaces_nothing(again: Path) -> None:
    before = candidates(logbook.connect(again / "out" / "log.sqlite"))["sightings"].tolist()
    path = again / "in" / f"day{STACK + 4:03d}.fits"
    path.write_bytes(path.read_bytes()[:200_000])
    log = run(again)
    assert outcomes(log)[path.stem] == "rejected"
    assert superseded(log) == {}
    assert candidates(log)["sightings"].tolist() == before


def test_images_that_wait_for_the_first_stack_count_once(tmp_path: Path) -> None:
    for day in range(STACK - 1):
        write(tmp_path / "in", day)
    reprocess(tmp_path / "in" / "day001.fits", "anew.fits")
    log = run(tmp_path)
    write(tmp_path / "in", STACK)
    log = run(tmp_path)
    assert set(outcomes(log).values()) == {"stack"}  # four files, three exposures before it
    write(tmp_path / "in", STACK + 1)
    assert outcomes(run(tmp_path))[f"day{STACK + 1:03d}"] == "searched"


@pytest.mark.parametrize(
    ("day", "factor"),
    [
        (2, 40),
        (STACK + 5, 1 / 40),
        *(long(day, factor) for day in (2, STACK + 5) for factor in (1e-10, 5, 0.2)),
    ],
)
def test_an_image_of_another_noise_is_rejected_and_kept_out_of_stacks(
    again: Path, tmp_path_factory: pytest.TempPathFactory, day: int, factor: float
) -> None:
    root = again if day > STACK else tmp_path_factory.mktemp("first")
    for other in range(0 if day < STACK else STACK + 6, STACK + 2 if day < STACK else STACK + 7):
        if other != day:
            write(root / "in", other)
    path = write(root / "in", day)
    with fits.open(path, mode="update") as hdus:
        hdus[0].data = (hdus[0].data * factor).astype(np.float32)
    log = run(root)
    row = log.execute("SELECT outcome, reason FROM images WHERE name = ?", (path.stem,)).fetchone()
    assert row["outcome"] == "rejected"
    assert re.search(r"noise \S+, expected", row["reason"])
    assert path.stem in row["reason"]
    last = STACK + 1 if day < STACK else STACK + 6
    assert outcomes(log)[f"day{last:03d}"] == "searched"
    assert candidates(log).empty == (day < STACK)


@pytest.mark.parametrize("factor", [0.6, 1.5])
def test_half_and_twice_the_light_are_usual(again: Path, factor: float) -> None:
    path = write(again / "in", STACK + 5)
    with fits.open(path, mode="update") as hdus:
        noise = np.random.default_rng([7, STACK + 5]).normal(0, 0.0076, (SIDE, SIDE))
        hdus[0].data = (hdus[0].data + (factor - 1) * noise).astype(np.float32)
    assert outcomes(run(again))[path.stem] == "searched"


def test_links_into_a_cache_go_by_their_own_names(tmp_path: Path) -> None:
    """As an inbox of DVC or git-annex: the targets have the names of their hashes, and no suffix."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "in").mkdir()
    for day in range(STACK + 2):
        plain = write(tmp_path / "made", day, *[NEW] * (day > STACK - 1))
        packed = gzip.compress(plain.read_bytes()) if day % 2 else plain.read_bytes()
        target = tmp_path / "cache" / hashlib.md5(packed).hexdigest()
        target.write_bytes(packed)
        (tmp_path / "in" / f"{plain.name}{'.gz' * (day % 2)}").symlink_to(target)
    log = run(tmp_path)
    names = [f"day{day:03d}" for day in range(STACK + 2)]
    assert outcomes(log) == dict.fromkeys(names[:STACK], "stack") | dict.fromkeys(
        names[STACK:], "searched"
    )
    assert candidates(log)["first_frame"].tolist() == [names[STACK]]
    assert catalogue.list_images(log, tmp_path / "in" / "frames.csv") == names
    shutil.rmtree(tmp_path / "out" / "stack")
    write(tmp_path / "in", STACK + 2, NEW)
    assert outcomes(run(tmp_path))[f"day{STACK + 2:03d}"] == "searched"


def part(day: int, path: Path) -> None:
    """Make an image of a day smaller."""
    with fits.open(path, mode="update") as hdus:
        hdus[0].data = hdus[0].data[:300, 50:350].copy()


@pytest.mark.parametrize(
    ("odd", "at_once"), [({0}, True), ({1, 3, 5}, True), ({0, 2}, False), ({STACK + 1}, False)]
)
def test_images_of_another_size_are_rejected_and_the_rest_is_searched(
    tmp_path: Path, odd: set[int], at_once: bool
) -> None:
    days = range(STACK + len(odd) + 2)
    for day in days:
        path = write(tmp_path / "in", day, NEW)
        if day in odd:
            part(day, path)
        if not at_once:
            run(tmp_path).close()
    log = run(tmp_path)
    usual = [f"day{day:03d}" for day in days if day not in odd]
    expected = dict.fromkeys(usual[:STACK], "stack") | dict.fromkeys(usual[STACK:], "searched")
    assert outcomes(log) == expected | {f"day{day:03d}": "rejected" for day in odd}
    reasons = {
        row["reason"] for row in log.execute("SELECT reason FROM images WHERE outcome = 'rejected'")
    }
    assert all(
        "found 300x300 pixels, expected 512x512 as the images that this log searches" in text
        for text in reasons
    )


def slip(root: Path, kind: str) -> dict[str, Path]:
    """An option with a slip in it."""
    write(root, 99, name="whole")
    path = root / "whole.fits"
    match kind:
        case "no such stack":
            path = root / "none.fits"
        case "a stack of another size":
            part(99, path)
        case "a stack that is text":
            path.write_text("no image")
        case "a stack without noise":
            fits.PrimaryHDU(np.zeros((SIDE, SIDE), np.float32)).writeto(path, overwrite=True)
        case "RMS map of another size":
            planes = {"STACK": pixels(9, KNOWN), "SCATTER": np.ones((99, 99), np.float32)}
            fits_images.write_images(path, planes)
        case "no such catalogue":
            return {"catalogue": root / "none.csv"}
        case "a catalogue that is an image":
            return {"catalogue": path}
        case "a catalogue without places":
            (root / "bad.csv").write_text("blob,x\nb1,5\n")
            return {"catalogue": root / "bad.csv"}
    return {"reference": path}


@pytest.mark.parametrize(
    "kind",
    [
        *(
            "no such stack",
            "a stack of another size",
            "a stack that is text",
            "a stack without noise",
        ),
        *(
            "RMS map of another size",
            "no such catalogue",
            "a catalogue that is an image",
            "a catalogue without places",
        ),
    ],
)
def test_a_slip_in_an_option_leaves_no_trace(tmp_path: Path, kind: str) -> None:
    write(tmp_path / "in", 1, NEW)
    with pytest.raises(BlobpipeError) as caught:
        run(tmp_path, **slip(tmp_path, kind))
    assert str(tmp_path) in str(caught.value)
    if (tmp_path / "out" / "log.sqlite").exists():
        log = logbook.connect(tmp_path / "out" / "log.sqlite")
        assert [
            log.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
            for table in ("runs", "images")
        ] == [0, 0]
    write(tmp_path, 2, name="stack")
    assert outcomes(run(tmp_path, reference=tmp_path / "stack.fits")) == {"day001": "searched"}


def test_the_first_stack_is_compared_with_the_images_that_can_be_read(tmp_path: Path) -> None:
    """A file without any image, and a link that leads nowhere, say nothing about their size."""
    write(tmp_path / "in", 1, NEW)
    (tmp_path / "in" / "day000.fits").write_bytes(b"SIMPLE")
    (tmp_path / "in" / "day002.fits").symlink_to(tmp_path / "in" / "day002.fits")
    with pytest.raises(FrameError, match=r"found 300x300 pixels, expected 512x512 as the images"):
        run(tmp_path, **slip(tmp_path, "a stack of another size"))
    write(tmp_path, 3, name="stack")
    done = outcomes(run(tmp_path, reference=tmp_path / "stack.fits"))
    assert done["day001"] == "searched"


def test_a_stack_of_another_size_than_the_images_of_the_log_is_refused(again: Path) -> None:
    before = options(again, **slip(again, "a stack of another size"))
    with pytest.raises(
        FrameError, match=r"whole.fits: found 300x300 pixels, expected 512x512 as the images"
    ):
        quicklook(again / "in", before)
    log = logbook.connect(before.log_path)
    assert log.execute("SELECT count(*) FROM runs").fetchone()[0] == 1


def test_a_stack_that_fits_nothing_that_comes_later_does_not_reject_it(tmp_path: Path) -> None:
    """Where the folder is empty, the slip shows only when the first image comes."""
    made = options(tmp_path, **slip(tmp_path, "a stack of another size"))
    (tmp_path / "in").mkdir()
    inbox = Inbox(tmp_path / "in", 0.0)
    with _open_run(made, inbox) as opened:
        for day in range(STACK + 1):
            write(tmp_path / "in", day)
            processing.process(inbox, opened)
        assert list(outcomes(opened.connection).values()) == ["stack"] * STACK + ["searched"]


@pytest.mark.parametrize("fate", ["moved", "folder moved"])
def test_a_watch_ends_when_its_log_is_taken_away(again: Path, fate: str) -> None:
    made = options(again)
    log_path = again / "out" / "log.sqlite"
    inbox = Inbox(again / "in", 0.0)

    def watch_a_day_too_long() -> None:
        with _open_run(made, inbox) as opened:
            write(again / "in", STACK + 5, NEW)
            processing.process(inbox, opened)
            if fate == "moved":
                log_path.rename(again / "moved.sqlite")
            else:
                log_path.parent.rename(again / "elsewhere")
            processing.process(inbox, opened)

    with pytest.raises(
        LogError, match=r"log.sqlite: moved, deleted or replaced while it was in use"
    ):
        watch_a_day_too_long()
    if fate == "moved":  # without its -wal file
        assert f"day{STACK + 5:03d}" in outcomes(logbook.connect(again / "moved.sqlite"))
    if fate == "folder moved":
        assert f"day{STACK + 5:03d}" in outcomes(
            logbook.connect(again / "elsewhere" / "log.sqlite")
        )
        assert not log_path.parent.exists()


def test_a_log_that_is_taken_away_while_an_image_is_searched_is_noticed(
    again: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = processing.search

    def search_long(*rest: object) -> searching.ImageResult:
        (again / "out" / "log.sqlite").rename(again / "moved.sqlite")
        return search(*rest)  # type: ignore[arg-type]

    write(again / "in", STACK + 5, NEW)
    monkeypatch.setattr(processing, "search", search_long)
    with pytest.raises(LogError, match=r"log.sqlite: moved, deleted or replaced"):
        run(again)
    (again / "moved.sqlite").rename(again / "out" / "log.sqlite")
    monkeypatch.undo()
    assert outcomes(run(again))[f"day{STACK + 5:03d}"] == "searched"


def test_a_file_replaced_by_one_of_the_same_size_and_time_is_another_image(again: Path) -> None:
    path = again / "in" / f"day{STACK + 4:03d}.fits"
    before = path.stat()
    write(again / "in", STACK + 5, NEW, name=path.stem)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    log = run(again)
    assert (
        log.execute("SELECT count(*) FROM images WHERE name = ?", (path.stem,)).fetchone()[0] == 2
    )


def test_a_name_in_another_encoding_is_an_image_as_any(again: Path) -> None:
    odd = os.fsdecode(b"day\xe9\n9")
    write(again / "in", STACK + 5, NEW, name=odd)
    log = run(again)
    assert outcomes(log)[r"day\udce9\n9"] == "searched"
    run(again).close()  # it is known now
    assert log.execute("SELECT count(*) FROM files").fetchone()[0] == STACK + 6
    shutil.rmtree(again / "out" / "stack")
    write(again / "in", STACK + 6, NEW)
    assert outcomes(run(again))[f"day{STACK + 6:03d}"] == "searched"  # its stack takes that file


@pytest.mark.parametrize(
    ("error", "where"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), "hash"),
        (OSError(errno.EIO, "Input/output error"), "read"),
    ],
)
def test_a_file_that_cannot_be_read_now_is_told_of_and_searched_later(
    again: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: OSError,
    where: str,
) -> None:
    path = write(again / "in", STACK + 5, NEW)
    write(again / "in", STACK + 6, NEW)
    hashed = files.sha256
    read = fits_images.read_frame

    def no_hash(of: Path) -> str:
        if of == path and where == "hash":
            raise error
        return hashed(of)

    def no_image(of: Path, *whose: Detector) -> fits_images.Frame:
        if of == path and where == "read":
            raise FrameError(f"{of}: {error.strerror}") from error
        return read(of, *whose)

    monkeypatch.setattr(files, "sha256", no_hash)
    monkeypatch.setattr(fits_images, "read_frame", no_image)
    log = run(again)
    assert path.stem not in outcomes(log)
    assert outcomes(log)[f"day{STACK + 6:03d}"] == "searched"
    [line] = [text for text in caplog.messages if path.name in text]
    assert error.strerror in line
    monkeypatch.undo()
    assert outcomes(run(again))[path.stem] == "searched"


def test_a_bug_that_one_image_brings_to_light_is_its_alone(
    again: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for day in range(STACK + 5, STACK + 8):
        write(again / "in", day, NEW)
    calls = []

    def fail_on_the_second(*image: Any, **about: Any) -> Observation:
        calls.append(image)
        if len(calls) == 2:
            raise KeyError("no such column")
        return observe(*image, **about)

    monkeypatch.setattr(searching, "observe", fail_on_the_second)
    log = run(again)
    assert list(outcomes(log).values())[-3:] == ["searched", "rejected", "searched"]
    [row] = log.execute("SELECT name, reason FROM images WHERE outcome = 'rejected'").fetchall()
    assert row["reason"] == "internal fault (KeyError: 'no such column'): please report it"
    assert outcomes(run(again))[row["name"]] == "rejected"
    monkeypatch.undo()
    log = run(again, again=True)
    assert outcomes(log)[row["name"]] == "searched"
    assert log.execute("SELECT count(*) FROM images").fetchone()[0] == STACK + 8


@pytest.mark.parametrize(
    ("where", "error", "told_as"),
    [
        ((running_stack, "keep"), OSError(errno.ENOSPC, "No space left on device"), OSError),
        ((running_stack, "keep"), KeyboardInterrupt(), KeyboardInterrupt),
        ((notices, "queue"), sqlite3.OperationalError("database or disk is full"), LogError),
        ((notices, "queue"), sqlite3.DatabaseError("database disk image is malformed"), LogError),
    ],
)
def test_what_is_no_fault_of_the_image_is_not_laid_to_it(
    again: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    where: tuple[object, str],
    told_as: type[BaseException],
) -> None:
    write(again / "in", STACK + 5, NEW)

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(*where, fail)
    with pytest.raises(told_as):
        run(again)
    monkeypatch.undo()
    assert f"day{STACK + 5:03d}" not in outcomes(logbook.connect(options(again).log_path))
    assert outcomes(run(again))[f"day{STACK + 5:03d}"] == "searched"


KILLER = """
import os, signal, sys

def kill(event, args):
    if event == "open" and "killer" in str(args[0]):
        frame = sys._getframe()
        while frame and "hashlib" not in frame.f_code.co_names:
            frame = frame.f_back
        if frame is None:
            os.kill(os.getpid(), signal.{signal})

sys.addaudithook(kill)
"""


@pytest.mark.long
@pytest.mark.parametrize("name", ["SIGSEGV", "SIGKILL"])
def test_a_file_that_kills_its_reader_is_passed_over_at_the_next_start(
    again: Path, name: str
) -> None:
    """A start costs a crash in the decompressor, or a kill for want of memory; the next one does not."""
    (again / "site").mkdir()
    (again / "site" / "sitecustomize.py").write_text(KILLER.format(signal=name))
    (again / "params.yaml").write_text(to_yaml(SETTINGS))
    write(again / "in", STACK + 5, NEW, name="killer")
    write(again / "in", STACK + 6, NEW)
    path = os.pathsep.join((str(again / "site"), *sys.path))
    deadly = os.environ | {"PYTHONPATH": path}
    sound = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for status in (-signal.Signals[name], 0):
        process = start(again, env=deadly)
        printed, _ = process.communicate(timeout=300)
        assert process.returncode == status, printed
    log = logbook.connect(again / "out" / "log.sqlite")
    assert outcomes(log)[f"day{STACK + 6:03d}"] == "searched"
    row = log.execute("SELECT outcome, reason FROM images WHERE name = 'killer'").fetchone()
    assert tuple(row) == (
        "rejected",
        f"crashes the process that reads it ({name}); fetch or write the file again",
    )
    process = start(again, "--again", env=sound)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    assert outcomes(log)["killer"] == "searched"


def test_an_image_at_which_somebody_killed_the_run_is_not_blamed(
    again: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(again / "in", STACK + 5, NEW)
    rehearsed = []
    rehearse = arrivals._fatal_to_read
    monkeypatch.setattr(
        arrivals, "_fatal_to_read", lambda path: rehearsed.append(path) or rehearse(path)
    )
    lock = again / "out" / "log.lock"
    # as a kill leaves it; the other file is gone
    lock.write_text(f"{'0' * 64}\n{files.sha256(path)}\n")
    assert outcomes(run(again))[path.stem] == "searched"
    assert rehearsed == [path]
    assert lock.read_text() == f"{'0' * 64}\n"


def test_a_file_whose_reading_does_not_end_is_passed_over(
    again: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(again / "in", STACK + 5, NEW)
    (again / "out" / "log.lock").write_text(f"{files.sha256(path)}\n")
    monkeypatch.setattr(arrivals, "TRIAL_S", 0.001)
    log = run(again)
    assert outcomes(log)[path.stem] == "rejected"
    assert (
        "takes longer than"
        in log.execute("SELECT reason FROM images WHERE name = ?", (path.stem,)).fetchone()[0]
    )


def test_a_run_says_what_it_found(
    again: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level("INFO", "blobpipe")
    path = write(again / "in", STACK + 5, NEW, (180.0, 300.0, 6.0, 0.08))
    run(again)
    [line] = [text for text in caplog.messages if text.startswith(f"{path.stem}: ")]
    assert re.search(r"1 new: #\d+ at \(\d+\.\d, \d+\.\d\), S/N \d+\.\d, depth \d+\.\d %", line)
    assert (
        "1 image: 1 searched, 0 for the stack alone, 0 rejected; 1 new, 0 seen again" in caplog.text
    )
    assert "review them: blobpipe serve --log" in caplog.text
    caplog.clear()
    run(again)
    assert "in: no image was logged; " in caplog.text


def test_a_folder_without_images_says_where_there_are_some(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "blobpipe")
    (tmp_path / "in").mkdir()
    run(tmp_path)
    assert "in: no FITS image in it, expected some" in caplog.text
    assert "name that folder" not in caplog.text
    (tmp_path / "in/2024").mkdir()
    write(tmp_path / "in/2024", 1)
    run(tmp_path)
    assert "in/2024 has some: name that folder" in caplog.text


def test_a_file_in_place_of_a_folder_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"SIMPLE")
    with pytest.raises(FrameError, match=r"in: a file, expected a folder .* 'blobpipe scan'"):
        run(tmp_path)


def test_bad_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(FrameError, match="in: not found, expected a folder of images"):
        run(tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "blobs.csv").write_text("a,b\n1,2\n")
    with pytest.raises(TableError, match=r"blobs.csv: column x_px is missing"):
        run(tmp_path, catalogue=tmp_path / "blobs.csv")
    wrong = Options(tmp_path / "log.sqlite", tmp_path / "none.safetensors", SETTINGS)
    with pytest.raises(ModelError, match=r"none\.safetensors"):
        quicklook(tmp_path / "in", wrong)


def write_large(path: Path, day: int, *blobs: Blob) -> np.ndarray:
    """An image of 1024 x 1024 pixels with 25 known blobs."""
    image = np.random.default_rng([8, day]).normal(0, 0.0076, (1024, 1024)).astype(np.float32)
    for x, y, radius, depth in (
        *((100 + 200 * k, 120 + 190 * j, 6.5, 0.08) for k in range(5) for j in range(5)),
        *blobs,
    ):
        window = image[round(y) - 20 : round(y) + 21, round(x) - 20 : round(x) + 21]
        window += depth * blob_profile("disc", radius, 0, 0)
    path.parent.mkdir(exist_ok=True)
    fits.PrimaryHDU(image, fits.Header({"EXPSTART": 60000.0 + day})).writeto(path)
    return image


@pytest.mark.slow
def test_from_the_file_to_the_mail_it_takes_less_than_five_seconds(tmp_path: Path) -> None:
    """On two cores, the process being up; the wait until the file is whole (2 s) is in it."""
    box = Mailbox()
    folder = tmp_path / "in"
    cache = tmp_path / "out" / "stack"
    with MailServer(box) as server:
        address = {
            "mail_to": ("team@example.org",),
            "mail_from": "blobs@example.org",
            "smtp_host": "127.0.0.1",
        }
        notices = Notices(**address, smtp_port=server.port, security="none")  # type: ignore[arg-type]
        params = Params().model_copy(update={"notices": notices})
        made = Options(tmp_path / "out" / "log.sqlite", MODEL, params)
        inbox = Inbox(folder, params.quicklook.settle_s)
        with _open_run(made, inbox) as opened:
            for day in range(params.difference.stack_size):  # as if they had been searched
                image = write_large(folder / f"day{day:03}.fits", day)
                row = {"run": 1, "kind": "image"}
                row |= {
                    "sha256": files.sha256(folder / f"day{day:03}.fits"),
                    "name": f"day{day:03}",
                }
                row |= {"mjd": 60000.0 + day, "logged": logbook.now(), "outcome": "searched"}
                number = logbook.insert(opened.connection, "images", row)
                logbook.insert(opened.connection, "corrections", {"image": number, "bytes": b""})
                running_stack.keep(Cache(cache), row["sha256"], image, b"")
            took = []
            for day in range(40, 43):
                sent_s: list[float] = []
                box.on_letter = lambda sent_s=sent_s: sent_s.append(time.monotonic())
                path = folder / f"new{day}.fits"
                write_large(path, day, (512.0, 230.0 + 5 * STACK * (day - 38), 6.0, 0.08))
                begun = time.monotonic()
                worked_s = time.process_time()
                processing.process(inbox, opened)
                time.sleep(params.quicklook.settle_s)
                processing.process(inbox, opened)
                took.append(
                    (sent_s[0] - begun, params.quicklook.settle_s + time.process_time() - worked_s)
                )
    assert [str(letter["Subject"]).split(" at ")[0] for letter in box.taken].count(
        "blobpipe: new blob"
    ) == 3
    wall_s, busy_s = (min(times) for times in zip(*took, strict=True))
    print(f"\nfrom file to mail: {wall_s:.2f} s; settling and processor time: {busy_s:.2f} s")
    assert min(wall_s, busy_s) < 5.0  # where others keep the processor busy, its time counts


def start(root: Path, *words: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    command = (
        sys.executable,
        "-m",
        "blobpipe",
        "quicklook",
        "in",
        "--log",
        "out/log.sqlite",
        *words,
    )
    return subprocess.Popen(
        command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
    )


def until(true: Callable[[], bool], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.2)


@pytest.mark.slow
def test_a_watch_and_a_manual_run_share_the_work(again: Path) -> None:
    (again / "params.yaml").write_text(to_yaml(SETTINGS))
    watching = start(again, "--watch")
    log = logbook.connect(again / "out" / "log.sqlite")
    try:
        until(lambda: log.execute("SELECT count(*) FROM runs").fetchone()[0] == 2)
        for day in range(STACK + 5, STACK + 11):
            write(again / "in", day, NEW)
        manual = start(again)
        printed, _ = manual.communicate(timeout=300)
        assert manual.returncode == 0, printed
        until(lambda: len(outcomes(log)) == STACK + 11)
    finally:
        watching.terminate()
        watching.communicate(timeout=30)
    assert set(outcomes(log).values()) == {"stack", "searched"}
    assert log.execute("SELECT count(*) - count(DISTINCT sha256) FROM images").fetchone()[0] == 0
    assert len(candidates(log)) == 1


@pytest.mark.parametrize(
    ("card", "kept"),
    [
        (b"LEVEL_E = 'bright'", None),
        (b"LEVEL_E = (1.0, 2.0)", None),
        (b"LEVEL_E = " + b"9" * 60, None),
        (b"LEVEL_E =", None),
        (b"LEVEL_E = T", None),
        (b"LEVEL_E = 20000", 20000.0),
        (b"EXPTIME =             1402,937", None),
        (b"PROPOSID= (1.0, 2.0)", None),
        (b"TARGNAME= 'TERRE \xe9clair\xe9e'", None),
    ],
    ids=str,
)
def test_an_image_with_an_odd_card_is_logged_without_it(
    tmp_path: Path, card: bytes, kept: float | None
) -> None:
    path = write(tmp_path / "in", 1)
    content = path.read_bytes()
    place = content.index(b"FILTER  =")
    path.write_bytes(content[:place] + card.ljust(80) + content[place + 80 :])
    log = run(tmp_path)
    row = log.execute("SELECT outcome, signal_e, header FROM images").fetchone()
    assert (row["outcome"], row["signal_e"]) == ("stack", kept)
    assert json.loads(row["header"], parse_constant=pytest.fail)["EXPSTART"] == 60001.0


def test_infinite_pixels_hide_no_blob(tmp_path: Path) -> None:
    """What is found is what would be found if they were NaN; so with numbers beyond all sense."""
    found = []
    for name, values in (("nan", [np.nan]), ("bad", [np.inf, -np.inf, 1e38])):
        for day in range(STACK + 1):
            (tmp_path / name).mkdir(exist_ok=True)
            path = write(tmp_path / name / "in", day, *([NEW] if day == STACK else []))
            with fits.open(path, mode="update") as hdus:
                rng = np.random.default_rng(day)
                bad = rng.random((SIDE, SIDE)) < 0.005
                hdus[0].data[bad] = rng.choice(values, int(bad.sum()))
        log = run(tmp_path / name)
        found.append(
            [
                tuple(row)
                for row in log.execute("SELECT status, x_px, y_px, snr, score FROM detections")
            ]
        )
    assert found[0] == found[1]
    assert [row[0] for row in found[0]].count("new") == 1


@pytest.mark.slow
def test_a_watch_lives_with_odd_names_and_dates_and_ends_with_its_log(again: Path) -> None:
    settings = SETTINGS.model_copy(update={"quicklook": Quicklook(settle_s=0.3)})
    (again / "params.yaml").write_text(to_yaml(settings))
    watching = start(again, "--watch")
    log = logbook.connect(again / "out" / "log.sqlite")
    try:
        until(lambda: log.execute("SELECT count(*) FROM runs").fetchone()[0] == 2)
        # which the watch for events cannot tell
        (again / "in" / os.fsdecode(b"folder\xe9.fits")).mkdir()
        for day, ahead_s in enumerate((3600.0, 1e9, 2e10), STACK + 5):
            path = write(again / "in", day, NEW)
            os.utime(path, (time.time() + ahead_s, time.time() + ahead_s))
        until(lambda: len(outcomes(log)) == STACK + 8)
        (again / "out" / "log.sqlite").rename(again / "out" / "moved.sqlite")
        printed, _ = watching.communicate(timeout=60)
    finally:
        watching.kill()
        watching.communicate()
    assert watching.returncode == 1
    assert set(outcomes(log).values()) == {"stack", "searched"}
    lines = printed.splitlines()
    assert sum("a folder, expected a FITS file" in line for line in lines) == 1
    assert lines[-1].startswith("blobpipe: ")
    assert "out/log.sqlite: moved, deleted or replaced while it was in use" in lines[-1]


def test_a_run_says_how_many_images_it_logged_and_where_each_is_positive(
    month: Path, again: Path
) -> None:
    write(again / "in", 60, NEW)
    assert quicklook(again / "in", options(again)) == 1
    assert quicklook(again / "in", options(again)) == 0
    log = logbook.connect(again / "out" / "log.sqlite")
    [searched] = log.execute("SELECT id FROM images WHERE name = 'day060'").fetchone()
    rows = log.execute(
        "SELECT row, col, positive, probability FROM subframes WHERE image = ?", (searched,)
    ).fetchall()
    new = (int(NEW[1]) // 256, int(NEW[0]) // 256)
    first = log.execute(
        "SELECT s.row, s.col FROM subframes s JOIN images i ON i.id = s.image WHERE s.positive AND i.name = ?",
        (f"day{STACK + 1:03d}",),
    ).fetchall()
    assert [tuple(row) for row in first] == [new]
    assert all(row["probability"] < 0.5 for row in rows if not row["positive"])


def test_what_is_taken_off_an_image_is_logged_for_every_image_of_a_stack(month: Path) -> None:
    log = logbook.connect(month / "out" / "log.sqlite")
    stacked = {
        row["name"]
        for row in log.execute("SELECT i.name FROM corrections c JOIN images i ON i.id = c.image")
    }
    assert stacked == {row["name"] for row in log.execute("SELECT name FROM images")}


def test_the_rehearsal_of_a_sound_file_ends_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What reads it in another process is code in a string: nothing else would see that it is none."""
    ended = []
    run_process = subprocess.run

    def run_and_note(*words: Any, **more: Any) -> Any:
        ended.append(run_process(*words, **more))
        return ended[-1]

    monkeypatch.setattr(subprocess, "run", run_and_note)
    assert arrivals._fatal_to_read(write(tmp_path, 1)) == ""
    assert [process.returncode for process in ended] == [0]


# --- bad pixels ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full_frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stack of full frames, and two days on which a new blob and a cluster of bad pixels show."""
    root = tmp_path_factory.mktemp("full")
    for day in range(STACK):
        masked.write(root / "in" / f"day{day:03d}.fits", day)
    for day in range(STACK, STACK + 2):
        blobs = (masked.NEW, masked.CLUSTER)
        masked.write(root / "in" / f"day{day:03d}.fits", day, *blobs)
    masked.write_mask(root / "mask.fits", masked.around(*masked.CLUSTER[:2], 9))
    return root


def places(log: sqlite3.Connection) -> set[tuple[int, int]]:
    """Candidates, to 10 px."""
    found = candidates(log)
    return {(round(x, -1), round(y, -1)) for x, y in zip(found["x_px"], found["y_px"], strict=True)}


BOTH = {(300, 600), (600, 450)}


def test_a_mask_keeps_a_cluster_of_bad_pixels_from_becoming_a_candidate(
    full_frames: Path, tmp_path: Path
) -> None:
    (tmp_path / "in").symlink_to(full_frames / "in")
    assert places(run(tmp_path)) == BOTH
    shutil.rmtree(tmp_path / "out")
    mask = full_frames / "mask.fits"
    log = run(tmp_path, bad_pixels=(mask,))
    assert places(log) == {(300, 600)}
    [row] = log.execute("SELECT bad_pixels FROM runs").fetchall()
    n_px = int(masked.around(*masked.CLUSTER[:2], 9).sum())
    assert json.loads(row["bad_pixels"]) == [
        {"file": str(mask), "n_px": n_px, "sha256": files.sha256(mask)}
    ]


@pytest.mark.parametrize("besides", [False, True])
def test_another_mask_makes_the_same_stacks_as_if_it_had_been_there_from_the_start(
    full_frames: Path, tmp_path: Path, besides: bool
) -> None:
    """The cache holds images without the pixels of the mask before; it is not used."""
    shutil.copytree(full_frames / "in", tmp_path / "in")
    last = tmp_path / "in" / f"day{STACK + 1:03d}.fits"
    late = last.rename(tmp_path / "late.fits")
    log_path = tmp_path / "out" / "log.sqlite"
    run(tmp_path, bad_pixels=(full_frames / "mask.fits",)).close()

    # a second mask, besides the first or instead of it
    other = masked.write_mask(tmp_path / "other.fits", masked.around(500, 500, 6))
    later = (full_frames / "mask.fits", other) if besides else (other,)
    late.rename(last)
    log = run(tmp_path, bad_pixels=later)
    [stack] = log.execute("SELECT stack_sha256 FROM images WHERE name = ?", (last.stem,))
    kept = (tmp_path / "out" / "stack").glob("*.npy")
    assert sum(not path.stem.endswith("-settled") for path in kept) == STACK + 2
    log.close()

    shutil.rmtree(log_path.parent)
    fresh = run(tmp_path, bad_pixels=later)
    [expected] = fresh.execute("SELECT stack_sha256 FROM images WHERE name = ?", (last.stem,))
    assert stack["stack_sha256"] == expected["stack_sha256"]


@pytest.mark.parametrize("kind", ["missing", "text", "of another size", "all bad", "no BPIX"])
def test_a_slip_in_the_mask_leaves_no_trace(full_frames: Path, tmp_path: Path, kind: str) -> None:
    masked.write(tmp_path / "in" / "day.fits", 1)
    path = tmp_path / "mask.fits"
    match kind:
        case "text":
            path.write_text("3 4\n")
        case "of another size":
            masked.write_mask(path, np.zeros((512, 512)))
        case "all bad":
            masked.write_mask(path, np.ones((1014, 1014)))
        case "no BPIX":
            columns = [fits.Column("A", "I", array=[1])]
            fits.BinTableHDU.from_columns(columns).writeto(path)
    with pytest.raises(BlobpipeError, match="expected") as caught:
        run(tmp_path, bad_pixels=(path,))
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "log.sqlite").exists()


def test_a_mask_for_images_of_another_size_leaves_no_trace(
    full_frames: Path, tmp_path: Path
) -> None:
    write(tmp_path / "in", 1, NEW)
    with pytest.raises(FrameError, match=r"mask\.fits: found 1024x1024 pixels, expected 512x512"):
        run(tmp_path, bad_pixels=(full_frames / "mask.fits",))
    log = logbook.connect(tmp_path / "out" / "log.sqlite")
    assert not log.execute("SELECT * FROM runs").fetchall()


# --- the operating point that a team has set -------------------------------------------------------------------------


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


@pytest.mark.parametrize("where", ["option", "settings"])
def test_a_run_with_an_operating_point_uses_its_threshold_and_says_so(
    again: Path, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "blobpipe")
    path = again / "point.yaml"
    point = calibrate_log(again / "out" / "log.sqlite", path, MODEL, budget=5.0, confidence=0.9)
    write_promised_point(path, replace(point, threshold=0.999999))
    write(again / "in", STACK + 5, NEW, (120.0, 300.0, 5.0, 0.03))
    if where == "option":
        log = run(again, operating_point=path)
    else:
        named = Quicklook(settle_s=0.0, operating_point=str(path))
        params = SETTINGS.model_copy(update={"quicklook": named})
        quicklook(again / "in", replace(options(again), params=params))
        log = logbook.connect(again / "out" / "log.sqlite")
    assert f"operating point: {path}, threshold 0.999999, at most 46.06" in caplog.text
    first, last = log.execute("SELECT * FROM runs ORDER BY id").fetchall()
    assert (first["operating_point_sha256"], first["false_alarms_per_100"]) == ("", None)
    assert last["threshold"] == 0.999999
    assert last["operating_point_sha256"] == files.sha256(path)
    assert last["false_alarms_per_100"] == 46.06
    assert len(candidates(log)) == 1


def test_a_point_of_another_model_leaves_no_trace_in_the_log(again: Path) -> None:
    path = again / "point.yaml"
    point = calibrate_log(again / "out" / "log.sqlite", path, MODEL, budget=5.0, confidence=0.9)
    write_promised_point(path, replace(point, model_sha256="a" * 64))
    with pytest.raises(ModelError, match="the operating point of the model aaaaaaaaaaaa"):
        run(again, operating_point=path)
    log = logbook.connect(again / "out" / "log.sqlite")
    assert log.execute("SELECT count(*) FROM runs").fetchone()[0] == 1
