"""Bad pixels that are known beforehand: masks, bad-pixel tables (BPIXTAB) and the DQ of an image.

A bad pixel has no value (NaN) from the first step on, in the image and in the stack. Known blobs are no bad pixels: the
flag by which calibration marks them does not count unless the settings say so.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from blobpipe.core import files, fits_images
from blobpipe.core.arrays import Image, Mask
from blobpipe.core.detector import DEFAULT, Detector
from blobpipe.core.hdus import File, opened
from blobpipe.core.threads import unwarned
from blobpipe.errors import FrameError, TableError, printable
from blobpipe.images.bpixtab import (
    RUN_COLUMNS,
    dq_image,
    find_runs,
    find_table,
    hdus_from_bytes,
    require_runs,
)
from blobpipe.images.stack import CELL_PX
from blobpipe.params import BadPixels as Settings

log = logging.getLogger(__name__)

# Largest fraction of bad pixels of a file; a real map of this detector has 0.02
MAX_BAD_FRAC = 0.5

# What a file should be and what to do, for messages
EXPECTED = "a bad-pixel mask or table (FITS); correct its name, or fetch or write it again"


@dataclass(frozen=True)
class MaskFile:
    """A file that bad pixels were read from.

    Attributes
    ----------
    path : path
    sha256 : str
    n_px : int
        Number of its bad pixels.
    """

    path: Path
    sha256: str
    n_px: int


@dataclass(frozen=True)
class BadPixels:
    """Bad pixels of the detector, and the DQ flags that make a pixel of an image bad.

    Attributes
    ----------
    mask : ndarray, shape (ny, nx), bool, or None
        Bad pixels of all files together; None if no file is named.
    files : tuple of MaskFile
    dq_flags : int
        Sum of the DQ flags that count.
    """

    mask: Mask | None = None
    files: tuple[MaskFile, ...] = ()
    dq_flags: int = DEFAULT.exposure.bad_dq

    @property
    def key(self) -> str:
        """Return what tells these bad pixels from others: flags, and SHA-256 of each file."""
        return " ".join((str(self.dq_flags), *(file.sha256 for file in self.files)))

    def count(self, frame: fits_images.Frame | None = None) -> int:
        """Return the number of bad pixels of all files together, with those of the DQ of an image."""
        is_bad: Any = False if self.mask is None else self.mask
        if frame is not None and frame.dq is not None:
            is_bad = is_bad | ((frame.dq & self.dq_flags) != 0)
        return int(np.count_nonzero(is_bad))

    def blank(self, frame: fits_images.Frame, path: str | Path) -> fits_images.Frame:
        """Return an image without the values of its bad pixels: those of the files, and of its own DQ.

        Raises
        ------
        FrameError
            If the image has another size than the mask.
        """
        frame = self.blank_files(frame, path)
        if frame.dq is None:
            return frame
        is_bad = (frame.dq & self.dq_flags) != 0
        return replace(frame, data=np.where(is_bad, np.float32(np.nan), frame.data))

    def blank_files(self, frame: fits_images.Frame, path: str | Path) -> fits_images.Frame:
        """Return an image without the values of the files' bad pixels; its own DQ is not used.

        Raises
        ------
        FrameError
            If the image has another size than the mask.
        """
        if self.mask is None:
            return frame
        if frame.data.shape != self.mask.shape:
            ny, nx = frame.data.shape
            mask_ny, mask_nx = self.mask.shape
            raise FrameError(
                f"{path}: found {nx}x{ny} pixels, expected {mask_nx}x{mask_ny} as the bad-pixel mask "
                f"{self.files[0].path}; leave out the image or the mask"
            )
        return replace(frame, data=np.where(self.mask, np.float32(np.nan), frame.data))

    def blank_cells(self, rms: Image | None) -> Image | None:
        """Return an RMS map, 0 (not known) in each cell of 2 x 2 pixels that holds a bad one.

        A map of another size than the mask is returned as it is.
        """
        if rms is None or self.mask is None:
            return rms
        ny, nx = (side // CELL_PX for side in self.mask.shape)
        if rms.shape != (ny, nx):
            return rms
        whole = self.mask[: ny * CELL_PX, : nx * CELL_PX]
        is_bad = whole.reshape(ny, CELL_PX, nx, CELL_PX).any(axis=(1, 3))
        return np.where(is_bad, np.float32(0), rms)

    def cards(self, frame: fits_images.Frame | None = None) -> dict[str, Any]:
        """Return header cards that name the files, with their numbers of pixels and SHA-256.

        Parameters
        ----------
        frame : Frame, optional
            Image that is blanked: ``BPXCOUNT`` then counts the flagged pixels of its DQ too.

        Returns
        -------
        dict
            Empty if there are neither files nor a DQ.
        """
        dq = None if frame is None else frame.dq
        if not self.files and dq is None:
            return {}
        cards: dict[str, Any] = {}
        for i, file in enumerate(self.files, 1):
            cards[f"BPXFIL{i}"] = ascii(file.path.name)[1:-1]
            cards[f"BPXNUM{i}"] = file.n_px
            cards[f"BPXSHA{i}"] = file.sha256
        if dq is not None:
            cards["BPXFLAGS"] = self.dq_flags
        cards["BPXCOUNT"] = self.count(frame)
        return cards

    def as_rows(self) -> list[dict[str, Any]]:
        """Return path, number of pixels and SHA-256 of each file, as the log keeps them."""
        return [
            {"file": printable(str(file.path)), "n_px": file.n_px, "sha256": file.sha256}
            for file in self.files
        ]


def read_bad_pixels(
    settings: Settings, paths: Sequence[str | Path] = (), detector: Detector = DEFAULT
) -> BadPixels:
    """Read the bad pixels of some files, and of those that the settings name.

    Parameters
    ----------
    settings : params.BadPixels
        Its files are relative to the working folder.
    paths : sequence of path
        Further files.
    detector : Detector, optional
        Its flags count unless the settings name others.

    Raises
    ------
    FrameError, TableError
        If a file is missing or is neither a mask nor a table of bad pixels of a full frame.
    """
    dq_flags = detector.exposure.bad_dq if settings.dq_flags is None else settings.dq_flags
    mask: Mask | None = None
    found = []
    for path in dict.fromkeys(map(Path, (*settings.files, *paths))):
        one = read_mask(path, dq_flags, detector)
        sha256 = files.sha256(path)
        found.append(MaskFile(path, sha256, int(np.count_nonzero(one))))
        mask = one if mask is None else mask | one
        log.info("bad pixels: %s, %d pixels, SHA-256 %s", path, found[-1].n_px, sha256[:12])
    return BadPixels(mask, tuple(found), dq_flags)


def read_mask(
    path: str | Path, dq_flags: int = DEFAULT.exposure.bad_dq, detector: Detector = DEFAULT
) -> Mask:
    """Read a mask of bad pixels.

    Of a bad-pixel table and of an image called DQ, the pixels with one of the flags are bad; of any other image, those
    that are not zero.

    Parameters
    ----------
    path : path
        FITS file, plain or compressed.
    dq_flags : int
        Sum of the DQ flags that count.
    detector : Detector, optional

    Returns
    -------
    ndarray, shape (ny, nx), bool
        Of a full frame; a border of good pixels is added to a mask that has none.

    Raises
    ------
    FrameError, TableError
        If the file holds none of these, has another size, or flags more than half of the detector.
    """
    with opened(path, EXPECTED) as file:
        if find_runs(file) is not None:
            mask = (_mask_of_table(path, file, detector) & dq_flags) != 0
        elif file.named("DQ") is not None:
            mask = (_mask_of_dq(path, file, detector) & dq_flags) != 0
        else:
            mask = _mask_of_image(path, file, detector)
    if mask.shape == detector.light_shape:
        mask = np.pad(mask, detector.border_px)
    bad_frac = float(mask.mean())
    if bad_frac > MAX_BAD_FRAC:
        raise FrameError(
            f"{path}: {bad_frac:.0%} of its pixels are bad, expected at most {MAX_BAD_FRAC:.0%}: an image, or a mask "
            "in which 0 means bad; name a mask that is 0 where a pixel is good"
        )
    return np.asarray(mask)


def _mask_of_table(path: str | Path, file: File, detector: Detector) -> Any:
    """Return the DQ image of a bad-pixel table."""
    table = find_runs(file)
    assert table is not None
    # Reading the content compares the checksums
    file.content(table)
    try:
        with unwarned():
            hdus = hdus_from_bytes(file.whole())
            require_runs(path, find_table(hdus), detector)
            return dq_image(find_table(hdus).data, detector)
    except TableError:
        raise
    except Exception as error:
        # A damaged table makes astropy raise nearly anything
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"not a whole FITS table ({reason})") from error


def _mask_of_dq(path: str | Path, file: File, detector: Detector) -> Any:
    """Return the image DQ of an exposure."""
    hdu = file.named("DQ")
    assert hdu is not None
    _require_full_frame(path, "its DQ", hdu.shape, detector)
    values = fits_images.integers(file, hdu)
    if values is None:
        raise ValueError("a DQ that does not hold integers")
    return values


def _mask_of_image(path: str | Path, file: File, detector: Detector) -> Any:
    """Return the first image of a file that is no exposure."""
    images = [hdu for hdu in file.hdus if hdu.shape and 0 not in hdu.shape]
    if not images:
        kinds = ", ".join(f"{hdu.kind} {hdu.name}".strip() for hdu in file.hdus[:9])
        raise FrameError(
            f"{path}: found no bad pixels ({kinds}); expected an image of {detector.sizes} pixels, "
            f"or a table with the columns {', '.join(RUN_COLUMNS)}; name such a file"
        )
    fitting = [hdu for hdu in images if hdu.shape in (detector.shape, detector.light_shape)]
    _require_full_frame(path, "an image", (fitting or images)[0].shape, detector)
    return fits_images.plane(file, fitting[0]) != 0


def _require_full_frame(
    path: str | Path, what: str, shape: tuple[int, ...], detector: Detector
) -> None:
    """Refuse an image that has not the size of the detector."""
    if shape not in (detector.shape, detector.light_shape):
        size = "x".join(map(str, shape[::-1]))
        raise FrameError(
            f"{path}: found {what} of {size} pixels, expected {detector.sizes}; name the mask of a full frame"
        )
