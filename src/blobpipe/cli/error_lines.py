"""Faults of the input or the machine, each in one line."""

from __future__ import annotations

import errno

from blobpipe.errors import BlobpipeError, printable

# What to do about an error of the system, by its number
ADVICE = {
    **dict.fromkeys(
        (errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free some space or choose another folder"
    ),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "change its permissions or choose another"),
    errno.EROFS: "choose a folder you can write to",
    errno.ENAMETOOLONG: "choose a shorter one; most file systems take 255 bytes",
    **dict.fromkeys(
        (errno.ENOTDIR, errno.EEXIST), "correct the name; this is a file, expected a folder"
    ),
    errno.EISDIR: "name a file",
    errno.ELOOP: "correct the link; it leads back to itself",
    errno.EMFILE: "raise the limit with 'ulimit -n'",
    errno.EIO: "look at the disk; it could not be read or written",
}


def one_line(error: Exception) -> str:
    """Describe a fault of the input or the machine in one line; return "" for a bug, which needs a traceback."""
    import sqlite3

    match error:
        case BlobpipeError():
            line = str(error)
        case FileNotFoundError() if error.filename is not None:
            line = f"{error.filename}: not found; run the stage that makes it first, or correct the name"
        case OSError() if error.strerror:
            advice = f"; {ADVICE[error.errno]}" if error.errno in ADVICE else ""
            line = f"{'writing' if error.filename is None else error.filename}: {error.strerror}{advice}"
        case OSError():
            line = " ".join(str(error).split()) or type(error).__name__
        case sqlite3.Error():
            from blobpipe.monitor.logbook import reason

            line = f"the log: {reason(error)}"
        case MemoryError():
            line = "not enough memory; end other programs, or use smaller images or fewer threads"
        case RecursionError():
            line = "found an input that is nested too deeply to be read; --debug says where"
        case UnicodeError():  # its own message shows the bytes alone
            line = "found text in another encoding, expected UTF-8; --debug says where"
        case _:
            return ""
    return printable(line)
