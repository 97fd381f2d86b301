"""Watch the folder that images arrive in: which files are images, complete, and not yet looked at.

No file is opened here. An entry that is not a regular file, or cannot be examined, is reported once and skipped.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import re
import stat
import time
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from blobpipe.core import files, fits_images
from blobpipe.errors import FrameError, printable
from blobpipe.images.listing import LIKE_AN_IMAGE, say_skipped

log = logging.getLogger(__name__)

# age (s) from which a file counts as complete whatever its own times say: the clocks of network
# drives and memory cards may be hours off, seldom a day
SURELY_WHOLE_S = 86_400.0
RETRY_S = 60.0  # pause (s) before an unchanged file that could not be read is tried again
MOST_BYTES = 2**30  # largest file that is read: more than an exposure of many readouts
KNOWN_PER_LOOK = 1000  # known files that are examined at a look, if there are more, in turns
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFBLK: "a block device",
    stat.S_IFCHR: "a character device",
}


def refuse_difference(frame: fits_images.Frame, path: Path) -> None:
    """Refuse a difference image of the pipeline where a stack is to be subtracted.

    Raises
    ------
    FrameError
        If it is one.
    """
    # The name alone does not tell: other programs use it, too
    if frame.header.get("EXTNAME") == "DIFFERENCE" and "NSTACK" in frame.header:
        raise FrameError(
            f"{path}: found a difference image, expected a blob image; give --difference"
        )


def require_short_name(path: Path) -> None:
    """Refuse an image after which no file can be named.

    Raises
    ------
    FrameError
        If its name is longer than `files.MAX_NAME_BYTES`.
    """
    n_bytes = len(fits_images.frame_name(path).encode())
    if n_bytes > files.MAX_NAME_BYTES:
        raise FrameError(
            f"{path}: found a name of {n_bytes} bytes, expected at most {files.MAX_NAME_BYTES}; rename the file"
        )


class Stamp(NamedTuple):
    """Identify the content of a file without reading it: the same stamp means the same bytes.

    The modification time can be set by hand; the time of the last change of any kind and the inode cannot.
    """

    size_bytes: int
    modified_ns: int
    changed_ns: int
    inode: int

    @classmethod
    def of(cls, found: os.stat_result) -> Stamp:
        """Take the stamp of a file, in the 64-bit integers that the log can hold.

        Dates after 2262 and some inodes need more bits; they are wrapped around.
        """
        numbers = (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)
        return cls(*((number + 2**63) % 2**64 - 2**63 for number in numbers))


class File(NamedTuple):
    """Pair a file with its stamp; the path is the name in the folder, which may be that of a link."""

    path: Path
    stamp: Stamp


@dataclass
class _Seen:
    """Record a file as it was at the last look.

    Attributes
    ----------
    stamp : Stamp
    since_s : float
        Time of the first look that found this stamp (s of `time.monotonic`).
    due_s : float
        Time from which it is to be looked at again (s of `time.monotonic`).
    """

    stamp: Stamp
    since_s: float
    due_s: float

    @property
    def known(self) -> bool:
        """Return whether it is listed again only after a change."""
        return self.due_s == math.inf


class Inbox:
    """Keep track of a folder and of what earlier looks at it have found.

    Parameters
    ----------
    folder : path
    settle_s : float
        Time (s) for which a file must stay unchanged before it counts as complete.
    frames : container of str, optional
        Names of images, without ``.fits`` and the like; files of other names are left alone.
    """

    def __init__(self, folder: Path, settle_s: float, frames: Container[str] | None = None) -> None:
        self.folder = folder
        self.settle_s = settle_s
        self.frames = frames
        self._seen: dict[str, _Seen] = {}
        self._reported: dict[str, str] = {}
        self._others: set[str] = set()
        self._looks = 0

    def look(self) -> list[File]:
        """List the files that may be new images, by name.

        A file that was passed to `know` or `leave` is listed only once it has changed or is due again. Of more than
        `KNOWN_PER_LOOK` known files, a change is noticed when it is the file's turn: of 10,000, at one of ten looks.

        Raises
        ------
        FrameError
            If the folder cannot be read.
        """
        now = time.monotonic()

        # a changed file starts anew, an unchanged one keeps its history
        seen = {}
        for name, stamp in self._stamps():
            before = self._seen.get(name)
            unchanged = before is not None and before.stamp == stamp
            seen[name] = before if before and unchanged else _Seen(stamp, now, now)
        self._seen = seen

        folder = self.folder.resolve()
        due = [name for name in sorted(seen) if seen[name].due_s <= now]
        return [File(folder / name, seen[name].stamp) for name in due]

    def unsettled_s(self, file: File) -> float:
        """Return how long (s) a file must still stay unchanged before it counts as complete.

        The file's own times decide only when they are far in the past: they may be wrong.
        """
        newest_ns = max(file.stamp.modified_ns, file.stamp.changed_ns)
        if time.time() - newest_ns / 1e9 > SURELY_WHOLE_S:
            return 0.0
        settled_s = self._seen[file.path.name].since_s + self.settle_s
        return max(0.0, settled_s - time.monotonic())

    def know(self, file: File) -> None:
        """Do not list a file again until it has changed."""
        self._seen[file.path.name].due_s = math.inf

    def leave(self, file: File, reason: str) -> None:
        """Report once why a file is skipped; it is listed again when it has changed, or in a minute."""
        self._seen[file.path.name].due_s = time.monotonic() + RETRY_S
        self._report(file.path.name, reason)

    def _stamps(self) -> Iterator[tuple[str, Stamp]]:
        """Yield name and stamp of each regular file that is named like an image."""
        try:
            entries = [entry for entry in os.scandir(self.folder) if not entry.name.startswith(".")]
        except OSError as error:
            raise FrameError(
                f"{self.folder}: {error.strerror}, expected a folder of images that can be read"
            ) from error

        names = [entry.name for entry in entries]
        self._report_others([name for name in names if not name.endswith(fits_images.SUFFIXES)])

        # Examining a file takes most of the time of a look
        n_known = 0
        n_turns = math.ceil(sum(seen.known for seen in self._seen.values()) / KNOWN_PER_LOOK)
        self._looks += 1

        for entry in entries:
            if not self._is_named_like_an_image(entry.name):
                continue
            before = self._seen.get(entry.name)
            if before and before.known:
                n_known += 1
                if (n_known + self._looks) % max(1, n_turns):
                    yield entry.name, before.stamp
                    continue
            found = self._stat(entry)
            if found is None:
                continue
            # reading a pipe would block, a device might never end
            if not stat.S_ISREG(found.st_mode):
                kind = KINDS.get(stat.S_IFMT(found.st_mode), "not a file")
                self._report(entry.name, f"{kind}, expected a FITS file; move it elsewhere")
                continue
            # even its hash would take too long
            if found.st_size > MOST_BYTES:
                reason = f"{found.st_size} bytes, expected an image of at most {MOST_BYTES} bytes; move it elsewhere"
                self._report(entry.name, reason)
                continue
            yield entry.name, Stamp.of(found)

    def _is_named_like_an_image(self, name: str) -> bool:
        """Return whether a file has the name of an image, and of one that is asked for."""
        if not name.endswith(fits_images.SUFFIXES):
            return False
        return self.frames is None or fits_images.frame_name(name) in self.frames

    def _stat(self, entry: os.DirEntry[str]) -> os.stat_result | None:
        """Return the status of an entry, links followed; report it and return None if there is none."""
        try:
            return entry.stat()
        except FileNotFoundError:
            # a plain file that is missing was only moved in the meantime
            if entry.is_symlink():
                target = _link_target(entry)
                self._report(
                    entry.name, f"a link to {target}, which does not exist; repair or remove it"
                )
        except OSError as error:
            if error.errno == errno.ELOOP:
                self._report(entry.name, "a link that leads back to itself; remove it")
            else:
                self._report(entry.name, str(error.strerror))
        return None

    def _report(self, name: str, reason: str) -> None:
        """Warn about an entry, unless the same was said of it before."""
        if self._reported.get(name) == reason:
            return
        self._reported[name] = reason
        path = printable(str(self.folder / name))
        log.warning("blobpipe: %s: %s (skipped)", path, printable(reason))

    def _report_others(self, names: list[str]) -> None:
        """List once the files that are not named like images; after the first look, only those that might be some."""
        first = self._looks == 0
        new = [
            name
            for name in names
            if name not in self._others and (first or LIKE_AN_IMAGE.search(name))
        ]
        self._others.update(new)
        say_skipped(new)


def _link_target(entry: os.DirEntry[str]) -> str:
    """Return what a link points to, in words if it cannot be read."""
    try:
        return str(Path(entry).readlink())
    except OSError:
        return "a file"


def path_text(path: Path) -> str:
    """Write a path as text for the log, with bytes that are not UTF-8 as escapes (``\\udce9``)."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def path_of(text: str) -> Path:
    """Read a path that `path_text` wrote."""
    escape = r"\\udc([89a-f][0-9a-f])"
    return Path(re.sub(escape, lambda found: chr(0xDC00 + int(found[1], 16)), text))
