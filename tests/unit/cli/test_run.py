"""The entry point: errors end as one line, with their exit status."""

from __future__ import annotations

import ctypes
import errno
import importlib
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from tests.unit import synthetic_log

from blobpipe import __version__, cli
from blobpipe.cli.paths import LOG
from blobpipe.cli.run import HEAPS, PIPE_CLOSED
from blobpipe.errors import BlobpipeError

ERRORS = {
    "a.fits: 3\\npixels": BlobpipeError("a.fits: 3\npixels"),
    "data/clip/a.fits.fz: No space left on device; free some": OSError(errno.ENOSPC, "No space left on device", "data/clip/a.fits.fz"),
    "out: Read-only file system; choose a folder": OSError(errno.EROFS, "Read-only file system", "out"),
    "a.csv: not found": FileNotFoundError(errno.ENOENT, "No such file or directory", "a.csv"),
    "writing: No such file or directory": FileNotFoundError(errno.ENOENT, "No such file or directory"),
    "without a number": OSError("without a number"),
    "OSError": OSError(),
    "writing: Disk quota exceeded; free some space": OSError(errno.EDQUOT, "Disk quota exceeded"),
    "a: Permission denied; change its permissions or choose another": OSError(errno.EACCES, "Permission denied", "a"),
    "a\\nb: Is a directory; name a file": OSError(errno.EISDIR, "Is a directory", "a\nb"),
    "a: Input/output error; look at the disk": OSError(errno.EIO, "Input/output error", "a"),
    "a: Connection refused": OSError(errno.ECONNREFUSED, "Connection refused", "a"),
    "the log: disk I/O error; expected": sqlite3.OperationalError("disk I/O error"),
    "not enough memory; end other programs": MemoryError(),
    "found an input that is nested too deeply": RecursionError("maximum recursion depth exceeded"),
    "found text in another encoding, expected UTF-8; --debug": UnicodeEncodeError("ascii", "\xdc", 0, 1, "not in range"),
}  # fmt: skip


def fail_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(importlib.import_module("blobpipe.images.clip"), "clip", fail)


@pytest.mark.parametrize("message", ERRORS)
def test_an_error_is_one_line_and_status_1(
    message: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(ERRORS[message], monkeypatch)
    assert cli.main(["clip"]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith(f"blobpipe: {message}")
    assert err.count("\n") == 1
    assert ("space" in err) == (
        getattr(ERRORS[message], "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    )
    assert "xdc" not in err


@pytest.mark.parametrize("message", ERRORS)
def test_debug_shows_the_traceback(
    message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(ERRORS[message], monkeypatch)
    with pytest.raises(type(ERRORS[message])):
        cli.main(["clip", "--debug"])


def test_an_interrupt_is_one_line_and_status_130(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(KeyboardInterrupt(), monkeypatch)
    assert cli.main(["clip"]) == 130
    assert capsys.readouterr().err.count("\n") == 1


def test_a_fault_of_ours_is_not_hidden(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(ZeroDivisionError(), monkeypatch)
    with pytest.raises(ZeroDivisionError):
        cli.main(["clip"])


@pytest.mark.parametrize(
    "words",
    [["params"], ["log", "images"], ["log", "notices"], ["check", "none.fits", "none.fits"]],
)
def test_a_closed_pipe_ends_it_without_a_word(folder: Path, words: list[str]) -> None:
    synthetic_log.make_log(Path(LOG), 40).close()
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "blobpipe", *words],
        stdout=write,
        stderr=subprocess.PIPE,
        timeout=300,
        check=False,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (PIPE_CLOSED, b"")


def test_output_without_space_is_one_line(folder: Path) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "blobpipe", "params"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert (
        done.stderr
        == "blobpipe: writing: No space left on device; free some space or choose another folder\n"
    )


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["log", "images", "--log", "x" * 300], "File name too long; choose a shorter one"),
        (["quicklook", "x" * 300], "File name too long; choose a shorter one"),
        (["page", "--log", "there/x", "--out", "out"], "there/x: not found"),
        (["log", "images", "--log", "there"], "it cannot be opened"),
        (
            ["log", "images", "--log", LOG, "--out", "there/file/x.csv"],
            "this is a file, expected a folder",
        ),
        (["log", "images", "--log", LOG, "--out", f"{'y' * 300}.csv"], "File name too long"),
    ],
)
def test_a_name_that_cannot_be_used_has_its_reason(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], reason: str
) -> None:
    synthetic_log.make_log(Path(LOG), 40).close()
    Path("there").mkdir()
    Path("there/file").touch()
    assert cli.main(words) == 1
    err = capsys.readouterr().err
    assert reason in err
    assert err.count("\n") == 1
    assert "free some space" not in err


def test_the_installed_command_and_the_module_are_the_same() -> None:
    """One line on stderr, and no traceback unless asked for."""
    command = [sys.executable, "-m", "blobpipe", "clip", "--params", "none.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("blobpipe: none.yaml: ")
    assert done.stderr.count("\n") == 1
    done = subprocess.run([*command, "--debug"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    script = shutil.which("blobpipe", path=str(Path(sys.executable).parent))
    if script:
        version = subprocess.run(
            [script, "--version"], capture_output=True, text=True, check=True
        ).stdout
        assert version.split()[-1] == __version__


HEAPS_OF_THREADS = """
import ctypes, sys, threading
from blobpipe.cli.run import keep_memory

keep_memory()
library = ctypes.CDLL(None)
library.malloc.restype = library.fopen.restype = ctypes.c_void_p
library.free.argtypes = library.fclose.argtypes = (ctypes.c_void_p,)
library.malloc_info.argtypes = (ctypes.c_int, ctypes.c_void_p)
together = threading.Barrier(4)

def work():
    held = library.malloc(2**20)
    together.wait()
    library.free(held)

threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
file = library.fopen(sys.argv[1].encode(), b"w")
library.malloc_info(0, file)
library.fclose(file)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="not the GNU C library")
def test_threads_leave_no_heaps_of_their_own(tmp_path: Path) -> None:
    """Else a watch grows with each image: a heap that a thread has left is kept, and used by nobody."""
    subprocess.run((sys.executable, "-c", HEAPS_OF_THREADS, tmp_path / "heaps.xml"), check=True)
    assert (tmp_path / "heaps.xml").read_text().count("<heap nr=") == HEAPS
