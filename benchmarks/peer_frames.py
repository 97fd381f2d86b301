"""Difference images with blobs of known S/N, in white noise and in structure: what the peers are compared on."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.ndimage import gaussian_filter, uniform_filter, zoom

from blobpipe.core import blob_shapes
from blobpipe.core.arrays import FloatArray, Image
from blobpipe.core.detector import DEFAULT
from blobpipe.core.random_streams import log_uniform, stream
from blobpipe.images import tiles
from blobpipe.simulation.inject import add_blob

KINDS = {
    "white": "white noise",
    "one_over_f": "30 % of the variance is 1/f noise along rows",
    "one_over_f_strong": "60 % of the variance is 1/f noise along rows",
    "soft_clusters": "soft clusters of bad pixels, smaller than a blob",
    "resampled": "clusters of bad pixels, then halved in resolution and interpolated back",
    "halved": "half the noise",
    "doubled": "twice the noise",
}

# Range of the matched-filter S/N of blobs, drawn evenly in its logarithm
SNR = (4.0, 20.0)

# Least distance of a blob from the edges, and of two blobs from each other (px)
MARGIN_PX = 24
SEPARATION_PX = 60

# Bad-pixel clusters of an image of 1024 x 1024 px (count)
N_CLUSTERS = 12

# Radius of a cluster (px), its depth (fraction of the light), and the sigma of what softens it (px); as in real images
CLUSTER_RADIUS_PX = (1.5, 2.8)
CLUSTER_DEPTH_FRAC = (0.04, 0.1)
SOFTENING_PX = (0.8, 1.1)

# Typical radius of blobs at the place of a cluster, over the radius of the cluster: no blob is so small there
MIN_RADIUS_RATIO = 2.0

# Half the side of a cluster's stamp (px)
HALF_PX = 12

# Share of the variance that is 1/f noise (fraction)
PINK_SHARE = {"one_over_f": 0.3, "one_over_f_strong": 0.6}

# Outputs of the detector, each read row by row; the share of their 1/f noise that is common to all (fraction of the variance)
N_OUTPUTS = 4
COMMON_SHARE = 0.9

# Side of the running mean that is taken out, as blob images are high-pass filtered (px)
HIGH_PASS_PX = 41


class Frame(NamedTuple):
    """A difference image and its blobs.

    Attributes
    ----------
    image : ndarray, shape (side, side), float32
        Fraction of the light; NaN in the border of reference pixels.
    blobs : DataFrame
        x_px, y_px, radius_px, snr.
    """

    image: Image
    blobs: pd.DataFrame


def make_frame(kind: str, index: int, *, seed: int, side: int = 1024) -> Frame:
    """Make a difference image.

    Frames of one number have the same blobs and the same white noise, whatever their kind, so that kinds differ by nothing but
    their structure.

    Parameters
    ----------
    kind : str
        Key of `KINDS`.
    index : int
        Number of the frame.
    seed : int
    side : int
        Side of the image, a multiple of 256 (px).
    """
    noise_frac = DEFAULT.difference_noise_frac
    if kind == "halved":
        noise_frac = noise_frac / 2
    if kind == "doubled":
        noise_frac = 2 * noise_frac
    image, blobs = _draw_blobs(stream(seed, "peers", "blobs", index), side, noise_frac)

    # The same spread per pixel, whatever its correlation
    noise = stream(seed, "peers", "noise", index).normal(0, 1, (side, side))
    if kind in PINK_SHARE:
        share = PINK_SHARE[kind]
        pink = read_noise(stream(seed, "peers", "read noise", index), side)
        noise = np.sqrt(1 - share) * noise + np.sqrt(share) * pink
    image += (noise_frac * noise).astype(np.float32)

    # Bad pixels are hard before an image is resampled
    if kind in ("soft_clusters", "resampled"):
        rng = stream(seed, "peers", "clusters", index)
        _add_clusters(image, rng, soft=kind == "soft_clusters")
    if kind == "resampled":
        image = resample(image)

    # The reference pixels have no value
    image[: DEFAULT.border_px] = np.nan
    image[-DEFAULT.border_px :] = np.nan
    image[:, : DEFAULT.border_px] = np.nan
    image[:, -DEFAULT.border_px :] = np.nan
    return Frame(image, blobs)


def _draw_blobs(
    rng: np.random.Generator, side: int, noise_frac: float
) -> tuple[Image, pd.DataFrame]:
    """Draw one blob in every second subframe, of any shape, of the radius that is typical of its place."""
    image = np.zeros((side, side), np.float32)
    corners = list(product(range(0, side, tiles.SIDE), repeat=2))
    n_blobs = max(1, len(corners) // 2)
    rows: list[tuple[float, float, float, float]] = []
    for k in rng.permutation(len(corners))[:n_blobs]:
        x, y = _draw_centre(rng, corners[k], side, rows)
        radius = float(DEFAULT.typical_radius(np.asarray(x), np.asarray(y)))
        shape = blob_shapes.SHAPES[rng.integers(len(blob_shapes.SHAPES))]
        snr = float(log_uniform(rng, *SNR))

        # The depth that gives a blob of this shape its S/N in white noise
        profile = blob_shapes.blob_profile(shape, radius)
        depth = snr / blob_shapes.matched_snr(profile, noise_frac)
        add_blob(image, shape=shape, x_px=x, y_px=y, radius_px=radius, depth_frac=depth)
        rows.append((x, y, radius, snr))
    return image, pd.DataFrame(rows, columns=["x_px", "y_px", "radius_px", "snr"])


def _draw_centre(
    rng: np.random.Generator,
    corner: tuple[int, int],
    side: int,
    placed: list[tuple[float, float, float, float]],
) -> tuple[float, float]:
    """Draw a place in a subframe, away from the edges of the image and from other blobs."""
    while True:
        x, y = (float(low + rng.uniform(-0.5, tiles.SIDE - 0.5)) for low in corner)
        inside = min(x, y) >= MARGIN_PX and max(x, y) <= side - 1 - MARGIN_PX
        if inside and all(np.hypot(x - u, y - v) >= SEPARATION_PX for u, v, *_ in placed):
            return x, y


def _add_clusters(image: Image, rng: np.random.Generator, *, soft: bool) -> None:
    """Add clusters of bad pixels, in place, where no blob is so small; half of them have the sign of a blob."""
    side = len(image)
    n_clusters = max(1, round(N_CLUSTERS * (side / 1024) ** 2))
    dy, dx = np.mgrid[-HALF_PX : HALF_PX + 1, -HALF_PX : HALF_PX + 1]
    for k in range(n_clusters):
        radius = rng.uniform(*CLUSTER_RADIUS_PX)
        typical = 0.0
        while typical < MIN_RADIUS_RATIO * radius:
            x, y = rng.integers(MARGIN_PX, side - MARGIN_PX, 2)
            typical = float(DEFAULT.typical_radius(x, y))

        # An uneven disc, at a random place within its pixel
        x_offset, y_offset = rng.uniform(-0.5, 0.5, 2)
        stretch = rng.uniform(0.8, 1.2)
        distance = np.hypot((dx - x_offset) * stretch, (dy - y_offset) / stretch)
        cluster = (distance <= radius).astype(float)
        if soft:
            cluster = gaussian_filter(cluster, rng.uniform(*SOFTENING_PX))
        depth = rng.uniform(*CLUSTER_DEPTH_FRAC) * (-1 if k % 2 else 1)
        stamp = depth * cluster / cluster.max()
        window = image[y - HALF_PX : y + HALF_PX + 1, x - HALF_PX : x + HALF_PX + 1]
        window += stamp.astype(np.float32)


def read_noise(rng: np.random.Generator, side: int) -> FloatArray:
    """Draw 1/f noise as it is read out: row by row, in four outputs that are read side by side; standard deviation 1.

    Every second output is read from right to left. Most of the noise is common to all.
    """
    width = side // N_OUTPUTS
    common = _pink(rng, side * width).reshape(side, width)
    outputs = []
    for k in range(N_OUTPUTS):
        own = _pink(rng, side * width).reshape(side, width)
        noise = np.sqrt(COMMON_SHARE) * common + np.sqrt(1 - COMMON_SHARE) * own
        outputs.append(noise[:, ::-1] if k % 2 else noise)
    image = np.hstack(outputs)
    image -= uniform_filter(image, HIGH_PASS_PX)
    return image / image.std()


def _pink(rng: np.random.Generator, n: int) -> FloatArray:
    """Draw a stream of 1/f noise, shape (n,), standard deviation 1."""
    frequency = np.fft.rfftfreq(n)
    frequency[0] = frequency[1]
    spectrum = np.fft.rfft(rng.normal(size=n)) / np.sqrt(frequency)
    values = np.fft.irfft(spectrum, n)
    return values / values.std()


def resample(image: Image) -> Image:
    """Halve the resolution of an image and interpolate it back, so that noise is correlated and bad pixels are soft."""
    ny, nx = image.shape
    halved = image.reshape(ny // 2, 2, nx // 2, 2).mean(axis=(1, 3))
    back = zoom(halved, 2, order=1, mode="nearest", grid_mode=True)
    return np.asarray(back, np.float32)
