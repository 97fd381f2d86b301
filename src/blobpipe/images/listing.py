"""List the image files of a folder, and name those that are skipped for their suffix."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path

from blobpipe.core.fits_images import SUFFIXES
from blobpipe.errors import printable

log = logging.getLogger(__name__)

# Names of FITS files, also of those that are not read: their suffix is in capitals or of another compression
LIKE_AN_IMAGE = re.compile(r"\.(fits?|fts)(\.(gz|fz|bz2|xz|z|zip|zst))?$", re.IGNORECASE)

# Files listed in one message (count)
MOST_NAMED = 20


def list_images(folder: Path) -> list[Path]:
    """List the images of a folder by name; say which other files look like some.

    Neither hidden files nor parts of a download are images.
    """
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    others = [name for name in names if not name.endswith(SUFFIXES)]
    say_skipped(name for name in others if LIKE_AN_IMAGE.search(name))
    return [folder / name for name in names if name.endswith(SUFFIXES)]


def say_skipped(names: Iterable[str]) -> None:
    """Say in one line which files are skipped for their suffix, if there are any."""
    skipped = sorted(names)
    if skipped:
        more = f" and {len(skipped) - MOST_NAMED} more" if len(skipped) > MOST_NAMED else ""
        listed = printable(", ".join(skipped[:MOST_NAMED]))
        log.info("skipped, expected %s: %s%s", ", ".join(SUFFIXES), listed, more)
