"""Detections: places, sizes and depths with honest errors, and what is no new blob."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.ndimage import shift as moved

from blobpipe.core.blob_shapes import SHAPES, Shape, blob_profile, matched_snr
from blobpipe.core.cutouts import distance_from
from blobpipe.detection.fit import (
    CUT_HALF,
    CUT_SIDE,
    DETECTION_COLUMNS,
    Cut,
    Model,
    _averaged,
    _best_disc,
    _brightest_square,
    _cut,
    _highest,
    _limits,
    _model,
    _normal,
    _reduced_chi2,
    _solve,
    _table,
    _unfitted,
    _without_outliers,
    fit_blobs,
    rough_snr,
)
from blobpipe.detection.match import mark_seen_again, pair, without_repeats
from blobpipe.detection.vet import (
    _beyond,
    _has_counterpart,
    _height,
    _lit,
    _on_few_pixels,
    _predicted,
    _shift_residual,
    _trimmed_snr,
    flickers,
    is_of_the_stack,
    on_bad_pixels,
    vet_candidates,
)
from blobpipe.images.noise import clean_noise
from blobpipe.images.stack import rms_map
from blobpipe.images.template import Template, find_bad_pixels

NOISE = 0.0101
SIDE = 160
KNOWN = pd.DataFrame({"x_px": [50.0, 110.0], "y_px": [50.0, 60.0], "radius_px": [6.0, 4.5]})


def noise(seed: int = 1, side: int = SIDE) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, NOISE, (side, side)).astype(np.float32)


def blob(
    x: float, y: float, radius: float, depth: float, shape: Shape = "disc", side: int = SIDE
) -> np.ndarray:
    """A blob alone on an image; what reaches over the edge is cut."""
    padded = np.zeros((side + 82, side + 82), np.float32)
    row = round(y)
    column = round(x)
    padded[row + 21 : row + 62, column + 21 : column + 62] = depth * blob_profile(
        shape, radius, x - column, y - row
    )
    return padded[41:-41, 41:-41]


def depth_of(snr: float, radius: float, shape: Shape) -> float:
    return snr / matched_snr(blob_profile(shape, radius), NOISE)


def measured(image: np.ndarray, *peaks: tuple[float, float]) -> pd.DataFrame:
    x, y = np.reshape(peaks, (-1, 2)).T
    return fit_blobs(image, x, y, np.linspace(1, 0.5, len(x)), NOISE)


def judged(
    image: np.ndarray,
    *peaks: tuple[float, float],
    catalogue: pd.DataFrame | None = KNOWN,
    shift_px: tuple[float, float] = (0.0, 0.0),
    pattern: np.ndarray | None = None,
    scatter: np.ndarray | None = None,
    bad: np.ndarray | None = None,
    stack: np.ndarray | None = None,
) -> list[str]:
    template = Template(stack, pattern, scatter, bad)
    about = {"catalogue": catalogue, "shift_px": shift_px, "noise_frac": NOISE}
    done = vet_candidates(measured(image, *peaks), image, template, **about)
    return list(done["status"])


def pattern_of(depths: tuple[float, float] = (0.10, 0.12)) -> np.ndarray:
    return sum(blob(x, y, r, d) for (x, y, r), d in zip(KNOWN.to_numpy(), depths, strict=True))


# --- measure ---------------------------------------------------------------------------------------------------------


def population(shape: Shape, snr: float, n: int = 120) -> tuple[np.ndarray, np.ndarray]:
    """True x, y, radius, depth of blobs of the detector's sizes, and the table of what is measured of them."""
    rng = np.random.default_rng(len(shape))
    truth = []
    found = []
    for _ in range(n):
        x, y = rng.uniform(30, 34, 2)
        radius = float(np.clip(rng.normal(5.7, 1.4), 2.5, 10))
        depth = depth_of(snr, radius, shape)
        image = rng.normal(0, NOISE, (64, 64)).astype(np.float32) + blob(
            x, y, radius, depth, shape, 64
        )
        truth.append((x, y, radius, depth))
        found.append(measured(image, (x + rng.uniform(-3, 3), y + rng.uniform(-3, 3))))
    return np.array(truth), pd.concat(found, ignore_index=True)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("snr", "bias", "place_px"), [(7, 0.10, 0.9), (10, 0.07, 0.7), (20, 0.03, 0.35)]
)
def test_depth_place_and_radius_with_honest_errors(
    shape: Shape, snr: float, bias: float, place_px: float
) -> None:
    """The standard error of the mean depth is 2 % at S/N 7; the best that any unbiased fit can do there is 0.6 px."""
    (x, y, radius, depth) = (part := population(shape, snr))[0].T
    table = part[1]
    assert abs(np.mean(table["depth_frac"] / depth) - 1) < bias
    assert 0.8 < np.std((table["depth_frac"] - depth) / table["depth_err_frac"]) < 1.3
    assert np.median(np.hypot(table["x_px"] - x, table["y_px"] - y)) < place_px
    for name, true in (("x", x), ("y", y), ("radius", radius)):
        within = np.mean(np.abs(table[f"{name}_px"] - true) < table[f"{name}_err_px"])
        assert 0.7 < within / 0.683 < 1.3, name
    assert np.median(table["radius_px"] / radius) == pytest.approx(1, abs=0.1)
    assert np.median(table["snr"]) == pytest.approx(snr, rel=0.07)


@pytest.mark.parametrize("shape", SHAPES)
def test_without_noise_the_truth_comes_out(shape: Shape) -> None:
    image = blob(70.3, 80.6, 6.3, 0.1, shape)
    [row] = fit_blobs(image, [72], [79], [0.9], 0.0005).to_dict("records")
    assert row["x_px"] == pytest.approx(70.3, abs=0.01)
    assert row["y_px"] == pytest.approx(80.6, abs=0.01)
    assert row["radius_px"] == pytest.approx(6.3, rel=0.005)
    assert row["depth_frac"] == pytest.approx(0.1, rel=0.005)
    assert row["loss_frac_px2"] == pytest.approx(image.sum(), rel=0.01)
    assert (row["score"], row["status"]) == (0.9, "")


@pytest.mark.parametrize(("x", "y"), [(75, 80), (80, 80), (83, 86)])
def test_a_hot_pixel_does_not_pull_the_fit(x: int, y: int) -> None:
    image = noise() + blob(80, 80, 5.5, 0.06)
    hot = image.copy()
    hot[y, x] += 0.9
    before, after = (measured(i, (81, 79)).iloc[0] for i in (image, hot))
    assert np.hypot(after["x_px"] - before["x_px"], after["y_px"] - before["y_px"]) < 0.15
    assert after["depth_frac"] == pytest.approx(before["depth_frac"], rel=0.05)


@pytest.mark.parametrize("border", [0, 5])
def test_a_blob_that_the_edge_cuts(border: int) -> None:
    image = noise() + blob(border + 2.0, 80, 6, 0.1)
    if border:
        image[:border] = image[-border:] = np.nan
        image[:, :border] = image[:, -border:] = np.nan
    [row] = measured(image, (border + 4, 81)).to_dict("records")
    assert row["x_px"] == pytest.approx(border + 2, abs=1.5)
    assert row["y_px"] == pytest.approx(80, abs=0.6)
    assert abs(row["depth_frac"] - 0.1) < 3 * row["depth_err_frac"]
    assert judged(image, (border + 4, 81)) == ["new"]


def test_a_neighbour_does_not_count() -> None:
    alone, pair = (noise() + blob(70, 80, 6, 0.06) + other for other in (0, blob(92, 80, 6, 0.2)))
    before = measured(alone, (70, 80)).iloc[0]
    after = measured(pair, (70, 80), (92, 80)).iloc[0]
    assert after["depth_frac"] == pytest.approx(before["depth_frac"], rel=0.15)
    assert after["x_px"] == pytest.approx(before["x_px"], abs=0.5)


@pytest.mark.parametrize("snr", [8, 20, 60])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_blob_is_fitted_down_to_the_noise_and_a_cluster_is_not(shape: Shape, snr: float) -> None:
    misfits = [
        measured(noise(seed) + blob(80.3, 90.1, 4.5, depth_of(snr, 4.5, shape), shape), (80, 90))[
            "misfit"
        ][0]
        for seed in range(9)
    ]
    assert 0.8 < np.median(misfits) < 1.2
    assert max(misfits) < 1.6
    ragged = np.where(np.random.default_rng(3).random((7, 7)) < 0.6, 0.1, 0.0).astype(np.float32)
    cluster = noise()
    cluster[87:94, 77:84] += ragged
    assert measured(cluster, (80, 90))["misfit"][0] > 2


def test_a_fit_does_not_depend_on_the_company() -> None:
    places = [(x, y) for x in range(24, 150, 36) for y in range(24, 150, 36)]
    image = noise() + sum(blob(x, y, 3 + k % 4, 0.02 + 0.01 * k) for k, (x, y) in enumerate(places))
    together = measured(image, *places)
    # they share pixels
    near = [place for place in places if np.hypot(*np.subtract(place, places[5])) < 3 * CUT_HALF]
    few = measured(image, *near)
    assert len(few) < len(together)
    columns = list(DETECTION_COLUMNS[:10])
    of_few = few[columns].to_numpy()[near.index(places[5])]
    of_all = together[columns].to_numpy()[5]
    np.testing.assert_array_equal(of_few, of_all)


@pytest.mark.parametrize("radius", [2.4, 4.0, 7.0, 10.0])
@pytest.mark.parametrize("offset", [0, 7])
def test_a_rough_snr_is_about_two_thirds_of_a_matched_filter_s(radius: float, offset: int) -> None:
    image = blob(80, 80, radius, depth_of(20, radius, "disc"))
    found = rough_snr(image, np.array([80 + offset]), np.array([80 - offset]), NOISE)
    assert 9 < found[0] < 20


def test_a_rough_snr_of_noise_is_low_and_of_nothing_zero() -> None:
    places = np.arange(20, 150, 10.0)
    assert rough_snr(noise(), places, places[::-1], NOISE).max() < 5
    empty = np.full((64, 64), np.nan, np.float32)
    assert list(rough_snr(empty, np.array([30, -100]), np.array([30, 500]), NOISE)) == [0, 0]
    assert len(rough_snr(noise(), np.zeros(0), np.zeros(0), NOISE)) == 0


def test_noise_is_estimated_if_not_given() -> None:
    image = noise() + blob(80, 80, 5, 0.06)
    given, estimated = (fit_blobs(image, [80], [80], [1], sigma) for sigma in (NOISE, None))
    assert estimated["snr"][0] == pytest.approx(given["snr"][0], rel=0.05)


def test_what_cannot_be_fitted_has_no_errors() -> None:
    """No pixels, no noise to compare with, a peak off the image, or a hole instead of a blob."""
    empty = np.full((64, 64), np.nan, np.float32)
    assert measured(empty, (30, 30)).iloc[0, 2:10].isna().all()
    assert fit_blobs(empty, [30], [30], [1]).iloc[0, 2:10].isna().all()
    assert fit_blobs(np.zeros((64, 64), np.float32), [30], [30], [1]).iloc[0, 2:10].isna().all()
    assert measured(noise(), (-100, 500)).iloc[0, 2:10].isna().all()
    assert measured(noise(), (np.nan, 30)).iloc[0, 2:10].isna().all()
    assert judged(noise(), (-100, 500)) == ["bad_pixels"]
    hole = measured(noise() - blob(80, 80, 12, 0.3), (80, 80)).iloc[0]
    assert np.isfinite(hole[["x_px", "y_px", "radius_px", "depth_frac", "snr"]].astype(float)).all()


def test_no_peaks_give_a_table_without_rows() -> None:
    table = measured(noise())
    assert tuple(table.columns) == (*DETECTION_COLUMNS, "misfit")
    assert [str(kind) for kind in table.dtypes[:11]] == ["float64"] * 11
    assert table.dtypes.equals(measured(noise(), (80, 80)).dtypes)
    done = vet_candidates(
        table, noise(), Template(), catalogue=KNOWN, shift_px=(1, 0), noise_frac=NOISE
    )
    assert len(done) == 0
    assert done.drop(columns="reason").dtypes.equals(table.dtypes)
    assert len(mark_seen_again(table, table)) == 0


# --- judge -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("radius", "snr"), [(3.0, 8), (5.0, 8), (8.0, 8), (2.3, 15), (5.0, 60)])
def test_a_new_blob_is_new(shape: Shape, radius: float, snr: float) -> None:
    statuses = []
    for seed in range(5):
        image = noise(seed) + blob(80.4, 110.2, radius, depth_of(snr, radius, shape), shape)
        statuses += judged(image, (81, 110))
    assert statuses == ["new"] * 5


def test_a_blob_on_a_known_one_is_known() -> None:
    image = noise() + blob(50.5, 50.5, 6, 0.05) + blob(110, 67, 5, 0.06)
    assert judged(image, (50, 50), (110, 67)) == ["known", "new"]
    assert judged(image, (50, 50), (110, 67), catalogue=None) == ["new", "new"]


def test_a_blob_that_the_stack_shows_is_known_if_it_varies_by_less_than_itself() -> None:
    pattern = blob(50.5, 50.5, 6, 0.08) + blob(110, 67, 5, 0.03)
    image = noise() + blob(50.5, 50.5, 6, 0.05) + blob(110, 67, 5, 0.06)
    assert judged(image, (50, 50), (110, 67), catalogue=None, pattern=pattern) == ["known", "new"]


@pytest.mark.parametrize(
    "shift", [(0.3, 0.0), (0.2, -0.25), (1.0, 0.0), (-0.7, 0.7), (3.0, 0.0), (2.0, -2.2)]
)
@pytest.mark.parametrize("told", ["shift and pattern", "catalogue only"])
def test_dips_of_known_blobs(shift: tuple[float, float], told: str) -> None:
    """The fit of a crescent may be put anywhere on it; a new blob elsewhere on the same image stays new."""
    pattern = pattern_of((0.2, 0.25))
    image = noise() + moved(pattern, shift[::-1], order=3) - pattern + blob(80, 110, 5, 0.05)
    length = np.hypot(*shift)
    peaks = [(x + r * shift[0] / length, y + r * shift[1] / length) for x, y, r in KNOWN.to_numpy()]
    more = {"shift_px": shift, "pattern": pattern} if told == "shift and pattern" else {}
    assert judged(image, *peaks, (80, 110), **more) == ["dip", "dip", "new"]


def test_a_shift_that_has_been_taken_off_makes_no_dips() -> None:
    """A blob lands where a known one would leave its crescent, had the image not been registered."""
    image = noise() + blob(57, 50, 4, 0.06)
    assert judged(image, (57, 50), shift_px=(1.0, 0.0), pattern=pattern_of()) == ["new"]


def test_a_hot_pixel_does_not_spoil_a_blob() -> None:
    image = noise() + blob(80, 80, 5.5, 0.06)
    image[81, 79] += 0.9
    assert judged(image, (80, 80)) == ["new"]


@pytest.mark.parametrize("width", [1, 2, 3, 5, 7])
def test_a_few_bad_pixels_are_no_blob(width: int) -> None:
    image = noise()
    image[80 : 80 + width, 80 : 80 + width] += 0.4
    assert judged(image, (80, 80)) == ["bad_pixels"]


def test_a_footprint_without_values_is_no_blob() -> None:
    image = noise() + blob(80, 80, 6, 0.1)
    image[75:86, 76:81] = np.nan
    assert judged(image, (80, 80)) == ["bad_pixels"]


def test_nothing_but_noise_is_no_blob() -> None:
    assert judged(np.zeros((SIDE, SIDE), np.float32) + 0.001 * noise(), (80, 80)) == ["bad_pixels"]


def scatter_of(*structures: tuple[int, np.ndarray], n: int = 30) -> np.ndarray:
    """Of a stack's images, some of which show structures."""
    images = np.random.default_rng(9).normal(0, NOISE, (n, SIDE, SIDE)).astype(np.float32)
    for index, structure in structures:
        images[index] += structure
    return rms_map(images, np.median(images, axis=0))


@pytest.mark.parametrize("place", [(80, 110), (81, 111)], ids=["even", "odd"])
def test_what_flickers_in_the_stack_is_bad_pixels(place: tuple[int, int]) -> None:
    """A cluster looks like a small blob, but the stack's images have read it high or low before."""
    cluster = blob(*place, 3.0, 0.12)
    image = noise() + 0.5 * cluster
    assert judged(image, place) == ["new"]
    assert judged(image, place, scatter=scatter_of()) == ["new"]
    for sign in (-1, 1):
        assert judged(image, place, scatter=scatter_of((3, sign * cluster))) == ["bad_pixels"]


@pytest.mark.parametrize("level", [-0.3, 0.3], ids=["bright", "dark"])
def test_a_cluster_that_the_stack_shows_is_bad_pixels(level: float) -> None:
    """Today it reads otherwise, which looks like a small blob. Neither noise, known blobs nor single pixels are bad."""
    rng = np.random.default_rng(4)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    pattern = pattern_of()
    stack = pattern + rng.normal(0, NOISE / 5, (SIDE, SIDE)).astype(np.float32)
    stack[rng.random(stack.shape) < 0.02] += level
    image = noise()
    here = (80, 110)
    there = (50, 110)
    for place in (here, there):
        image += blob(*place, 3.0, 0.05)
    stack[np.hypot(columns - here[0], rows - here[1]) <= 2.6] += level
    bad = find_bad_pixels(stack, pattern)
    assert judged(image, here, there) == ["new", "new"]
    assert judged(image, here, there, bad=bad) == ["bad_pixels", "new"]
    assert bad[pattern > 0.01].mean() < 0.03


def test_what_is_bright_in_the_stack_and_not_dark_in_the_image_is_bad_pixels() -> None:
    """Faint clusters, none of whose pixels stands out, that the stack shows and the image does not."""
    here = (80, 110)
    there = (50, 110)
    both = blob(*here, 4.0, 0.024) + blob(*there, 4.0, 0.024)
    rng = np.random.default_rng(5)
    stack = rng.normal(0, NOISE / 2, (SIDE, SIDE)).astype(np.float32) - blob(*here, 4.0, 0.018)
    assert find_bad_pixels(stack, np.zeros_like(stack)).mean() < 1e-3
    image = noise() + both
    assert judged(image, here, there) == ["new", "new"]
    assert judged(image, here, there, stack=stack) == ["bad_pixels", "new"]
    assert judged(image, here, there, stack=-stack) == ["new", "new"]


def test_hot_pixels_in_the_stack_do_not_hide_a_blob() -> None:
    stack = np.zeros((SIDE, SIDE), np.float32)
    stack[110, 78:82], stack[:, 50] = -30.0, np.nan
    image = noise() + blob(80, 110, 4.0, 0.04) + blob(50, 110, 4.0, 0.04)
    assert judged(image, (80, 110), (50, 110), stack=stack) == ["new", "new"]
    assert judged(image, (80, 110), stack=np.full_like(stack, np.nan)) == ["new"]


def test_a_blob_deeper_than_any_flicker_explains_is_new() -> None:
    cluster = blob(80, 110, 3.0, 0.06)
    assert judged(noise() + blob(80, 110, 4, 0.2), (80, 110), scatter=scatter_of((3, cluster))) == [
        "new"
    ]


def test_single_pixels_and_streaks_in_the_stack_do_not_hide_a_blob() -> None:
    image = noise() + blob(80, 110, 5, 0.04)
    pixel, streak = np.zeros((2, SIDE, SIDE), np.float32)
    pixel[110, 81] = 0.4
    streak[109:112] = 0.06
    assert judged(image, (80, 110), scatter=scatter_of((3, pixel), (9, pixel), (11, streak))) == [
        "new"
    ]


@pytest.mark.parametrize("place", [(2, 2), (SIDE - 3, SIDE - 2)])
def test_scatter_is_looked_at_next_to_the_corners_too(place: tuple[int, int]) -> None:
    cluster = blob(*place, 3.5, 0.12)
    assert judged(
        noise() + 0.5 * cluster, place, scatter=scatter_of((3, cluster), (8, cluster))
    ) == ["bad_pixels"]


def test_judging_leaves_the_measurements_alone() -> None:
    image = noise() + blob(80, 110, 5, 0.05)
    before = measured(image, (80, 110), (50, 50))
    kept = before.copy()
    after = vet_candidates(before, image, Template(), catalogue=KNOWN, noise_frac=NOISE)
    pd.testing.assert_frame_equal(before, kept)
    pd.testing.assert_frame_equal(
        after.drop(columns=["status", "reason"]), kept.drop(columns="status")
    )


# --- seen_again, match -----------------------------------------------------------------------------------------------


def table(*rows: tuple[float, float, str]) -> pd.DataFrame:
    x, y, status = zip(*rows, strict=True)
    return pd.DataFrame(
        {"x_px": x, "y_px": y, "status": np.array(status, object)}, index=range(7, 7 + len(rows))
    )


def test_a_new_blob_on_a_later_image_is_seen_again() -> None:
    previous = table(
        (10, 10, "new"), (50, 50, "new"), (90, 90, "dip"), (70, 70, "new"), (30, 30, "known")
    )
    current = table(
        (52, 50, "known"),
        (90, 90, "new"),
        (70, 70, "bad_pixels"),
        (30, 30, "new"),
        (13.1, 10, "new"),
    )
    done = mark_seen_again(previous, current)
    assert list(done["status"]) == ["new", "seen_again", "dip", "new", "known"]
    assert list(previous["status"]) == ["new", "new", "dip", "new", "known"]
    assert mark_seen_again(previous, current, 3.2)["status"].iloc[0] == "seen_again"


def test_marking_twice_changes_nothing() -> None:
    previous = table((10, 10, "new"), (50, 50, "new"))
    current = table((11, 10, "new"), (80, 50, "new"))
    once = mark_seen_again(previous, current)
    pd.testing.assert_frame_equal(mark_seen_again(once, current), once)


def test_pairs_are_one_to_one_and_within_the_tolerance() -> None:
    rng = np.random.default_rng(3)
    detections = rng.uniform(0, 40, (30, 2))
    blobs = rng.uniform(0, 40, (25, 2))
    pairs = pair(detections, blobs, 5.0)
    assert len(set(pairs[:, 0])) == len(set(pairs[:, 1])) == len(pairs)
    assert np.hypot(*(detections[pairs[:, 0]] - blobs[pairs[:, 1]]).T).max() <= 5
    back = pair(blobs, detections, 5.0)
    assert {(i, j) for i, j in pairs} == {(j, i) for i, j in back}


def test_as_many_pairs_as_there_can_be() -> None:
    """The nearest pair alone would leave the other two without partners."""
    assert pair([(0, 0), (4, 0)], [(3, 0), (7, 0)], 3.5).tolist() == [[0, 0], [1, 1]]


def test_pairs_of_nothing_and_of_no_place() -> None:
    assert pair(np.zeros((0, 2)), [(1, 1)], 3).shape == (0, 2)
    assert pair([(1, 1)], np.zeros((0, 2)), 3).shape == (0, 2)
    assert pair([(np.nan, 1), (1, 1)], [(1, 1)], 3).tolist() == [[1, 0]]


def test_two_peaks_on_one_blob_are_one_detection() -> None:
    image = noise() + blob(60.0, 80.0, 9.0, 0.08) + blob(110.0, 80.0, 5.0, 0.08)
    table = measured(image, (57.0, 80.0), (110.0, 81.0), (64.0, 79.0))
    once = without_repeats(table)
    assert once["score"].tolist() == [1.0, 0.75]
    assert once.index.tolist() == [0, 1]
    assert once.columns.equals(table.columns)
    assert len(without_repeats(table[:0])) == 0


# --- what a fit is made of -------------------------------------------------------------------------------------------

PLACE = (14.3, 18.8, 5.1, 7.0, 0.4)  # x, y, radius, depth, background on a cut-out


def modelled(
    shape: int, parameters: tuple[float, ...], values: np.ndarray, good: np.ndarray
) -> tuple[float, ...]:
    """Chi square, residual and slopes of `fit._model`."""
    residual = np.empty_like(values)
    slopes = np.empty((5, len(values)), np.float32)
    chi2 = _model(values, good, _table(), shape, np.array(parameters), residual, slopes)
    return chi2, residual, slopes


def a_cut(seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Values of a cut-out, 0 where it is not good, and where it is."""
    rng = np.random.default_rng(seed)
    good = (rng.random(CUT_SIDE**2) < 0.95).astype(np.float32)
    return good * rng.normal(0, 1, good.shape).astype(np.float32), good


@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_the_model_is_the_profile_at_its_depth_above_the_background(shape: int) -> None:
    values, good = a_cut()
    chi2, residual, _ = modelled(shape, PLACE, values, good)
    x, y, radius, depth, background = PLACE
    profile = blob_profile(SHAPES[shape], radius, x - CUT_HALF, y - CUT_HALF, CUT_SIDE)
    expected = values - good * (depth * profile.ravel() + background)
    np.testing.assert_allclose(residual, expected, atol=0.006 * depth)
    prior = ((radius - 5.7) / 2.5) ** 2 - 2 * np.log((0.35, 0.45, 0.2)[shape])
    assert chi2 == pytest.approx(np.square(residual, dtype=float).sum() + prior, rel=1e-5)


@pytest.mark.parametrize("radius", [0.7, 0.95, 1.2, 6.7, 12.45, 12.7])
def test_the_model_is_the_profile_for_every_radius_of_the_table(radius: float) -> None:
    """At its ends, between and on its nodes: without noise, what is left is nothing."""
    profile = blob_profile("disc", radius, 0.4, -0.3, 49)[8:-8, 8:-8].ravel()
    chi2, residual, _ = modelled(0, (16.4, 15.7, radius, 1.0, 0.0), profile, np.ones_like(profile))
    assert np.abs(residual).max() < 0.01
    assert chi2 - ((radius - 5.7) / 2.5) ** 2 + 2 * np.log(0.35) < 0.01


def test_a_fit_stays_within_eight_pixels_of_its_start_and_the_table_of_radii() -> None:
    low, high = _limits(np.array([10.0, 12.0, 5.0, 3.0, 0.5]))
    assert low.tolist() == [2, 4, 0.7, -np.inf, -np.inf]
    assert high.tolist() == [18, 20, 12.7, np.inf, np.inf]


def test_a_fit_that_failed_leaves_the_disc_that_it_started_from() -> None:
    good = a_cut()[1]
    cut = Cut(0, 0, good, good > 0)
    x, y, x_err, y_err, radius, radius_err, depth, depth_err, loss, snr = _unfitted(
        cut, np.array(PLACE)
    )
    assert (x, y, radius, depth) == PLACE[:4]
    assert np.isnan([x_err, y_err, radius_err, depth_err]).all()
    profile = blob_profile("disc", PLACE[2], PLACE[0] - 16, PLACE[1] - 16, 33)
    assert loss == pytest.approx(PLACE[3] * profile.sum(), rel=0.01)
    assert snr == pytest.approx(PLACE[3] * np.linalg.norm(profile.ravel() * good), rel=0.01)


@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_the_slopes_are_the_derivatives_of_the_model(shape: int) -> None:
    values, good = a_cut()
    slopes = modelled(shape, PLACE, values, good)[2]
    for i, step in enumerate((0.05, 0.05, 0.05, 0.5, 0.5)):
        below, above = (
            modelled(
                shape, tuple(p + sign * step * (k == i) for k, p in enumerate(PLACE)), values, good
            )[1]
            for sign in (-1, 1)
        )
        np.testing.assert_allclose(slopes[i], (below - above) / (2 * step), atol=0.02)


def test_normal_equations_are_those_of_least_squares_with_the_prior_of_the_radius() -> None:
    values, good = a_cut()
    _, residual, slopes = modelled(1, PLACE, values, good)
    normal, right = _normal(np.array(PLACE), residual, slopes)
    prior = np.diag([0, 0, 1 / 2.5**2, 0, 0])
    np.testing.assert_allclose(
        normal, slopes.astype(float) @ slopes.T + prior, rtol=1e-4, atol=1e-2
    )
    expected = slopes.astype(float) @ residual - [0, 0, (PLACE[2] - 5.7) / 2.5**2, 0, 0]
    np.testing.assert_allclose(right, expected, rtol=1e-4, atol=1e-2)
    assert (normal == normal.T).all()
    solution = right.copy()
    _solve(normal.copy(), solution)
    np.testing.assert_allclose(normal @ solution, right, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("radius", [2.7, 5.2, 7.7])
def test_the_fit_starts_from_the_disc_that_is_there(radius: float) -> None:
    good = a_cut()[1]
    profile = blob_profile("disc", radius, -1.0, 2.0, CUT_SIDE).ravel()
    values = (good * (6.0 * profile + 0.5)).astype(np.float32)
    found = _best_disc(values, good, _table(), 15.0, 18.0)
    assert found == pytest.approx((radius, 6.0, 0.5), abs=0.02)


def test_the_fit_starts_at_the_highest_place_near_the_peak() -> None:
    image = blob(80, 80, 4, 0.05) + blob(80, 88, 4, 0.1)
    peaks = np.array([[79.0, 79.0, 1.0]])
    cut = _cut(image, peaks, 0, NOISE)
    assert _highest(cut, 79 - cut.x, 79 - cut.y)[1] + cut.y < 88
    assert _highest(cut, 80 - cut.x, 86 - cut.y) == pytest.approx((80 - cut.x, 88 - cut.y), abs=1)


def test_a_cut_out_holds_the_good_pixels_nearest_to_its_peak_in_units_of_the_noise() -> None:
    image = noise()
    image[70, 75], image[71, 80] = np.nan, 9.0
    peaks = np.array([[78.4, 69.6, 1.0], [90.0, 70.0, 0.9], [78.0, 90.0, 0.8]])
    cut = _cut(image, peaks, 0, NOISE)
    assert (cut.x, cut.y) == (78 - 16, 70 - 16)
    values, good = (part.reshape(33, 33) for part in (cut.values, cut.good))
    rows, columns = np.mgrid[cut.y : cut.y + 33, cut.x : cut.x + 33]
    own = np.hypot(columns - 78.4, rows - 69.6)
    other = np.hypot(columns - 78, rows - 90)
    expected = own <= other  # the one 12 px away is on the same blob
    expected[70 - cut.y, 75 - cut.x] = expected[71 - cut.y, 80 - cut.x] = False
    assert (good != expected).sum() <= 1  # an outlier of the noise at most
    np.testing.assert_allclose(
        values[good], image[cut.y : cut.y + 33, cut.x : cut.x + 33][good] / NOISE, rtol=1e-5
    )
    assert not values[~good].any()


def test_beyond_the_edge_a_cut_out_is_not_good() -> None:
    cut = _cut(noise(), np.array([[3.0, SIDE - 2.0, 1.0]]), 0, NOISE)
    good = cut.good.reshape(33, 33)
    assert not good[:, :13].any()
    assert not good[18:].any()
    assert good[:18, 13:].mean() > 0.99


def test_outliers_are_single_pixels_and_small_clusters_and_not_the_tops_of_blobs() -> None:
    values = (noise(3, 33) + blob(16, 16, 2.4, 0.15, side=33)) / np.float32(NOISE)
    good = _without_outliers(values)
    assert good.mean() > 0.99
    values[5, 5] = values[5, 6] = values[32, 0] = 9.0
    values[20, 28], values[8, 28] = -9.0, np.nan
    again = _without_outliers(values)
    changed = {(int(y), int(x)) for y, x in np.argwhere(good & ~again)}
    assert changed == {(5, 5), (5, 6), (32, 0), (20, 28), (8, 28)}


@pytest.mark.parametrize(("level", "limit"), [(0.0, 5.0), (6.0, 8.0), (-6.0, 8.0)])
def test_an_outlier_is_five_sigma_and_half_of_the_level_around_it_off(
    level: float, limit: float
) -> None:
    values = np.full((33, 33), level, np.float32)
    for place, off in (((10, 10), limit - 0.1), ((10, 22), 0.1 - limit), ((22, 10), limit + 0.1)):
        values[place] += off
    expected = np.ones((33, 33), bool)
    expected[22, 10] = False
    assert (_without_outliers(values) == expected).all()


def test_the_brightest_square_is_the_brightest_of_all() -> None:
    signal = np.random.default_rng(2).normal(0, 1, (27, 27))
    sums = [
        signal[y : y + side, x : x + side].sum() / side
        for side, trim in ((5, 3), (11, 0))
        for y in range(trim, 27 - side - trim + 1)
        for x in range(trim, 27 - side - trim + 1)
    ]
    assert _brightest_square(signal) == pytest.approx(max(sums))
    for corner in (0, 8, 16):
        flat = np.zeros((27, 27))
        flat[corner : corner + 11, 16 - corner : 27 - corner] = 2.0
        assert _brightest_square(flat) == pytest.approx(22.0)


@pytest.mark.parametrize(("x", "y"), [(80, 80), (87.6, 72.4), (72, 87)])
def test_a_rough_snr_is_that_of_the_square_within_reach(x: float, y: float) -> None:
    image = np.zeros((SIDE, SIDE), np.float32)
    image[78:83, 78:83] = 0.02
    found = rough_snr(image, np.array([x]), np.array([y]), NOISE)
    assert found[0] == pytest.approx(5 * 0.02 / NOISE)
    image[0, 0] = np.nan
    assert rough_snr(image + 1, np.array([x]), np.array([y]), NOISE)[0] == pytest.approx(
        found[0], rel=1e-4
    )
    assert rough_snr(image, np.array([93.0]), np.array([80.0]), NOISE)[0] < found[0] / 2


def test_too_few_pixels_are_not_fitted() -> None:
    image = noise() + blob(80, 80, 5, 0.1)
    for n, fitted in ((59, False), (60, True)):
        few = np.full_like(image, np.nan)
        places = [(y, x) for y in range(76, 84) for x in range(76, 84)][:n]
        for place in places:
            few[place] = image[place]
        assert (
            np.isfinite(measured(few, (80, 80)).loc[0, ["snr", "depth_frac"]].astype(float)).all()
            == fitted
        )


def test_errors_of_depth_and_place_follow_the_signal() -> None:
    """That of the depth does not depend on it; those of the place go with the inverse S/N, and more where that is low."""
    image = noise()
    strong, faint = (
        measured(image + blob(80, 80, 5, depth), (80, 80)).iloc[0] for depth in (0.2, 0.03)
    )
    assert faint["depth_err_frac"] == pytest.approx(strong["depth_err_frac"], rel=0.5)
    for name in ("x_err_px", "y_err_px"):
        fisher = faint[name] / np.sqrt(1 + 40 / faint["snr"] ** 2)
        assert fisher / strong[name] == pytest.approx(strong["snr"] / faint["snr"], rel=0.25), name


def test_the_misfit_is_the_mean_square_in_the_footprint_less_what_another_shape_may_leave() -> None:
    """15 % of the depth is allowed, squared; a pixel farther than 1.5 px outside does not count."""
    good = np.ones(CUT_SIDE**2, bool)
    distance = distance_from(16, 16, CUT_SIDE).ravel()
    cut = Cut(0, 0, np.zeros(good.shape, np.float32), good)
    parameters = np.array([[16, 16, 4.0, 20.0, 0], [3, 3, 2.0, 1.0, 0]])
    for level, expected in ((1.0, 1.0), (3.0, 1.0), (4.0, 16 - 9.0)):
        residual = np.stack(
            [np.where(distance <= 5.4, level, 50.0), np.zeros_like(distance)]
        ).astype(np.float32)
        model = Model(parameters, residual, np.zeros((2, 5, len(good))), np.array([1.0, 2.0]))
        assert _reduced_chi2(cut, model) == pytest.approx(expected)
    nowhere = Cut(0, 0, cut.values, np.zeros_like(good))
    assert np.isnan(_reduced_chi2(nowhere, model))


def test_shapes_are_averaged_by_the_likelihood_that_their_misfit_leaves_them() -> None:
    """exp(-chi2 / 2), with chi2 in units of the best one per degree of freedom: half a depth of 10, half of 30."""
    cut = _cut(noise(), np.array([[80.0, 80.0, 1.0]]), 0, NOISE)
    free = cut.good.sum() - 5
    slopes = np.random.default_rng(1).normal(0, 100, (2, 5, len(cut.values))).astype(np.float32)
    parameters = np.array([[16, 16, 5.0, 1000.0, 0], [16, 16, 5.0, 3000.0, 0]])
    residual = np.zeros((2, len(cut.values)), np.float32)
    for misfit, more, share in (
        (1.0, 2 * np.log(3), 0.25),
        (4.0, 8 * np.log(3), 0.25),
        (0.5, 2 * np.log(3), 0.25),
    ):
        model = Model(parameters, residual, slopes, misfit * free + np.array([0.0, more]))
        depth = _averaged(cut, model, np.array([True, True]))[6]
        assert depth == pytest.approx(1000 + 2000 * share, rel=1e-3)


# --- what a judgement is made of -------------------------------------------------------------------------------------


def told(x: float, y: float, radius: float, depth: float, snr: float) -> pd.DataFrame:
    """A detection as if it had been measured so."""
    return pd.DataFrame(
        {"x_px": [x], "y_px": [y], "radius_px": radius, "depth_frac": depth, "snr": snr}
    )


def verdict_of(
    image: np.ndarray,
    detection: pd.DataFrame,
    catalogue: pd.DataFrame = KNOWN,
    pattern: np.ndarray | None = None,
) -> str:
    done = vet_candidates(
        detection, image, Template(pattern=pattern), catalogue=catalogue, noise_frac=NOISE
    )
    return str(done["status"][0])


def test_what_is_sharper_than_any_blob_or_faint_is_bad_pixels() -> None:
    image = noise() + blob(80, 110, 5, 0.1)
    found = [
        verdict_of(image, told(80, 110, *each))
        for each in ((5, 0.1, 2.9), (5, 0.1, 3.1), (1.4, 0.1, 30))
    ]
    assert found == ["bad_pixels", "new", "bad_pixels"]


@pytest.mark.parametrize(
    ("radius", "apart", "status"), [(4.0, 2.9, "known"), (4.0, 3.1, "new"), (10.0, 4.9, "known")]
)
def test_a_blob_within_three_pixels_or_half_a_radius_of_a_known_one_is_known(
    radius: float, apart: float, status: str
) -> None:
    image = noise() + blob(80 + apart, 110, 5, 0.1)
    catalogue = pd.DataFrame({"x_px": [80.0], "y_px": [110.0], "radius_px": [radius]})
    assert verdict_of(image, told(80 + apart, 110, 5, 0.1, 40), catalogue) == status


def test_a_known_blob_explains_what_is_less_deep_than_its_middle() -> None:
    pattern = np.zeros((SIDE, SIDE), np.float32)
    pattern[108:113, 78:83] = 0.05
    image = noise() + blob(80, 110, 5, 0.1)
    assert _height(pattern, 80.4, 109.6) == pytest.approx(0.05)
    assert _height(pattern, 81, 112) == pytest.approx(0.05 * 4 * 3 / 25)
    assert verdict_of(image, told(80, 110, 5, 0.049, 40), KNOWN[:0], pattern=pattern) == "known"
    assert verdict_of(image, told(80, 110, 5, 0.051, 40), KNOWN[:0], pattern=pattern) == "new"


def test_a_shift_leaves_the_known_blobs_where_they_went_less_where_they_were() -> None:
    pattern = pattern_of()
    for shift in ((2.0, 0.0), (0.0, -3.0), (1.0, 2.0)):
        left = _shift_residual(pattern, shift)
        np.testing.assert_allclose(
            left, np.roll(pattern, [int(s) for s in shift[::-1]], (0, 1)) - pattern, atol=1e-4
        )
    assert _shift_residual(pattern, (0.04, 0.02)) is None
    assert _shift_residual(None, (2.0, 0.0)) is None


def sides(positive: float, negative: float) -> np.ndarray:
    """A light loss and, 12 px to the left, its counterpart: flat discs of 4 px."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    right, left = (np.hypot(columns - x, rows - 80) <= 4 for x in (86, 74))
    return (positive * right - negative * left).astype(np.float32)


@pytest.mark.parametrize(
    ("positive", "negative", "explained"),
    [
        (0.1, 0.1, True),
        (0.19, 0.1, True),
        (0.21, 0.1, False),
        (0.1, 0.045, True),
        (0.1, 0.035, False),
        (0.1, -0.1, False),
    ],
)
def test_a_shift_explains_what_it_predicts_half_of_if_the_negative_side_is_there(
    positive: float, negative: float, explained: bool
) -> None:
    """Two fifths of it at least, and no outlier makes up for the rest."""
    image = sides(positive, negative)
    assert _predicted(86, 80, 4, image, sides(0.1, 0.1), 0.001) == explained
    image[80, 74] = -50.0
    assert _predicted(86, 80, 4, image, sides(0.1, 0.1), 0.001) == explained


@pytest.mark.parametrize(
    ("negative", "noise_frac", "found"),
    [
        (0.055, 0.001, True),
        (0.045, 0.001, False),
        (0.055, 0.085, True),
        (0.055, 0.095, False),
        (-0.1, 0.001, False),
    ],
)
def test_a_counterpart_is_half_as_strong_and_above_the_noise(
    negative: float, noise_frac: float, found: bool
) -> None:
    """Of the mean of 5 x 5 px for a known blob of 4 px, whose noise is a fifth of a pixel's."""
    known = np.array([80.0, 80.0, 4.0])
    assert _has_counterpart((86, 80), 3, known, sides(0.1, negative), noise_frac) == found
    behind = sides(0.1, 0) + np.roll(sides(0, negative), 24, axis=1)
    assert not _has_counterpart((86, 80), 3, known, behind, noise_frac)


def test_beyond_is_within_sixty_degrees_of_the_centre_s_direction() -> None:
    beyond = _beyond((10, 10), (14, 10), 21)
    rows, columns = np.mgrid[:21, :21]
    angle = np.degrees(np.arctan2(rows - 10, columns - 10))
    clear = np.abs(np.abs(angle) - 60) > 1
    np.testing.assert_array_equal(beyond[clear], (np.abs(angle) < 60)[clear])
    assert _beyond((10, 10), (10.5, 10.5), 21).all()
    assert not _beyond((10, 10), (11.5, 10), 21)[:, 0].any()


def test_a_trimmed_signal_is_without_its_highest_and_lowest_sixth_or_eight() -> None:
    # three are left out at each end
    values = np.array([900.0, *np.full(14, 2.0), 5.0, 5.0, -900.0])
    assert _trimmed_snr(values) == pytest.approx(2.0 * np.sqrt(18))
    many = np.array([*np.full(8, 100.0), 50.0, *np.zeros(91)])
    assert _trimmed_snr(many) == pytest.approx(50 / 84 * 10)
    assert _trimmed_snr(np.array([4.0, 5.0])) == pytest.approx(4.5 * np.sqrt(2))


@pytest.mark.parametrize(("missing", "too_much"), [(26, False), (27, True)])
def test_a_third_of_a_footprint_without_values_is_too_much(missing: int, too_much: bool) -> None:
    """Of the 81 within 5 px."""
    image = noise()
    footprint = np.argwhere(distance_from(80, 80, SIDE) <= 5)
    image[tuple(footprint.T)] += 0.2
    assert len(footprint) == 81
    image[tuple(footprint[:missing].T)] = np.nan
    assert _on_few_pixels(80, 80, 5, image, np.ones(image.shape, bool), NOISE) == too_much


def test_rows_and_columns_without_any_value_are_the_border() -> None:
    image = noise()
    image[:3] = image[:, -2:] = image[50, 60] = np.nan
    lit = _lit(image)
    assert not lit[:3].any()
    assert not lit[:, -2:].any()
    assert lit[3:, :-2].all()


@pytest.mark.parametrize(("share", "on_bad"), [(0.30, False), (0.36, True)])
def test_a_third_of_a_footprint_on_bad_pixels_is_too_much(share: float, on_bad: bool) -> None:
    bad = np.zeros((SIDE, SIDE), bool)
    footprint = np.argwhere(distance_from(80, 3, SIDE) <= 4)
    bad[tuple(footprint[: int(share * len(footprint))].T)] = True
    assert on_bad_pixels(80, 3, 4, bad) == on_bad


def test_bad_pixels_lie_five_sigma_and_three_tenths_of_a_known_blob_off() -> None:
    stack = noise()
    pattern = np.zeros((SIDE, SIDE), np.float32)
    pattern[40:80, 40:80] = 0.5
    stack += pattern
    sigma = clean_noise(stack)
    for k, off in enumerate((4.8, 5.2, -4.8, -5.2)):
        stack[20, 100 + k] = off * sigma
        stack[50, 50 + k] = 0.5 + np.sign(off) * (0.15 + (abs(off) - 0.1) * sigma)
    bad = find_bad_pixels(stack, pattern)
    assert bad[20, 100:104].tolist() == [False, True, False, True]
    assert bad[50, 50:54].tolist() == [False, True, False, True]


@pytest.mark.parametrize(("level", "of_stack"), [(-0.06, True), (-0.04, False), (0.06, False)])
def test_a_signal_is_of_the_stack_if_that_is_brighter_by_half_of_it(
    level: float, of_stack: bool
) -> None:
    rows, columns = np.mgrid[:SIDE, :SIDE]
    disc = (np.hypot(columns - 80, rows - 110) <= 5).astype(np.float32)
    stack = 0.3 + level * disc
    stack[110, 81] = -9.0  # counts as one pixel of the depth
    image = 0.1 * disc + 0.02
    stack[111, 80] = np.nan
    image[109, 80] = np.nan
    assert is_of_the_stack(80, 110, 4.5, 0.1, image, stack) == of_stack
    assert not is_of_the_stack(80, 110, 4.5, 0.1, 0.04 - image, stack)


def flicker(middle: float, around: float) -> np.ndarray:
    """Scatter of so much within 4 px of 80, 110, and around."""
    rows, columns = np.mgrid[: SIDE // 2, : SIDE // 2]
    inside = np.hypot(2 * columns + 0.5 - 80, 2 * rows + 0.5 - 110) <= 4
    return np.where(inside, middle, around).astype(np.float32)


@pytest.mark.parametrize(
    ("middle", "depth", "flickering"),
    [
        (0.0125, 0.07, True),
        (0.0115, 0.01, False),
        (0.0125, 0.08, False),
        (0.05, 0.48, True),
        (0.05, 0.5, False),
    ],
)
def test_flicker_is_a_fifth_above_its_surroundings_and_explains_a_tenth_of_the_depth(
    middle: float, depth: float, flickering: bool
) -> None:
    assert flickers(80, 110, 4.0, depth, flicker(middle, 0.01)) == flickering


def test_flicker_is_compared_with_the_ring_around_alone() -> None:
    scatter = flicker(0.02, 0.01)
    distance = np.hypot(*(2 * np.mgrid[:80, :80] + 0.5 - [[[110]], [[80]]]))
    scatter[(distance > 4 + 8.5) | ((distance > 4.5) & (distance < 4 + 3.5))] = 0.5
    assert flickers(80, 110, 4.0, 0.05, scatter)
    assert not flickers(80, 110, 4.0, 0.05, np.where(distance > 5, 0, scatter))


@pytest.mark.parametrize(
    ("inner", "outer", "compared"), [(6, 8, 0), (8, 9, 1), (11, 12, 1), (12, 13, 0)]
)
def test_flicker_is_compared_from_four_to_eight_pixels_outside_a_footprint(
    inner: int, outer: int, compared: int
) -> None:
    distance = np.hypot(*(2 * np.mgrid[:80, :80] + 0.5 - [[[110]], [[80]]]))
    scatter = np.where((distance > inner) & (distance <= outer), 0.01, 0) + flicker(0.02, 0.0)
    scatter[(distance > 4) & (distance <= inner)] = 0  # no value: not compared
    assert flickers(80, 110, 4.0, 0.05, scatter.astype(np.float32)) == bool(compared)


@pytest.mark.parametrize(("apart", "kept"), [(3.0, 1), (3.1, 2)])
def test_detections_within_three_pixels_are_one(apart: float, kept: int) -> None:
    table = pd.DataFrame({"x_px": [50.0, 50.0 + apart], "y_px": [20.0, 20.0], "score": [0.9, 0.8]})
    assert without_repeats(table)["score"].tolist() == [0.9, 0.8][:kept]
    assert len(without_repeats(table, 4.0)) == 1
