"""The folder that images come to: which of its files are images, whole, and not looked at yet.

Nothing here opens a file. What is no file, or cannot be looked at, is told of once and left; the rest goes on.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from blobpipe.core import fits_images
from blobpipe.errors import FrameError, printable

log = logging.getLogger(__name__)

# age by its own times; the clocks of drives and cards may be hours off, seldom a day
SURELY_WHOLE_S = 86_400.0
RETRY_S = 60.0  # until a file that could not be read is tried again, if it has not changed before
# of an exposure of many readouts, and some more: what is longer is not even read for its hash
MOST_BYTES = 2**30
MOST_NAMED = 20  # other files in the one line that says that they are left alone
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFBLK: "a block device",
    stat.S_IFCHR: "a character device",
}


class Stamp(NamedTuple):
    """What the system says of a file: the same stamp, the same bytes.

    The time of modification can be set by hand; the time of the last change of any kind and the inode cannot.
    """

    size_bytes: int
    modified_ns: int
    changed_ns: int
    inode: int

    @classmethod
    def of(cls, found: os.stat_result) -> Stamp:
        """The stamp of a file, in numbers that the log can hold: a date after 2262 has more bits, and some inodes."""
        numbers = (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)
        return cls(*((number + 2**63) % 2**64 - 2**63 for number in numbers))


class File(NamedTuple):
    """A file under the name that it has in the folder, which may be that of a link."""

    path: Path
    stamp: Stamp


@dataclass
class _Seen:
    """A file as it was at the last look: since when, and when it is to be looked at again (`time.monotonic`)."""

    stamp: Stamp
    since_s: float
    due_s: float


class Inbox:
    """The folder, and what earlier looks at it have found."""

    def __init__(self, folder: Path, settle_s: float) -> None:
        self.folder = folder
        self.settle_s = settle_s
        self._seen: dict[str, _Seen] = {}
        self._told: dict[str, str] = {}
        self._others_told = False

    def look(self) -> list[File]:
        """The files that may be new images, by name; those that `know` or `leave` was told of only if they changed.

        Raises
        ------
        FrameError
            If the folder cannot be read.
        """
        now = time.monotonic()
        folder = self.folder.resolve()
        seen = {}
        for name, stamp in self._stamps():
            before = self._seen.get(name)
            seen[name] = before if before and before.stamp == stamp else _Seen(stamp, now, now)
        self._seen = seen
        return [
            File(folder / name, seen[name].stamp)
            for name in sorted(seen)
            if seen[name].due_s <= now
        ]

    def unsettled_s(self, file: File) -> float:
        """For how long a file has yet to stay as it is before it counts as whole; not by its own times, which may lie."""
        newest_ns = max(file.stamp.modified_ns, file.stamp.changed_ns)
        if time.time() - newest_ns / 1e9 > SURELY_WHOLE_S:
            return 0.0
        return max(0.0, self._seen[file.path.name].since_s + self.settle_s - time.monotonic())

    def know(self, file: File) -> None:
        """Look at a file again only when it has changed."""
        self._seen[file.path.name].due_s = float("inf")

    def leave(self, file: File, reason: str) -> None:
        """Say once why a file is left for now; it is looked at again when it has changed, or in a minute."""
        self._seen[file.path.name].due_s = time.monotonic() + RETRY_S
        self._tell(file.path.name, reason)

    def _stamps(self) -> Iterator[tuple[str, Stamp]]:
        """The regular files whose names are those of images."""
        try:
            entries = [entry for entry in os.scandir(self.folder) if not entry.name.startswith(".")]
        except OSError as error:
            raise FrameError(
                f"{self.folder}: {error.strerror}, expected a folder of images that can be read"
            ) from error
        self._tell_of_others(
            [entry.name for entry in entries if not entry.name.endswith(fits_images.SUFFIXES)]
        )
        for entry in entries:
            if not entry.name.endswith(fits_images.SUFFIXES):
                continue
            try:
                found = entry.stat()
            except FileNotFoundError:
                if entry.is_symlink():  # else it has been moved while we looked
                    self._tell(
                        entry.name,
                        f"a link to {_target(entry)}, which is not there; mend or remove it",
                    )
                continue
            except OSError as error:
                loop = error.errno == errno.ELOOP
                self._tell(
                    entry.name,
                    "a link that leads back to itself; remove it" if loop else str(error.strerror),
                )
                continue
            if not stat.S_ISREG(found.st_mode):
                kind = KINDS.get(stat.S_IFMT(found.st_mode), "no file")
                self._tell(entry.name, f"{kind}, expected a FITS file; move it elsewhere")
            elif found.st_size > MOST_BYTES:
                self._tell(
                    entry.name, f"{found.st_size} bytes, expected an image of at most {MOST_BYTES}"
                )
            else:
                yield entry.name, Stamp.of(found)

    def _tell(self, name: str, reason: str) -> None:
        if self._told.get(name) != reason:
            self._told[name] = reason
            log.warning(
                "blobpipe: %s: %s (left alone)",
                printable(str(self.folder / name)),
                printable(reason),
            )

    def _tell_of_others(self, names: list[str]) -> None:
        """Name the files that are no images by their names, at the first look only."""
        if names and not self._others_told:
            more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
            listed = printable(", ".join(sorted(names)[:MOST_NAMED]))
            log.info("left alone, expected %s: %s%s", ", ".join(fits_images.SUFFIXES), listed, more)
        self._others_told = True


def _target(entry: os.DirEntry[str]) -> str:
    try:
        return str(Path(entry).readlink())
    except OSError:
        return "a file"


def path_text(path: Path) -> str:
    """A path as the log holds it; bytes that are no UTF-8 as escapes (``\\udce9``)."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def path_of(text: str) -> Path:
    """The path that `path_text` wrote."""
    return Path(
        re.sub(r"\\udc([89a-f][0-9a-f])", lambda found: chr(0xDC00 + int(found[1], 16)), text)
    )
