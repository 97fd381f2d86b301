"""What a file is, in words: for the moment when an image will not go through."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from blobpipe.core import fits_images
from blobpipe.errors import FrameError, printable


@dataclass(frozen=True)
class Description:
    """What `describe` found; `fault` is empty for a usable image."""

    path: Path
    found: str
    fault: str

    def __str__(self) -> str:
        verdict = f"not usable: {self.fault}" if self.fault else "usable"
        return printable(
            f"{self.path}: {self.found}; {verdict}" if self.found else f"{self.path}: {verdict}"
        )


def describe(path: str | Path) -> Description:
    """Layout, size, filter, finite fraction and noise of a FITS file, and whether blobs can be sought in it.

    Never raises for a bad file: the fault is part of the answer.
    """
    path = Path(path)
    try:
        frame = fits_images.read_frame(path)
    except FrameError as error:
        return Description(path, "", _without_path(error, path))
    finite = np.isfinite(frame.data)
    header = frame.header
    parts = [f"{frame.layout} px", f"target {header.get('TARGNAME', 'unknown')}"]
    parts += [f"filter {header.get('FILTER', 'unknown')}", f"{finite.mean():.1%} finite"]
    if finite.any():
        median, noise = fits_images.median_and_noise(frame.data)
        parts.append(f"median {median:.4g}, noise {noise:.4g} {header.get('BUNIT', '')}".strip())
    try:
        fits_images.require_usable(frame, path)
    except FrameError as error:
        return Description(path, ", ".join(parts), _without_path(error, path))
    return Description(path, ", ".join(parts), "")


def _without_path(error: FrameError, path: Path) -> str:
    return str(error).removeprefix(printable(f"{path}: "))
