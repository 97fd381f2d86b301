"""Files of a folder: each image exactly once, whatever comes, and no file harms the others."""

from __future__ import annotations

import errno
import gzip
import hashlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from astropy.io import fits
from tests.unit.quicklook.days import (
    KNOWN,
    MODEL,
    NEW,
    SETTINGS,
    STACK,
    candidates,
    options,
    outcomes,
    pixels,
    run,
    start,
    write,
)

from blobpipe.core import files, fits_images
from blobpipe.core.detector import Detector
from blobpipe.errors import FrameError
from blobpipe.monitor import catalogue, logbook
from blobpipe.monitor.inbox import Inbox
from blobpipe.params import Quicklook, to_yaml
from blobpipe.quicklook import arrivals, processing
from blobpipe.quicklook import search as searching
from blobpipe.quicklook.options import Options


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


def test_a_difference_image_is_rejected_and_enters_no_stack(again: Path) -> None:
    header = fits.Header({"EXPSTART": 60000.0 + STACK + 5, "NSTACK": 30})
    made = fits.ImageHDU(pixels(91, KNOWN), header, name="DIFFERENCE")
    fits.HDUList([fits.PrimaryHDU(), made]).writeto(again / "in" / "difference.fits")
    [row] = run(again).execute("SELECT outcome, reason FROM images WHERE name = 'difference'")
    assert row["outcome"] == "rejected"
    assert "found a difference image, expected a blob image; give --difference" in row["reason"]


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


def test_the_rehearsal_of_a_sound_file_ends_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What reads it in another process is code in a string: nothing else would see that it is none."""
    path = write(tmp_path, 1)
    ended = []
    run_process = subprocess.run

    def run_and_note(words: Any, **more: Any) -> Any:
        process = run_process(words, **more)
        # A library that is used for the first time may run a program of its own
        if path in words:
            ended.append(process)
        return process

    monkeypatch.setattr(subprocess, "run", run_and_note)
    assert arrivals._fatal_to_read(path) == ""
    assert [process.returncode for process in ended] == [0]
