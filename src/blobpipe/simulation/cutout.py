"""Draw the recipes of subframes: which windows of which frames, and which blobs on them (ISR 3.3)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from blobpipe.core import fits_images, plotting, tables
from blobpipe.core.arrays import Int64Array
from blobpipe.core.detector import DEFAULT, Detector
from blobpipe.core.random_streams import stream
from blobpipe.errors import TableError
from blobpipe.images import tiles
from blobpipe.images.clip import clip_image
from blobpipe.images.scale import scale_image
from blobpipe.params import Clip, Cutout, Scale
from blobpipe.simulation import render, stamps
from blobpipe.simulation.recipes import Recipes, Scene, load_scene, to_recipes

if TYPE_CHECKING:
    import pandas as pd

SPLITS = ("train", "validation")

# Fraction of the stamps that training uses
TRAIN_FRAC = 0.75

# Subframes on a contact sheet
N_SHEET = 48

SUBFRAME_COLUMNS = ("subframe", "frame", "x0_px", "y0_px", "label", "dip_x_px", "dip_y_px")
BLOB_COLUMNS = ("subframe", "stamp", "x_px", "y_px", "factor", "snr")
STAMP_COLUMNS = ("stamp", "source", "blob", "split", "radius_px", "peak_sigma")


class Region(NamedTuple):
    """Frames, and the range of x that windows may cover in them (px, end excluded)."""

    names: list[str]
    x_range: tuple[int, int]


def cut(
    raw_dir: str | Path,
    difference_dir: str | Path,
    scale_dir: str | Path,
    out_dir: str | Path,
    params: Cutout,
    *,
    clip: Clip,
    scale: Scale,
    detector: Detector = DEFAULT,
) -> None:
    """Write the recipes of all subframes, the stamps that they use, and a contact sheet (stage ``cutout``).

    Training windows come from the left part of the images; validation windows come from the right part, and from whole
    images that are held out. Images that show a new blob for the first time are left to the regression test.

    Parameters
    ----------
    raw_dir, difference_dir, scale_dir : path
        Folders of the images and of these stages.
    out_dir : path
        Folder of ``stamps.fits``, ``stamps.csv``, ``{split}_subframes.csv``, ``{split}_blobs.csv``, and
        ``contact_sheet.png``.
    params : Cutout
    clip, scale : Clip, Scale
        Settings by which the median stack is clipped and scaled, as the images were.
    detector : Detector, optional

    Raises
    ------
    TableError
        If there are too few images or stamps.

    Notes
    -----
    Source: ISR 3.3; images that are held out, dips, and separate stamps for training and validation are this project's.
    """
    out_dir = Path(out_dir)
    table = _frames_without_new_blobs(raw_dir, scale_dir, detector)
    stack = fits_images.read_plane(Path(difference_dir) / "reference.fits.fz", "STACK")
    cube, catalogue, stack_sigma = _make_stamps(raw_dir, stack, params, clip, scale, detector)
    fits_images.write_cube(out_dir / "stamps.fits", cube)
    tables.write_table(out_dir / "stamps.csv", catalogue)

    # One sigma of the stack, from which the stamps come, in sigma of each frame
    sigma = table.set_index("frame")["sigma_frac"]
    ratio = stack_sigma / sigma if params.amplitude == "physical" else sigma * 0 + 1

    regions = split_regions(list(table["frame"]), stack.shape[1], params)
    for split, n in zip(SPLITS, (params.n_train, params.n_validation), strict=True):
        rng = stream(params.seed, "cutout", split)
        subframes = draw_subframes(rng, n, regions[split], stack.shape, params)
        usable = catalogue["stamp"][catalogue["split"] == split].to_numpy()
        blobs = draw_blobs(rng, subframes, usable, cube, ratio, params)
        tables.write_table(out_dir / f"{split}_subframes.csv", subframes)
        tables.write_table(out_dir / f"{split}_blobs.csv", blobs)

    scene, recipes = open_split(difference_dir, scale_dir, out_dir, "validation", n=N_SHEET)
    pixels = render.render_subframes(scene, recipes, np.arange(len(recipes)))
    sheet = out_dir / "contact_sheet.png"
    plotting.contact_sheet(sheet, pixels, recipes.label, "Validation subframes")


def _frames_without_new_blobs(
    raw_dir: str | Path, scale_dir: str | Path, detector: Detector
) -> pd.DataFrame:
    """Return the table of the scaled frames that are not the first to show a blob."""
    cases = set(tables.read_blobs(raw_dir, detector)["first_frame"])
    table = tables.read_stage(scale_dir).query("status == 'ok'")
    quiet = table[~table["frame"].isin(cases)]
    if len(quiet) < 2:
        raise TableError(
            f"{scale_dir}: found {len(quiet)} usable images without a new blob, expected at least 2 (one to train on, "
            "one to hold out); add images"
        )
    return quiet


def _make_stamps(
    raw_dir: str | Path,
    stack: stamps.Stamps,
    params: Cutout,
    clip: Clip,
    scale: Scale,
    detector: Detector,
) -> tuple[stamps.Stamps, pd.DataFrame, float]:
    """Make the stamps of training and validation.

    Returns
    -------
    ndarray, shape (n, 41, 41), float32
        Stamps (sigma of the scaled stack).
    DataFrame
        Columns of ``stamps.csv``.
    float
        One sigma of the scaled stack (fraction of the light).
    """
    import pandas as pd

    clipped, _ = clip_image(stack, clip)
    scaled, scaling = scale_image(clipped, scale)

    # Stamps cut from the stack, from profiles, or both
    rng = stream(params.seed, "cutout", "stamps")
    cubes = []
    sources = []
    if params.stamps != "profiles":
        known = tables.read_blobs(raw_dir, detector).query("first_frame == ''")
        cube, table = stamps.extract_stamps(scaled, known)
        cubes.append(cube)
        sources.append(table.assign(source="stack"))
    if params.stamps != "stack":
        cube, table = stamps.profile_stamps(
            rng,
            params.n_profiles,
            stack.shape,
            sigma_frac=scaling.sigma_frac,
            high_sigma=scaling.high_sigma,
            detector=detector,
        )
        cubes.append(cube)
        sources.append(table.assign(source="profile"))
    catalogue = pd.concat(sources, ignore_index=True)
    if len(catalogue) < 2:
        raise TableError(
            f"{raw_dir}/blobs.csv: found {len(catalogue)} usable stamps, expected at least 2; list more known blobs or "
            "set cutout.stamps to profiles or mix"
        )

    # Training and validation each have at least one
    n = len(catalogue)
    n_train = min(max(1, round(TRAIN_FRAC * n)), n - 1)
    order = rng.permutation(n)
    catalogue["stamp"] = np.arange(n)
    in_training = np.isin(catalogue["stamp"], order[:n_train])
    catalogue["split"] = np.where(in_training, *SPLITS)
    return np.concatenate(cubes), catalogue[list(STAMP_COLUMNS)], scaling.sigma_frac


def split_regions(names: list[str], nx: int, params: Cutout) -> dict[str, list[Region]]:
    """Return the regions of training and of validation windows, which never share a pixel.

    Parameters
    ----------
    names : list of str
        Frames in order of date; at most ``max_frames``, evenly chosen, are used.
    nx : int
        Width of the frames (px).
    params : Cutout

    Returns
    -------
    dict of list of Region
        By the names of `SPLITS`.

    Raises
    ------
    TableError
        If the left part of the frames is too narrow for a window.

    Notes
    -----
    Source: ISR 3.3 (left 75 %, right 25 %); whole images that are held out are this project's.
    """
    if len(names) > params.max_frames:
        chosen = np.linspace(0, len(names) - 1, params.max_frames)
        names = [names[i] for i in chosen.astype(int)]

    # Hold out whole frames, evenly chosen, but neither the first nor the last
    n_held_out = min(max(1, round(params.whole_frames_frac * len(names))), len(names) - 1)
    chosen = np.linspace(0, len(names) - 1, n_held_out + 2)[1:-1]
    held_out = [names[i] for i in chosen.astype(int)]
    shared = [name for name in names if name not in set(held_out)]

    border = int(params.left_frac * nx)
    if border < tiles.SIDE:
        raise TableError(
            f"the left {params.left_frac:.0%} of images {nx} px wide are {border} px, expected at least {tiles.SIDE} "
            "for a training window; raise cutout.left_frac"
        )
    validation = [Region(held_out, (0, nx))]
    if nx - border >= tiles.SIDE:
        validation.append(Region(shared, (border, nx)))
    return {"train": [Region(shared, (0, border))], "validation": validation}


def draw_subframes(
    rng: np.random.Generator, n: int, regions: list[Region], shape: tuple[int, ...], params: Cutout
) -> pd.DataFrame:
    """Draw windows (equal numbers from each region), labels and dips.

    Parameters
    ----------
    rng : Generator
    n : int
        Number of subframes.
    regions : list of Region
    shape : (ny, nx)
        Shape of the frames.
    params : Cutout

    Returns
    -------
    DataFrame
        One row per subframe, with the columns of ``*_subframes.csv``.
    """
    import pandas as pd

    region = [regions[i] for i in np.arange(n) % len(regions)]
    frame = [each.names[rng.integers(len(each.names))] for each in region]
    x0 = []
    for each in region:
        first, end = each.x_range
        x0.append(int(rng.integers(first, end - tiles.SIDE + 1)))
    with_blobs = np.arange(n) < round(params.blob_frac * n)
    label = rng.permutation(with_blobs.astype(int))

    # Dips: shifts of the known blobs, evenly distributed in their logarithm and direction, for some subframes
    low, high = map(math.log, params.dip_px)
    size = np.exp(rng.uniform(low, high, n))
    size = size * (rng.random(n) < params.dip_frac)
    angle = rng.uniform(0, 2 * np.pi, n)
    dip_x = np.round(size * np.cos(angle), 3)
    dip_y = np.round(size * np.sin(angle), 3)

    y0 = rng.integers(0, shape[0] - tiles.SIDE + 1, n)
    columns = (np.arange(n), frame, x0, y0, label, dip_x, dip_y)
    return pd.DataFrame(dict(zip(SUBFRAME_COLUMNS, columns, strict=True)))


def draw_blobs(
    rng: np.random.Generator,
    subframes: pd.DataFrame,
    usable: Int64Array,
    cube: stamps.Stamps,
    ratio: pd.Series[float],
    params: Cutout,
) -> pd.DataFrame:
    """Draw 1 to ``max_blobs`` blobs for every subframe of label 1, with centres anywhere on it.

    Parameters
    ----------
    rng : Generator
    subframes : DataFrame
        From `draw_subframes`.
    usable : ndarray of int
        Indices of the stamps to choose from.
    cube : ndarray, shape (m, size, size)
        All stamps.
    ratio : Series
        One sigma of the stack in sigma of each frame, by frame.
    params : Cutout

    Returns
    -------
    DataFrame
        One row per blob, with the columns of ``*_blobs.csv``.
    """
    import pandas as pd

    with_blobs = subframes[subframes["label"] == 1]
    counts = rng.integers(1, params.max_blobs + 1, len(with_blobs))
    subframe = np.repeat(with_blobs["subframe"].to_numpy(), counts)
    frame = np.repeat(with_blobs["frame"].to_numpy(), counts)
    n = len(subframe)
    stamp = usable[rng.integers(len(usable), size=n)]
    x, y = rng.integers(0, tiles.SIDE, (2, n))
    strength = rng.uniform(*params.strength, n)
    factor = np.round(strength * ratio.loc[frame].to_numpy(), 5)
    norms = [_visible_norm(cube[s], cx, cy) for s, cx, cy in zip(stamp, x, y, strict=True)]
    snr = np.round(factor * norms, 3)
    columns = (subframe, stamp, x, y, factor, snr)
    return pd.DataFrame(dict(zip(BLOB_COLUMNS, columns, strict=True)))


def _visible_norm(stamp: stamps.Stamps, cx: int, cy: int) -> float:
    """Return the norm of the part of a stamp that lies on the subframe, its S/N in noise of one sigma."""
    half = len(stamp) // 2
    rows = slice(max(0, half - cy), half + min(half + 1, tiles.SIDE - cy))
    columns = slice(max(0, half - cx), half + min(half + 1, tiles.SIDE - cx))
    energy = (stamp[rows, columns] ** 2).sum()
    return float(np.sqrt(energy))


def read_recipes(cutout_dir: str | Path, split: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Read ``*_subframes.csv`` and ``*_blobs.csv`` of ``train`` or ``validation``."""
    folder = Path(cutout_dir)
    subframes = tables.read_table(folder / f"{split}_subframes.csv", SUBFRAME_COLUMNS)
    blobs = tables.read_table(folder / f"{split}_blobs.csv", BLOB_COLUMNS)
    return subframes, blobs


def open_split(
    difference_dir: str | Path,
    scale_dir: str | Path,
    cutout_dir: str | Path,
    split: str,
    augmented: pd.DataFrame | None = None,
    *,
    n: int | None = None,
) -> tuple[Scene, Recipes]:
    """Read the scene and the recipes that `render.render_subframes` renders.

    Parameters
    ----------
    difference_dir, scale_dir, cutout_dir : path
        Folders of these stages.
    split : {"train", "validation"}
    augmented : DataFrame, optional
        Augmentation of the training subframes, from `augment.read_augmentation`.
    n : int, optional
        Number of subframes, the first ones; all if not given.
    """
    subframes, blobs = read_recipes(cutout_dir, split)
    if n is not None:
        subframes = subframes[:n]
        blobs = blobs[blobs["subframe"] < n]
    if augmented is not None:
        augmented = augmented[augmented["subframe"] < len(subframes)]
    names = sorted(set(subframes["frame"]))
    cube = fits_images.read_cube(Path(cutout_dir) / "stamps.fits")
    scene = load_scene(difference_dir, scale_dir, names, cube)
    return scene, to_recipes(scene.names, subframes, blobs, augmented)
