"""Vetting: each reason for which a candidate is no new blob."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.ndimage import shift as moved
from tests.unit.detection.blobs import NOISE, SIDE, blob, depth_of, measured, noise

from blobpipe.core.blob_shapes import SHAPES, Shape
from blobpipe.core.cutouts import distance_from
from blobpipe.detection.vet import (
    Evidence,
    Fit,
    _beyond,
    _lies_across,
    flickers_in_the_stack,
    is_bright_in_the_stack,
    lies_on_bad_stack_pixels,
    vet_candidates,
)
from blobpipe.images.stack import rms_map
from blobpipe.images.template import Template, find_bad_pixels
from blobpipe.params import Vetting

KNOWN = pd.DataFrame({"x_px": [50.0, 110.0], "y_px": [50.0, 60.0], "radius_px": [6.0, 4.5]})


def statuses(
    image: np.ndarray,
    *peaks: tuple[float, float],
    catalogue: pd.DataFrame | None = KNOWN,
    shift_px: tuple[float, float] = (0.0, 0.0),
    pattern: np.ndarray | None = None,
    rms: np.ndarray | None = None,
    bad: np.ndarray | None = None,
    stack: np.ndarray | None = None,
) -> list[str]:
    template = Template(stack, pattern, rms, bad)
    about = {"catalogue": catalogue, "shift_px": shift_px, "noise_frac": NOISE}
    done = vet_candidates(measured(image, *peaks), image, template, **about)
    return list(done["status"])


def pattern_of(depths: tuple[float, float] = (0.10, 0.12)) -> np.ndarray:
    return sum(blob(x, y, r, d) for (x, y, r), d in zip(KNOWN.to_numpy(), depths, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("radius", "snr"), [(3.0, 8), (5.0, 8), (8.0, 8), (2.3, 15), (5.0, 60)])
def test_a_new_blob_is_new(shape: Shape, radius: float, snr: float) -> None:
    found = []
    for seed in range(5):
        image = noise(seed) + blob(80.4, 110.2, radius, depth_of(snr, radius, shape), shape)
        found += statuses(image, (81, 110))
    assert found == ["new"] * 5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("radius", "depth"), [(4.0, 0.05), (6.0, 0.08), (8.0, 0.2)])
def test_a_blob_of_which_half_has_no_value_is_new(
    shape: Shape, radius: float, depth: float
) -> None:
    """The rim of missing pixels is no hard edge."""
    image = noise() + blob(80.4, 110.2, radius, depth, shape)
    image[95:126, 60:80] = np.nan
    assert statuses(image, (81, 110)) == ["new"]


def test_clusters_with_hard_edges_are_bad_pixels_with_missing_pixels_or_without() -> None:
    image = noise()
    image[108:114, 78:84] += 0.3
    assert statuses(image, (81, 111)) == ["bad_pixels"]
    image[108:114, 78:80] = np.nan
    assert statuses(image, (81, 111)) == ["bad_pixels"]


def test_a_blob_on_a_known_one_is_known() -> None:
    image = noise() + blob(50.5, 50.5, 6, 0.05) + blob(110, 67, 5, 0.06)
    assert statuses(image, (50, 50), (110, 67)) == ["known", "new"]
    assert statuses(image, (50, 50), (110, 67), catalogue=None) == ["new", "new"]


def test_a_blob_that_the_stack_shows_is_known_if_it_varies_by_less_than_itself() -> None:
    pattern = blob(50.5, 50.5, 6, 0.08) + blob(110, 67, 5, 0.03)
    image = noise() + blob(50.5, 50.5, 6, 0.05) + blob(110, 67, 5, 0.06)
    assert statuses(image, (50, 50), (110, 67), catalogue=None, pattern=pattern) == ["known", "new"]


@pytest.mark.parametrize(
    "shift", [(0.3, 0.0), (0.2, -0.25), (1.0, 0.0), (-0.7, 0.7), (3.0, 0.0), (2.0, -2.2)]
)
def test_dips_of_known_blobs(shift: tuple[float, float]) -> None:
    """The fit of a crescent may be put anywhere on it; a new blob elsewhere on the same image stays new."""
    pattern = pattern_of((0.2, 0.25))
    image = noise() + moved(pattern, shift[::-1], order=3) - pattern + blob(80, 110, 5, 0.05)
    length = np.hypot(*shift)
    peaks = [(x + r * shift[0] / length, y + r * shift[1] / length) for x, y, r in KNOWN.to_numpy()]
    assert statuses(image, *peaks, (80, 110)) == ["dip", "dip", "new"]


def test_a_shift_that_has_been_taken_off_makes_no_dips() -> None:
    """A blob lands where a known one would leave its crescent, had the image not been registered."""
    image = noise() + blob(57, 50, 4, 0.06)
    assert statuses(image, (57, 50), shift_px=(1.0, 0.0), pattern=pattern_of()) == ["new"]


def test_a_hot_pixel_does_not_spoil_a_blob() -> None:
    image = noise() + blob(80, 80, 5.5, 0.06)
    image[81, 79] += 0.9
    assert statuses(image, (80, 80)) == ["new"]


@pytest.mark.parametrize("width", [4, 5, 7])
def test_a_cluster_of_bad_pixels_is_no_blob(width: int) -> None:
    image = noise()
    image[80 : 80 + width, 80 : 80 + width] += 0.4
    assert statuses(image, (80, 80)) == ["bad_pixels"]


@pytest.mark.parametrize("width", [1, 2, 3])
def test_a_few_bad_pixels_leave_nothing_to_fit(width: int) -> None:
    """The fit leaves outliers out; what remains is noise, and its score is low."""
    image = noise()
    image[80 : 80 + width, 80 : 80 + width] += 0.4
    assert measured(image, (80, 80))["snr"][0] < 4


def rms_of(*structures: tuple[int, np.ndarray], n: int = 30) -> np.ndarray:
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
    assert statuses(image, place) == ["new"]
    assert statuses(image, place, rms=rms_of()) == ["new"]
    for sign in (-1, 1):
        assert statuses(image, place, rms=rms_of((3, sign * cluster))) == ["bad_pixels"]


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
    assert statuses(image, here, there) == ["new", "new"]
    assert statuses(image, here, there, bad=bad) == ["bad_pixels", "new"]
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
    assert statuses(image, here, there) == ["new", "new"]
    assert statuses(image, here, there, stack=stack) == ["bad_pixels", "new"]
    assert statuses(image, here, there, stack=-stack) == ["new", "new"]


def test_hot_pixels_in_the_stack_do_not_hide_a_blob() -> None:
    stack = np.zeros((SIDE, SIDE), np.float32)
    stack[110, 78:82], stack[:, 50] = -30.0, np.nan
    image = noise() + blob(80, 110, 4.0, 0.04) + blob(50, 110, 4.0, 0.04)
    assert statuses(image, (80, 110), (50, 110), stack=stack) == ["new", "new"]
    assert statuses(image, (80, 110), stack=np.full_like(stack, np.nan)) == ["new"]


def test_a_blob_deeper_than_any_flicker_explains_is_new() -> None:
    cluster = blob(80, 110, 3.0, 0.06)
    assert statuses(noise() + blob(80, 110, 4, 0.2), (80, 110), rms=rms_of((3, cluster))) == ["new"]


def test_single_pixels_and_streaks_in_the_stack_do_not_hide_a_blob() -> None:
    image = noise() + blob(80, 110, 5, 0.04)
    pixel, streak = np.zeros((2, SIDE, SIDE), np.float32)
    pixel[110, 81] = 0.4
    streak[109:112] = 0.06
    assert statuses(image, (80, 110), rms=rms_of((3, pixel), (9, pixel), (11, streak))) == ["new"]


@pytest.mark.parametrize("place", [(2, 2), (SIDE - 3, SIDE - 2)])
def test_the_rms_map_is_looked_at_next_to_the_corners_too(place: tuple[int, int]) -> None:
    cluster = blob(*place, 3.5, 0.12)
    assert statuses(noise() + 0.5 * cluster, place, rms=rms_of((3, cluster), (8, cluster))) == [
        "bad_pixels"
    ]


def test_vetting_leaves_the_measurements_alone() -> None:
    image = noise() + blob(80, 110, 5, 0.05)
    before = measured(image, (80, 110), (50, 50))
    kept = before.copy()
    after = vet_candidates(before, image, Template(), catalogue=KNOWN, noise_frac=NOISE)
    pd.testing.assert_frame_equal(before, kept)
    pd.testing.assert_frame_equal(
        after.drop(columns=["status", "reason"]), kept.drop(columns="status")
    )


def told(x: float, y: float, radius: float, depth: float, snr: float) -> pd.DataFrame:
    """A detection as if it had been measured so."""
    return pd.DataFrame(
        {"x_px": [x], "y_px": [y], "radius_px": radius, "depth_frac": depth, "snr": snr}
    )


def evidence(
    image: np.ndarray, *, template: Template | None = None, noise: float = NOISE
) -> Evidence:
    """An image of which no blob is known."""
    nothing = np.zeros((0, 3))
    about = {"known": nothing, "recent": nothing[:, :2], "shift": (0.0, 0.0), "params": Vetting()}
    return Evidence(image, template or Template(), noise=noise, **about)


def status_of(
    image: np.ndarray,
    detection: pd.DataFrame,
    catalogue: pd.DataFrame = KNOWN,
    pattern: np.ndarray | None = None,
) -> str:
    done = vet_candidates(
        detection, image, Template(pattern=pattern), catalogue=catalogue, noise_frac=NOISE
    )
    return str(done["status"][0])


def test_what_is_sharper_than_any_blob_or_was_not_fitted_is_bad_pixels() -> None:
    image = noise() + blob(80, 110, 5, 0.1)
    radii = (1.4, 1.6, np.nan)
    found = [status_of(image, told(80, 110, radius, 0.1, 30)) for radius in radii]
    assert found == ["bad_pixels", "new", "bad_pixels"]


@pytest.mark.parametrize(
    ("radius", "apart", "status"), [(4.0, 2.9, "known"), (4.0, 3.1, "new"), (10.0, 4.9, "known")]
)
def test_a_blob_within_three_pixels_or_half_a_radius_of_a_known_one_is_known(
    radius: float, apart: float, status: str
) -> None:
    image = noise() + blob(80 + apart, 110, 5, 0.1)
    catalogue = pd.DataFrame({"x_px": [80.0], "y_px": [110.0], "radius_px": [radius]})
    assert status_of(image, told(80 + apart, 110, 5, 0.1, 40), catalogue) == status


def test_a_known_blob_explains_what_is_less_deep_than_its_middle() -> None:
    pattern = np.zeros((SIDE, SIDE), np.float32)
    pattern[108:113, 78:83] = 0.05
    image = noise() + blob(80, 110, 5, 0.1)
    assert status_of(image, told(80, 110, 5, 0.049, 40), KNOWN[:0], pattern=pattern) == "known"
    assert status_of(image, told(80, 110, 5, 0.051, 40), KNOWN[:0], pattern=pattern) == "new"
    # One pixel to the right and two up, 4 x 3 of the 25 pixels show it.
    beside = 0.05 * 12 / 25
    for depth, status in ((0.98 * beside, "known"), (1.02 * beside, "new")):
        detection = told(81, 112, 5, depth, 40)
        assert status_of(image, detection, KNOWN[:0], pattern=pattern) == status


def sides(positive: float, negative: float) -> np.ndarray:
    """A light loss and, 12 px to the left, its counterpart: flat discs of 4 px."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    right, left = (np.hypot(columns - x, rows - 80) <= 4 for x in (86, 74))
    return (positive * right - negative * left).astype(np.float32)


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
    fit = Fit(86, 80, 3, 0.1, 30)
    assert _lies_across(fit, known, evidence(sides(0.1, negative), noise=noise_frac)) == found
    behind = sides(0.1, 0) + np.roll(sides(0, negative), 24, axis=1)
    assert not _lies_across(fit, known, evidence(behind, noise=noise_frac))


@pytest.mark.parametrize(
    ("shift", "hidden", "found"),
    [
        ((0.6, 0.0), 3, True),  # over the border, towards the candidate
        ((0.4, 0.0), 3, False),  # by too little
        ((-0.6, 0.0), 3, False),  # away from the candidate
        ((0.6, 0.0), 0, False),  # nothing of it is hidden
        ((0.0, 0.6), 3, False),  # beside the candidate
    ],
)
def test_a_known_blob_that_moved_in_over_the_border_leaves_no_counterpart(
    shift: tuple[float, float], hidden: int, found: bool
) -> None:
    image = blob(86, 80, 3, 0.1)
    image[:, : 77 + hidden] = np.nan if hidden else 0
    known = pd.DataFrame({"x_px": [80.0], "y_px": [80.0], "radius_px": [4.0]})
    done = vet_candidates(
        told(86, 80, 3, 0.1, 30),
        image,
        Template(),
        catalogue=known,
        shift_px=shift,
        noise_frac=NOISE,
    )
    assert (done["reason"][0] == "counterpart") == found


def test_beyond_is_within_sixty_degrees_of_the_centre_s_direction() -> None:
    beyond = _beyond((10, 10), (14, 10), 21)
    rows, columns = np.mgrid[:21, :21]
    angle = np.degrees(np.arctan2(rows - 10, columns - 10))
    clear = np.abs(np.abs(angle) - 60) > 1
    np.testing.assert_array_equal(beyond[clear], (np.abs(angle) < 60)[clear])
    assert _beyond((10, 10), (10.5, 10.5), 21).all()
    assert not _beyond((10, 10), (11.5, 10), 21)[:, 0].any()


@pytest.mark.parametrize(("share", "on_bad"), [(0.30, False), (0.36, True)])
def test_a_third_of_a_footprint_on_bad_pixels_is_too_much(share: float, on_bad: bool) -> None:
    bad = np.zeros((SIDE, SIDE), bool)
    footprint = np.argwhere(distance_from(80, 3, SIDE) <= 4)
    bad[tuple(footprint[: int(share * len(footprint))].T)] = True
    about = evidence(noise(), template=Template(bad_pixels=bad))
    assert lies_on_bad_stack_pixels(Fit(80, 3, 4, 0.1, 30), about) == on_bad


@pytest.mark.parametrize(("level", "of_stack"), [(-0.07, True), (-0.06, False), (0.07, False)])
def test_a_signal_is_of_the_stack_if_that_is_brighter_by_two_thirds_of_it(
    level: float, of_stack: bool
) -> None:
    rows, columns = np.mgrid[:SIDE, :SIDE]
    disc = (np.hypot(columns - 80, rows - 110) <= 5).astype(np.float32)
    stack = 0.3 + level * disc
    stack[110, 81] = -9.0  # counts as one pixel of the depth
    image = 0.1 * disc + 0.02
    stack[111, 80] = np.nan
    image[109, 80] = np.nan
    fit = Fit(80, 110, 4.5, 0.1, 30)
    template = Template(stack=stack)
    assert is_bright_in_the_stack(fit, evidence(image, template=template)) == of_stack
    assert not is_bright_in_the_stack(fit, evidence(0.04 - image, template=template))


def flickers(depth: float, rms: np.ndarray) -> bool:
    """Whether a candidate of so much light loss at 80, 110 is taken for flicker."""
    about = evidence(noise(), template=Template(rms=rms))
    return flickers_in_the_stack(Fit(80, 110, 4.0, depth, 30), about)


def flicker(middle: float, around: float) -> np.ndarray:
    """RMS of so much within 4 px of 80, 110, and around."""
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
    assert flickers(depth, flicker(middle, 0.01)) == flickering


def test_flicker_is_compared_with_the_ring_around_alone() -> None:
    rms = flicker(0.02, 0.01)
    distance = np.hypot(*(2 * np.mgrid[:80, :80] + 0.5 - [[[110]], [[80]]]))
    rms[(distance > 4 + 8.5) | ((distance > 4.5) & (distance < 4 + 3.5))] = 0.5
    assert flickers(0.05, rms)
    assert not flickers(0.05, np.where(distance > 5, 0, rms))


@pytest.mark.parametrize(
    ("inner", "outer", "compared"), [(6, 8, 0), (8, 9, 1), (11, 12, 1), (12, 13, 0)]
)
def test_flicker_is_compared_from_four_to_eight_pixels_outside_a_footprint(
    inner: int, outer: int, compared: int
) -> None:
    distance = np.hypot(*(2 * np.mgrid[:80, :80] + 0.5 - [[[110]], [[80]]]))
    rms = np.where((distance > inner) & (distance <= outer), 0.01, 0) + flicker(0.02, 0.0)
    rms[(distance > 4) & (distance <= inner)] = 0  # no value: not compared
    assert flickers(0.05, rms.astype(np.float32)) == bool(compared)
