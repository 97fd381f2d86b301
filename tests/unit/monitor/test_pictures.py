"""Pictures of detections: each pixel at its place in its colour, the circle around the blob, titles that fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from blobpipe.core import plotting
from blobpipe.monitor import pictures

RNG = np.random.default_rng(1)
ORANGE = tuple(bytes.fromhex(plotting.ORANGE[1:]))
TITLE = "Title"


def drawn(path: Path, image: npt.ArrayLike, **chosen: Any) -> npt.NDArray[np.int64]:
    """The picture of an image and of a map, as numbers from 0 to 255."""
    image = np.asarray(image, np.float32)
    given: dict[str, Any] = {"saliency": image, "origin": (0, 0), "peak": (-99, -99)}
    pictures.draw_detection(path, image, **{**given, "title": TITLE, **chosen})
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def panels(picture: npt.NDArray[np.int64], ny: int, nx: int, n_lines: int = 1) -> list[Any]:
    """The two panels of a picture, turned so that row 0 is the first."""
    zoom = max(2, 384 // max(ny, nx))
    top = pictures.TOP + n_lines * pictures.LINE
    lefts = (pictures.LEFT, pictures.LEFT + zoom * nx + pictures.GAP)
    return [picture[top : top + zoom * ny, x : x + zoom * nx][::-1] for x in lefts]


def is_orange(panel: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    return (panel == ORANGE).all(axis=2)


@pytest.mark.parametrize("shape", [(256, 256), (128, 128), (20, 33), (1, 1)])
def test_every_pixel_is_a_square_in_its_shade(tmp_path: Path, shape: tuple[int, int]) -> None:
    image = RNG.normal(size=shape).astype(np.float32)
    saliency = RNG.normal(size=shape).astype(np.float32)
    picture = drawn(tmp_path / "a.png", image, saliency=saliency, limits=(-1, 2))
    zoom = max(2, 384 // max(shape))
    expected = (
        matplotlib.colormaps["gray"]((image + 3) / 6, bytes=True),
        matplotlib.colormaps["magma"]((saliency + 1) / 3, bytes=True),
    )
    for panel, shades in zip(panels(picture, *shape), expected, strict=True):
        squares = shades[..., :3].repeat(zoom, 0).repeat(zoom, 1)
        assert np.abs(panel - squares).max() <= 4
        assert np.abs(panel - squares).mean() < 0.01


def test_the_brightest_pixel_is_at_its_column_and_at_its_row_from_the_bottom(
    tmp_path: Path,
) -> None:
    image = np.zeros((128, 128))
    image[20, 90] = 9
    for panel in panels(drawn(tmp_path / "a.png", image), 128, 128):
        light = panel.sum(axis=2)
        rows, columns = np.nonzero(light == light.max())
        assert {*rows} == {60, 61, 62}
        assert {*columns} == {270, 271, 272}


def test_what_has_no_value_is_white_and_a_flat_map_black(tmp_path: Path) -> None:
    image = np.zeros((128, 128))
    image[3, 5] = np.nan
    left, right = panels(drawn(tmp_path / "a.png", image, saliency=np.ones((128, 128))), 128, 128)
    assert (left[9:12, 15:18] == 255).all()
    assert (np.delete(left, slice(9, 12), axis=0) < 255).all()
    assert right.max() < 10


def test_the_default_scale_of_the_map_spans_its_values(tmp_path: Path) -> None:
    saliency = RNG.uniform(5, 7, size=(128, 128)).astype(np.float32)
    chosen = {"saliency": saliency}
    by_default = drawn(tmp_path / "a.png", saliency, **chosen)
    limits = (float(saliency.min()), float(saliency.max()))
    assert np.array_equal(by_default, drawn(tmp_path / "b.png", saliency, limits=limits, **chosen))


@pytest.mark.parametrize(
    ("n", "peak", "radius_px", "radius"),
    [
        (128, (64.0, 64.0), 8.0, 24.0),
        (128, (30.3, 90.6), 12.5, 37.5),
        (256, (100.0, 40.0), 8.0, 16.0),
        # A circle must not cover a small blob, and one of unknown radius has the usual size
        (128, (30.3, 90.6), 2.0, 12.0),
        (128, (30.3, 90.6), np.nan, 12.0),
        (256, (30.3, 90.6), None, pictures.USUAL_RADIUS),
        # Near the corners, part of it is seen
        (128, (1.0, 2.0), 8.0, 24.0),
        (128, (126.0, 125.0), 8.0, 24.0),
        (128, (1.0, 125.0), 20.0, 60.0),
    ],
)
def test_the_circle_has_the_radius_of_the_blob_around_its_centre(
    tmp_path: Path, n: int, peak: tuple[float, float], radius_px: float | None, radius: float
) -> None:
    picture = drawn(tmp_path / "a.png", np.zeros((n, n)), peak=peak, radius_px=radius_px)
    zoom = max(2, 384 // n)
    x, y = (zoom * (value + 0.5) - 0.5 for value in peak)
    for panel in panels(picture, n, n):
        rows, columns = np.nonzero(is_orange(panel))
        distance = np.hypot(rows - y, columns - x)
        assert distance == pytest.approx(radius, abs=1.2)
        # Every direction in which it lies on the panel
        angles = np.linspace(0, 2 * np.pi, 200)
        across = np.rint(x + radius * np.cos(angles)).astype(int)
        up = np.rint(y + radius * np.sin(angles)).astype(int)
        inside = (across >= 0) & (across < zoom * n) & (up >= 0) & (up < zoom * n)
        assert inside.any()
        colours = panel[up[inside], across[inside]]
        assert np.abs(colours - ORANGE).max() < 60


def test_the_circle_is_smooth(tmp_path: Path) -> None:
    picture = drawn(tmp_path / "a.png", np.full((128, 128), -3), peak=(64.0, 64.0))
    red = panels(picture, 128, 128)[0][..., 0]
    between = (red > 20) & (red < ORANGE[0] - 20)
    assert between.sum() > 50


@pytest.mark.parametrize(
    ("first", "length", "zoom", "expected"),
    [
        (0, 128, 3, [0, 20, 40, 60, 80, 100, 120]),
        (412, 128, 3, [420, 440, 460, 480, 500, 520]),
        (512, 256, 2, [550, 600, 650, 700, 750]),
        (896, 128, 3, [900, 920, 940, 960, 980, 1000, 1020]),
        (7, 6, 64, [7, 8, 9, 10, 11, 12]),
        (1, 1, 384, [1]),
    ],
)
def test_ticks_are_round_numbers(first: int, length: int, zoom: int, expected: list[int]) -> None:
    assert [*pictures.ticks(first, length, zoom)] == expected


def test_ticks_are_at_the_middles_of_their_pixels(tmp_path: Path) -> None:
    picture = drawn(tmp_path / "a.png", np.zeros((128, 128)), origin=(412, 300))
    bottom = pictures.TOP + pictures.LINE + 384
    for left in (pictures.LEFT, pictures.LEFT + 384 + pictures.GAP):
        below = picture[bottom + pictures.TICK, left - 10 : left + 384].sum(axis=1)
        assert [*(np.flatnonzero(below == 0) - 10)] == [
            3 * (x - 412) + 1 for x in (420, 440, 460, 480, 500, 520)
        ]
        beside = picture[: bottom + 10, left - pictures.TICK].sum(axis=1)
        rows = [bottom - 1 - y for y in np.flatnonzero(beside == 0)]
        # The corner of the left panel's numbers is not reached
        assert rows[::-1] == [3 * (y - 300) + 1 for y in (300, 320, 340, 360, 380, 400, 420)]


@pytest.mark.parametrize("origin", [(0, 0), (896, 0), (100_000, 123_456)])
def test_numbers_stay_on_the_picture_and_off_the_panels(
    tmp_path: Path, origin: tuple[int, int]
) -> None:
    picture = drawn(tmp_path / "a.png", np.zeros((128, 128)), origin=origin)
    edges = (picture[0], picture[-1], picture[:, 0], picture[:, -1])
    assert all((edge == 255).all() for edge in edges)
    for panel in panels(picture, 128, 128):
        assert len(np.unique(panel.reshape(-1, 3), axis=0)) == 1


@pytest.mark.parametrize(
    "title", ["x" * 200, "word " * 60, "a_name_without_blanks" * 9 + " b" * 99]
)
def test_a_long_title_is_broken_and_moves_the_panels(tmp_path: Path, title: str) -> None:
    image = RNG.normal(size=(128, 128))
    width = pictures.LEFT + 2 * 384 + pictures.GAP
    lines = pictures.wrap(title, width)
    assert len(lines) > 1
    assert "".join(lines).replace(" ", "") == title.replace(" ", "")
    picture = drawn(tmp_path / "a.png", image, title=title)
    short = drawn(tmp_path / "b.png", image)
    assert len(picture) == len(short) + pictures.LINE * (len(lines) - 1)
    for one, other in zip(
        panels(picture, 128, 128, len(lines)), panels(short, 128, 128), strict=True
    ):
        assert np.array_equal(one, other)
    assert (picture[:, [0, -1]] == 255).all()


def test_a_title_breaks_between_words() -> None:
    title = "image: probability 0.987, depth 1.23 ± 0.10 %, radius 6.3 px"
    lines = pictures.wrap(title, 300)
    assert len(lines) > 1
    assert " ".join(lines) == title
    assert pictures.wrap("short title", 300) == ["short title"]
    assert len(pictures.wrap("", 300)) <= 1


def test_text_is_large_enough_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[float] = []
    write = pictures._write

    def listen(sheet: Any, text: str, points: float, *args: Any, **chosen: Any) -> None:
        sizes.append(points)
        write(sheet, text, points, *args, **chosen)

    monkeypatch.setattr(pictures, "_write", listen)
    pictures._blank_sheet.cache_clear()
    drawn(tmp_path / "a.png", np.zeros((128, 128)))
    assert min(sizes) >= plotting.SMALL
    assert len(sizes) > 20


def test_a_picture_is_the_same_bytes_each_time_and_alone_in_its_folder(tmp_path: Path) -> None:
    image = RNG.normal(size=(256, 256))
    for folder in "ab":
        drawn(tmp_path / folder / "a.png", image, peak=(30, 40), radius_px=7.0)
        # Another size and title between them
        drawn(tmp_path / "other.png", image[:99, :99], title="Other")
    one, two = (tmp_path / folder / "a.png" for folder in "ab")
    assert one.read_bytes() == two.read_bytes()
    assert [*one.parent.iterdir()] == [one]
    assert one.stat().st_size < 400_000


def test_an_old_picture_stays_until_the_new_one_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    drawn(path, np.zeros((128, 128)))
    before = path.read_bytes()

    def fail(self: Image.Image, to: Path, *_: object, **__: object) -> None:
        to.write_bytes(before[:99])
        raise OSError(28, "No space left on device", str(to))

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="No space left") as caught:
        drawn(path, np.ones((128, 128)))
    assert caught.value.filename == str(path)
    assert path.read_bytes() == before
    assert [*tmp_path.iterdir()] == [path]
