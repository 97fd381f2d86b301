"""Recipes for subframes: which windows of which frames, and which blobs on them (ISR 3.3)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from blobpipe.core import fits_images, plotting, tables
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
SUBFRAME_COLUMNS = ("subframe", "frame", "x0_px", "y0_px", "label", "dip_x_px", "dip_y_px")
BLOB_COLUMNS = ("subframe", "stamp", "x_px", "y_px", "factor", "snr")
STAMP_COLUMNS = ("stamp", "source", "blob", "split", "radius_px", "peak_sigma")


class Region(NamedTuple):
    """Frames, and the range of x that windows may cover in them (pixels, end excluded)."""

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
) -> None:
    """Write the recipes of all subframes, the stamps they use, and a contact sheet (stage ``cutout``).

    Training windows come from the left part of the images, validation windows from the right part and
    from images kept aside whole. Images that show a new blob for the first time are left to the
    regression test.

    Raises
    ------
    TableError
        If there are too few images or stamps.

    Notes
    -----
    Source: ISR 3.3; images kept aside, dips and the separate stamps of training and validation are ours.
    """
    out_dir = Path(out_dir)
    table = _quiet_frames(raw_dir, scale_dir)
    stack = fits_images.read_plane(Path(difference_dir) / "reference.fits.fz", "STACK")
    cube, catalogue, stack_sigma = _make_stamps(raw_dir, stack, params, clip, scale)
    regions = split_regions(list(table["frame"]), stack.shape[1], params)
    sigma = table.set_index("frame")["sigma_frac"]
    fits_images.write_cube(out_dir / "stamps.fits", cube)
    tables.write_table(out_dir / "stamps.csv", catalogue)
    for split, n in zip(SPLITS, (params.n_train, params.n_validation), strict=True):
        rng = stream(params.seed, "cutout", split)
        subframes = draw_subframes(rng, n, regions[split], stack.shape, params)
        ratio = stack_sigma / sigma if params.amplitude == "physical" else sigma * 0 + 1
        usable = catalogue["stamp"][catalogue["split"] == split].to_numpy()
        blobs = draw_blobs(rng, subframes, usable, cube, ratio, params)
        tables.write_table(out_dir / f"{split}_subframes.csv", subframes)
        tables.write_table(out_dir / f"{split}_blobs.csv", blobs)
    _contact_sheet(difference_dir, scale_dir, out_dir)


def _quiet_frames(raw_dir: str | Path, scale_dir: str | Path) -> pd.DataFrame:
    """The scaled frames that are not the first to show a blob."""
    cases = set(tables.read_blobs(raw_dir)["first_frame"])
    table = tables.read_stage(scale_dir).query("status == 'ok'")
    quiet = table[~table["frame"].isin(cases)]
    if len(quiet) < 2:
        raise TableError(
            f"{scale_dir}: {len(quiet)} usable images without a new blob, expected at least 2 (one to train on, "
            "one to keep aside); add images"
        )
    return quiet


def _make_stamps(
    raw_dir: str | Path, stack: stamps.Stamps, params: Cutout, clip: Clip, scale: Scale
) -> tuple[stamps.Stamps, pd.DataFrame, float]:
    import pandas as pd

    clipped, _ = clip_image(stack, clip)
    scaled, scaling = scale_image(clipped, scale)
    rng = stream(params.seed, "cutout", "stamps")
    cubes = []
    sources = []
    if params.stamps != "profiles":
        known = tables.read_blobs(raw_dir).query("first_frame == ''")
        cube, table = stamps.extract_stamps(scaled, known)
        cubes = [cube]
        sources = [table.assign(source="stack")]
    if params.stamps != "stack":
        cube, table = stamps.profile_stamps(
            rng,
            params.n_profiles,
            stack.shape,
            sigma_frac=scaling.sigma_frac,
            high_sigma=scaling.high_sigma,
        )
        cubes = [*cubes, cube]
        sources = [*sources, table.assign(source="profile")]
    catalogue = pd.concat(sources, ignore_index=True)
    if len(catalogue) < 2:
        raise TableError(
            f"{raw_dir}/blobs.csv: {len(catalogue)} usable stamps, expected at least 2; list more known blobs or "
            "set cutout.stamps to profiles or mix"
        )
    catalogue["stamp"] = np.arange(len(catalogue))
    order = rng.permutation(len(catalogue))
    n_train = min(max(1, round(0.75 * len(catalogue))), len(catalogue) - 1)
    catalogue["split"] = np.where(np.isin(catalogue["stamp"], order[:n_train]), *SPLITS)
    return np.concatenate(cubes), catalogue[list(STAMP_COLUMNS)], scaling.sigma_frac


def split_regions(names: list[str], nx: int, params: Cutout) -> dict[str, list[Region]]:
    """Where training and validation windows may lie; the two never share a pixel.

    Parameters
    ----------
    names : list of str
        Frames in order of date; at most ``max_frames``, evenly chosen, are used.
    nx : int
        Width of the frames (px).

    Notes
    -----
    Source: ISR 3.3 (left 75 %, right 25 %); whole images kept aside are ours.
    """
    if len(names) > params.max_frames:
        names = [names[i] for i in np.linspace(0, len(names) - 1, params.max_frames).astype(int)]
    n_aside = min(max(1, round(params.whole_frames_frac * len(names))), len(names) - 1)
    aside = [names[i] for i in np.linspace(0, len(names) - 1, n_aside + 2)[1:-1].astype(int)]
    shared = [name for name in names if name not in set(aside)]
    border = int(params.left_frac * nx)
    if border < tiles.SIDE:
        raise TableError(
            f"the left {params.left_frac:.0%} of images {nx} px wide are {border} px, expected at least {tiles.SIDE} "
            "for a training window; raise cutout.left_frac"
        )
    validation = [Region(aside, (0, nx))]
    if nx - border >= tiles.SIDE:
        validation.append(Region(shared, (border, nx)))
    return {"train": [Region(shared, (0, border))], "validation": validation}


def draw_subframes(
    rng: np.random.Generator, n: int, regions: list[Region], shape: tuple[int, ...], params: Cutout
) -> pd.DataFrame:
    """Draw windows (equal numbers from each region), labels and dips.

    Returns
    -------
    DataFrame
        One row per subframe, with the columns of ``*_subframes.csv``.
    """
    import pandas as pd

    region = [regions[i] for i in np.arange(n) % len(regions)]
    names = [r.names[rng.integers(len(r.names))] for r in region]
    x0 = [int(rng.integers(r.x_range[0], r.x_range[1] - tiles.SIDE + 1)) for r in region]
    label = rng.permutation((np.arange(n) < round(params.blob_frac * n)).astype(int))
    dip = _draw_dips(rng, n, params)
    columns = (
        np.arange(n),
        names,
        x0,
        rng.integers(0, shape[0] - tiles.SIDE + 1, n),
        label,
        dip[:, 0],
        dip[:, 1],
    )
    return pd.DataFrame(dict(zip(SUBFRAME_COLUMNS, columns, strict=True)))


def _draw_dips(rng: np.random.Generator, n: int, params: Cutout) -> npt.NDArray[np.float64]:
    low, high = map(math.log, params.dip_px)
    size = np.exp(rng.uniform(low, high, n)) * (rng.random(n) < params.dip_frac)
    angle = rng.uniform(0, 2 * np.pi, n)
    return np.round(np.stack([size * np.cos(angle), size * np.sin(angle)], axis=1), 3)


def draw_blobs(
    rng: np.random.Generator,
    subframes: pd.DataFrame,
    usable: npt.NDArray[np.int64],
    cube: stamps.Stamps,
    ratio: pd.Series[float],
    params: Cutout,
) -> pd.DataFrame:
    """Draw 1 to ``max_blobs`` blobs for every subframe of label 1, their centres anywhere on it.

    Parameters
    ----------
    usable : ndarray of int
        Stamps to choose from.
    cube : ndarray, shape (m, size, size)
        All stamps.
    ratio : Series
        By frame: what one sigma of the stack is worth in sigma of the frame.

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
    factor = np.round(rng.uniform(*params.strength, n) * ratio.loc[frame].to_numpy(), 5)
    snr = factor * [_visible_norm(cube[s], cx, cy) for s, cx, cy in zip(stamp, x, y, strict=True)]
    return pd.DataFrame(
        dict(zip(BLOB_COLUMNS, (subframe, stamp, x, y, factor, np.round(snr, 3)), strict=True))
    )


def _visible_norm(stamp: stamps.Stamps, cx: int, cy: int) -> float:
    half = len(stamp) // 2
    rows = slice(max(0, half - cy), half + min(half + 1, tiles.SIDE - cy))
    columns = slice(max(0, half - cx), half + min(half + 1, tiles.SIDE - cx))
    return float(np.sqrt((stamp[rows, columns] ** 2).sum()))


def read_recipes(cutout_dir: str | Path, split: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """``*_subframes.csv`` and ``*_blobs.csv`` of ``train`` or ``validation``."""
    subframes = tables.read_table(Path(cutout_dir) / f"{split}_subframes.csv", SUBFRAME_COLUMNS)
    return subframes, tables.read_table(Path(cutout_dir) / f"{split}_blobs.csv", BLOB_COLUMNS)


def open_split(
    difference_dir: str | Path,
    scale_dir: str | Path,
    cutout_dir: str | Path,
    split: str,
    augmented: pd.DataFrame | None = None,
    *,
    n: int | None = None,
) -> tuple[Scene, Recipes]:
    """Everything that `render.render_subframes` needs for ``train`` or ``validation``, or for its first ``n`` rows."""
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


def _contact_sheet(difference_dir: str | Path, scale_dir: str | Path, out_dir: Path) -> None:
    scene, recipes = open_split(difference_dir, scale_dir, out_dir, "validation", n=48)
    pixels = render.render_subframes(scene, recipes, np.arange(len(recipes)))
    plotting.contact_sheet(
        out_dir / "contact_sheet.png", pixels, recipes.label, "Validation subframes"
    )
