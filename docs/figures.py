"""Draw the pictures of the documentation, and fill in the numbers of the README.

    python docs/figures.py                          from data/ and results/, as far as they are there
    python docs/figures.py --beside IMAGE STACK     also a real pair beside a simulated one, in docs/_build, to look at

Without data/ a short campaign is simulated for the pictures that need images; without results/train the picture of
a detection is left as it is. Only simulated pixels go into docs/img.
"""

from __future__ import annotations

import argparse
import io
import logging
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.patches import Circle, Rectangle
from PIL import Image

from blobpipe.core import fits_images, tables
from blobpipe.core.plotting import STYLE, two_digits
from blobpipe.images import difference, tiles
from blobpipe.images.clip import clip
from blobpipe.images.scale import scale
from blobpipe.networks import model_file, report_network, saliency
from blobpipe.noise.level import clean_noise
from blobpipe.params import Params
from blobpipe.simulation import augment, campaign, cutout, render
from blobpipe.simulation.recipes import Recipes, Scene
from blobpipe.validation import regression

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

matplotlib.rcParams.update(STYLE)

DOCS = Path(__file__).resolve().parent
IMG = DOCS / "img"
MAX_BYTES = 300_000
DPI = 100  # of pictures, which are mostly noise and compress badly
GREYS = 40  # enough for the eye, and noise compresses badly
# colour-blind safe, bright on grey
BLUE = "#56B4E9"
ORANGE = "#E69F00"
EXAMPLE_SNR = 25.0  # of the blob on the picture of a detection: clear, but not glaring

SHORT = Params(
    campaign=campaign.Campaign(n_frames=36, n_cases=3),
    cutout=cutout.Cutout(n_train=2000, n_validation=100),
    augment=augment.Augment(copies=2),
)

log = logging.getLogger("figures")


def main() -> None:
    """Draw what can be drawn."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--beside", nargs=2, type=Path, metavar=("IMAGE", "STACK"), help="a real pair to look at"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if (DOCS.parent / "results/augment/train.csv").exists():
            root = DOCS.parent
        else:
            log.info("no pipeline results: simulating a short campaign")
            make_project(root)
        simulated = example(root)
        draw_pair(IMG / "simulated.png", {"simulated": simulated})
        draw_steps(IMG / "steps.png", root)
        if (root / "results/train/model.safetensors").exists():
            draw_detection(IMG / "detection.png", root)
    if args.beside:
        draw_pair(
            DOCS / "_build" / "beside.png",
            {"simulated": simulated, "real": real_pair(*args.beside)},
        )
    sys.path.insert(0, str(DOCS / "_ext"))
    from measured import fill_in

    fill_in(DOCS.parent / "README.md")


def make_project(root: Path) -> None:
    """The stages up to augment, small."""
    raw, subtracted, clipped, scaled = (
        root / "data" / name for name in ("raw", "difference", "clip", "scale")
    )
    campaign.simulate(raw, SHORT.campaign)
    difference.reference(raw, subtracted, SHORT.difference)
    difference.write_differences(raw, subtracted, SHORT.difference)
    clip(subtracted, clipped, SHORT.clip)
    scale(clipped, scaled, SHORT.scale)
    recipes = root / "results/cutout"
    cutout.cut(raw, subtracted, scaled, recipes, SHORT.cutout, clip=SHORT.clip, scale=SHORT.scale)
    augment.augment(subtracted, scaled, recipes, root / "results/augment", SHORT.augment)


Pair = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], pd.DataFrame]


def example(root: Path) -> Pair:
    """A difference image with a strong new blob, the reference stack, and the new blobs."""
    raw = root / "data/raw"
    subtracted = root / "data/difference"
    usable = tables.read_stage(subtracted).query("status == 'ok'").set_index("frame")
    blobs = tables.read_blobs(raw)
    blobs = blobs[blobs["first_frame"].isin(usable.index)]
    snr = [
        regression.blob_snr(blob, usable.loc[blob.first_frame, "noise_frac"])
        for blob in blobs.itertuples()
    ]
    name = blobs["first_frame"].iloc[int(np.argmax(snr))]
    image = fits_images.read_frame(fits_images.find_image(subtracted, name)).data
    return (
        image,
        fits_images.read_plane(subtracted / "reference.fits.fz", "STACK"),
        blobs[blobs["first_frame"] == name],
    )


def real_pair(image_path: Path, stack_path: Path) -> Pair:
    """A real difference image and its stack."""
    stack = fits_images.read_image(stack_path).data
    return (
        fits_images.read_image(image_path).data - stack,
        stack,
        pd.DataFrame({"x_px": [], "y_px": [], "radius_px": []}),
    )


def draw_pair(path: Path, pairs: dict[str, Pair]) -> None:
    """Difference and median stack side by side, one row for each pair."""
    figure, axes = plt.subplots(
        len(pairs), 2, figsize=(10.6, 6.0 * len(pairs)), squeeze=False, layout="compressed"
    )
    for (name, (image, stack, blobs)), row in zip(pairs.items(), axes, strict=True):
        for axis, data, what in zip(
            row, (image, stack), ("difference", "median stack"), strict=True
        ):
            noise = clean_noise(data)
            show(axis, data, 3 * noise, binned=2)
            axis.set_title(
                f"{name} {what}: noise {noise:.4f} of the light per pixel,\n"
                "means of 2 x 2, -3 (black) to 3 sigma (white)"
            )
        circle(row[0], blobs, BLUE)
    figure.suptitle("Light lost; circles: new blobs")
    save(figure, path)


def draw_steps(path: Path, root: Path) -> None:
    """One training recipe, step by step."""
    folders = root / "data/difference", root / "data/scale", root / "results/cutout"
    scene, recipes = cutout.open_split(
        *folders, "train", augment.read_augmentation(root / "results/augment")
    )
    row = _telling_recipe(scene, recipes)
    plain = replace(recipes, turn=np.zeros_like(recipes.turn))
    empty = replace(plain, first_blob=np.zeros_like(plain.first_blob))
    bare = replace(empty, dip=np.zeros_like(empty.dip))
    noise = SHORT.augment.noise_sigma
    steps = {
        "window of the scaled difference": (bare, 0.0, 0),
        "plus a dip": (empty, 0.0, 0),
        "plus blobs (circles), clipped again": (plain, 0.0, 0),
        "plus noise": (plain, noise, 0),
        "rotated, flipped": (recipes, noise, 0),
        "another copy": (recipes, noise, 1),
    }
    figure, axes = plt.subplots(2, 3, figsize=(10.6, 7.6), layout="compressed")
    for (title, (step, sigma, copy)), axis in zip(steps.items(), axes.flat, strict=True):
        show(
            axis,
            render.render_subframes(scene, step, np.array([row]), copy=copy, noise_sigma=sigma)[0],
            3.0,
        )
        axis.set_title(title)
    first, last = recipes.first_blob[row : row + 2]
    for _, x, y in recipes.blob[first:last]:
        axes[0, 2].add_patch(Circle((x, y), 14, fill=False, ec=BLUE, lw=1.2))
    figure.suptitle("A training subframe, step by step: -3 (black) to 3 sigma (white)")
    save(figure, path)


def _telling_recipe(scene: Scene, recipes: Recipes) -> int:
    """A row with a strong dip and at least two blobs."""
    x, y = recipes.window.T
    sums = np.pad(scene.pattern.clip(0).cumsum(0, dtype=float).cumsum(1), ((1, 0), (1, 0)))
    side = tiles.SIDE
    known = sums[y + side, x + side] - sums[y, x + side] - sums[y + side, x] + sums[y, x]
    turned = recipes.turn[0].min(axis=1) > 0
    good = (np.diff(recipes.first_blob) >= 2) & (np.hypot(*recipes.dip.T) > 1) & turned
    return int(np.argmax(known * good))


def draw_detection(path: Path, root: Path) -> None:
    """What blobpipe finds: a difference image, the positive subframe with a new blob, and its saliency."""
    network, _ = model_file.load_model(root / "results/train/model.safetensors")
    case = _found_case(root)
    image = fits_images.read_frame(
        fits_images.find_image(root / "data/difference", case.frame)
    ).data
    scaled = fits_images.read_frame(fits_images.find_image(root / "data/scale", case.frame)).data
    subframes, origins = tiles.tile(scaled)
    subframes = render.standardise(subframes)
    probability = report_network.predict(network, subframes)
    [index] = np.flatnonzero((origins[:, :2] == (case.row, case.col)).all(axis=1))
    heat = saliency.saliency_maps(network, subframes[index : index + 1])[0]
    blobs = tables.read_blobs(root / "data/raw")
    new = blobs[blobs["first_frame"] == case.frame]
    x0, y0 = (int(value) for value in origins[index, 2:])

    figure, (whole, part, seen) = plt.subplots(1, 3, figsize=(14.4, 5.4), layout="compressed")
    show(whole, image, 3 * clean_noise(image), binned=2)
    for (x, y), p in zip(origins[:, 2:], probability, strict=True):
        if p >= Params().evaluate.threshold:
            whole.add_patch(
                Rectangle((x, y), tiles.SIDE, tiles.SIDE, fill=False, ec=ORANGE, lw=1.5)
            )
    whole.set_title("difference image; orange: subframes called blob")
    show(part, subframes[index], 3.0, origin=(x0, y0))
    part.set_title(f"subframe: blob with probability {probability[index]:.2f}")
    show(seen, heat, float(heat.max()), origin=(x0, y0), cmap="magma", low=0.0)
    seen.set_title(f"saliency, 0 to {two_digits(float(heat.max()))} logits per sigma")
    for axis in (whole, part, seen):
        circle(axis, new, BLUE)
    figure.suptitle(
        "The report's network; circles: new blobs; images: -3 (black) to 3 sigma (white)"
    )
    save(figure, path)


def _found_case(root: Path) -> Any:
    """Of the new blobs that were found well inside their subframe, the one that is next to the example's S/N."""
    cases = tables.read_table(root / "results/regression/cases.csv", regression.CASE_COLUMNS).query(
        "status == 'found'"
    )
    inside = cases[["x_px", "y_px"]].mod(tiles.SIDE).sub(tiles.SIDE / 2).abs().max(axis=1) < 90
    cases = cases[inside] if inside.any() else cases
    return cases.loc[(cases["snr"] - EXAMPLE_SNR).abs().idxmin()]


def show(
    axis: Axes,
    data: npt.NDArray[np.float32],
    high: float,
    *,
    binned: int = 1,
    origin: tuple[int, int] = (0, 0),
    cmap: str = "gray",
    low: float | None = None,
) -> None:
    """Draw an image in pixel coordinates of the frame, ``binned`` x ``binned`` pixels averaged."""
    ny, nx = data.shape
    small = (
        np.nan_to_num(data).reshape(ny // binned, binned, nx // binned, binned).mean(axis=(1, 3))
    )
    x, y = origin
    extent = (x - 0.5, x + nx - 0.5, y - 0.5, y + ny - 0.5)
    low = -high / binned if low is None else low
    axis.imshow(
        small,
        origin="lower",
        cmap=cmap,
        vmin=low,
        vmax=high / binned,
        extent=extent,
        interpolation="nearest",
    )
    axis.set(xlabel="x (px)", ylabel="y (px)")


def circle(axis: Axes, blobs: pd.DataFrame, colour: str) -> None:
    """Circles around blobs that lie in the axis' range."""
    low, high = axis.get_xlim()
    bottom, top = axis.get_ylim()
    room = 0.012 * (high - low)
    for blob in blobs.itertuples():
        if low < blob.x_px < high and bottom < blob.y_px < top:
            axis.add_patch(
                Circle((blob.x_px, blob.y_px), blob.radius_px + room, fill=False, ec=colour, lw=1.3)
            )


def save(figure: Figure, path: Path) -> None:
    """Write a small PNG of few colours, the same bytes each time."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DPI, metadata={"Software": None})
    plt.close(figure)
    image = (
        Image.open(content).convert("RGB").quantize(palette=_palette(), dither=Image.Dither.NONE)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, optimize=True)
    size = path.stat().st_size
    log.info("%s: %d kB", path, size // 1000)
    if size > MAX_BYTES and path.parent == IMG:
        raise SystemExit(
            f"{path}: {size} bytes, expected at most {MAX_BYTES}; draw fewer pixels or colours"
        )


def _palette() -> Image.Image:
    """Greys, the marks' colours and their blends with black and white, and the colours of saliency."""
    from matplotlib import colormaps
    from matplotlib.colors import to_rgb

    shades = np.linspace(0, 1, 8)[:, None]
    marks = [
        end + shades * (np.array(to_rgb(mark)) - end) for mark in (BLUE, ORANGE) for end in (0, 1)
    ]
    greys = np.repeat(np.linspace(0, 1, GREYS), 3).reshape(-1, 3)
    colours = np.concatenate([greys, *marks, colormaps["magma"](np.linspace(0, 1, 48))[:, :3]])
    palette = Image.new("P", (1, 1))
    palette.putpalette(np.rint(255 * colours).astype(np.uint8).tobytes())
    return palette


if __name__ == "__main__":
    main()
