"""A catalogue, its export, and what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits

from blobpipe.monitor import export

BLOBS = """blob,x_px,y_px,radius_px,depth_frac,shape,first_frame
b001,312.4,118.25,8.1,0.035,diamond,
b002,801.9,644.2,4.3,0.021,disc,second
b003,6.0,1019.0,5.5,0.05,disc,first
"""
IMAGES = "frame,mjd\nfirst,56197.31\nsecond,56218.7\n"


def exported(catalogue: Path, **options: Any) -> Path:
    out = catalogue.parent / "out"
    export.export_blobs(catalogue, out, **options)
    return out


def rows_of(path: Path) -> Any:
    with fits.open(path) as hdus:
        return hdus["BPIX"].data.copy()


def dq_of(path: Path) -> np.ndarray:
    with fits.open(path) as hdus:
        return hdus["DQ"].data.copy()
