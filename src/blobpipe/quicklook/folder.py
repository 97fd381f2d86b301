"""Check the folder of images before anything else is imported or read: a name that is mistyped costs no time."""

from __future__ import annotations

from pathlib import Path

from blobpipe.errors import FrameError


def require_folder(folder: Path) -> None:
    """Refuse what is not a folder.

    Raises
    ------
    FrameError
        If the path is that of a file, or of nothing.
    """
    if folder.is_file():
        raise FrameError(
            f"{folder}: a file, expected a folder of images; name its folder ({folder.parent}), or search this one "
            "image with 'blobpipe scan'"
        )
    if not folder.is_dir():
        raise FrameError(
            f"{folder}: not found, expected a folder of images; make it or correct the name"
        )
