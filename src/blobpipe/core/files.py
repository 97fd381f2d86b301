"""Files that are written whole or not at all, their hashes and their names.

Everything is written under a temporary name and then renamed, so that no run leaves half a file.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from blobpipe.errors import TableError

if TYPE_CHECKING:
    pass
MAX_NAME_BYTES = 200  # what file systems take (255), less suffixes and the rest of temporary names


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary name beside ``path``, renamed to it on success and removed on failure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = "".join(path.suffixes[-2:])
    temporary = path.with_name(f".{path.name.removesuffix(suffix)}.{os.getpid()}.tmp{suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.filename not in (None, str(temporary)):
            raise
        reason = (error.strerror or " ".join(str(error).split()))[:120]
        # NumPy hides why it wrote less than it was asked to: for lack of space
        hidden = errno.ENOSPC if "requested and" in reason else errno.EIO
        raise OSError(error.errno or hidden, reason, str(path)) from error  # now it names the file
    finally:
        temporary.unlink(missing_ok=True)


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_name(name: str) -> bool:
    """Whether a frame can be called so: its files lie in the folder that they are meant for, and no name is two.

    That is what can be printed, without slash or backslash, without a dot or dash at its start, and no longer than
    `MAX_NAME_BYTES`.
    """
    tidy = (
        name.isprintable()
        and not name.startswith((".", "-"))
        and "/" not in name
        and "\\" not in name
    )
    return tidy and 0 < len(name.encode()) <= MAX_NAME_BYTES


def require_name(name: str, where: str) -> None:
    """Refuse what `is_name` says no to; the message begins with ``where`` it was found.

    Raises
    ------
    TableError
        If it is none.
    """
    if not is_name(name):
        found = f"{name[:40]}..." if len(name) > 40 else name
        raise TableError(
            f"{where} is {found!r}, expected the name of a file: at most {MAX_NAME_BYTES} bytes that can be printed, no "
            "slash or backslash, no dot or dash at its start; correct it"
        )
