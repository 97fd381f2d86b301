"""A simulated CSM-monitor campaign: the default source of images (stage ``campaign``).

An image is the fraction of the airglow's light that is missing, pixel by pixel: positive where light is lost.
Sizes, depths, noise and artefacts follow what was measured on real monitor images; where those leave room, the
choice is named "ours".
"""

from __future__ import annotations

import logging
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from blobpipe.core import fits_images, tables
from blobpipe.core.arrays import Image
from blobpipe.core.blob_shapes import Shape, blob_profile, matched_snr, typical_radius
from blobpipe.core.random_streams import stream
from blobpipe.errors import ParamsError
from blobpipe.params import Campaign

if TYPE_CHECKING:
    from astropy.io.fits import Header

log = logging.getLogger(__name__)

SIZE = 1024
READ_NOISE_E = 20.0
DIFFERENCE_NOISE_FRAC = 0.0101  # measured; the scale on which a new blob is faint or strong
# steps of stored values than elsewhere: a tenth of the noise, a quarter off the files' size
COARSER = 3
FIRST_MJD = 55_250.0
MEAN_INTERVAL_D = 21.0

STAMP = 41
SEPARATION_PX = 26.0  # between centres: neighbours touch, but none lies on another
MARGIN_PX = 14.0  # of new blobs from the light's edge: nearly all of each is on the detector
# 4 in 10 peak above 3 %
MEDIAN_DEPTH_FRAC = 0.025
DEPTH_SPREAD = 0.8
DEEPEST_FRAC = 0.30
FAINTEST_SNR = 3.0
NEW_BLOBS = (0.6, 0.28, 0.12)  # chances of one, two or three on a historical image

DEATH_STAR = (362.0, 59.0, 22.0)  # x, y, radius (px)
WAGON_WHEEL = (968.0, 50.0)
STEADY_GLOW = 0.25  # spread of the strength of features that are never quite the same


class Blob(NamedTuple):
    """A blob of the simulation; ``first`` is the index of the first image that shows it, -1 if all do."""

    blob: str
    x_px: float
    y_px: float
    radius_px: float
    depth_frac: float
    shape: Shape
    first: int


class Conditions(NamedTuple):
    """What is particular to one image: photon level (electrons) and CSM shift (px)."""

    photons_e: float
    shift_x_px: float
    shift_y_px: float


@dataclass(frozen=True)
class Detector:
    """What all images share.

    Attributes
    ----------
    fixed : ndarray, shape (1024, 1024), float32
        Pattern of pixels, columns, quadrants, bad pixels and edges (fraction).
    glow : ndarray, shape (1024, 1024), float32
        Features whose strength varies from image to image: dark streak, wagon wheel (fraction).
    flicker : ndarray, shape (1024, 1024), float32
        Standard deviation of what a bad pixel adds to each image (fraction).
    clusters, rim : lists of (rows, columns)
        Pixels of each cluster of bad pixels, and of each piece of the Death Star's rim.
    """

    fixed: Image
    glow: Image
    flicker: Image
    clusters: list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]
    rim: list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]


def frame_names(params: Campaign) -> list[str]:
    """Names of the images, in order of date: like MAST's, nine characters of rootname and ``_blob``."""
    return [f"{_rootname(index)}_blob" for index in range(params.n_frames)]


def _rootname(index: int) -> str:
    """Proposal, visit and exposure: 8 exposures to a visit, 1280 visits to a proposal."""
    visits, exposure = divmod(index, 8)
    proposal, visit = divmod(visits, 1280)
    return f"idb{chr(ord('b') + proposal)}{_base36(visit + 10)}{_base36(exposure + 1)}q"


def _base36(number: int) -> str:
    digits = "0123456789abcdefghijklmnopqrstuvwxyz"
    return digits[number // 36] + digits[number % 36]


def simulate(out_dir: str | Path, params: Campaign, threads: int = 1) -> None:
    """Write the images of a campaign, then ``blobs.csv`` and ``frames.csv``.

    Parameters
    ----------
    out_dir : path
        ``{frame}.fits.fz`` and the two tables; the tables come last, so that a folder with ``frames.csv`` is whole.
    params : Campaign
    threads : int
        Processes that render images; the bytes do not depend on it.

    Raises
    ------
    ParamsError
        If there are fewer images after the first ones than historical cases.

    Notes
    -----
    Source: ours, from the physics and the numbers measured on real images.
    """
    out_dir = Path(out_dir)
    for table in ("frames.csv", "blobs.csv"):
        (out_dir / table).unlink(missing_ok=True)
    population(params)  # a fault in the parameters shows here, before any image
    jobs = [(out_dir, params, index) for index in range(params.n_frames)]
    if threads == 1:
        list(map(_write_frame, jobs))
    else:
        with ProcessPoolExecutor(threads, mp_context=get_context("spawn")) as pool:
            list(pool.map(_write_frame, jobs, chunksize=4))
    _write_tables(out_dir, params)
    log.info("%d images with %d blobs in %s", params.n_frames, len(population(params)), out_dir)


def _write_frame(job: tuple[Path, Campaign, int]) -> None:
    out_dir, params, index = job
    name = frame_names(params)[index]
    header = _header(name, float(dates(params)[index]))
    sigma = COARSER * pixel_noise(params, conditions(params, index).photons_e)
    fits_images.write_image(
        out_dir / f"{name}.fits.fz",
        render_image(params, index),
        name="SCI",
        header=header,
        sigma=sigma,
    )


def _header(name: str, mjd: float) -> Header:
    from astropy.io.fits import Header

    cards = [
        ("TELESCOP", "HST"),
        ("INSTRUME", "WFC3"),
        ("DETECTOR", "IR"),
        ("FILTER", "F153M"),
        ("TARGNAME", "DARK-EARTH-CALIB"),
        ("ROOTNAME", name.removesuffix("_blob")),
        ("EXPSTART", mjd, "exposure start (MJD)"),
        ("BUNIT", "", "fraction of the light that is missing"),
        ("ORIGIN", "blobpipe", "simulated, not observed"),
    ]
    return Header(cards)


def _write_tables(out_dir: Path, params: Campaign) -> None:
    import pandas as pd

    names = frame_names(params)
    blobs = pd.DataFrame(population(params))
    blobs["first_frame"] = ["" if first < 0 else names[first] for first in blobs.pop("first")]
    tables.write_table(out_dir / "blobs.csv", blobs)
    table = pd.DataFrame(
        {"frame": names, "mjd": dates(params), "label": labels(params), "seed": params.seed}
    )
    each = pd.DataFrame([conditions(params, index) for index in range(params.n_frames)])
    tables.write_table(out_dir / "frames.csv", table.join(each))


def dates(params: Campaign) -> npt.NDArray[np.float64]:
    """Date of each image (MJD), increasing."""
    gaps = stream(params.seed, "campaign", "dates").gamma(2.0, MEAN_INTERVAL_D / 2, params.n_frames)
    return np.round(FIRST_MJD + np.cumsum(gaps + 0.1), 4)


def labels(params: Campaign) -> list[str]:
    """For each image ``stack`` (one of the first), ``historical`` (shows a blob that none showed before) or ``clean``."""
    cases = set(_cases(params))
    rest = range(params.first_frames, params.n_frames)
    return ["stack"] * min(params.first_frames, params.n_frames) + [
        "historical" if i in cases else "clean" for i in rest
    ]


def _cases(params: Campaign) -> list[int]:
    candidates = np.arange(params.first_frames, params.n_frames)
    if params.n_cases >= len(candidates):
        raise ParamsError(
            f"campaign.n_cases={params.n_cases}, expected fewer than the {len(candidates)} images after the first "
            f"{params.first_frames}; lower n_cases or raise n_frames"
        )
    chosen = stream(params.seed, "campaign", "cases").choice(
        candidates, params.n_cases, replace=False
    )
    return [int(index) for index in np.sort(chosen)]


def conditions(params: Campaign, index: int) -> Conditions:
    """Photon level and CSM shift of one image."""
    return _conditions(params, _frame_stream(params, index))


def _frame_stream(params: Campaign, index: int) -> np.random.Generator:
    return stream(params.seed, "campaign", index)


def _conditions(params: Campaign, rng: np.random.Generator) -> Conditions:
    """The first draws of an image's stream: a shift is usually small, sometimes up to the largest."""
    low, high = params.photons_e
    photons_e = float(np.exp(rng.uniform(np.log(low), np.log(high))))
    small = rng.normal(0, params.shift_px, 2)
    distance = params.large_shift_px * rng.uniform(0.1, 1)
    angle = rng.uniform(0, 2 * np.pi)
    large = distance * np.array([np.cos(angle), np.sin(angle)])
    x, y = large if rng.random() < params.large_shift_frac else small
    return Conditions(photons_e, float(x), float(y))


def pixel_noise(params: Campaign, photons_e: float) -> float:
    """Standard deviation of an undisturbed pixel from image to image (fraction)."""
    return float(
        np.sqrt(1 / photons_e + (READ_NOISE_E / photons_e) ** 2 + params.flattening_noise_frac**2)
    )


@lru_cache(maxsize=2)
def population(params: Campaign) -> tuple[Blob, ...]:
    """All blobs, those known before the first image first, then the new ones by date."""
    rng = stream(params.seed, "campaign", "blobs")
    per_case = rng.choice(1 + np.arange(len(NEW_BLOBS)), params.n_cases, p=NEW_BLOBS)
    first = [-1] * params.n_known + [
        i for i, n in zip(_cases(params), per_case, strict=True) for _ in range(n)
    ]
    x, y = _places(rng, first)
    return tuple(_blob(rng, f"b{k + 1:04d}", x[k], y[k], first[k]) for k in range(len(first)))


def _places(rng: np.random.Generator, first: list[int]) -> npt.NDArray[np.float64]:
    """Centres that keep their distance, as far as there is room; shape (2, n)."""
    placed = np.array([[DEATH_STAR[0]], [DEATH_STAR[1]]])
    for index in first:
        margin = fits_images.BORDER_PX + (MARGIN_PX if index >= 0 else 0)
        tries = rng.uniform(margin, SIZE - 1 - margin, (2, 200))
        nearest = np.hypot(*(tries[:, :, None] - placed[:, None, :])).min(axis=1)
        far = np.flatnonzero(nearest > SEPARATION_PX)
        best = far[0] if len(far) else nearest.argmax()
        placed = np.append(placed, tries[:, best : best + 1], axis=1)
    return placed[:, 1:]


def _blob(rng: np.random.Generator, name: str, x: float, y: float, first: int) -> Blob:
    """Large diamonds and rings lower left, small discs upper right."""
    radius = float(typical_radius(np.asarray(x), np.asarray(y)) * rng.normal(1, 0.1))
    lower_left = 1 - (x + y) / (2 * SIZE)
    disc = 1 - 0.9 * lower_left
    diamond = 0.6 * lower_left
    shape: Shape = rng.choice(["disc", "diamond", "ring"], p=[disc, diamond, 1 - disc - diamond])
    shape = str(shape)  # type: ignore[assignment]
    radius = max(radius, 2.0)
    return Blob(name, float(x), float(y), radius, _depth(rng, shape, radius), shape, first)


def _depth(rng: np.random.Generator, shape: Shape, radius: float) -> float:
    """A few per cent mostly, and never so little that nobody could have seen it."""
    snr_of_1 = matched_snr(blob_profile(shape, radius, size=STAMP), DIFFERENCE_NOISE_FRAC)
    small = 0.5 if shape == "ring" else 1.0  # a ring's particle covers little of the pupil
    depths = (
        small * MEDIAN_DEPTH_FRAC * np.exp(small**0.5 * DEPTH_SPREAD * rng.standard_normal(100))
    )
    seen = depths[(depths <= DEEPEST_FRAC) & (depths * snr_of_1 >= FAINTEST_SNR)]
    return float(seen[0])


def render_image(params: Campaign, index: int) -> Image:
    """One image of the campaign, from its own random stream alone.

    Returns
    -------
    ndarray, shape (1024, 1024), float32
        Fraction of the light that is missing; NaN on the reference pixels.
    """
    rng = _frame_stream(params, index)
    state = _conditions(params, rng)
    shared = detector(params.seed, params.fixed_pattern_frac)
    loss = blob_layer(
        [b for b in population(params) if b.first <= index], state.shift_x_px, state.shift_y_px
    )
    image = shared.fixed + loss
    image += shared.glow * np.float32(rng.normal(1, STEADY_GLOW))
    image += _illumination(rng) + _stripes(rng)
    _flicker(image, shared, rng)
    _streaks(image, rng)
    _trails(image, rng)
    image += _noise(loss, params, state.photons_e, rng)
    return _without_border(image)


def blob_layer(blobs: list[Blob], shift_x_px: float, shift_y_px: float) -> Image:
    """The light lost in blobs, all moved together by the mirror; shape (1024, 1024), float32."""
    half = STAMP // 2
    padded = np.zeros((SIZE + 2 * STAMP, SIZE + 2 * STAMP), np.float32)
    for blob in blobs:
        x = blob.x_px + shift_x_px
        y = blob.y_px + shift_y_px
        i = round(y)
        j = round(x)
        stamp = blob_profile(blob.shape, blob.radius_px, x - j, y - i, STAMP)
        padded[i + half + 1 :, j + half + 1 :][:STAMP, :STAMP] += (
            np.float32(blob.depth_frac) * stamp
        )
    return padded[STAMP:-STAMP, STAMP:-STAMP]


def _noise(loss: Image, params: Campaign, photons_e: float, rng: np.random.Generator) -> Image:
    """Photons, readout and flattening in one draw: at 10,000 electrons Poisson's law is a normal one."""
    constant = (READ_NOISE_E / photons_e) ** 2 + params.flattening_noise_frac**2
    sigma = np.sqrt(np.clip(1 - loss, 0, None) / np.float32(photons_e) + np.float32(constant))
    return np.asarray(sigma * rng.standard_normal(loss.shape, np.float32))


def _illumination(rng: np.random.Generator) -> Image:
    """What the high-pass filter leaves of the airglow's large-scale structure."""
    from scipy.ndimage import gaussian_filter, zoom

    coarse = gaussian_filter(
        rng.standard_normal((SIZE // 8, SIZE // 8), np.float32), 2, mode="wrap"
    )
    return np.asarray(zoom(coarse * np.float32(3e-4 / coarse.std()), 8, order=1), dtype=np.float32)


def _stripes(rng: np.random.Generator, columns: float = 2e-4, rows: float = 2e-4) -> Image:
    """Columns and rows whose zero point is off, a few of them visibly."""
    lines = rng.standard_normal((2, SIZE)) * [[columns], [rows]] + np.where(
        rng.random((2, SIZE)) < 0.004, 3e-3, 0
    )
    return np.asarray(np.add.outer(lines[1], lines[0]), dtype=np.float32)


def _flicker(image: Image, shared: Detector, rng: np.random.Generator) -> None:
    """Bad pixels jitter; some clusters and pieces of the Death Star's rim read otherwise than usual."""
    where = np.flatnonzero(shared.flicker)
    image.flat[where] += shared.flicker.flat[where] * rng.standard_normal(len(where), np.float32)
    for pieces, chance in ((shared.clusters, 0.06), (shared.rim, 0.25)):
        for rows, columns in pieces:
            if rng.random() < chance:
                image[rows, columns] += np.float32(rng.normal(0, 0.12))


def _streaks(image: Image, rng: np.random.Generator) -> None:
    """Pairs and triples of parallel, nearly horizontal streaks, faint or strong, light added or missing."""
    for _ in range(rng.poisson(2.0)):
        x, y = rng.uniform(0, SIZE, 2)
        length = rng.uniform(100, 270)
        angle = np.radians(rng.normal(0, 4))
        spacing = rng.uniform(10, 18)
        strong = rng.random() < 0.4
        value = rng.choice([-1, 1]) * (
            rng.uniform(0.02, 0.06) if strong else rng.uniform(0.004, 0.012)
        )
        for k in range(rng.choice([2, 3])):
            start = x + rng.normal(0, 12), y + k * spacing
            _draw_line(
                image, start, length * rng.normal(1, 0.05), angle, rng.uniform(0.8, 1.5), value
            )


def _trails(image: Image, rng: np.random.Generator) -> None:
    """City lights and stars: slanted, faint, of any length, always light added."""
    for _ in range(rng.poisson(0.8)):
        angle = np.radians(rng.uniform(-60, 60))
        length = rng.uniform(60, 700)
        width = rng.uniform(1, 2.5)
        value = -np.exp(rng.normal(np.log(0.005), 0.5))
        _draw_line(image, tuple(rng.uniform(0, SIZE, 2)), length, angle, width, value)


def _draw_line(
    image: Image,
    start: tuple[float, float],
    length: float,
    angle: float,
    width: float,
    value: float,
) -> None:
    """Add a line with a Gaussian cross-section (sigma ``width`` px) and soft ends."""
    dx = np.cos(angle)
    dy = np.sin(angle)
    reach = 4 * width
    ends = np.array([start, (start[0] + length * dx, start[1] + length * dy)])
    x0, y0 = np.clip(np.floor(ends.min(axis=0) - reach), 0, SIZE).astype(int)
    x1, y1 = np.clip(np.ceil(ends.max(axis=0) + reach), 0, SIZE).astype(int)
    x = np.arange(x0, x1)[None, :] - start[0]
    y = np.arange(y0, y1)[:, None] - start[1]
    along = x * dx + y * dy
    across = y * dx - x * dy
    beyond = np.maximum(np.maximum(-along, along - length), 0)
    image[y0:y1, x0:x1] += (value * np.exp(-(across**2 + beyond**2) / (2 * width**2))).astype(
        np.float32
    )


def _without_border(image: Image) -> Image:
    border = fits_images.BORDER_PX
    inner = image[border:-border, border:-border]
    return np.pad(inner, border, constant_values=np.nan)


@lru_cache(maxsize=2)
def detector(seed: int, fixed_pattern_frac: float) -> Detector:
    """The detector that all images of a campaign share."""
    rng = stream(seed, "campaign", "detector")
    fixed = np.float32(fixed_pattern_frac) * rng.standard_normal((SIZE, SIZE), np.float32)
    fixed += _stripes(rng, columns=4e-4) + _illumination(rng)
    fixed[SIZE // 2 :] += np.float32(2e-4)
    flicker = np.zeros((SIZE, SIZE), np.float32)
    _add_bad_pixels(fixed, flicker, rng)
    clusters = [_cluster(rng) for _ in range(650)]
    for pixels in clusters:
        sign = -1 if rng.random() < 0.92 else 1  # hot far more often than dead
        fixed[pixels] = sign * np.exp(rng.normal(np.log(0.15), 0.7, len(pixels[0])))
    rim = _add_death_star(fixed, rng)
    hub = tuple(int(c) for c in WAGON_WHEEL)
    fixed[hub[1] - 5 : hub[1] + 1, hub[0] - 1 : hub[0] + 2] = fixed[
        hub[1] : hub[1] + 3, hub[0] + 1 : hub[0] + 5
    ] = -0.1
    _add_edges(fixed, flicker, rng)
    glow = _dark_streak() + _wagon_wheel()
    for array in (fixed, flicker, glow):
        array.setflags(write=False)
    return Detector(fixed, glow, flicker, clusters, rim)


def _add_bad_pixels(fixed: Image, flicker: Image, rng: np.random.Generator) -> None:
    """One pixel in seventy: some are merely off, some never read the same twice."""
    bad = rng.choice(SIZE * SIZE, SIZE * SIZE // 70, replace=False)
    fixed.flat[bad] += rng.choice([-1, 1], len(bad)) * np.exp(
        rng.normal(np.log(0.03), 1.0, len(bad))
    )
    flicker.flat[bad] = np.exp(rng.normal(np.log(0.008), 1.2, len(bad)))


def _cluster(rng: np.random.Generator) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """A ragged patch one to eight pixels across; there are more of them towards the top."""
    centre = SIZE * rng.random(2) ** (0.8, 1.0)
    across = np.clip(rng.lognormal(np.log(3.0), 0.4), 1, 8)
    rows, columns = np.mgrid[-5:6, -5:6]
    stretch = rng.uniform(0.75, 1.33)
    ragged = np.hypot(rows * stretch, columns / stretch) + rng.normal(0, 0.35, rows.shape)
    inside = (ragged <= across / 2) | ((rows == 0) & (columns == 0))
    found = np.clip(
        np.stack([rows[inside], columns[inside]]) + centre[:, None].astype(int), 0, SIZE - 1
    )
    return found[0], found[1]


def _add_death_star(
    fixed: Image, rng: np.random.Generator
) -> list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
    """A disc of dead pixels, patched over; only its rim shows, in pieces that read high or low."""
    rows, columns = np.mgrid[:SIZE, :SIZE]
    x = columns - DEATH_STAR[0]
    y = rows - DEATH_STAR[1]
    near_rim = np.abs(np.hypot(x, y) - DEATH_STAR[2]) < 1.6
    piece = ((np.arctan2(y, x) / (2 * np.pi) % 1) * 28).astype(int)
    rim = [np.nonzero(near_rim & (piece == k)) for k in range(28)]
    for k, pixels in enumerate(rim):  # mostly by turns
        fixed[pixels] = [-0.06, 0.05][(k + (rng.random() < 0.3)) % 2]
    return [(pixels[0], pixels[1]) for pixels in rim]


def _add_edges(fixed: Image, flicker: Image, rng: np.random.Generator) -> None:
    """The notch in the upper edge, the two upper corners and the outermost rows and columns: bright and unsteady."""
    rows, columns = np.mgrid[:SIZE, :SIZE]
    ragged = rng.normal(0, 1.2, (SIZE, SIZE)) + np.repeat(rng.normal(0, 1.5, SIZE // 4), 4)
    notch = (np.abs(columns - 487) < 103) & (
        SIZE - 1 - rows < 16 - 7 * np.abs(columns - 487) / 103 + ragged
    )
    left = (columns + 0.9 * (SIZE - 1 - rows)) < 34 + ragged
    right = (SIZE - 1 - columns + 1.1 * (SIZE - 1 - rows)) < 24 + ragged
    from_edge = np.minimum.reduce([rows, columns, SIZE - 1 - rows, SIZE - 1 - columns])
    outermost = from_edge < 7.5 + ragged / 2
    bright = notch | left | right
    fixed[outermost] -= rng.uniform(0, 0.06, int(outermost.sum())).astype(np.float32)
    fixed[bright] = -rng.uniform(0.03, 0.2, int(bright.sum())).astype(np.float32)
    flicker[bright] = 0.03


def _dark_streak() -> Image:
    """A faint, nearly vertical dark streak right of the middle, fading downwards."""
    rows, columns = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    centre = 891 - 9 * ((rows - 700) / 260) ** 2 * (rows > 700)
    strength = np.clip((rows - 380) / 500, 0, 1) * (rows < 960)
    return np.asarray(
        4.5e-3 * strength * np.exp(-(((columns - centre) / 2.2) ** 2) / 2), dtype=np.float32
    )


def _wagon_wheel() -> Image:
    """Rings and spokes around a point in the lower right corner."""
    rows, columns = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    x = columns - WAGON_WHEEL[0]
    y = rows - WAGON_WHEEL[1]
    r = np.hypot(x, y)
    angle = np.arctan2(y, x)
    rings = 6e-3 * np.cos(2 * np.pi * r / 11) * np.exp(-r / 12) * (1 + np.cos(angle - 1))
    spokes = (
        1.2e-3 * np.cos(24 * angle) * np.exp(-((r / 150) ** 2)) * (1 - np.exp(-((r / 30) ** 2)))
    )
    return np.asarray(rings + spokes, dtype=np.float32)
