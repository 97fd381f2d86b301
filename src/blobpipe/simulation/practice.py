"""Draw what the joint score learns from: blobs, and things that look like them, to add to images."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np
import pandas as pd
from scipy.ndimage import gaussian_filter

from blobpipe.core import blob_shapes
from blobpipe.core.arrays import Float32Array, Int16Array
from blobpipe.core.detector import DEFAULT, Detector
from blobpipe.core.random_streams import log_uniform, stream
from blobpipe.images import tiles
from blobpipe.simulation import clutter
from blobpipe.simulation.inject import HALF_PX, add_blob, add_stamp

# Fraction of the squares of 256 x 256 pixels that show clutter instead of blobs and a cluster
CLUTTER_FRAC = 0.5

# Range of the S/N of blobs, drawn evenly in its logarithm, and of their radii (px)
SNR = (4.0, 40.0)
RADII_PX = (2.4, 10.0)

# Scatter of the radii of blobs about that of their place (1 sigma of the logarithm); 0.17 for 71 blobs
# of a real image, of which none is smaller than 0.59 of it
LAW_SCATTER = 0.22

# Fraction of the blobs that are ragged as real ones are, so that a high reduced chi-squared is no proof
# against a blob
RAGGED_FRAC = 0.5

# Ranges of radius (px), of the Gaussian that softens the edges (px), of axis ratio and of S/N of
# clusters of bad pixels; real ones whose edges resampling or diffusion has softened have radii of 1.6 to
# 2.9 px and S/N 8 to 26
CLUSTER_RADII_PX = (0.8, 3.2)
CLUSTER_SOFTNESS_PX = (0.3, 1.4)
CLUSTER_AXES = (0.6, 1.6)
CLUSTER_SNR = (5.0, 40.0)

# Largest radius of a cluster with its softness, over that of a blob at its place: where both are alike,
# size cannot tell them apart, and the score is not to give up the smallest blobs for clusters that stack,
# mask and persistence show. With 0.6, three of 160 clear blobs were lost, all with radii below 3.1 px.
CLUSTER_RATIO = 0.5

# Smaller squares along each axis of one of 256 pixels (count), their side (px), and the fractions of
# them that hold a blob and a cluster
N_SMALLER = 3
SMALLER_PX = tiles.SIDE / N_SMALLER
BLOB_FRAC = 0.55
CLUSTER_FRAC = 0.25

# Fraction of the smaller squares that hold a blob, where there is nothing else but noise
ALONE_FRAC = 0.2


def draw_practice(
    seed: int,
    frame: str,
    draw: int,
    shape: tuple[int, int],
    noise_frac: float,
    pieces: Int16Array,
    detector: Detector = DEFAULT,
) -> tuple[Float32Array, pd.DataFrame]:
    """Draw a signal for every 256 x 256 pixels of an image: blobs and soft clusters, or clutter.

    Parameters
    ----------
    seed : int
        Seed of the detect stage.
    frame : str
        Name of the frame. With the number of the draw it selects the random stream.
    draw : int
        Number of the draw for this frame, from 0.
    shape : (ny, nx)
        Shape of the image.
    noise_frac : float
        Noise per pixel (fraction of the light), which sets the depth of a given S/N.
    pieces : ndarray, shape (n, 256, 256), int16
        From `clutter.draw_pieces`.
    detector : Detector, optional
        Says how large blobs are.

    Returns
    -------
    ndarray, shape (ny, nx), float32
        Light loss (fraction of the light).
    DataFrame
        x_px, y_px, radius_px of each blob.
    """
    rng = stream(seed, "detect", frame, draw)
    signal = np.zeros(shape, np.float32)
    blobs: list[tuple[float, float, float]] = []
    for top, left in product(*(range(0, side - tiles.SIDE + 1, tiles.SIDE) for side in shape)):
        if rng.random() < CLUTTER_FRAC:
            piece = pieces[rng.integers(len(pieces))].astype(np.float32)
            piece[piece == clutter.NO_VALUE] = 0
            of_light = np.float32(noise_frac / clutter.STEP)
            square = np.s_[top : top + tiles.SIDE, left : left + tiles.SIDE]
            signal[square] += of_light * piece
            continue

        for x, y in _smaller_squares(rng, top, left):
            kind = rng.random()
            if kind < BLOB_FRAC:
                blobs.append((x, y, _add_any_blob(signal, rng, x, y, noise_frac, detector)))
            elif kind < BLOB_FRAC + CLUSTER_FRAC:
                _add_cluster(signal, rng, x, y, noise_frac, detector)
    columns = ["x_px", "y_px", "radius_px"]
    return signal, pd.DataFrame(blobs, columns=columns, dtype=float)


def draw_blobs(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    noise_frac: float,
    detector: Detector = DEFAULT,
) -> tuple[Float32Array, pd.DataFrame]:
    """Draw a signal of blobs alone: one in some of the smaller squares of each 256 x 256 pixels.

    Parameters
    ----------
    shape, noise_frac, detector
        As for `draw_practice`.

    Returns
    -------
    signal, blobs
        As from `draw_practice`.
    """
    signal = np.zeros(shape, np.float32)
    blobs: list[tuple[float, float, float]] = []
    for top, left in product(*(range(0, side - tiles.SIDE + 1, tiles.SIDE) for side in shape)):
        for x, y in _smaller_squares(rng, top, left):
            if rng.random() < ALONE_FRAC:
                blobs.append((x, y, _add_any_blob(signal, rng, x, y, noise_frac, detector)))
    columns = ["x_px", "y_px", "radius_px"]
    return signal, pd.DataFrame(blobs, columns=columns, dtype=float)


def _smaller_squares(
    rng: np.random.Generator, top: int, left: int
) -> Iterator[tuple[float, float]]:
    """Draw a place (x, y) in each of the smaller squares of a square whose first pixel is given."""
    for row, column in product(range(N_SMALLER), repeat=2):
        y = top + row * SMALLER_PX + rng.uniform(HALF_PX, SMALLER_PX - HALF_PX)
        x = left + column * SMALLER_PX + rng.uniform(HALF_PX, SMALLER_PX - HALF_PX)
        yield x, y


def _add_any_blob(
    image: Float32Array,
    rng: np.random.Generator,
    x_px: float,
    y_px: float,
    noise_frac: float,
    detector: Detector,
) -> float:
    """Add a blob of any shape and S/N, and return its radius (px), which is usual there."""
    usual = float(detector.typical_radius(np.array(x_px), np.array(y_px)))
    radius = float(np.clip(usual * np.exp(rng.normal(0, LAW_SCATTER)), *RADII_PX))
    snr = float(log_uniform(rng, *SNR))
    kind = blob_shapes.SHAPES[rng.integers(len(blob_shapes.SHAPES))]
    is_ragged = rng.random() < RAGGED_FRAC

    # The depth that gives a blob of this shape its S/N
    profile = blob_shapes.blob_profile(kind, radius)
    add_blob(
        image,
        shape=kind,
        x_px=x_px,
        y_px=y_px,
        radius_px=radius,
        depth_frac=snr / blob_shapes.matched_snr(profile, noise_frac),
        ragged=rng if is_ragged else None,
    )
    return radius


def _add_cluster(
    image: Float32Array,
    rng: np.random.Generator,
    x_px: float,
    y_px: float,
    noise_frac: float,
    detector: Detector,
) -> None:
    """Add an elliptical cluster of bad pixels with soft edges that reads low, as a blob does."""
    radius = float(log_uniform(rng, *CLUSTER_RADII_PX))
    softness = float(rng.uniform(*CLUSTER_SOFTNESS_PX))
    usual = float(detector.typical_radius(np.array(x_px), np.array(y_px)))
    shrink = min(1.0, CLUSTER_RATIO * usual / np.hypot(radius, softness))
    radius *= shrink
    softness *= shrink
    axes = float(log_uniform(rng, *CLUSTER_AXES))
    snr = float(log_uniform(rng, *CLUSTER_SNR))
    x = round(x_px)
    y = round(y_px)
    rows, columns = np.mgrid[-HALF_PX : HALF_PX + 1, -HALF_PX : HALF_PX + 1]
    distance = np.hypot((columns - (x_px - x)) * axes, (rows - (y_px - y)) / axes)
    spot = gaussian_filter((distance <= radius).astype(np.float32), softness)
    if not spot.any():  # smaller than a pixel, between two
        return
    depth = snr * noise_frac / np.linalg.norm(spot)
    add_stamp(image, np.float32(depth) * spot, x, y)
