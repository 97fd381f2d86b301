"""Exposures of other observatories, in the layouts that their pipelines write."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.exposures import (
    DEPTH_FRAC,
    corners,
    lit,
    small,
    write_euclid,
    write_jwst,
    write_roman,
)

from blobpipe.core import fits_images
from blobpipe.core.dates import exposure_mjd
from blobpipe.core.detector import Detector
from blobpipe.errors import FrameError
from blobpipe.images import flatten

NIRCAM = small("nircam_lw", width_px=648, height_px=520, exposure={"box_px": 64})
ROMAN = small("roman_wfi", width_px=648, height_px=520, exposure={"box_px": 64})
EUCLID = small(
    "euclid_nisp",
    width_px=520,
    height_px=520,
    exposure={"box_px": 64, "detectors": ("DET11", "DET44")},
)


def flags(detector: Detector) -> np.ndarray:
    """Return flags of a full frame: three pixels not to be used, one with a harmless flag of many bits."""
    dq = np.zeros(detector.shape, np.int64)
    dq[100, 100:103] = 1
    dq[100, 110] = 2**30 + 4
    return dq


def require_blobs_at_corners(loss: np.ndarray, detector: Detector) -> None:
    """Check that light is missing, positive, where the blobs are, to a pixel."""
    for x, y in corners(detector):
        row, column = round(y), round(x)
        assert loss[row - 2 : row + 3, column - 2 : column + 3].mean() > 0.7 * DEPTH_FRAC
        surroundings = loss[row - 25 : row + 26, column - 25 : column + 26]
        weight = np.clip(surroundings, 0.02, None) - 0.02
        rows, columns = np.mgrid[-25:26, -25:26]
        assert (weight * rows).sum() / weight.sum() == pytest.approx(y - row, abs=0.7)
        assert (weight * columns).sum() / weight.sum() == pytest.approx(x - column, abs=0.7)


def test_a_cal_file_of_jwst_is_read_as_it_comes(tmp_path: Path) -> None:
    path = tmp_path / "jw01_nrcalong_cal.fits"
    write_jwst(path, lit(NIRCAM, corners(NIRCAM)), flags(NIRCAM), 60000.25)
    out = flatten.flatten_exposure(path, tmp_path / "out", detector=NIRCAM)
    assert out.name == "jw01_nrcalong_blob.fits.fz"
    frame = fits_images.read_image(out, NIRCAM)
    assert frame.data.shape == NIRCAM.shape
    # The flags are 32 bits: the lowest must not be lost in rounding
    assert np.isnan(frame.data[100, 100:103]).all()
    assert np.isfinite(frame.data[100, 110])
    require_blobs_at_corners(frame.data, NIRCAM)
    assert exposure_mjd(frame, out, NIRCAM) == 60000.25
    assert frame.header["FILTER"] == "F277W"


def test_a_level_2_image_of_roman_is_read_as_it_comes(tmp_path: Path) -> None:
    pytest.importorskip("asdf")
    path = tmp_path / "r0000101001_wfi01_cal.asdf"
    write_roman(path, lit(ROMAN, corners(ROMAN)), flags(ROMAN), "2021-01-01T06:00:00.000")
    out = flatten.flatten_exposure(path, tmp_path / "out", detector=ROMAN)
    assert out.name == "r0000101001_wfi01_blob.fits.fz"
    frame = fits_images.read_image(out, ROMAN)
    assert frame.data.shape == ROMAN.shape
    assert np.isnan(frame.data[:4]).all()
    assert np.isnan(frame.data[100, 100:103]).all()
    require_blobs_at_corners(frame.data, ROMAN)
    assert exposure_mjd(frame, out, ROMAN) == pytest.approx(59215.25)


def test_each_detector_of_a_euclid_file_is_an_image_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "EUC_NIR_cal.fits"
    images = {
        "DET11": lit(EUCLID, corners(EUCLID), seed=1),
        "DET44": lit(EUCLID, [], seed=2),
    }
    write_euclid(path, images, flags(EUCLID))
    outs = [
        flatten.flatten_exposure(path, tmp_path / "out", detector=EUCLID, part=part)
        for part in EUCLID.exposure.detectors
    ]
    assert outs == [
        tmp_path / "out" / "DET11" / "EUC_NIR_DET11_blob.fits.fz",
        tmp_path / "out" / "DET44" / "EUC_NIR_DET44_blob.fits.fz",
    ]
    require_blobs_at_corners(fits_images.read_image(outs[0], EUCLID).data, EUCLID)
    clean = fits_images.read_image(outs[1], EUCLID)
    assert np.nanmax(clean.data[20:60, 20:60]) < 0.05
    assert exposure_mjd(clean, outs[1], EUCLID) == pytest.approx(60370.5)
    with pytest.raises(FrameError, match=r"no image DET12\.SCI in its 7 HDU"):
        flatten.flatten_exposure(path, tmp_path / "out", detector=EUCLID, part="DET12")


def test_signs_and_units_of_images_that_are_flattened_already(tmp_path: Path) -> None:
    detector = small(
        "wfc3_ir", exposure={"unit": "light_lost", "blobs": "negative", "dq": "", "bad_dq": 0}
    )
    loss = np.random.default_rng(1).normal(0, 0.01, detector.shape).astype(np.float32)
    loss[300:306, 400:406] -= 0.2
    path = tmp_path / "flat.fits"
    header = {"EXPSTART": 56000.0}
    fits_images.write_image(path, loss, name="SCI", header=header, sigma=0.01)
    out = flatten.flatten_exposure(path, tmp_path, detector=detector)
    assert fits_images.read_image(out).data[300:306, 400:406].mean() == pytest.approx(0.2, abs=0.01)


def test_a_damaged_asdf_file_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("asdf")
    path = tmp_path / "bad.asdf"
    path.write_bytes(b"#ASDF 1.0.0\n#ASDF_STANDARD 1.5.0\n%YAML 1.1\n--- {roman: 5}\n...\n")
    with pytest.raises(FrameError, match=r"bad\.asdf: .*expected an image roman\.data"):
        flatten.flatten_exposure(path, tmp_path, detector=ROMAN)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(FrameError, match=r"bad\.asdf: cannot be read as ASDF") as caught:
        flatten.flatten_exposure(path, tmp_path, detector=ROMAN)
    assert "\n" not in str(caught.value)
