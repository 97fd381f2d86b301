"""Measure the depth of a blob on every image: its shape and place fixed, its depth and the background free.

On a cut-out around its place, moved with the mirror, the image is b + d P: P is the profile of the blob, 1 at its
highest point. d and b are fitted by least squares; the farther a pixel lies from the fit beyond `LIMIT_SIGMA`,
the less it counts, so that bad pixels and streaks change little, and none is in on one image and out on the
next. The pixels' own pattern adds a constant to d, the same on every image.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pandas as pd

from blobpipe.core.arrays import Float32Array, FloatArray, Image, Mask
from blobpipe.core.blob_shapes import SHAPES, Shape, blob_profile
from blobpipe.core.cutouts import cut_square, distance_from
from blobpipe.history.deep import SettledImage
from blobpipe.images.pattern import DEEPEST_FRAC
from blobpipe.images.register import NO_SHIFT, Shift

# Side of a cut-out (px): the largest blob and some background
SIDE = 41
HALF = SIDE // 2

# Distance from a pixel to the fit beyond which it counts less (sigma), and as a share of the profile: no blob
# has exactly the shape that is fitted. At this many times the distance it does not count at all.
LIMIT_SIGMA = 3.0
LIMIT_FRAC = 0.3
GONE = 2.5

# Rounds of the fit; more change nothing
ROUNDS = 3

# Radius of the background around a blob (px), and what neighbours cover of it, in their radii
BACKGROUND_PX = 16.0
NEIGHBOUR_RADII = 1.55

# Fewest pixels that hold a depth (count), and the least share of the profile's power among them
FEWEST_PIXELS = 60
LEAST_POWER = 0.5


class Depths(NamedTuple):
    """Depths of blobs on one image, and their standard errors (fraction of the light), shape (n,); NaN: none."""

    depth_frac: FloatArray
    error_frac: FloatArray


def measure_depths(
    image: Image,
    blobs: pd.DataFrame,
    noise_frac: float,
    *,
    shift: Shift = NO_SHIFT,
    neighbours: pd.DataFrame | None = None,
) -> Depths:
    """Measure the depth of each blob on an image.

    Parameters
    ----------
    image : ndarray, shape (ny, nx), float32
        Fraction of the light; NaN where there is no value. Better without the pixels' own pattern.
    blobs : DataFrame
        x_px, y_px (usual place) and radius_px; ``shape`` if it is known, else a disc.
    noise_frac : float
        Standard deviation of a pixel (fraction of the light).
    shift : Shift
        By how much the mirror has moved the blobs on this image (px).
    neighbours : DataFrame, optional
        x_px, y_px, radius_px of all known blobs: their pixels are no background. ``blobs`` if not given.

    Returns
    -------
    Depths
        NaN where too much of a blob has no value.
    """
    probes = _probes(blobs, shift, neighbours)
    found = [_fit(cut_square(image, *probe.corner, SIDE), probe, noise_frac) for probe in probes]
    depth, error = np.array(found, np.float64).reshape(-1, 2).T
    return Depths(depth, error)


def measure_histories(images: Iterable[SettledImage], blobs: pd.DataFrame) -> Depths:
    """Measure the depth of each blob on each of some settled images, as `measure_depths` does.

    Returns
    -------
    Depths
        Of shape (images, blobs).
    """
    probes = _probes(blobs)
    found = [
        [_fit(image.cut(*probe.corner, SIDE), probe, image.noise_frac) for probe in probes]
        for image in images
    ]
    depth, error = np.moveaxis(
        np.array(found, np.float64).reshape(len(found), len(probes), 2), 2, 0
    )
    return Depths(depth, error)


class _Probe(NamedTuple):
    """What the depth of a blob is measured with: first pixel (x, y), profile and mask of its cut-out."""

    corner: tuple[int, int]
    profile: Float32Array
    mask: Mask


def _probes(
    blobs: pd.DataFrame, shift: Shift = NO_SHIFT, neighbours: pd.DataFrame | None = None
) -> list[_Probe]:
    """Return a probe for each blob, moved by a shift."""
    columns = ["x_px", "y_px", "radius_px"]
    moved = np.array([*shift, 0.0])
    places = blobs[columns].to_numpy(float) + moved
    others = places if neighbours is None else neighbours[columns].to_numpy(float) + moved
    known = blobs["shape"] if "shape" in blobs else [""] * len(blobs)
    probes = []
    for (x, y, radius), name in zip(places, known, strict=True):
        shape: Shape = name if name in SHAPES else "disc"
        column = round(float(x)) - HALF
        row = round(float(y)) - HALF
        profile = blob_profile(shape, radius, x - column - HALF, y - row - HALF, SIDE)

        # Background is near, and belongs to no other blob
        mask = distance_from(x - column, y - row, SIDE) < BACKGROUND_PX
        for other_x, other_y, other_radius in others[_near(others, x, y, radius)]:
            apart = distance_from(other_x - column, other_y - row, SIDE)
            mask &= (apart > NEIGHBOUR_RADII * other_radius) | (profile > 0.5)
        probes.append(_Probe((column, row), profile, mask))
    return probes


def _fit(window: Image, probe: _Probe, noise_frac: float) -> tuple[float, float]:
    """Return the depth of a blob on its cut-out, and its error; NaN if too much of it has no value."""
    good = np.isfinite(window) & probe.mask
    signal = probe.profile[good].astype(np.float64)
    power = float(np.square(probe.profile, dtype=np.float64).sum())
    if good.sum() < FEWEST_PIXELS or np.square(signal).sum() < LEAST_POWER * power:
        return np.nan, np.nan

    # Least squares of a depth and a background, outliers limited
    values = window[good].astype(np.float64)
    centred = signal - signal.mean()
    energy = float(centred @ centred)
    usual = float(np.median(values))
    limited = np.clip(values, usual - LIMIT_SIGMA * noise_frac, usual + DEEPEST_FRAC)
    for _ in range(ROUNDS):
        depth = float(centred @ limited) / energy
        level = float(limited.mean() - depth * signal.mean())
        model = level + depth * signal
        reach = LIMIT_SIGMA * noise_frac + LIMIT_FRAC * abs(depth) * signal
        rest = values - model
        fading = np.clip((GONE - np.abs(rest) / reach) / (GONE - 1), 0, 1)
        limited = model + np.clip(rest, -reach, reach) * fading
    return float(centred @ limited) / energy, noise_frac / np.sqrt(energy)


def _near(others: FloatArray, x: float, y: float, radius: float) -> Mask:
    """Return which blobs reach into the cut-out of another, itself and what lies on it left out."""
    apart = np.hypot(others[:, 0] - x, others[:, 1] - y)
    return np.asarray((apart > radius / 2) & (apart < 2 * SIDE))
