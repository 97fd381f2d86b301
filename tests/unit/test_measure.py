"""Detections: places, sizes and depths with honest errors, and what is no new blob."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.ndimage import shift as moved

from blobpipe import difference, measure
from blobpipe.profiles import SHAPES, Shape, blob_profile, matched_snr

NOISE = 0.0101
SIDE = 160
KNOWN = pd.DataFrame({"x_px": [50.0, 110.0], "y_px": [50.0, 60.0], "radius_px": [6.0, 4.5]})


def noise(seed: int = 1, side: int = SIDE) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, NOISE, (side, side)).astype(np.float32)


def blob(x: float, y: float, radius: float, depth: float, shape: Shape = "disc", side: int = SIDE) -> np.ndarray:
    """A blob alone on an image; what reaches over the edge is cut."""
    padded = np.zeros((side + 82, side + 82), np.float32)
    row, column = round(y), round(x)
    padded[row + 21 : row + 62, column + 21 : column + 62] = depth * blob_profile(shape, radius, x - column, y - row)
    return padded[41:-41, 41:-41]


def depth_of(snr: float, radius: float, shape: Shape) -> float:
    return snr / matched_snr(blob_profile(shape, radius), NOISE)


def measured(image: np.ndarray, *peaks: tuple[float, float]) -> pd.DataFrame:
    x, y = np.reshape(peaks, (-1, 2)).T
    return measure.measure(image, x, y, np.linspace(1, 0.5, len(x)), NOISE)


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
    about = {"catalogue": catalogue, "shift_px": shift_px, "pattern": pattern, "scatter": scatter, "bad": bad}
    done = measure.judge(measured(image, *peaks), image, noise_frac=NOISE, stack=stack, **about)
    return list(done["status"])


def pattern_of(depths: tuple[float, float] = (0.10, 0.12)) -> np.ndarray:
    return sum(blob(x, y, r, d) for (x, y, r), d in zip(KNOWN.to_numpy(), depths, strict=True))


# --- measure ---------------------------------------------------------------------------------------------------------


def population(shape: Shape, snr: float, n: int = 120) -> tuple[np.ndarray, np.ndarray]:
    """True x, y, radius, depth of blobs of the detector's sizes, and the table of what is measured of them."""
    rng = np.random.default_rng(len(shape))
    truth, found = [], []
    for _ in range(n):
        x, y = rng.uniform(30, 34, 2)
        radius = float(np.clip(rng.normal(5.7, 1.4), 2.5, 10))
        depth = depth_of(snr, radius, shape)
        image = rng.normal(0, NOISE, (64, 64)).astype(np.float32) + blob(x, y, radius, depth, shape, 64)
        truth.append((x, y, radius, depth))
        found.append(measured(image, (x + rng.uniform(-3, 3), y + rng.uniform(-3, 3))))
    return np.array(truth), pd.concat(found, ignore_index=True)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("snr", "bias", "place_px"), [(7, 0.10, 0.9), (10, 0.07, 0.7), (20, 0.03, 0.35)])
def test_depth_place_and_radius_with_honest_errors(shape: Shape, snr: float, bias: float, place_px: float) -> None:
    """The standard error of the mean depth is 2 % at S/N 7; the best that any unbiased fit can do there is 0.6 px."""
    (x, y, radius, depth), table = (part := population(shape, snr))[0].T, part[1]
    assert abs(np.mean(table["depth_frac"] / depth) - 1) < bias
    assert 0.8 < np.std((table["depth_frac"] - depth) / table["depth_err_frac"]) < 1.3
    assert np.median(np.hypot(table["x_px"] - x, table["y_px"] - y)) < place_px
    assert 0.7 < np.mean(np.abs(table["x_px"] - x) < table["x_err_px"]) / 0.683 < 1.3
    assert np.median(table["radius_px"] / radius) == pytest.approx(1, abs=0.1)
    assert np.median(table["snr"]) == pytest.approx(snr, rel=0.07)


@pytest.mark.parametrize("shape", SHAPES)
def test_without_noise_the_truth_comes_out(shape: Shape) -> None:
    image = blob(70.3, 80.6, 6.3, 0.1, shape)
    [row] = measure.measure(image, [72], [79], [0.9], 0.0005).to_dict("records")
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
    before, after = measured(alone, (70, 80)).iloc[0], measured(pair, (70, 80), (92, 80)).iloc[0]
    assert after["depth_frac"] == pytest.approx(before["depth_frac"], rel=0.15)
    assert after["x_px"] == pytest.approx(before["x_px"], abs=0.5)


@pytest.mark.parametrize("snr", [8, 20, 60])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_blob_is_fitted_down_to_the_noise_and_a_cluster_is_not(shape: Shape, snr: float) -> None:
    misfits = [
        measured(noise(seed) + blob(80.3, 90.1, 4.5, depth_of(snr, 4.5, shape), shape), (80, 90))["misfit"][0]
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
    near = [
        place for place in places if np.hypot(*np.subtract(place, places[5])) < 3 * measure.HALF
    ]  # they share pixels
    few = measured(image, *near)
    assert len(few) < len(together)
    columns = list(measure.DETECTION_COLUMNS[:10])
    of_few, of_all = few[columns].to_numpy()[near.index(places[5])], together[columns].to_numpy()[5]
    np.testing.assert_array_equal(of_few, of_all)


@pytest.mark.parametrize("radius", [2.4, 4.0, 7.0, 10.0])
@pytest.mark.parametrize("offset", [0, 7])
def test_a_rough_snr_is_about_two_thirds_of_a_matched_filter_s(radius: float, offset: int) -> None:
    image = blob(80, 80, radius, depth_of(20, radius, "disc"))
    found = measure.rough_snr(image, np.array([80 + offset]), np.array([80 - offset]), NOISE)
    assert 9 < found[0] < 20


def test_a_rough_snr_of_noise_is_low_and_of_nothing_zero() -> None:
    places = np.arange(20, 150, 10.0)
    assert measure.rough_snr(noise(), places, places[::-1], NOISE).max() < 5
    empty = np.full((64, 64), np.nan, np.float32)
    assert list(measure.rough_snr(empty, np.array([30, -100]), np.array([30, 500]), NOISE)) == [0, 0]
    assert len(measure.rough_snr(noise(), np.zeros(0), np.zeros(0), NOISE)) == 0


def test_noise_is_estimated_if_not_given() -> None:
    image = noise() + blob(80, 80, 5, 0.06)
    given, estimated = (measure.measure(image, [80], [80], [1], sigma) for sigma in (NOISE, None))
    assert estimated["snr"][0] == pytest.approx(given["snr"][0], rel=0.05)


def test_what_cannot_be_fitted_has_no_errors() -> None:
    """No pixels, no noise to compare with, a peak off the image, or a hole instead of a blob."""
    empty = np.full((64, 64), np.nan, np.float32)
    assert measured(empty, (30, 30)).iloc[0, 2:10].isna().all()
    assert measure.measure(empty, [30], [30], [1]).iloc[0, 2:10].isna().all()
    assert measure.measure(np.zeros((64, 64), np.float32), [30], [30], [1]).iloc[0, 2:10].isna().all()
    assert measured(noise(), (-100, 500)).iloc[0, 2:10].isna().all()
    assert measured(noise(), (np.nan, 30)).iloc[0, 2:10].isna().all()
    assert judged(noise(), (-100, 500)) == ["bad_pixels"]
    hole = measured(noise() - blob(80, 80, 12, 0.3), (80, 80)).iloc[0]
    assert np.isfinite(hole[["x_px", "y_px", "radius_px", "depth_frac", "snr"]].astype(float)).all()


def test_no_peaks_give_a_table_without_rows() -> None:
    table = measured(noise())
    assert tuple(table.columns) == (*measure.DETECTION_COLUMNS, "misfit")
    assert [str(kind) for kind in table.dtypes[:11]] == ["float64"] * 11
    assert table.dtypes.equals(measured(noise(), (80, 80)).dtypes)
    done = measure.judge(table, noise(), catalogue=KNOWN, shift_px=(1, 0), pattern=None, noise_frac=NOISE)
    assert len(done) == 0
    assert done.dtypes.equals(table.dtypes)
    assert len(measure.seen_again(table, table)) == 0


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


@pytest.mark.parametrize("shift", [(0.3, 0.0), (0.2, -0.25), (1.0, 0.0), (-0.7, 0.7), (3.0, 0.0), (2.0, -2.2)])
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
    return difference.scatter(images, np.median(images, axis=0))


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
    image, here, there = noise(), (80, 110), (50, 110)
    for place in (here, there):
        image += blob(*place, 3.0, 0.05)
    stack[np.hypot(columns - here[0], rows - here[1]) <= 2.6] += level
    bad = measure.bad_pixels(stack, pattern)
    assert judged(image, here, there) == ["new", "new"]
    assert judged(image, here, there, bad=bad) == ["bad_pixels", "new"]
    assert bad[pattern > 0.01].mean() < 0.03


def test_what_is_bright_in_the_stack_and_not_dark_in_the_image_is_bad_pixels() -> None:
    """Faint clusters, none of whose pixels stands out, that the stack shows and the image does not."""
    here, there = (80, 110), (50, 110)
    both = blob(*here, 4.0, 0.024) + blob(*there, 4.0, 0.024)
    rng = np.random.default_rng(5)
    stack = rng.normal(0, NOISE / 2, (SIDE, SIDE)).astype(np.float32) - blob(*here, 4.0, 0.018)
    assert measure.bad_pixels(stack, np.zeros_like(stack)).mean() < 1e-3
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
    assert judged(noise() + blob(80, 110, 4, 0.2), (80, 110), scatter=scatter_of((3, cluster))) == ["new"]


def test_single_pixels_and_streaks_in_the_stack_do_not_hide_a_blob() -> None:
    image = noise() + blob(80, 110, 5, 0.04)
    pixel, streak = np.zeros((2, SIDE, SIDE), np.float32)
    pixel[110, 81], streak[109:112] = 0.4, 0.06
    assert judged(image, (80, 110), scatter=scatter_of((3, pixel), (9, pixel), (11, streak))) == ["new"]


@pytest.mark.parametrize("place", [(2, 2), (SIDE - 3, SIDE - 2)])
def test_scatter_is_looked_at_next_to_the_corners_too(place: tuple[int, int]) -> None:
    cluster = blob(*place, 3.5, 0.12)
    assert judged(noise() + 0.5 * cluster, place, scatter=scatter_of((3, cluster), (8, cluster))) == ["bad_pixels"]


def test_judging_leaves_the_measurements_alone() -> None:
    image = noise() + blob(80, 110, 5, 0.05)
    before = measured(image, (80, 110), (50, 50))
    kept = before.copy()
    after = measure.judge(before, image, catalogue=KNOWN, shift_px=(0, 0), pattern=None, noise_frac=NOISE)
    pd.testing.assert_frame_equal(before, kept)
    pd.testing.assert_frame_equal(after.drop(columns="status"), kept.drop(columns="status"))


# --- seen_again, match -----------------------------------------------------------------------------------------------


def table(*rows: tuple[float, float, str]) -> pd.DataFrame:
    x, y, status = zip(*rows, strict=True)
    return pd.DataFrame({"x_px": x, "y_px": y, "status": np.array(status, object)}, index=range(7, 7 + len(rows)))


def test_a_new_blob_on_a_later_image_is_seen_again() -> None:
    previous = table((10, 10, "new"), (50, 50, "new"), (90, 90, "dip"), (70, 70, "new"), (30, 30, "known"))
    current = table((52, 50, "known"), (90, 90, "new"), (70, 70, "bad_pixels"), (30, 30, "new"), (13.1, 10, "new"))
    done = measure.seen_again(previous, current)
    assert list(done["status"]) == ["new", "seen_again", "dip", "new", "known"]
    assert list(previous["status"]) == ["new", "new", "dip", "new", "known"]
    assert measure.seen_again(previous, current, 3.2)["status"].iloc[0] == "seen_again"


def test_marking_twice_changes_nothing() -> None:
    previous, current = table((10, 10, "new"), (50, 50, "new")), table((11, 10, "new"), (80, 50, "new"))
    once = measure.seen_again(previous, current)
    pd.testing.assert_frame_equal(measure.seen_again(once, current), once)


def test_pairs_are_one_to_one_and_within_the_tolerance() -> None:
    rng = np.random.default_rng(3)
    detections, blobs = rng.uniform(0, 40, (30, 2)), rng.uniform(0, 40, (25, 2))
    pairs = measure.match(detections, blobs, 5.0)
    assert len(set(pairs[:, 0])) == len(set(pairs[:, 1])) == len(pairs)
    assert np.hypot(*(detections[pairs[:, 0]] - blobs[pairs[:, 1]]).T).max() <= 5
    back = measure.match(blobs, detections, 5.0)
    assert {(i, j) for i, j in pairs} == {(j, i) for i, j in back}


def test_as_many_pairs_as_there_can_be() -> None:
    """The nearest pair alone would leave the other two without partners."""
    assert measure.match([(0, 0), (4, 0)], [(3, 0), (7, 0)], 3.5).tolist() == [[0, 0], [1, 1]]


def test_pairs_of_nothing_and_of_no_place() -> None:
    assert measure.match(np.zeros((0, 2)), [(1, 1)], 3).shape == (0, 2)
    assert measure.match([(1, 1)], np.zeros((0, 2)), 3).shape == (0, 2)
    assert measure.match([(np.nan, 1), (1, 1)], [(1, 1)], 3).tolist() == [[1, 0]]


def test_two_peaks_on_one_blob_are_one_detection() -> None:
    image = noise() + blob(60.0, 80.0, 9.0, 0.08) + blob(110.0, 80.0, 5.0, 0.08)
    table = measured(image, (57.0, 80.0), (110.0, 81.0), (64.0, 79.0))
    assert measure.without_repeats(table)["score"].tolist() == [1.0, 0.75]
    assert len(measure.without_repeats(table[:0])) == 0
