"""Simulate a campaign of the CSM monitor, the default source of images (stage ``campaign``).

An image is the fraction of the airglow's light that is missing, pixel by pixel: positive where light is lost. Sizes, depths,
noise and artefacts follow what was measured on real monitor images; the rest is this project's choice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from blobpipe.core import fits_images, tables
from blobpipe.core.arrays import FloatArray, Image
from blobpipe.core.blob_shapes import SHAPES, Shape, blob_profile, matched_snr
from blobpipe.core.detector import DEFAULT, Detector
from blobpipe.core.random_streams import log_uniform, stream
from blobpipe.errors import ParamsError
from blobpipe.params import Campaign

if TYPE_CHECKING:
    from astropy.io.fits import Header

log = logging.getLogger(__name__)

# Steps of stored values over those of difference images: a tenth of the noise, which makes files a quarter smaller
COARSER = 3

# Date of the first image (MJD), and mean interval between images (days)
FIRST_MJD = 55_250.0
MEAN_INTERVAL_D = 21.0

# Side of the square on which a blob is drawn (px)
STAMP = 41

# Distance between the centres of blobs (px): neighbours touch, but none lies on another
SEPARATION_PX = 26.0

# Distance of new blobs from the reference pixels (px): nearly all of each is on the detector
MARGIN_PX = 14.0

# Depths of blobs: median (fraction of the light), standard deviation of the logarithm, and range, from an S/N on a real
# difference image to a fraction of the light. 4 in 10 are deeper than 3 %.
MEDIAN_DEPTH_FRAC = 0.025
DEPTH_SPREAD = 0.8
FAINTEST_SNR = 3.0
DEEPEST_FRAC = 0.30

# Probabilities of one, two or three new blobs on a historical image
NEW_BLOBS = (0.6, 0.28, 0.12)

# Standard deviation of the strength of streak and wagon wheel from image to image (fraction)
STEADY_GLOW = 0.25

# Pieces of the rim of a disc of dead pixels
N_RIM = 28

Pixels = tuple[npt.NDArray[Any], npt.NDArray[Any]]


class Blob(NamedTuple):
    """A blob of the simulation.

    Attributes
    ----------
    blob : str
        Name.
    x_px, y_px : float
        Centre when the mirror is at its usual place (px).
    radius_px : float
        Radius of the best top-hat (px).
    depth_frac : float
        Depth (fraction of the light).
    shape : {"disc", "diamond", "ring"}
    first : int
        Index of the first image that shows it, -1 if all do.
    """

    blob: str
    x_px: float
    y_px: float
    radius_px: float
    depth_frac: float
    shape: Shape
    first: int


class Conditions(NamedTuple):
    """Photon level (electrons) of one image, and its shift of the blobs by the CSM (px)."""

    photons_e: float
    shift_x_px: float
    shift_y_px: float


@dataclass(frozen=True)
class SharedPattern:
    """What all images of a detector share.

    Attributes
    ----------
    fixed : ndarray, shape (ny, nx), float32
        Pattern of pixels, columns, quadrants, bad pixels and edges (fraction of the light).
    glow : ndarray, shape (ny, nx), float32
        Features whose strength varies from image to image: dark streak, wagon wheel (fraction of the light).
    unsteady : ndarray, shape (n,), intp
        Bad pixels that differ from image to image (flat indices).
    flicker : ndarray, shape (n,), float32
        Standard deviation of each of them (fraction of the light).
    clusters, rim : lists of (rows, columns)
        Pixels of each cluster of bad pixels, and of each piece of the rim of a disc of dead pixels.
    """

    fixed: Image
    glow: Image
    unsteady: npt.NDArray[np.intp]
    flicker: FloatArray
    clusters: list[Pixels]
    rim: list[Pixels]


def frame_names(params: Campaign) -> list[str]:
    """Return the names of the images, in order of date: a rootname of nine characters as in MAST, and ``_blob``."""
    return [f"{_rootname(index)}_blob" for index in range(params.n_frames)]


def _rootname(index: int) -> str:
    """Return a rootname of proposal, visit and exposure: 8 exposures to a visit, 1280 visits to a proposal."""
    visits, exposure = divmod(index, 8)
    proposal, visit = divmod(visits, 1280)
    letter = chr(ord("b") + proposal)
    return f"idb{letter}{_base36(visit + 10)}{_base36(exposure + 1)}q"


def _base36(number: int) -> str:
    """Return a number below 1296 as two digits to the base of 36."""
    digits = "0123456789abcdefghijklmnopqrstuvwxyz"
    return digits[number // 36] + digits[number % 36]


def simulate(
    out_dir: str | Path, params: Campaign, threads: int = 1, detector: Detector = DEFAULT
) -> None:
    """Write the images of a campaign, then ``blobs.csv`` and ``frames.csv``.

    Parameters
    ----------
    out_dir : path
        Folder of ``{frame}.fits.fz`` and the two tables. The tables are written last, so that a folder with
        ``frames.csv`` is complete.
    params : Campaign
    threads : int
        Number of processes that render images; the results do not depend on it.
    detector : Detector, optional

    Raises
    ------
    ParamsError
        If there are not more images after the first ones than historical cases.
    """
    out_dir = Path(out_dir)
    for table in ("frames.csv", "blobs.csv"):
        (out_dir / table).unlink(missing_ok=True)

    # Impossible settings are refused here, before any image is made
    population(params, detector)

    jobs = [(out_dir, params, index, detector) for index in range(params.n_frames)]
    if threads == 1:
        list(map(_write_frame, jobs))
    else:
        with ProcessPoolExecutor(threads, mp_context=get_context("spawn")) as pool:
            list(pool.map(_write_frame, jobs, chunksize=4))
    _write_tables(out_dir, params, detector)
    n_blobs = len(population(params, detector))
    log.info("%d images with %d blobs in %s", params.n_frames, n_blobs, out_dir)


def _write_frame(job: tuple[Path, Campaign, int, Detector]) -> None:
    """Render one image and write it."""
    out_dir, params, index, detector = job
    name = frame_names(params)[index]
    header = _header(name, float(dates(params)[index]), detector)
    image = render_image(params, index, detector)
    noise = pixel_noise(params, conditions(params, index, detector).photons_e, detector)
    path = out_dir / f"{name}.fits.fz"
    fits_images.write_image(path, image, name="SCI", header=header, sigma=COARSER * noise)


def _header(name: str, mjd: float, detector: Detector) -> Header:
    """Return the header of an image, with the cards of a real one."""
    from astropy.io.fits import Header

    cards = [
        *detector.simulation.header.items(),
        ("ROOTNAME", name.removesuffix("_blob")),
        ("EXPSTART", mjd, "exposure start (MJD)"),
        ("BUNIT", "", "fraction of the light that is missing"),
        ("ORIGIN", "blobpipe", "simulated, not observed"),
    ]
    return Header(cards)


def _write_tables(out_dir: Path, params: Campaign, detector: Detector) -> None:
    """Write ``blobs.csv``, the catalogue, and ``frames.csv``, the list of images with their true conditions."""
    import pandas as pd

    names = frame_names(params)
    blobs = pd.DataFrame(population(params, detector))
    blobs["first_frame"] = ["" if first < 0 else names[first] for first in blobs.pop("first")]
    tables.write_table(out_dir / "blobs.csv", blobs)
    table = pd.DataFrame(
        {"frame": names, "mjd": dates(params), "label": labels(params), "seed": params.seed}
    )
    each = pd.DataFrame([conditions(params, index, detector) for index in range(params.n_frames)])
    tables.write_table(out_dir / "frames.csv", table.join(each))


def dates(params: Campaign) -> npt.NDArray[np.float64]:
    """Return the date of each image (MJD), increasing, shape (n,)."""
    rng = stream(params.seed, "campaign", "dates")
    gaps_d = rng.gamma(2.0, MEAN_INTERVAL_D / 2, params.n_frames)
    return np.round(FIRST_MJD + np.cumsum(gaps_d + 0.1), 4)


def labels(params: Campaign) -> list[str]:
    """Return the label of each image.

    It is ``stack`` for one of the first images, ``historical`` for one that shows a blob that none showed before, and
    ``clean`` for all others.
    """
    cases = set(_cases(params))
    found = []
    for index in range(params.n_frames):
        if index < params.first_frames:
            found.append("stack")
        else:
            found.append("historical" if index in cases else "clean")
    return found


def _cases(params: Campaign) -> list[int]:
    """Draw the indices of the images that show new blobs, increasing."""
    candidates = np.arange(params.first_frames, params.n_frames)
    if params.n_cases >= len(candidates):
        raise ParamsError(
            f"campaign.n_cases={params.n_cases}, expected fewer than the {len(candidates)} images after the first "
            f"{params.first_frames}; lower n_cases or raise n_frames"
        )
    rng = stream(params.seed, "campaign", "cases")
    chosen = rng.choice(candidates, params.n_cases, replace=False)
    return [int(index) for index in np.sort(chosen)]


def conditions(params: Campaign, index: int, detector: Detector = DEFAULT) -> Conditions:
    """Return the photon level and the CSM shift of one image."""
    return _draw_conditions(params, _frame_stream(params, index), detector)


def _frame_stream(params: Campaign, index: int) -> np.random.Generator:
    """Return the random stream of one image."""
    return stream(params.seed, "campaign", index)


def _draw_conditions(params: Campaign, rng: np.random.Generator, detector: Detector) -> Conditions:
    """Draw the conditions of an image, the first numbers of its stream.

    A shift is usually small, and sometimes up to the largest; there is none where nothing moves.
    """
    photons_e = float(log_uniform(rng, *params.photons_e))
    small = rng.normal(0, params.shift_px, 2)
    distance = params.large_shift_px * rng.uniform(0.1, 1)
    angle = rng.uniform(0, 2 * np.pi)
    large = distance * np.array([np.cos(angle), np.sin(angle)])
    x, y = large if rng.random() < params.large_shift_frac else small
    if not detector.moves:
        x, y = 0.0, 0.0
    return Conditions(photons_e, float(x), float(y))


def pixel_noise(params: Campaign, photons_e: float, detector: Detector = DEFAULT) -> float:
    """Return the standard deviation of a good pixel from image to image (fraction of the light)."""
    variance = (
        1 / photons_e + (detector.read_noise_e / photons_e) ** 2 + params.flattening_noise_frac**2
    )
    return float(np.sqrt(variance))


@lru_cache(maxsize=2)
def population(params: Campaign, detector: Detector = DEFAULT) -> tuple[Blob, ...]:
    """Draw all blobs: those older than the first image, then the new ones by date."""
    rng = stream(params.seed, "campaign", "blobs")
    per_case = rng.choice(1 + np.arange(len(NEW_BLOBS)), params.n_cases, p=NEW_BLOBS)
    first = [-1] * params.n_known
    for index, n_new in zip(_cases(params), per_case, strict=True):
        first += [index] * int(n_new)
    x, y = _draw_centres(rng, first, detector)
    return tuple(
        _draw_blob(rng, f"b{k + 1:04d}", x[k], y[k], first[k], detector) for k in range(len(first))
    )


def _draw_centres(
    rng: np.random.Generator, first: list[int], detector: Detector
) -> npt.NDArray[np.float64]:
    """Draw the centres of blobs, `SEPARATION_PX` apart as far as there is room; shape (2, n).

    Parameters
    ----------
    rng : Generator
    first : list of int
        As in `Blob`; new blobs keep away from the border.
    detector : Detector
    """
    # A disc of dead pixels hides what would be on it
    disc = detector.simulation.dead_disc_px
    placed = np.array([[disc[0]], [disc[1]]]) if disc else np.zeros((2, 0))
    n_hidden = placed.shape[1]
    ny, nx = detector.shape
    for index in first:
        margin = detector.border_px + (MARGIN_PX if index >= 0 else 0)
        high = np.array([[nx], [ny]]) - 1 - margin
        tries = rng.uniform(margin, high, (2, 200))
        # The first try that is far from all others, else the farthest one
        dx, dy = tries[:, :, None] - placed[:, None, :]
        nearest = np.hypot(dx, dy).min(axis=1, initial=np.inf)
        far = np.flatnonzero(nearest > SEPARATION_PX)
        best = far[0] if len(far) else nearest.argmax()
        placed = np.append(placed, tries[:, best : best + 1], axis=1)
    return placed[:, n_hidden:]


def _draw_blob(
    rng: np.random.Generator, name: str, x: float, y: float, first: int, detector: Detector
) -> Blob:
    """Draw size, shape and depth of a blob: large diamonds and rings lower left, small discs upper right."""
    typical = detector.typical_radius(np.asarray(x), np.asarray(y))
    radius = float(np.clip(typical * rng.normal(1, 0.1), *detector.blobs.radius_px))

    lower_left = 1 - (x + y) / (detector.width_px + detector.height_px)
    disc = 1 - 0.9 * lower_left
    diamond = 0.6 * lower_left
    ring = 1 - disc - diamond
    shape: Shape = str(rng.choice(SHAPES, p=[disc, diamond, ring]))  # type: ignore[assignment]

    # Depths below the S/N at which anybody could have seen the blob, or beyond the deepest, are drawn again.
    # The particle of a ring covers little of the pupil, so rings are faint, and of more equal depths.
    snr_of_1 = matched_snr(blob_profile(shape, radius, size=STAMP), detector.difference_noise_frac)
    small = 0.5 if shape == "ring" else 1.0
    spread = small**0.5 * DEPTH_SPREAD
    depths = small * MEDIAN_DEPTH_FRAC * np.exp(spread * rng.standard_normal(100))
    possible = (depths <= DEEPEST_FRAC) & (depths * snr_of_1 >= FAINTEST_SNR)
    depth = float(depths[possible][0])
    return Blob(name, float(x), float(y), radius, depth, shape, first)


def render_image(params: Campaign, index: int, detector: Detector = DEFAULT) -> Image:
    """Render one image of the campaign, from its own random stream alone.

    Returns
    -------
    ndarray, shape (ny, nx), float32
        Fraction of the light that is missing; NaN on the reference pixels.
    """
    visible = [blob for blob in population(params, detector) if blob.first <= index]
    return _render(params, _frame_stream(params, index), visible, detector)


def known_blobs(params: Campaign, detector: Detector = DEFAULT) -> list[Blob]:
    """Return the blobs that are older than the first image."""
    return [blob for blob in population(params, detector) if blob.first < 0]


def render_quiet_image(params: Campaign, number: int, detector: Detector = DEFAULT) -> Image:
    """Render an image that is not of the campaign, of the same detector and without any new blob.

    Parameters
    ----------
    params : Campaign
    number : int
        Which one, from 0; selects the random stream.
    detector : Detector, optional

    Returns
    -------
    ndarray, shape (ny, nx), float32
        As `render_image`.
    """
    rng = stream(params.seed, "campaign", "quiet", number)
    return _render(params, rng, known_blobs(params, detector), detector)


def _render(
    params: Campaign, rng: np.random.Generator, visible: list[Blob], detector: Detector
) -> Image:
    """Render an image with some blobs on the mirror."""
    # The order of these steps is that of the draws from the stream
    state = _draw_conditions(params, rng, detector)
    loss = blob_layer(visible, state.shift_x_px, state.shift_y_px, detector.shape)

    # The detector's pattern, and what the flattening leaves of the light
    shared = shared_pattern(params.seed, params.fixed_pattern_frac, detector)
    image = shared.fixed + loss
    image += shared.glow * np.float32(rng.normal(1, STEADY_GLOW))
    image += _illumination(rng, loss.shape) + _stripes(rng, loss.shape)

    # Artefacts of this image alone
    _add_flicker(image, shared, rng)
    _add_streaks(image, rng)
    _add_trails(image, rng)

    # Photons, readout and flattening in one draw: at 10,000 electrons, a Poisson distribution is normal
    constant = (detector.read_noise_e / state.photons_e) ** 2 + params.flattening_noise_frac**2
    light = np.clip(1 - loss, 0, None)
    variance = light / np.float32(state.photons_e) + np.float32(constant)
    image += np.asarray(np.sqrt(variance) * rng.standard_normal(loss.shape, np.float32))

    image = detector.without_border(image)
    return np.pad(image, detector.border_px, constant_values=np.nan)


def blob_layer(
    blobs: list[Blob],
    shift_x_px: float,
    shift_y_px: float,
    shape: tuple[int, int] = DEFAULT.shape,
) -> Image:
    """Return the light lost in blobs, all moved together by the mirror.

    Parameters
    ----------
    blobs : list of Blob
    shift_x_px, shift_y_px : float
        Shift by the mirror (px).
    shape : (ny, nx), optional

    Returns
    -------
    ndarray, shape (ny, nx), float32
        Fraction of the light that is missing.
    """
    # A margin that blobs at the border can be added to
    half = STAMP // 2
    padded = np.zeros((shape[0] + 2 * STAMP, shape[1] + 2 * STAMP), np.float32)
    for blob in blobs:
        x = blob.x_px + shift_x_px
        y = blob.y_px + shift_y_px
        column = round(x)
        row = round(y)
        profile = blob_profile(blob.shape, blob.radius_px, x - column, y - row, STAMP)
        window = padded[row + half + 1 :, column + half + 1 :][:STAMP, :STAMP]
        window += np.float32(blob.depth_frac) * profile
    return padded[STAMP:-STAMP, STAMP:-STAMP]


def _illumination(rng: np.random.Generator, shape: tuple[int, ...]) -> Image:
    """Draw what flattening leaves of the large-scale structure of the airglow."""
    from scipy.ndimage import gaussian_filter

    ny, nx = shape
    coarse = rng.standard_normal((-(-ny // 8), -(-nx // 8)), np.float32)
    coarse = gaussian_filter(coarse, 2, mode="wrap")
    scaled = coarse * np.float32(3e-4 / coarse.std())
    image: Image = _compiled(_enlarged)(scaled, ny, nx)
    return image


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function by Numba, which is not imported where only names of images are asked for."""
    import numba as nb

    compiled: Callable[..., Any] = nb.njit(cache=True, nogil=True)(function)
    return compiled


def _enlarged(coarse: Image, ny: int, nx: int) -> Image:
    """Return an image that is eight times larger, interpolated linearly, cut to (ny, nx).

    It is that of ``scipy.ndimage.zoom`` to the last bit, in an eighth of the time.
    """
    rows, columns = coarse.shape
    step_y = (rows - 1) / (8 * rows - 1)
    step_x = (columns - 1) / (8 * columns - 1)
    left = np.minimum((np.arange(nx) * step_x).astype(np.int64), columns - 2)
    near = 1 - (np.arange(nx) * step_x - left)
    image = np.empty((ny, nx), np.float32)
    for y in range(ny):
        top = min(int(y * step_y), rows - 2)
        upper = 1 - (y * step_y - top)
        for x in range(nx):
            at = left[x]
            value = coarse[top, at] * upper * near[x]
            value += coarse[top, at + 1] * upper * (1 - near[x])
            value += coarse[top + 1, at] * (1 - upper) * near[x]
            value += coarse[top + 1, at + 1] * (1 - upper) * (1 - near[x])
            image[y, x] = value
    return image


def _stripes(
    rng: np.random.Generator, shape: tuple[int, ...], columns: float = 2e-4, rows: float = 2e-4
) -> Image:
    """Draw columns and rows whose zero point is off, a few of them visibly.

    Parameters
    ----------
    rng : Generator
    shape : (ny, nx)
    columns, rows : float
        Standard deviations of the zero points (fraction of the light).
    """
    ny, nx = shape
    longest = max(shape)
    offsets = rng.standard_normal((2, longest)) * [[columns], [rows]]
    visible = np.where(rng.random((2, longest)) < 0.004, 3e-3, 0)
    of_columns = (offsets + visible)[0, :nx]
    of_rows = (offsets + visible)[1, :ny]
    return np.asarray(np.add.outer(of_rows, of_columns), dtype=np.float32)


def _add_flicker(image: Image, shared: SharedPattern, rng: np.random.Generator) -> None:
    """Let bad pixels jitter, and some clusters and pieces of the dead disc's rim read differently than usual."""
    jitter = shared.flicker * rng.standard_normal(len(shared.flicker), np.float32)
    image.flat[shared.unsteady] += jitter
    for pieces, chance in ((shared.clusters, 0.06), (shared.rim, 0.25)):
        for rows, columns in pieces:
            if rng.random() < chance:
                image[rows, columns] += np.float32(rng.normal(0, 0.12))


def _add_streaks(image: Image, rng: np.random.Generator) -> None:
    """Add pairs and triples of parallel, nearly horizontal streaks, faint or strong, light added or missing."""
    for _ in range(rng.poisson(2.0)):
        x, y = rng.uniform(0, image.shape[::-1])
        length = rng.uniform(100, 270)
        angle = np.radians(rng.normal(0, 4))
        spacing = rng.uniform(10, 18)
        is_strong = rng.random() < 0.4
        sign = rng.choice([-1, 1])
        value = sign * (rng.uniform(0.02, 0.06) if is_strong else rng.uniform(0.004, 0.012))
        for k in range(rng.choice([2, 3])):
            start = (x + rng.normal(0, 12), y + k * spacing)
            own_length = length * rng.normal(1, 0.05)
            width = rng.uniform(0.8, 1.5)
            _draw_line(image, start, own_length, angle, width, value)


def _add_trails(image: Image, rng: np.random.Generator) -> None:
    """Add trails of city lights and stars: slanted, faint, of any length, always light added."""
    for _ in range(rng.poisson(0.8)):
        angle = np.radians(rng.uniform(-60, 60))
        length = rng.uniform(60, 700)
        width = rng.uniform(1, 2.5)
        value = -np.exp(rng.normal(np.log(0.005), 0.5))
        start = tuple(rng.uniform(0, image.shape[::-1]))
        _draw_line(image, start, length, angle, width, value)


def _draw_line(
    image: Image,
    start: tuple[float, float],
    length: float,
    angle: float,
    width: float,
    value: float,
) -> None:
    """Add a line with a Gaussian cross-section and soft ends to an image.

    Parameters
    ----------
    image : ndarray, shape (ny, nx), float32
    start : (x, y)
        One end (px).
    length, width : float
        Length, and Gaussian sigma of the cross-section (px).
    angle : float
        Direction, from x to y (radians).
    value : float
        Height along the middle (fraction of the light).
    """
    dx = np.cos(angle)
    dy = np.sin(angle)
    end = (start[0] + length * dx, start[1] + length * dy)

    # The part of the image that the line reaches
    reach = 4 * width
    ends = np.array([start, end])
    size = image.shape[::-1]
    x0, y0 = np.clip(np.floor(ends.min(axis=0) - reach), 0, size).astype(int)
    x1, y1 = np.clip(np.ceil(ends.max(axis=0) + reach), 0, size).astype(int)
    x = np.arange(x0, x1)[None, :] - start[0]
    y = np.arange(y0, y1)[:, None] - start[1]
    along = x * dx + y * dy
    across = y * dx - x * dy
    # Distance from the nearest point of the line
    beyond = np.maximum(np.maximum(-along, along - length), 0)
    line = value * np.exp(-(across**2 + beyond**2) / (2 * width**2))
    image[y0:y1, x0:x1] += line.astype(np.float32)


@lru_cache(maxsize=2)
def shared_pattern(
    seed: int, fixed_pattern_frac: float, detector: Detector = DEFAULT
) -> SharedPattern:
    """Draw what all images of a campaign share.

    Parameters
    ----------
    seed : int
    fixed_pattern_frac : float
        Standard deviation of the pattern of pixels (fraction of the light).
    detector : Detector, optional
    """
    # Pixels, columns and rows, and amplifiers
    shape = detector.shape
    n_px = shape[0] * shape[1]
    special = detector.simulation
    rng = stream(seed, "campaign", "detector")
    fixed = np.float32(fixed_pattern_frac) * rng.standard_normal(shape, np.float32)
    fixed += _stripes(rng, shape, columns=4e-4) + _illumination(rng, shape)
    _add_amplifiers(fixed, detector)

    # One pixel in seventy is bad: some are merely off, some never read the same twice
    flicker = np.zeros(shape, np.float32)
    bad = rng.choice(n_px, n_px // 70, replace=False)
    signs = rng.choice([-1, 1], len(bad))
    fixed.flat[bad] += signs * np.exp(rng.normal(np.log(0.03), 1.0, len(bad)))
    flicker.flat[bad] = np.exp(rng.normal(np.log(0.008), 1.2, len(bad)))

    # Clusters of bad pixels are hot far more often than dead
    clusters = [_draw_cluster(rng, shape) for _ in range(special.n_clusters)]
    for pixels in clusters:
        sign = -1 if rng.random() < 0.92 else 1
        fixed[pixels] = sign * np.exp(rng.normal(np.log(0.15), 0.7, len(pixels[0])))

    # Artefacts at given places; the hub of the wagon wheel is two patches of hot pixels
    rim = _add_dead_disc(fixed, rng, special.dead_disc_px) if special.dead_disc_px else []
    glow = np.zeros(shape, np.float32)
    if special.dark_streak_x_px is not None:
        glow += _dark_streak(shape, special.dark_streak_x_px)
    if special.wagon_wheel_px is not None:
        x, y = (int(coordinate) for coordinate in special.wagon_wheel_px)
        fixed[y - 5 : y + 1, x - 1 : x + 2] = -0.1
        fixed[y : y + 3, x + 1 : x + 5] = -0.1
        glow += _wagon_wheel(shape, special.wagon_wheel_px)
    _add_edges(fixed, flicker, rng, special.notch_x_px)

    # The result is cached
    unsteady = np.flatnonzero(flicker)
    arrays = (fixed, glow, unsteady, flicker.flat[unsteady])
    for array in arrays:
        array.setflags(write=False)
    return SharedPattern(*arrays, clusters, rim)


def _add_amplifiers(fixed: Image, detector: Detector) -> None:
    """Lift the zero point of every second amplifier, along y if there are several, else along x."""
    along_x, along_y = detector.amplifiers
    lines, n = (fixed, along_y) if along_y > 1 else (fixed.T, along_x)
    side = len(lines) // n
    for k in range(1, n, 2):
        lines[k * side : (k + 1) * side] += np.float32(2e-4)


def _draw_cluster(rng: np.random.Generator, shape: tuple[int, int]) -> Pixels:
    """Draw a ragged patch one to eight pixels across; there are more of them towards the top."""
    centre = np.array(shape) * rng.random(2) ** (0.8, 1.0)
    across = np.clip(rng.lognormal(np.log(3.0), 0.4), 1, 8)
    rows, columns = np.mgrid[-5:6, -5:6]
    stretch = rng.uniform(0.75, 1.33)
    ragged = np.hypot(rows * stretch, columns / stretch) + rng.normal(0, 0.35, rows.shape)
    is_centre = (rows == 0) & (columns == 0)
    inside = (ragged <= across / 2) | is_centre
    pixels = np.stack([rows[inside], columns[inside]]) + centre[:, None].astype(int)
    pixels = np.clip(pixels, 0, np.array(shape)[:, None] - 1)
    return pixels[0], pixels[1]


def _add_dead_disc(
    fixed: Image, rng: np.random.Generator, disc: tuple[float, float, float]
) -> list[Pixels]:
    """Add the rim of a disc of dead pixels, in pieces that read high or low, and return the pixels of each.

    The "Death Star" is such a disc, which calibration has patched over, so that only its rim shows.
    """
    ny, nx = fixed.shape
    rows, columns = np.mgrid[:ny, :nx]
    x = columns - disc[0]
    y = rows - disc[1]
    near_rim = np.abs(np.hypot(x, y) - disc[2]) < 1.6
    turn = np.arctan2(y, x) / (2 * np.pi) % 1
    piece = (turn * N_RIM).astype(int)
    rim = []
    for k in range(N_RIM):
        piece_rows, piece_columns = np.nonzero(near_rim & (piece == k))
        rim.append((piece_rows, piece_columns))
        # High and low mostly alternate
        is_low = (k + (rng.random() < 0.3)) % 2
        fixed[piece_rows, piece_columns] = 0.05 if is_low else -0.06
    return rim


def _add_edges(
    fixed: Image, flicker: Image, rng: np.random.Generator, notch_x: float | None
) -> None:
    """Add a notch in the upper edge, the two upper corners, and the outermost rows and columns.

    They are bright, and the notch and the corners are unsteady.
    """
    ny, nx = fixed.shape
    rows, columns = np.mgrid[:ny, :nx]
    ragged = rng.normal(0, 1.2, (ny, nx))
    ragged += np.repeat(rng.normal(0, 1.5, -(-nx // 4)), 4)[:nx]

    # Distances from the edges, and from the middle of the notch
    from_top = ny - 1 - rows
    from_right = nx - 1 - columns
    from_middle = np.abs(columns - notch_x) if notch_x is not None else np.full((ny, nx), np.inf)
    from_edge = np.minimum.reduce([rows, columns, from_top, from_right])

    notch = (from_middle < 103) & (from_top < 16 - 7 * from_middle / 103 + ragged)
    left = (columns + 0.9 * from_top) < 34 + ragged
    right = (from_right + 1.1 * from_top) < 24 + ragged
    outermost = from_edge < 7.5 + ragged / 2
    bright = notch | left | right
    fixed[outermost] -= rng.uniform(0, 0.06, int(outermost.sum())).astype(np.float32)
    fixed[bright] = -rng.uniform(0.03, 0.2, int(bright.sum())).astype(np.float32)
    flicker[bright] = 0.03


def _dark_streak(shape: tuple[int, int], x: float) -> Image:
    """Return a faint, nearly vertical dark streak, fading downwards."""
    ny, nx = shape
    rows, columns = np.mgrid[:ny, :nx].astype(np.float32)
    centre = x - 9 * ((rows - 700) / 260) ** 2 * (rows > 700)
    strength = np.clip((rows - 380) / 500, 0, 1) * (rows < 960)
    profile = np.exp(-(((columns - centre) / 2.2) ** 2) / 2)
    return np.asarray(4.5e-3 * strength * profile, dtype=np.float32)


def _wagon_wheel(shape: tuple[int, int], hub: tuple[float, float]) -> Image:
    """Return rings and spokes around the hub of the wagon wheel."""
    ny, nx = shape
    rows, columns = np.mgrid[:ny, :nx].astype(np.float32)
    x = columns - hub[0]
    y = rows - hub[1]
    r = np.hypot(x, y)
    angle = np.arctan2(y, x)
    rings = 6e-3 * np.cos(2 * np.pi * r / 11) * np.exp(-r / 12)
    rings = rings * (1 + np.cos(angle - 1))
    spokes = 1.2e-3 * np.cos(24 * angle) * np.exp(-((r / 150) ** 2))
    spokes = spokes * (1 - np.exp(-((r / 30) ** 2)))
    return np.asarray(rings + spokes, dtype=np.float32)
