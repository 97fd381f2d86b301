"""Images of the campaign and their template, for the tests of this room."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from blobpipe.core import fits_images, tables
from blobpipe.images.register import Shift
from blobpipe.params import Campaign
from blobpipe.simulation import campaign

NOISE = 0.0101


@pytest.fixture(scope="session")
def images(campaign_dir: Path) -> np.ndarray:
    """The first 18 images of the campaign."""
    names = tables.read_frame_list(campaign_dir)["frame"][:18]
    return np.stack(
        [fits_images.read_frame(fits_images.find_image(campaign_dir, name)).data for name in names]
    )


@pytest.fixture(scope="session")
def known(campaign_dir: Path) -> pd.DataFrame:
    """The blobs that are older than the first image."""
    return tables.read_blobs(campaign_dir).query("first_frame == ''")


@pytest.fixture(scope="session")
def reference(difference_dir: Path) -> tuple[np.ndarray, np.ndarray]:
    """The median stack of the first images, and its blob pattern."""
    path = difference_dir / "reference.fits.fz"
    return fits_images.read_plane(path, "STACK"), fits_images.read_plane(path, "PATTERN")


@pytest.fixture(scope="session")
def shifted(
    campaign_params: Campaign, reference: tuple[np.ndarray, np.ndarray]
) -> dict[Shift, np.ndarray]:
    """Images that are the same except for the shift of their blobs, and noise."""
    blobs = [blob for blob in campaign.population(campaign_params) if blob.first < 0]
    still = reference[0] - campaign.blob_layer(blobs, 0.0, 0.0)
    rng = np.random.default_rng(1)
    shifts = [Shift(*rng.uniform(-3, 3, 2)) for _ in range(6)] + [
        Shift(0.3, 0.0),
        Shift(0.0, -0.5),
        Shift(0.0, 0.0),
    ]
    noise = {shift: NOISE * rng.standard_normal(still.shape, np.float32) for shift in shifts}
    return {shift: still + campaign.blob_layer(blobs, *shift) + noise[shift] for shift in shifts}
