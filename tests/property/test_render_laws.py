"""Laws of rendering: what a recipe says is what comes out, the same bytes in any order and on any number of threads."""

from __future__ import annotations

import dataclasses

import numba
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr

from blobpipe.images import tiles
from blobpipe.simulation import clutter, render
from blobpipe.simulation.cutout import BLOB_COLUMNS, SUBFRAME_COLUMNS
from blobpipe.simulation.recipes import STEP, Recipes, Scene, to_recipes

SIDE = tiles.SIDE
N_FRAMES = 3
FRAME = (300, 340)
Blob = tuple[int, int, int, float]


def make_scene(seed: int = 1, noise: float = 1.0) -> Scene:
    rng = np.random.default_rng(seed)
    pattern = np.zeros(FRAME, np.float32)
    pattern[100:110, 150:162] = 0.03
    stamps = np.zeros((3, 41, 41), np.float32)
    rows, columns = np.mgrid[-20:21, -20:21]
    for i, radius in enumerate((3, 6, 9)):
        stamps[i] = 2 * np.exp(-((np.hypot(rows, columns) / radius) ** 4))
    backgrounds = np.rint(rng.normal(0, noise, (N_FRAMES, *FRAME)) * STEP / 4).astype(np.int16)
    limits = np.array([[-3.1, 3.2]] * N_FRAMES, np.float32)
    return Scene(
        ("a", "b", "c"),
        backgrounds,
        limits,
        np.array([0.01, 0.009, 0.011], np.float32),
        pattern,
        stamps,
    )


def make_recipes(
    subframes: list[tuple[str, int, int, int, float, float]],
    blobs: list[list[Blob]],
    augmented: list[tuple[int, int, int]] | None = None,
) -> Recipes:
    """Rows (frame, x0, y0, label, dip_x, dip_y), the blobs (stamp, x, y, factor) of each, and (seed, turns, flip) of each."""
    rows = [(i, *row) for i, row in enumerate(subframes)]
    flat = [(i, *blob, 0.0) for i, group in enumerate(blobs) for blob in group]
    table = pd.DataFrame(rows, columns=list(SUBFRAME_COLUMNS))
    copies = None
    if augmented is not None:
        columns = ["copy", "subframe", "noise_seed", "rotation", "flip"]
        copies = pd.DataFrame([(0, i, *row) for i, row in enumerate(augmented)], columns=columns)
    return to_recipes(
        ("a", "b", "c"), table, pd.DataFrame(flat, columns=list(BLOB_COLUMNS)), copies
    )


def as_the_recipe_says(scene: Scene, recipes: Recipes, row: int) -> np.ndarray:
    """The same in plain NumPy, up to the noise: slow, and short enough to be seen right."""
    image = np.clip(unlimited(scene, recipes, row), *scene.limits[recipes.frame[row]])
    return (image - image.mean()) / image.std()


def unlimited(scene: Scene, recipes: Recipes, row: int) -> np.ndarray:
    """Before clipping, in sigma of the frame."""
    frame = recipes.frame[row]
    (x0, y0) = recipes.window[row]
    image = scene.backgrounds[frame, y0 : y0 + SIDE, x0 : x0 + SIDE].astype(float) / STEP
    dx, dy = recipes.dip[row].astype(float)
    if dx or dy:
        x, y = np.meshgrid(np.arange(x0, x0 + SIDE) - dx, np.arange(y0, y0 + SIDE) - dy)
        pattern = scene.pattern.astype(float)
        ix = np.floor(x).astype(int)
        iy = np.floor(y).astype(int)
        inside = (ix >= 0) & (iy >= 0) & (ix + 1 < pattern.shape[1]) & (iy + 1 < pattern.shape[0])
        ix, iy, fx, fy = np.where(inside, ix, 0), np.where(inside, iy, 0), x - ix, y - iy
        low = pattern[iy, ix] * (1 - fx) + pattern[iy, ix + 1] * fx
        high = pattern[iy + 1, ix] * (1 - fx) + pattern[iy + 1, ix + 1] * fx
        moved = np.where(inside, low * (1 - fy) + high * fy, 0)
        image += (moved - pattern[y0 : y0 + SIDE, x0 : x0 + SIDE]) / scene.sigma_frac[frame]
    margin = np.zeros((SIDE + 80, SIDE + 80))
    for b in range(recipes.first_blob[row], recipes.first_blob[row + 1]):
        stamp, x, y = recipes.blob[b]
        margin[y + 20 : y + 61, x + 20 : x + 61] += recipes.factor[b] * scene.stamps[stamp]
    return image + margin[40:-40, 40:-40]


blobs = st.lists(
    st.tuples(
        st.integers(0, 2), st.integers(0, SIDE - 1), st.integers(0, SIDE - 1), st.floats(0.3, 2)
    ),
    max_size=4,
)
windows = st.tuples(
    st.sampled_from("abc"),
    st.integers(0, FRAME[1] - SIDE),
    st.integers(0, FRAME[0] - SIDE),
    st.integers(0, 1),
    st.sampled_from([0.0, 0.3, -2.7]),
    st.sampled_from([0.0, -0.4, 1.0]),
)
rows = st.lists(st.tuples(windows, blobs), min_size=1, max_size=6)


def turned(image: np.ndarray, quarters: int, flip: int) -> np.ndarray:
    image = np.rot90(image, quarters)
    return image[:, ::-1] if flip else image


@settings(max_examples=30)
@given(rows)
def test_pixels_are_what_the_recipe_says(rows: list) -> None:
    scene = make_scene()
    recipes = make_recipes(*map(list, zip(*rows, strict=True)))
    found = render.render_subframes(scene, recipes, np.arange(len(recipes)))
    for i in range(len(recipes)):
        np.testing.assert_allclose(found[i], as_the_recipe_says(scene, recipes, i), atol=2e-4)


@settings(max_examples=20)
@given(rows, st.randoms(use_true_random=False))
def test_the_same_bytes_in_any_order_and_on_any_number_of_threads(rows: list, random) -> None:
    scene = make_scene()
    recipes = make_recipes(*map(list, zip(*rows, strict=True)), [(9, 1, 0)] * len(rows))
    straight = render.render_subframes(scene, recipes, np.arange(len(recipes)), noise_sigma=0.75)
    order = [*random.sample(range(len(rows)), len(rows)), 0]
    for threads in {1, min(2, numba.config.NUMBA_NUM_THREADS)}:
        numba.set_num_threads(threads)
        found = render.render_subframes(scene, recipes, np.array(order), noise_sigma=0.75)
        assert found.tobytes() == straight[order].tobytes()


@settings(max_examples=20)
@given(
    st.integers(0, 2), st.integers(20, SIDE - 21), st.integers(20, SIDE - 21), st.floats(0.5, 1.5)
)
def test_a_blob_is_where_the_recipe_says(stamp: int, x: int, y: int, factor: float) -> None:
    scene = make_scene(noise=0)
    recipes = make_recipes([("a", 10, 20, 1, 0.0, 0.0)], [[(stamp, x, y, factor)]])
    image = render.render_subframes(scene, recipes, np.arange(1))[0]
    signal = image - np.median(image)
    ys, xs = np.mgrid[:SIDE, :SIDE]
    assert (signal * xs).sum() / signal.sum() == pytest.approx(x, abs=0.01)
    assert (signal * ys).sum() / signal.sum() == pytest.approx(y, abs=0.01)


@settings(max_examples=15)
@given(st.tuples(st.integers(-3, 3), st.integers(-3, 3)).filter(any))
def test_a_dip_is_the_known_blobs_here_less_there(shift: tuple[int, int]) -> None:
    """Known blobs have moved by +shift: light is missing (positive) where they went, not where they were."""
    scene = make_scene(noise=0)
    (dx, dy) = shift
    image = render.render_subframes(
        scene, make_recipes([("a", 0, 0, 0, dx, dy)], [[]]), np.arange(1)
    )[0]
    expected = np.roll(scene.pattern, (dy, dx), (0, 1)) - scene.pattern
    expected = expected[:SIDE, :SIDE] / scene.sigma_frac[0]
    np.testing.assert_allclose(image, (expected - expected.mean()) / expected.std(), atol=1e-4)


def test_a_dip_ends_where_the_frame_does() -> None:
    """Known blobs all over the frame: beyond its edges there are none to be moved into it."""
    scene = make_scene(noise=0)
    pattern = np.random.default_rng(5).uniform(0, 0.03, FRAME).astype(np.float32)
    scene = dataclasses.replace(
        scene, pattern=pattern, limits=np.array([[-99, 99]] * N_FRAMES, np.float32)
    )
    corners = [(x, y) for x in (0, FRAME[1] - SIDE) for y in (0, FRAME[0] - SIDE)]
    dips = [
        (2.7, -1.3),
        (-2.7, 1.0),
        (0.0, 3.0),
        (-1.0, 0.0),
        (1.0, 0.4),
        (300.0, 0.0),
        (0.5, -280.0),
    ]
    windows = [("a", *corner, 0, *dip) for corner in corners for dip in dips]
    recipes = make_recipes(windows, [[]] * len(windows))
    found = render.render_subframes(scene, recipes, np.arange(len(windows)))
    for i, image in enumerate(found):
        np.testing.assert_allclose(
            image, as_the_recipe_says(scene, recipes, i), atol=5e-4, err_msg=str(windows[i])
        )


@settings(max_examples=30)
@given(rows, st.integers(0, 3), st.integers(0, 1), st.integers(0, 2**62))
def test_rotations_and_flips_are_those_of_numpy_and_change_no_label(
    rows: list, quarters: int, flip: int, seed: int
) -> None:
    scene = make_scene()
    parts = list(map(list, zip(*rows, strict=True)))
    straight, both = (
        make_recipes(*parts, [(seed, *turn)] * len(rows)) for turn in ((0, 0), (quarters, flip))
    )
    everything = np.arange(len(rows))
    before = render.render_subframes(scene, straight, everything, noise_sigma=0.75)
    after = render.render_subframes(scene, both, everything, noise_sigma=0.75)
    for i in everything:
        np.testing.assert_array_equal(after[i], turned(before[i], quarters, flip))
    np.testing.assert_array_equal(straight.label, both.label)


@settings(max_examples=20)
@given(rows, st.sampled_from([0.0, 0.75]))
def test_every_subframe_has_mean_0_and_standard_deviation_1_whatever_its_label(
    rows: list, noise_sigma: float
) -> None:
    scene = make_scene()
    recipes = make_recipes(*map(list, zip(*rows, strict=True)), [(5, 0, 0)] * len(rows))
    found = render.render_subframes(
        scene, recipes, np.arange(len(recipes)), noise_sigma=noise_sigma
    ).astype(float)
    np.testing.assert_allclose(found.mean(axis=(1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(found.std(axis=(1, 2)), 1, atol=1e-4)


@settings(max_examples=20)
@given(rows)
def test_labels_never_touch_the_pixels(rows: list) -> None:
    scene = make_scene()
    (subframes, blobs) = map(list, zip(*rows, strict=True))
    images = [
        render.render_subframes(
            scene,
            make_recipes([(*row[:3], label, *row[4:]) for row in subframes], blobs),
            np.arange(len(rows)),
        )
        for label in (0, 1)
    ]
    assert images[0].tobytes() == images[1].tobytes()


# --- weaker and stronger blobs, clutter, parts ------------------------------------------------------------------------

TURNS = [(quarters, flip) for quarters in range(4) for flip in range(2)]


def everything(sigma: float) -> tuple[Scene, Recipes, dict]:
    """A row for each turn and flip, with dips, blobs near the edges, clutter on half of them, and noise of this sigma."""
    rng = np.random.default_rng(7)
    dips = [(0, 0), (1, 0), (0, 1), (-1, 0), (0, -1), (0.6, -0.3), (-1.0, 0.9), (2.2, 1.1)]
    windows = [("abc"[k % 3], 7 * k, 4 * k + 1, 1, *dip) for k, dip in enumerate(dips)]
    blobs = [[(k % 3, 20 * k, 250 - 30 * k, 1.2), (2, 128, 100, 0.7)] for k in range(8)]
    recipes = make_recipes(windows, blobs, [(100 + k, *turn) for k, turn in enumerate(TURNS)])
    pieces = rng.integers(-3 * clutter.STEP, 3 * clutter.STEP, (2, SIDE, SIDE)).astype(np.int16)
    pieces[1, 30:35, 40:60] = clutter.NO_VALUE
    varied = {
        "copy": 0,
        "strength": rng.uniform(0.3, 2, len(recipes.blob)).astype(np.float32),
        "noise_sigma": np.full(8, sigma, np.float32),
        "piece": np.array([-1, 0, 1, -1, 1, 0, 1, -1]),
        "pieces": pieces,
    }
    return make_scene(), recipes, varied


def test_varied_pixels_are_what_the_recipe_says_and_clutter_and_are_not_standardised() -> None:
    scene, recipes, varied = everything(sigma=0.0)
    stronger = dataclasses.replace(recipes, factor=recipes.factor * varied["strength"])
    found = render.render_varied(scene, recipes, np.arange(8), **varied)
    for i, (quarters, flip) in enumerate(TURNS):
        expected = unlimited(scene, stronger, i)
        piece = varied["piece"][i]
        if piece >= 0:
            expected = expected + varied["pieces"][piece] / clutter.STEP
        expected = np.clip(expected, *scene.limits[recipes.frame[i]])
        if piece >= 0:
            expected[varied["pieces"][piece] == clutter.NO_VALUE] = 0
        np.testing.assert_allclose(found[i], turned(expected, quarters, flip), atol=2e-4)


def test_the_noise_of_varied_pixels_is_that_of_rendering() -> None:
    scene, recipes, varied = everything(sigma=0.5)
    scene = dataclasses.replace(scene, limits=np.array([[-99, 99]] * N_FRAMES, np.float32))
    varied |= {"strength": np.ones(len(recipes.blob), np.float32), "piece": np.full(8, -1)}
    found = render.standardise(render.render_varied(scene, recipes, np.arange(8), **varied))
    np.testing.assert_allclose(
        found, render.render_subframes(scene, recipes, np.arange(8), noise_sigma=0.5), atol=1e-4
    )


def test_a_part_is_cut_from_the_whole_after_its_turns() -> None:
    scene, recipes, varied = everything(sigma=0.5)
    whole = render.render_varied(scene, recipes, np.arange(8), **varied)
    corner = np.array([(4 * k, 140 - 12 * k) for k in range(8)])
    part = render.render_varied(scene, recipes, np.arange(8), **varied, corner=corner, side=96)
    for image, cut, (x, y) in zip(whole, part, corner, strict=True):
        np.testing.assert_array_equal(cut, image[y : y + 96, x : x + 96])


@pytest.mark.parametrize(("quarters", "flip"), TURNS)
def test_a_pixel_lies_where_the_turn_takes_it(quarters: int, flip: int) -> None:
    image = np.zeros((SIDE, SIDE), bool)
    image[40, 7] = True
    [y], [x] = np.nonzero(turned(image, quarters, flip))
    found = render.turned(np.array([7.0]), np.array([40.0]), np.array([[quarters, flip]], np.int32))
    assert np.ravel(found).tolist() == [x, y]


# --- the noise generator ---------------------------------------------------------------------------------------------


def noise(seed: int, sigma: float = 1.0) -> np.ndarray:
    image = np.zeros((SIDE, SIDE), np.float32)
    render._add_noise(image, 0, 0, np.uint64(seed), np.float32(sigma), render.NORMAL_QUANTILES)
    return image.astype(float)


def test_the_noise_is_made_of_the_words_of_splitmix64() -> None:
    """The first two of seed 0, as published (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4): twelve bits of each 16, the lowest first."""
    image = np.zeros((SIDE, SIDE), np.float32)
    render._add_noise(image, 0, 0, np.uint64(0), np.float32(1), np.arange(4096, dtype=np.float32))
    assert image[0, :8].tolist() == [0xDAF, 0xB1D, 0x839, 0x220, 0x5F4, 0x1B9, 0xE6A, 0xE78]


def test_the_quantiles_of_the_noise_are_evenly_likely_and_of_standard_deviation_1() -> None:
    quantiles = render.NORMAL_QUANTILES.astype(float)
    assert quantiles.std() == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(quantiles, -quantiles[::-1], atol=1e-6)
    np.testing.assert_allclose(ndtr(quantiles), (np.arange(4096) + 0.5) / 4096, atol=1e-4)


@settings(max_examples=40)
@given(st.integers(0, 2**62), st.sampled_from([0.1, 0.75, 2.0]))
def test_the_noise_is_normal(seed: int, sigma: float) -> None:
    """Moments of 65,536 deviates, within five of their own standard errors."""
    values = noise(seed, sigma).ravel() / sigma
    n = SIDE**2
    assert abs(values.mean()) < 5 / np.sqrt(n)
    assert abs(values.std() - 1) < 5 / np.sqrt(2 * n)
    assert abs((values**3).mean()) < 5 * np.sqrt(15 / n)
    assert abs((values**4).mean() - 3) < 5 * np.sqrt(96 / n)
    assert 3.5 < np.abs(values).max() < 3.7  # the table of quantiles ends at 3.67


@settings(max_examples=20)
@given(st.integers(0, 2**62), st.integers(1, 2**40))
def test_the_noise_has_no_correlations(seed: int, step: int) -> None:
    """Between neighbours, rows, the four deviates of a word, and different seeds: below five standard errors."""
    one = noise(seed)
    other = noise(seed + step)
    limit = 5 / SIDE
    for shift in ((0, 1), (0, 2), (0, 3), (0, 4), (1, 0), (1, 1), (2, 0)):
        assert abs((one * np.roll(one, shift, (0, 1))).mean()) < limit, shift
    assert abs((one * other).mean()) < limit
    lanes = np.corrcoef(one.reshape(-1, 4).T) - np.eye(4)
    assert np.abs(lanes).max() < 2 * limit


def test_the_noise_of_two_subframes_shares_no_value_in_order() -> None:
    assert (noise(1) == noise(2)).mean() < 1e-3


@settings(max_examples=20)
@given(st.floats(-100, 100), st.floats(0.01, 100), st.integers(0, 9))
def test_standardising_undoes_gain_and_offset(offset: float, gain: float, seed: int) -> None:
    images = np.random.default_rng(seed).normal(0, 1, (2, 64, 48)).astype(np.float32)
    expected = (images - images.mean(axis=(1, 2), keepdims=True)) / images.std(
        axis=(1, 2), keepdims=True
    )
    found = render.standardise(images * np.float32(gain) + np.float32(offset * gain))
    np.testing.assert_allclose(found, expected, atol=0.01)
