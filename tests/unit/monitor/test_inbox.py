"""The folder of the daily routine: what is taken for an image, when it is whole, and what is said of the rest."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from blobpipe.errors import FrameError
from blobpipe.monitor import inbox
from blobpipe.monitor.inbox import Inbox, Stamp, path_of, path_text

NOW_S = 1.8e9


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The monotonic clock, to be set."""
    time_s = [100.0]
    monkeypatch.setattr(inbox.time, "monotonic", lambda: time_s[0])
    return time_s


def names(box: Inbox) -> list[str]:
    return [file.path.name for file in box.look()]


def test_images_are_known_by_their_names(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("b.fits", "a.fits.gz", "c.fits.fz", ".hidden.fits", "frames.csv", "d.FITS"):
        (folder / name).touch()
    box = Inbox(folder, 0.0)
    with caplog.at_level(logging.INFO):
        assert names(box) == names(box) == ["a.fits.gz", "b.fits", "c.fits.fz"]
    assert caplog.messages == ["skipped, expected .fits.fz, .fits, .fits.gz: d.FITS, frames.csv"]


def test_a_watch_tells_of_images_that_come_under_other_suffixes(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    box = Inbox(folder, 0.0)
    with caplog.at_level(logging.INFO):
        assert names(box) == []
        for name in ("a.FITS", "b.fits.bz2", "c.fit", "d.fits.part", "notes.txt"):
            (folder / name).touch()
        assert names(box) == names(box) == []
    expected = "skipped, expected .fits.fz, .fits, .fits.gz: a.FITS, b.fits.bz2, c.fit"
    assert caplog.messages == [expected]


def test_only_the_images_that_are_asked_for_are_listed(folder: Path) -> None:
    for name in ("a.fits", "b.fits.fz", "c.fits", "b2.fits", "b.txt"):
        (folder / name).touch()
    assert names(Inbox(folder, 0.0, {"b", "c", "d"})) == ["b.fits.fz", "c.fits"]
    assert names(Inbox(folder, 0.0, set())) == []


@pytest.mark.parametrize(("n_files", "most"), [(9, 9), (30, 10), (35, 9)])
def test_known_files_are_examined_in_turns(
    folder: Path, monkeypatch: pytest.MonkeyPatch, n_files: int, most: int
) -> None:
    """A thousand at a look, here ten; any change is noticed, new files at once."""
    monkeypatch.setattr(inbox, "KNOWN_PER_LOOK", 10)
    examined: list[str] = []
    stat = Inbox._stat
    monkeypatch.setattr(
        Inbox, "_stat", lambda box, entry: (examined.append(entry.name), stat(box, entry))[1]
    )
    box = Inbox(folder, 0.0)
    for number in range(n_files):
        (folder / f"{number:02d}.fits").touch()
    for file in box.look():
        box.know(file)
    looks = -(-n_files // 10)
    for _ in range(3):
        examined.clear()
        for _ in range(looks):
            before = len(examined)
            assert names(box) == []
            assert len(examined) - before <= most
        assert len(set(examined)) == len(examined) == n_files
    (folder / "07.fits").write_text("changed")
    (folder / "new.fits").touch()
    found = names(box)
    assert "new.fits" in found
    for _ in range(looks):
        found += names(box)
    assert "07.fits" in found
    assert set(found) == {"07.fits", "new.fits"}


def test_what_is_no_file_is_told_of_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "folder.fits").mkdir()
    os.mkfifo(folder / "pipe.fits")
    (folder / "loop.fits").symlink_to(folder / "loop.fits")
    (folder / "gone.fits").symlink_to(folder / "nothing")
    (folder / "zero.fits").symlink_to("/dev/zero")
    with open(folder / "long.fits", "wb") as file:
        file.truncate(inbox.MOST_BYTES + 1)
    box = Inbox(folder, 0.0)
    assert names(box) == names(box) == []
    said = {
        message.split(":")[1].split("/")[-1]: message.split(": ", 2)[2]
        for message in caplog.messages
    }
    assert len(caplog.messages) == 6
    assert said == {
        "folder.fits": "a folder, expected a FITS file; move it elsewhere (skipped)",
        "pipe.fits": "a named pipe, expected a FITS file; move it elsewhere (skipped)",
        "loop.fits": "a link that leads back to itself; remove it (skipped)",
        "gone.fits": f"a link to {folder / 'nothing'}, which does not exist; repair or remove it (skipped)",
        "zero.fits": "a character device, expected a FITS file; move it elsewhere (skipped)",
        "long.fits": f"{inbox.MOST_BYTES + 1} bytes, expected an image of at most {inbox.MOST_BYTES} bytes; move it elsewhere (skipped)",
    }


def test_a_link_has_its_own_name_and_the_bytes_of_its_target(folder: Path) -> None:
    (folder.parent / "9f86d081").write_bytes(b"12345")
    (folder / "day001.fits.gz").symlink_to(folder.parent / "9f86d081")
    (folder.parent / "today").symlink_to(folder)
    [file] = Inbox(folder.parent / "today", 0.0).look()
    assert file.path == folder.resolve() / "day001.fits.gz"
    assert file.stamp.size_bytes == 5


def test_a_link_to_what_comes_later_is_taken_then(folder: Path) -> None:
    (folder / "day001.fits").symlink_to(folder.parent / "later")
    box = Inbox(folder, 0.0)
    assert names(box) == []
    (folder.parent / "later").touch()
    assert names(box) == ["day001.fits"]


@pytest.mark.parametrize("ahead_s", [-7200.0, 0.0, 7200.0, 40 * 3.15e7, 600 * 3.15e7])
def test_a_file_is_whole_when_it_stays_as_it_is_whatever_its_date(
    folder: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch, ahead_s: float
) -> None:
    path = folder / "day001.fits"
    path.touch()
    box = Inbox(folder, 2.0)

    def unsettled_s(size: int) -> float:
        path.write_bytes(bytes(size))
        os.utime(path, (NOW_S + ahead_s, NOW_S + ahead_s))
        [file] = box.look()
        return box.unsettled_s(file)

    monkeypatch.setattr(inbox.time, "time", lambda: NOW_S)
    monkeypatch.setattr(
        inbox.Stamp,
        "of",
        lambda found: Stamp(found.st_size, found.st_mtime_ns, found.st_mtime_ns, 1),
    )
    assert unsettled_s(1) == 2.0
    clock[0] += 1.5
    assert unsettled_s(1) == 0.5
    clock[0] += 1.0
    assert unsettled_s(2) == 2.0  # it has grown
    clock[0] += 2.0
    assert unsettled_s(2) == 0.0


def test_a_file_that_has_not_changed_for_a_day_is_whole_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "day001.fits").touch()
    box = Inbox(folder, 2.0)
    [file] = box.look()
    assert box.unsettled_s(file) > 1.9
    monkeypatch.setattr(
        inbox.time, "time", lambda: file.stamp.changed_ns / 1e9 + inbox.SURELY_WHOLE_S + 1
    )
    assert box.unsettled_s(file) == 0.0


@pytest.mark.parametrize("what", ["bytes", "time", "inode"])
def test_a_known_file_is_offered_again_only_when_it_has_changed(folder: Path, what: str) -> None:
    path = folder / "day001.fits"
    path.write_bytes(b"one")
    other = folder / ".other"
    other.write_bytes(b"two")
    box = Inbox(folder, 0.0)
    [file] = box.look()
    box.know(file)
    assert box.look() == []
    before = path.stat()
    match what:
        case "bytes":
            path.write_bytes(b"four")
        case "time":
            os.utime(path, ns=(1, 1))
        case "inode":  # of the same size and time
            os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
            os.replace(other, path)
            assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert names(box) == ["day001.fits"]


def test_a_file_that_was_left_is_offered_again_in_a_minute_and_told_of_once(
    folder: Path, clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "day001.fits").touch()
    box = Inbox(folder, 0.0)
    for _ in range(3):
        [file] = box.look()
        box.leave(file, "Input/output error")
        assert box.look() == []
        clock[0] += inbox.RETRY_S
    assert caplog.messages == [f"blobpipe: {folder / 'day001.fits'}: Input/output error (skipped)"]


def test_names_that_are_no_text_can_be_written_down(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = os.fsdecode(b"day\xe9.fits")
    (folder / name).mkdir()
    (folder / "new\nline\x1b[31m.fits").mkdir()
    assert Inbox(folder, 0.0).look() == []
    assert sorted(message.split(": ")[1].rpartition("/")[2] for message in caplog.messages) == [
        r"day\udce9.fits",
        r"new\nline\x1b[31m.fits",
    ]
    for odd in (name, "plain.fits", "ünïcødé.fits", r"C:\udir\udc.fits"):
        assert path_of(path_text(Path(odd))) == Path(odd)
        assert path_text(Path(odd)).encode("utf-8")


def test_dates_and_inodes_of_any_length_fit_into_the_log() -> None:
    found = SimpleNamespace(st_size=5, st_mtime_ns=2 * 10**19, st_ctime_ns=1, st_ino=2**64 - 1)
    assert Stamp.of(found).inode == -1
    assert all(-(2**63) <= number < 2**63 for number in Stamp.of(found))


def test_a_folder_that_is_gone_is_named(folder: Path) -> None:
    box = Inbox(folder, 0.0)
    folder.rmdir()
    with pytest.raises(
        FrameError, match="in: No such file or directory, expected a folder of images"
    ):
        box.look()
