"""What the benchmarks work on: simulated difference images, and recipes as the stages draw them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from blobpipe.core.random_streams import stream
from blobpipe.images.clip import clip_image
from blobpipe.images.scale import Scaling, scale_image
from blobpipe.images.stack import running_median
from blobpipe.params import Augment, Campaign, Params
from blobpipe.simulation import augment, campaign, cutout, render, stamps
from blobpipe.simulation.recipes import STEP, Recipes, Scene, to_recipes

BATCH = 100  # subframes; ISR section 5
NOISE_SIGMA = Params().augment.noise_sigma
N_STACK = 7  # images of the median stack here: a difference is a little noisier than with 30
N_BACKGROUNDS = 64  # images behind the recipes, more than any cache holds


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    n_differences: int  # simulated; the others are copies
    n_train: int  # subframes to an epoch of ours
    n_plain: int  # batches in one timing of plain PyTorch's training
    n_plain_infer: int  # subframes of plain PyTorch's inference
    n_fused_infer: int
    n_one_by_one: int  # subframes rendered in the original's way
    n_matrix: int  # side of the matrices for the peak
    copied_mib: int  # for the bandwidth
    n_median: int  # images of the running median
    n_scanned: tuple[int, ...]
    main_scan: int  # which of these has the target
    scans: int  # of each of the others
    epochs: int
    least: int  # repetitions
    most: int
    stages: bool  # whether the start-up of each is measured


FULL = Size(
    n_differences=6,
    n_train=1600,
    n_plain=2,
    n_plain_infer=200,
    n_fused_infer=1600,
    n_one_by_one=300,
    n_matrix=3072,
    copied_mib=512,
    n_median=94,
    n_scanned=(50, 100, 200, 400),
    main_scan=100,
    scans=3,
    epochs=10,
    least=5,
    most=9,
    stages=True,
)
QUICK = Size(
    n_differences=2,
    n_train=100,
    n_plain=1,
    n_plain_infer=10,
    n_fused_infer=50,
    n_one_by_one=5,
    n_matrix=256,
    copied_mib=8,
    n_median=34,
    n_scanned=(2, 4),
    main_scan=4,
    scans=1,
    epochs=2,
    least=1,
    most=1,
    stages=False,
)


@dataclass(frozen=True)
class Made:
    """Recipes, and the scene they refer to."""

    scene: Scene
    recipes: Recipes


@cache
def differences(n: int) -> tuple[list[npt.NDArray[np.float32]], npt.NDArray[np.float32]]:
    """Simulated difference images, and the median stack that was subtracted (fraction of the light)."""
    params = Campaign(n_frames=N_STACK + n + 1, first_frames=N_STACK, n_cases=1)
    images = np.stack([campaign.render_image(params, index) for index in range(N_STACK + n)])
    stack = running_median(images[:N_STACK], N_STACK)[0]
    return [image - stack for image in images[N_STACK:]], stack


@cache
def make_recipes(size: Size) -> Made:
    """As the stages cutout and augment draw them by default: blobs on half of them, dips on a tenth."""
    params = Params()
    images, stack = differences(size.n_differences)
    scene = _scene(images, stack, params)
    rng = stream(1, "benchmarks")
    region = cutout.split_regions(list(scene.names), stack.shape[1], params.cutout)["train"]
    subframes = cutout.draw_subframes(rng, size.n_train, region, stack.shape, params.cutout)
    usable = np.arange(len(scene.stamps))
    ratio = pd.Series(1.0, index=list(scene.names))
    blobs = cutout.draw_blobs(rng, subframes, usable, scene.stamps, ratio, params.cutout)
    augmented = augment.draw_augmentation(rng, size.n_train, Augment())
    return Made(scene, to_recipes(scene.names, subframes, blobs, augmented))


def _scene(
    images: list[npt.NDArray[np.float32]], stack: npt.NDArray[np.float32], params: Params
) -> Scene:
    scaled, scalings = zip(*(scale(image, params) for image in images), strict=True)
    _, of_stack = scale(stack, params)
    copies = [i % len(images) for i in range(N_BACKGROUNDS)]
    steps = [np.rint(image * STEP).clip(-32768, 32767).astype(np.int16) for image in scaled]
    profiles, _ = stamps.profile_stamps(
        stream(1, "benchmarks", "stamps"),
        params.cutout.n_profiles,
        stack.shape,
        sigma_frac=of_stack.sigma_frac,
        high_sigma=of_stack.high_sigma,
    )
    known = [blob for blob in campaign.population(Campaign()) if blob.first < 0]
    return Scene(
        names=tuple(f"image{i:03d}" for i in range(N_BACKGROUNDS)),
        backgrounds=np.stack([steps[i] for i in copies]),
        limits=np.array(
            [(scalings[i].low_sigma, scalings[i].high_sigma) for i in copies], np.float32
        ),
        sigma_frac=np.array([scalings[i].sigma_frac for i in copies], np.float32),
        pattern=campaign.blob_layer(known, 0.0, 0.0),
        stamps=profiles,
    )


def scale(
    image: npt.NDArray[np.float32], params: Params
) -> tuple[npt.NDArray[np.float32], Scaling]:
    """Clipped and scaled by the default settings."""
    clipped, _ = clip_image(image, params.clip)
    return scale_image(clipped, params.scale)


def pixels(size: Size, n: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """So many rendered subframes, shape (n, 1, 256, 256), and their labels."""
    made = make_recipes(size)
    rows = np.arange(n) % len(made.recipes)
    images = render.render_subframes(made.scene, made.recipes, rows, noise_sigma=NOISE_SIGMA)
    return images[:, None], made.recipes.label[rows]


def write_frames(folder: Path, size: Size, n: int) -> list[Path]:
    """Plain FITS difference images under ``n`` names: a few that differ, and links to them."""
    from astropy.io import fits

    images, _ = differences(size.n_differences)
    paths = [folder / f"difference{i:03d}.fits" for i in range(n)]
    for path, image in zip(paths, images, strict=False):
        fits.PrimaryHDU(image).writeto(path)
    for i, path in enumerate(paths[len(images) :]):
        path.hardlink_to(paths[i % len(images)])
    return paths
