"""Figures: the same bytes each time, nothing left open, every axis with its unit."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.contour import ContourSet
from matplotlib.figure import Figure
from matplotlib.text import Text

from blobpipe.core import plotting
from blobpipe.validation import curves

RNG = np.random.default_rng(1)
SUBFRAMES = RNG.normal(size=(10, 256, 256)).astype(np.float32)
SALIENCY = np.abs(SUBFRAMES[:2])
LABELS = np.arange(10) % 2
HISTORY = pd.DataFrame(
    {"epoch": [1, 2], "train_loss": [0.7, 0.6], "val_loss": [0.7, 0.5], "val_accuracy": [0.5, 0.8]}
)
CURVE = (np.linspace(0, 1, 9), np.linspace(0, 1, 9) ** 0.5)
PANEL = plotting.Panel("one", SUBFRAMES[0], SALIENCY[0], np.array([[30.0, 40.0, 5.0]]))
BINS = pd.DataFrame(
    {
        "probability_low": [0.0, 0.5],
        "n": [3, 0],
        "mean_probability": [0.2, np.nan],
        "blob_frac": [0.3, np.nan],
        "blob_frac_low": [0.1, np.nan],
        "blob_frac_high": [0.5, np.nan],
    }
)
RECALL = pd.DataFrame(
    [
        (quantity, 0.0, high, 4, 0.5, 0.2, 0.8)
        for quantity in ("snr", "depth_frac", "radius_px")
        for high in (1.0, np.inf)
    ],
    columns=["quantity", "low", "high", "n", "recall", "recall_low", "recall_high"],
)
BLOBS = pd.DataFrame({"x_px": [10.0, 20.0], "y_px": [10.0, 900.0], "status": ["found", "missed"]})
ALARMS = pd.DataFrame(
    {"x_px": [10, 40, 300], "y_px": [20, 50, 700], "x0_px": [0, 0, 256], "y0_px": [0, 0, 512]}
)
GRID = pd.DataFrame(
    [
        (name, radius, depth, 24, 0.4, 0.2, 0.6)
        for name in ("dense", "report", "matched_filter")
        for radius in (4.0, 6.0)
        for depth in (0.01, 0.02)
    ],
    columns=[
        "detector",
        "radius_px",
        "depth_frac",
        "n",
        "completeness",
        "completeness_low",
        "completeness_high",
    ],
)
LIMITS = GRID[GRID["depth_frac"] == 0.01].assign(depth_50_frac=0.012, depth_90_frac=np.nan)
SHARES = pd.DataFrame(
    [
        (name, low, low + high, 4, 0.5, 0.2, 0.8)
        for name in ("dense", "report")
        for low, high in ((0.0, 5.0), (5.0, np.inf))
    ],
    columns=["detector", "low", "high", "n", "share", "share_low", "share_high"],
)
DEEP = pd.DataFrame(
    [(n_since, snr, 0.5, 0.3, 0.7, 0.6) for n_since in (1, 4, 16) for snr in (1.25, 2.5, 5.0)],
    columns=["n_since", "snr", "completeness", "completeness_low", "completeness_high", "optimum"],
)
LANDINGS = pd.DataFrame(
    {
        "snr": [2.5, 2.5, 5.0, 5.0],
        "error_images": [0.0, 12.0, -1.0, np.nan],
        "within_interval": [1, 0, 1, np.nan],
    }
)
DEEP_ALARMS = pd.DataFrame(
    {"n_images": [1, 1, 4], "persistent": [1, 1, 1], "score": [0.3, 0.85, 0.5]}
)
INTERVAL = {"tnr": (0.8, 0.9), "fpr": (0.1, 0.2), "fnr": (None, None), "tpr": (None, None)}

DRAW: dict[str, Callable[[Path], None]] = {
    "contact_sheet": lambda path: plotting.contact_sheet(path, SUBFRAMES, LABELS, "Title"),
    "history": lambda path: plotting.history(path, HISTORY, "loss (nat)", "dense"),
    "gallery": lambda path: plotting.gallery(path, {"right": [PANEL, PANEL], "wrong": []}, "Title"),
    "confusion": lambda path: curves.confusion(path, {"report": np.array([[9, 1], [0, 0]])}, {"report": INTERVAL}),
    "by_snr": lambda path: curves.by_snr(path, SHARES, "Title", {"dense": ": two false alarms"}),
    "roc": lambda path: curves.roc(path, {"report": CURVE, "dense": CURVE}, {"report": (0.1, 0.9)}, {"report": 0.9, "dense": None}),
    "precision_recall": lambda path: curves.precision_recall(path, {"report": CURVE}, {"report": 0.9}),
    "calibration": lambda path: plotting.calibration(path, {"report": BINS}, note="Note"),
    "cases": lambda path: curves.cases(path, RECALL, BLOBS, ALARMS, "dense", (1024, 1024)),
    "completeness": lambda path: curves.completeness(path, GRID, LIMITS),
    "deep_completeness": lambda path: curves.deep_completeness(path, DEEP),
    "landing_errors": lambda path: curves.landing_errors(path, LANDINGS, 0.9),
    "deep_alarms": lambda path: curves.deep_alarms(path, DEEP_ALARMS, {1: 0.8, 4: 0.9}, 50),
}  # fmt: skip
WITHOUT_AXES = ("contact_sheet", "gallery")  # pictures whose scale stands in their title


def test_every_figure_is_tested() -> None:
    functions = [
        *inspect.getmembers(curves, inspect.isfunction),
        *inspect.getmembers(plotting, inspect.isfunction),
    ]
    modules = (curves.__name__, plotting.__name__)
    ours = {
        name for name, function in functions if function.__module__ in modules and name[0] != "_"
    }
    assert ours - {"save", "two_digits"} == set(DRAW)


@pytest.mark.parametrize("name", DRAW)
def test_a_figure_is_the_same_bytes_each_time_and_closed(tmp_path: Path, name: str) -> None:
    for folder in "ab":
        DRAW[name](tmp_path / folder / f"{name}.png")
    one, two = (tmp_path / folder / f"{name}.png" for folder in "ab")
    assert one.read_bytes() == two.read_bytes()
    assert plt.imread(one).shape[0] > 200
    assert not plt.get_fignums()
    assert list(one.parent.iterdir()) == [one]


@pytest.mark.parametrize("name", [name for name in DRAW if name not in WITHOUT_AXES])
def test_every_axis_has_a_name_with_its_unit(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(plotting, "save", lambda figure, path, **_: drawn.append(figure))
    DRAW[name](tmp_path / "a.png")
    grid = [axis for axis in drawn[0].axes if axis.has_data() or axis.images or axis.patches]
    assert grid
    for axis in grid:
        for names in (
            [a.get_xlabel() for a in grid if _shares(axis, a, "x")],
            [a.get_ylabel() for a in grid if _shares(axis, a, "y")],
        ):
            labels = [label for label in names if label]
            assert labels, f"{name}: an axis without a name"
            assert all("(" in label or label == "epoch" for label in labels), labels
    plt.close("all")


def _shares(one: plt.Axes, other: plt.Axes, which: str) -> bool:
    group = one.get_shared_x_axes() if which == "x" else one.get_shared_y_axes()
    return one is other or group.joined(one, other)


@pytest.mark.parametrize("name", DRAW)
def test_legends_lie_beside_the_data_and_all_text_can_be_read(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(plotting, "save", lambda figure, path, **_: drawn.append(figure))
    DRAW[name](tmp_path / "a.png")
    [figure] = drawn
    figure.canvas.draw()
    legends = [*figure.legends, *filter(None, (axis.get_legend() for axis in figure.axes))]
    for legend in legends:
        box = legend.get_window_extent()
        assert not any(box.overlaps(axis.bbox) for axis in figure.axes)
    sizes = [text.get_fontsize() for text in figure.findobj(Text) if text.get_text()]
    assert min(sizes) >= plotting.SMALL
    plt.close("all")


def test_places_are_shown_on_the_whole_image_and_no_bin_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(plotting, "save", lambda figure, path, **_: drawn.append(figure))
    empty = RECALL.assign(n=0, recall=np.nan, recall_low=np.nan, recall_high=np.nan)
    curves.cases(tmp_path / "a.png", empty, BLOBS, ALARMS[:0], "dense", (900, 2048))
    by_snr, *_, places = drawn[0].axes
    assert by_snr.get_xlim() == (-0.5, 1.5)
    assert (places.get_xlim(), places.get_ylim()) == ((-0.5, 2047.5), (-0.5, 899.5))
    plt.close("all")


def test_limits_of_completeness_span_what_was_injected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(plotting, "save", lambda figure, path, **_: drawn.append(figure))
    for limits in (LIMITS, LIMITS.assign(depth_50_frac=np.nan)):
        curves.completeness(tmp_path / "a.png", GRID, limits)
        axis = drawn[-1].axes[3]
        drawn[-1].canvas.draw()
        assert [label.get_text() for label in axis.get_xticklabels()] == ["4", "6"]
        assert axis.get_xlim() == (3.5, 6.5)
        assert axis.get_ylim() == pytest.approx((0.8, 2.5))
        assert [label.get_text() for label in axis.get_yticklabels()] == ["1", "2"]
    plt.close("all")


def test_epochs_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(plotting, "save", lambda figure, path, **_: drawn.append(figure))
    for n in (1, 3, 200):
        table = pd.DataFrame({"epoch": np.arange(1, n + 1)}).assign(
            train_loss=1.0, val_loss=0.5, val_accuracy=0.9
        )
        plotting.history(tmp_path / "a.png", table, "loss (nat)", "report")
        axis = drawn[-1].axes[0]
        low, high = axis.get_xlim()
        ticks = axis.get_xticks()
        inside = ticks[(ticks >= low) & (ticks <= high)]
        assert len(inside) >= 1
        assert np.array_equal(inside, inside.round())
    plt.close("all")


@pytest.mark.parametrize("most", [0, 1, 3, 40, 2000])
def test_counts_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(plotting, "save", lambda figure, path, **_: drawn.append(figure))
    plotting.calibration(tmp_path / "a.png", {"dense": BINS.assign(n=[most, 0])})
    axis = drawn[0].axes[1]
    drawn[0].canvas.draw()
    low, high = axis.get_ylim()
    labels = [
        label.get_text()
        for which in ("major", "minor")
        for label in axis.yaxis.get_ticklabels(which=which)
        if label.get_text() and low <= label.get_position()[1] <= high
    ]
    assert labels
    assert all(label.isdigit() for label in labels), labels
    plt.close("all")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.0267, "0.027"),
        (4.13e-5, "4.1 \N{MULTIPLICATION SIGN} 10⁻⁵"),
        (-2e-12, "-2 \N{MULTIPLICATION SIGN} 10⁻¹²"),
        (17.0, "17"),
    ],
)
def test_small_numbers_are_written_with_a_power_of_ten(value: float, text: str) -> None:
    assert plotting.two_digits(value) == text


def test_all_panels_of_a_gallery_have_the_same_contours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(plotting, "save", lambda figure, path, **_: drawn.append(figure))
    faint = PANEL._replace(saliency=PANEL.saliency / 2)
    plotting.gallery(tmp_path / "a.png", {"one": [PANEL, faint]}, "Title")
    levels = [axis.findobj(ContourSet)[0].levels for axis in drawn[0].axes]
    highest = PANEL.saliency.max()
    assert levels[0] == pytest.approx(highest * np.array(plotting.CONTOURS))
    assert levels[1] == pytest.approx(
        levels[0][:2]
    )  # half the saliency does not reach the highest level
    plt.close("all")


@pytest.mark.parametrize("name", ["contact_sheet", "gallery"])
def test_pictures_say_their_grey_scale(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(plotting, "save", lambda figure, path, **_: drawn.append(figure))
    DRAW[name](tmp_path / "a.png")
    assert "sigma" in drawn[0].get_suptitle()
    plt.close("all")


def test_one_class_alone_makes_a_sheet(tmp_path: Path) -> None:
    plotting.contact_sheet(tmp_path / "a.png", SUBFRAMES[:3], np.zeros(3, int), "Title")
    assert (tmp_path / "a.png").exists()
