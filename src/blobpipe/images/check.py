"""Describe what a file is, and say if it can be searched for blobs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from blobpipe.core import fits_images
from blobpipe.errors import FrameError, printable


@dataclass(frozen=True)
class Description:
    """Description of a file in words.

    Attributes
    ----------
    path : Path
    found : str
        Layout, size, target, filter and noise; empty if the file cannot be read.
    fault : str
        Why it cannot be searched; empty for a usable image.
    """

    path: Path
    found: str
    fault: str

    def __str__(self) -> str:
        verdict = f"not usable: {self.fault}" if self.fault else "usable"
        text = f"{self.found}; {verdict}" if self.found else verdict
        return printable(f"{self.path}: {text}")


def is_exposure(frame: fits_images.Frame) -> bool:
    """Tell whether an image is a calibrated exposure, in units of light and with flags, and no blob image."""
    unit = str(frame.header.get("BUNIT", "")).upper()
    return frame.dq is not None and unit.startswith(("ELECTRON", "COUNT"))


def describe(path: str | Path) -> Description:
    """Describe the layout, size, target, filter, finite fraction and noise of a FITS file, and say if it is usable.

    A bad file raises no error; its fault is part of the description.
    """
    path = Path(path)
    # Faults are told without the path, which the description has anyway
    prefix = printable(f"{path}: ")
    try:
        frame = fits_images.read_frame(path)
    except FrameError as error:
        return Description(path, "", str(error).removeprefix(prefix))
    finite = np.isfinite(frame.data)
    header = frame.header
    parts = [
        f"{frame.layout} px",
        f"target {header.get('TARGNAME', 'unknown')}",
        f"filter {header.get('FILTER', 'unknown')}",
        f"{finite.mean():.1%} finite",
    ]
    if finite.any():
        median, noise = fits_images.median_and_noise(frame.data)
        parts.append(f"median {median:.4g}, noise {noise:.4g} {header.get('BUNIT', '')}".strip())
    if is_exposure(frame):
        fault = (
            "a calibrated exposure, expected a blob image; make one with 'blobpipe flatten' "
            "(quicklook takes the exposure as it is)"
        )
        return Description(path, ", ".join(parts), fault)
    fault = ""
    try:
        fits_images.require_usable(frame, path)
    except FrameError as error:
        fault = str(error).removeprefix(prefix)
    return Description(path, ", ".join(parts), fault)
