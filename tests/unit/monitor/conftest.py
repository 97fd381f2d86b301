"""A catalogue of known blobs and a bad-pixel table of somebody else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from astropy.io import fits
from tests.unit.exported import BLOBS, IMAGES

from blobpipe.monitor import bad_pixel_table


@pytest.fixture
def catalogue(tmp_path: Path) -> Path:
    (tmp_path / "frames.csv").write_text(IMAGES)
    (tmp_path / "blobs.csv").write_text(BLOBS)
    return tmp_path / "blobs.csv"


@pytest.fixture
def existing(tmp_path: Path) -> Path:
    """A table as another would make it: other order and types, a column and an HDU of its own, sums, and a 512 disc."""
    disc = bad_pixel_table.runs(bad_pixel_table.disc_mask(312.4, 118.25, 8.2) * 512)
    rows = pd.concat(
        [
            pd.DataFrame(
                {"PIX1": [5, -3], "PIX2": [9, 1], "LENGTH": 3, "AXIS": 2, "VALUE": [4, 16]}
            ),
            disc,
        ]
    )
    n = len(rows)
    columns = [
        fits.Column("PIX2", "J", array=rows["PIX2"], disp="I6", unit="pixel"),
        fits.Column("PIX1", "J", array=rows["PIX1"]),
        *(fits.Column(name, "I", array=rows[name]) for name in ("VALUE", "AXIS", "LENGTH")),
        fits.Column("CCDAMP", "8A", array=["ABCD"] * n),
        fits.Column("CCDGAIN", "D", array=[2.0] * n),
        fits.Column("CCDCHIP", "J", array=[-999] * n),
        fits.Column("NOTE", "6A", array=["mine"] * n),
    ]
    table = fits.BinTableHDU.from_columns(columns, name="BPIX")
    table.header["SIZAXIS1"] = (1014, "their size")
    primary = fits.PrimaryHDU()
    primary.header.update(
        {"USEAFTER": "Jan 02 2010 00:00:00", "PEDIGREE": "GROUND", "FILENAME": "x.fits"}
    )
    primary.header.add_history("made by hand")
    path = tmp_path / "their_bpx.fits"
    hdus = fits.HDUList([primary, fits.ImageHDU(np.arange(4), name="OTHER"), table])
    hdus.writeto(path, checksum=True)
    return path
