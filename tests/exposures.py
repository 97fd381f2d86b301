"""Exposures in the layouts of other observatories: an evenly lit sky with blobs in it, and the flags of a few pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from astropy.io import fits

from blobpipe.core.blob_shapes import blob_profile
from blobpipe.core.detector import Detector, read_detector

RADIUS_PX = 5.0
DEPTH_FRAC = 0.08
LEVEL = 1.3  # of the light, in any unit


def corners(detector: Detector) -> list[tuple[float, float]]:
    """Return a place near each corner of the light-sensitive part (px, 0-based, with the border)."""
    near = detector.border_px + 40.25
    return [
        (x, y)
        for y in (near, detector.height_px - 1 - near)
        for x in (near, detector.width_px - 1 - near)
    ]


def lit(
    detector: Detector, places: list[tuple[float, float]], seed: int = 1, noise_frac: float = 0.008
) -> npt.NDArray[np.float32]:
    """Return a full frame of an evenly lit exposure with a blob at each place, NaN on the border."""
    rng = np.random.default_rng(seed)
    ny, nx = detector.shape
    light = 1 + noise_frac * rng.standard_normal((ny, nx), np.float32)
    light *= np.linspace(0.9, 1.1, nx, dtype=np.float32)
    for x, y in places:
        column, row = round(x), round(y)
        profile = blob_profile("disc", RADIUS_PX, x - column, y - row, 41)
        light[row - 20 : row + 21, column - 20 : column + 21] *= 1 - DEPTH_FRAC * profile
    image = np.full((ny, nx), np.nan, np.float32)
    b = detector.border_px
    inside = np.s_[b : ny - b, b : nx - b]
    image[inside] = LEVEL * light[inside]
    return image


def write_jwst(path: Path, image: npt.NDArray[Any], dq: npt.NDArray[Any], mjd: float) -> None:
    """Write a file such as a _cal product of NIRCam: full frame, 32-bit flags, MJy/sr."""
    primary = fits.PrimaryHDU()
    primary.header.update(
        {
            "TELESCOP": "JWST",
            "INSTRUME": "NIRCAM",
            "DETECTOR": "NRCALONG",
            "FILTER": "F277W",
            "TARGNAME": "SKY",
            "EXPSTART": mjd,
            "DATE-OBS": "2023-01-01",
        }
    )
    science = fits.ImageHDU(image, name="SCI")
    science.header["BUNIT"] = "MJy/sr"
    error = np.where(np.isfinite(image), np.float32(0.01), np.float32(np.nan))
    hdus = [primary, science, fits.ImageHDU(error, name="ERR")]
    hdus.append(fits.ImageHDU(dq.astype(np.uint32), name="DQ"))
    fits.HDUList(hdus).writeto(path)


def write_roman(path: Path, image: npt.NDArray[Any], dq: npt.NDArray[Any], date: str) -> None:
    """Write a file such as a level 2 image of the WFI: ASDF, without the border."""
    import asdf

    meta = {
        "filename": path.name,
        "exposure": {"start_time": date},
        "instrument": {"optical_element": "F158", "detector": "WFI01"},
        "cal_step": {"flat_field": "COMPLETE"},
    }
    light = np.ascontiguousarray(image[4:-4, 4:-4])
    tree = {
        "roman": {
            "meta": meta,
            "data": light,
            "dq": np.ascontiguousarray(dq[4:-4, 4:-4]).astype(np.uint32),
            "err": np.full_like(light, 0.01),
        }
    }
    asdf.AsdfFile(tree).write_to(path)


def write_euclid(path: Path, images: dict[str, npt.NDArray[Any]], dq: npt.NDArray[Any]) -> None:
    """Write a file such as a calibrated frame of NISP: three extensions for each detector."""
    primary = fits.PrimaryHDU()
    primary.header.update(
        {"TELESCOP": "EUCLID", "INSTRUME": "NISP", "FILTER": "J", "DATE-OBS": "2024-03-01T12:00:00"}
    )
    hdus: list[Any] = [primary]
    for name, image in images.items():
        hdus.append(fits.ImageHDU(np.nan_to_num(image), name=f"{name}.SCI"))
        hdus.append(fits.ImageHDU(np.full_like(image, 0.01), name=f"{name}.RMS"))
        hdus.append(fits.ImageHDU(dq.astype(np.int32), name=f"{name}.DQ"))
    fits.HDUList(hdus).writeto(path)


def small(name: str, **changes: Any) -> Detector:
    """Return a detector of blobpipe with other sizes, so that tests stay fast."""
    detector = read_detector(name)
    exposure = changes.pop("exposure", {})
    copy = detector.model_copy(update=changes)
    return copy.model_copy(update={"exposure": copy.exposure.model_copy(update=exposure)})
