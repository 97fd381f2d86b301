"""A run of the daily routine: what it says, and that a slip in an option leaves no trace in the log."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from tests.servers import Mailbox, MailServer
from tests.unit.monitor import masked
from tests.unit.quicklook.days import (
    KNOWN,
    MODEL,
    NEW,
    SETTINGS,
    SIDE,
    STACK,
    Blob,
    candidates,
    options,
    outcomes,
    part,
    pixels,
    run,
    start,
    until,
    write,
)

import blobpipe
from blobpipe.core import files, fits_images, tables
from blobpipe.core.blob_shapes import blob_profile
from blobpipe.detection.promise import write_promised_point
from blobpipe.errors import BlobpipeError, FrameError, LogError, ModelError, TableError
from blobpipe.monitor import logbook
from blobpipe.monitor.inbox import Inbox
from blobpipe.monitor.scan import calibrate_log
from blobpipe.params import Notices, Params, Quicklook, to_yaml
from blobpipe.quicklook import processing, running_stack
from blobpipe.quicklook.options import Options
from blobpipe.quicklook.run import _open_run, quicklook
from blobpipe.quicklook.running_stack import Cache


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
    assert re.search(r"\d+ candidates? to decide on: blobpipe serve --log \S+$", caplog.text)
    caplog.clear()
    run(again)
    assert "in: no image was logged; " in caplog.text


def test_a_first_run_says_in_one_line_which_images_make_the_stack(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "blobpipe")
    for day in range(STACK + 2):
        write(tmp_path / "in", day)
    run(tmp_path)
    said = [text for text in caplog.messages if "model" not in text and "compiling" not in text]
    assert said[:3] == [
        f"{STACK + 2} new files in {tmp_path / 'in'}",
        f"{STACK} images kept for the first stack: day000 to day{STACK - 1:03d}",
        f"preparing the first stack from {STACK} images (once)",
    ]
    assert said[3].startswith(f"[{STACK + 1}/{STACK + 2}] day{STACK:03d}: ")
    assert said[4].startswith(f"[{STACK + 2}/{STACK + 2}] day{STACK + 1:03d}: ")


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


def list_images(folder: Path) -> None:
    """Write the list of the images in a folder, in order of date."""
    names = sorted(path.stem for path in folder.glob("*.fits"))
    rows = "".join(f"{name},{60000 + k}\n" for k, name in enumerate(names))
    (folder / "frames.csv").write_text(f"frame,mjd\n{rows}")


def rows_of(log: sqlite3.Connection) -> dict[str, list[dict[str, object]]]:
    """All rows of a log, without what differs from run to run and from folder to folder."""
    vary = ["run", "logged", "seen", "path", "inode", "changed_ns", "modified_ns"]
    found = {}
    for name in logbook.TABLES:
        if name != "runs":
            table = logbook.table(log, name).drop(columns=vary, errors="ignore")
            found[name] = table.astype(object).where(table.notna(), None).to_dict("records")
    return found


def test_batches_one_after_the_other_log_what_one_run_logs(
    month: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes its own images alone, and none of those that are logged."""
    monkeypatch.setattr(tables, "BATCH", 4)
    shutil.copytree(month / "in", tmp_path / "in")
    list_images(tmp_path / "in")
    run(tmp_path, batch=0).close()
    log = run(tmp_path, batch=1)
    assert list(outcomes(log)) == [f"day{day:03d}" for day in range(8)]
    log.close()
    assert quicklook(tmp_path / "in", options(tmp_path, batch=1)) == 0
    log = run(tmp_path, batch=2)
    whole = logbook.connect(month / "out/log.sqlite")
    assert rows_of(log) == rows_of(whole)
    pictures = "SELECT image, detection, kind, bytes FROM pictures ORDER BY id"
    both = [[tuple(row) for row in each.execute(pictures)] for each in (log, whole)]
    assert both[0] == both[1] != []
    with pytest.raises(TableError, match=r"frames.csv: found no batch 3, expected 0 to 2 for its"):
        run(tmp_path, batch=3)


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
        printed, _ = watching.communicate(timeout=300)
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
