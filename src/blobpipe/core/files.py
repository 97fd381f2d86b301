"""Files that are written completely or not at all, their hashes and their names.

Everything is written under a temporary name and then renamed, so that no run leaves an incomplete file.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from blobpipe.errors import TableError

# Longest name of a frame (bytes): file systems take 255, less suffixes and the rest of temporary names
MAX_NAME_BYTES = 200


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``, renamed to it on success and removed on failure.

    Raises
    ------
    OSError
        If writing fails; its file name is ``path``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = "".join(path.suffixes[-2:])
    stem = path.name.removesuffix(suffix)
    temporary = path.with_name(f".{stem}.{os.getpid()}.tmp{suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        # An error about another file is not of this writing
        if error.filename not in (None, str(temporary)):
            raise
        reason = (error.strerror or " ".join(str(error).split()))[:120]
        # NumPy gives no number when it writes less than it was asked to, which is for lack of space
        hidden = errno.ENOSPC if "requested and" in reason else errno.EIO
        raise OSError(error.errno or hidden, reason, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def sha256(path: str | Path) -> str:
    """Return the hexadecimal SHA-256 of the bytes of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_name(name: str) -> bool:
    """Say if a string can be the name of a frame, so that its files lie in the folder that they are meant for.

    A name is printable, has no slash or backslash, begins with neither a dot nor a dash, and has at most
    `MAX_NAME_BYTES` bytes.
    """
    has_separator = "/" in name or "\\" in name
    tidy = name.isprintable() and not name.startswith((".", "-")) and not has_separator
    return tidy and 0 < len(name.encode()) <= MAX_NAME_BYTES


def require_name(name: str, where: str) -> None:
    """Refuse a string that cannot be the name of a frame.

    Parameters
    ----------
    name : str
    where : str
        Where it was found; the message begins with it.

    Raises
    ------
    TableError
        If `is_name` says no.
    """
    if not is_name(name):
        found = f"{name[:40]}..." if len(name) > 40 else name
        raise TableError(
            f"{where} is {found!r}, expected the name of a file: at most {MAX_NAME_BYTES} printable bytes, no slash or "
            "backslash, no dot or dash at the beginning; correct it"
        )
