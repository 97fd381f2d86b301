"""``blobpipe check``: what a file is, in words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits

from blobpipe.core import fits_images
from blobpipe.images import check

IMAGE = np.random.default_rng(1).normal(0, 0.01, (1024, 1024)).astype(np.float32)


def test_a_good_image_is_described(tmp_path: Path) -> None:
    image = IMAGE.copy()
    image[:5], image[-5:] = np.nan, np.nan
    header = {"TARGNAME": "DARK-EARTH-CALIB", "FILTER": "F153M"}
    fits_images.write_image(tmp_path / "a.fits.fz", image, name="SCI", header=header, sigma=0.01)
    found = check.describe(tmp_path / "a.fits.fz")
    assert found.fault == ""
    line = str(found)
    for words in (
        "a.fits.fz: HDU 1 (SCI), 1024x1024",
        "target DARK-EARTH-CALIB",
        "filter F153M",
        "99.0% finite",
        "noise 0.0",
    ):
        assert words in line
    assert line.endswith("; usable")
    assert "\n" not in line


def test_a_cube_says_so(tmp_path: Path) -> None:
    fits.PrimaryHDU(np.stack([IMAGE] * 3)).writeto(tmp_path / "a.fits")
    assert "HDU 0 (PRIMARY), 1024x1024x3" in str(check.describe(tmp_path / "a.fits"))


def test_an_unusable_image_is_described_with_its_fault(tmp_path: Path) -> None:
    fits.PrimaryHDU(IMAGE[:100] * 1000).writeto(tmp_path / "a.fits")
    found = check.describe(tmp_path / "a.fits")
    assert "1024x100 px" in found.found
    assert "expected a full frame" in found.fault
    assert str(tmp_path) not in found.fault
    assert "filter unknown" in str(found)


@pytest.mark.parametrize("content", [None, b"", b"text"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "a.fits"
    if content is not None:
        path.write_bytes(content)
    found = check.describe(path)
    assert found.found == ""
    assert str(found).startswith(f"{path}: not usable: ")
    assert "\n" not in str(found)


def test_an_image_without_values_is_described(tmp_path: Path) -> None:
    fits.PrimaryHDU(IMAGE * np.nan).writeto(tmp_path / "a.fits")
    line = str(check.describe(tmp_path / "a.fits"))
    assert "0.0% finite" in line
    assert "not usable" in line
