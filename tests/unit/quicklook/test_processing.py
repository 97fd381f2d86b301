"""One transaction an image, which no fault leaves half-written."""

from __future__ import annotations

import errno
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from tests.unit.quicklook.days import (
    NEW,
    SETTINGS,
    SIDE,
    STACK,
    candidates,
    deep_log,
    options,
    outcomes,
    run,
    start,
    until,
    write,
)

from blobpipe.core import files, fits_images
from blobpipe.detection.search import Observation, observe
from blobpipe.errors import LogError
from blobpipe.monitor import logbook, notices, thumbnails
from blobpipe.params import to_yaml
from blobpipe.quicklook import processing, running_stack
from blobpipe.quicklook import search as searching


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
    (folder / f".{searched[0]['sha256']}.1.tmp.difference").write_bytes(b"x")
    monkeypatch.setattr(thumbnails, "KEPT", 2)
    path = write(again / "in", STACK + 5, NEW)
    run(again).close()
    kept = {path.name.partition(".")[0] for path in folder.iterdir()}
    assert kept == {files.sha256(path), searched[-1]["sha256"]}


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


def test_pruning_leaves_the_files_of_others(tmp_path: Path) -> None:
    log, _ = deep_log(tmp_path, "", "new")
    folder = tmp_path / "pixels"
    folder.mkdir()
    own = [f".{1:064}.12.tmp.map"]
    others = ["notes.txt", "old.map", f"{7:064}.map", f".{7:064}.12.tmp.map"]
    for name in (*own, *others, f"{1:064}.difference"):
        (folder / name).write_bytes(b"x")
    processing._prune_pixels(log, tmp_path / "log.sqlite")
    assert {path.name for path in folder.iterdir()} == {*others, f"{1:064}.difference"}


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
        watching.communicate(timeout=300)
    assert set(outcomes(log).values()) == {"stack", "searched"}
    assert log.execute("SELECT count(*) - count(DISTINCT sha256) FROM images").fetchone()[0] == 0
    assert len(candidates(log)) == 1
