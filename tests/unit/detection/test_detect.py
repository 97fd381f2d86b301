"""The operating point, the historical cases as the dense network sees them, and the scan with it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from blobpipe import cli
from blobpipe.core import fits_images, tables
from blobpipe.core.blob_shapes import blob_profile
from blobpipe.detection import detect, thresholds
from blobpipe.detection.detectors import (
    DenseDetector,
    MatchedFilter,
    Peaks,
    ReportDetector,
    load_dense_detector,
)
from blobpipe.detection.fit import DETECTION_COLUMNS
from blobpipe.detection.match import near_blobs
from blobpipe.detection.matched_filter import FilteredImage, filter_image
from blobpipe.detection.operating_point import CANDIDATE, OperatingPoint, logit
from blobpipe.detection.score import N_WEIGHTS
from blobpipe.detection.search import fit_peaks, subframe_scores, worth_fitting
from blobpipe.errors import ModelError, TableError
from blobpipe.networks import dense_network, model_file
from blobpipe.noise.whiten import WHITE
from blobpipe.params import Detect, Params, Vetting
from blobpipe.simulation import cutout, held_out
from blobpipe.simulation.inject import add_blob

from ..conftest import NEW


def near_new(found: pd.DataFrame) -> pd.Series:
    """Distances from the place of the new blob (px)."""
    return np.hypot(found["x_px"] - NEW[0], found["y_px"] - NEW[1])


def test_the_stage_finds_the_new_blob(detect_dir: Path) -> None:
    candidates = pd.read_csv(detect_dir / "candidates.csv")
    (best,) = candidates.query("is_blob == 1").nlargest(1, "score").to_dict("records")
    assert (best["frame"], best["status"]) == ("frame5", "new")
    assert math.hypot(best["x_px"] - NEW[0], best["y_px"] - NEW[1]) < 0.5
    assert best["depth_frac"] == pytest.approx(NEW[3], rel=0.15)
    metrics = json.loads((detect_dir / "metrics.json").read_text())
    assert best["score"] >= metrics["threshold"]
    table = pd.read_csv(detect_dir / "frames.csv")
    assert tuple(table) == detect.FRAME_COLUMNS
    assert table["kind"].tolist() == ["quiet"] * 5 + ["historical"]
    assert metrics["n_quiet"] == 5
    reliability = pd.read_csv(detect_dir / "reliability.csv")  # of the image with a new blob
    assert reliability["n"].sum() == len(candidates.query("frame == 'frame5' and status == 'new'"))
    assert (
        candidates["is_blob"] == candidates["frame"].eq("frame5") & (near_new(candidates) <= 6)
    ).all()
    assert set(candidates["frame"]) <= {f"frame{i}" for i in range(6)}


def test_images_without_a_catalogue_are_searched(
    made_project: Path, dense_model: Path, tmp_path: Path
) -> None:
    """Of images of the user's own without blobs.csv: nothing to find, all detections are false alarms."""
    data = made_project / "data"
    raw = Path(shutil.copytree(data / "raw", tmp_path / "raw"))
    (raw / "blobs.csv").unlink()
    folders = (raw, data / "difference", data / "scale", made_project / "results/cutout")
    detect.search_batches(*folders[:3], dense_model, tmp_path / "out", Params())
    detect.detect(*folders, dense_model, tmp_path / "out", Params())
    assert pd.read_csv(tmp_path / "out/candidates.csv")["is_blob"].sum() == 0
    assert json.loads((tmp_path / "out/metrics.json").read_text())["n_quiet"] == 6


def test_batches_give_the_same_bytes_as_all_at_once(
    made_project: Path, dense_model: Path, detect_dir: Path, tmp_path: Path
) -> None:
    """Two batches, the last first; one image rejected, and a batch without any that is usable."""
    data = tmp_path / "data"
    for stage in ("raw", "difference", "scale"):
        shutil.copytree(made_project / "data" / stage, data / stage)
    for stage in ("difference", "scale"):
        whole = pd.read_csv(data / stage / "frames-000.csv")
        last = whole["frame"] == "frame5"
        whole[~last].to_csv(data / stage / "frames-000.csv", index=False)
        whole[last].to_csv(data / stage / "frames-001.csv", index=False)
        whole[:0].to_csv(data / stage / "frames-002.csv", index=False)
    folders = (data / "raw", data / "difference", data / "scale")
    recipes = made_project / "results/cutout"
    out = tmp_path / "out"
    with pytest.raises(TableError, match=r"candidates-000.csv: not found"):
        detect.detect(*folders, recipes, dense_model, out, Params())
    for batch in (2, 1, 0):
        detect.search_batches(*folders, dense_model, out, Params(), batch)
    detect.detect(*folders, recipes, dense_model, out, Params())
    for path in detect_dir.glob("*.*"):
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name
    assert (out / "batches/candidates-002.csv").read_text().count("\n") == 1


def test_its_model_is_ready_for_use(detect_dir: Path) -> None:
    point = load_dense_detector(detect_dir / "model.safetensors").point
    assert point.threshold == json.loads((detect_dir / "metrics.json").read_text())["threshold"]
    scores = np.array([0.01, 0.2, 0.5, 0.9, 0.999])
    assert (np.diff(point.probability(scores)) > 0).all()


def test_practice_keeps_to_what_training_has_seen(made_project: Path, dense_model: Path) -> None:
    data = made_project / "data"
    recipes = made_project / "results/cutout"
    images = tables.image_table(data / "raw", data / "difference", data / "scale")
    blobs = tables.read_blobs(data / "raw")
    network, _ = model_file.load_dense(dense_model)
    folders = (data / "difference", data / "scale", recipes)
    detector = DenseDetector(network)
    about = (detector, images, blobs, folders)
    found = detect.inject_training_frames(*about, Detect(), Vetting())
    frames_seen, border = held_out.seen_part(images, blobs, recipes)
    assert frames_seen == set(images["frame"]) & set(
        pd.read_csv(recipes / "train_subframes.csv")["frame"]
    ) - {"frame5"}
    assert (found["x_px"] < border).all()
    assert set(found["status"]) <= {"new"}
    assert found["is_blob"].sum() > 0
    pd.testing.assert_frame_equal(
        found, detect.inject_training_frames(*about, Detect(threads=1), Vetting())
    )


def test_a_subframe_has_the_highest_score_on_it() -> None:
    """Of what may be a new blob: what was judged to be something else does not count."""
    places = {"x_px": [255.4, 255.6, 300.0, 9.0, 9.0], "y_px": [10.0, 10.0, 600.0, 9.0, 9.0]}
    scores = {
        "score": [0.3, 0.6, 0.9, 0.8, 0.7],
        "status": ["new", "new", "new", "bad_pixels", "dip"],
    }
    found = pd.DataFrame(places | scores)
    np.testing.assert_array_equal(subframe_scores(found, (300, 500)), [0.3, 0.6, 0.0, 0.0])
    np.testing.assert_array_equal(subframe_scores(found[:0], (512, 256)), [0.0, 0.0])


def test_the_threshold_follows_from_the_budget() -> None:
    """Logits with an exponential tail: the expected number above the threshold is what was allowed."""
    rng = np.random.default_rng(1)
    above = []
    for _ in range(300):
        scores = 1 / (1 + np.exp(-rng.exponential(0.8, 120) + 3))
        threshold = thresholds.tail_threshold(scores, 2.0)
        above.append((1 / (1 + np.exp(-rng.exponential(0.8, 120) + 3)) > threshold).sum())
    assert np.mean(above) == pytest.approx(2.0, rel=0.25)
    strict, lax = (thresholds.tail_threshold(scores, allowed) for allowed in (0.5, 8.0))
    assert strict > lax
    assert thresholds.tail_threshold(np.zeros(0), 1.0) == CANDIDATE


def test_a_level_is_exceeded_as_often_as_allowed() -> None:
    values = np.arange(100.0)
    assert thresholds.tail_level(values, 1.0) == 99
    assert thresholds.tail_level(values, 3.5) == 96.5
    assert thresholds.tail_level(values, 0.1) > 99
    rng = np.random.default_rng(1)
    above = [
        (rng.exponential(1, 500) > thresholds.tail_level(rng.exponential(1, 500), 0.5)).sum()
        for _ in range(400)
    ]
    assert np.mean(above) == pytest.approx(0.5, abs=0.25)


def test_the_baselines_meet_the_budget_on_held_out_subframes(
    made_project: Path, model: Path
) -> None:
    """An image of four subframes is held out; with 200 false alarms on 100 images, the second highest score is the level."""
    data = made_project / "data"
    recipes = made_project / "results/cutout"
    images = tables.image_table(data / "raw", data / "difference", data / "scale")
    blobs = tables.read_blobs(data / "raw")
    shown = set(pd.read_csv(recipes / "train_subframes.csv")["frame"])
    [aside] = set(images["frame"]) - shown - {"frame5"}
    report = ReportDetector(model_file.load_model(model)[0])
    filters = MatchedFilter((4.0, 6.0))
    folders = (data / "difference", data / "scale", recipes)
    scores = thresholds.score_held_out(report, filters, images, blobs, folders, threads=2)
    levels = thresholds.baseline_thresholds(scores, 4, per_100_frames=200.0)
    scaled = fits_images.read_frame(data / f"scale/{aside}.fits.fz").data
    assert levels["matched_filter"] == pytest.approx(np.sort(filters.answer(scaled))[-2])
    assert levels["report"] == pytest.approx(np.sort(report.answer(scaled))[-2])


def test_the_matched_filter_says_where_on_the_image_its_peaks_are() -> None:
    """A blob on each of four subframes, each elsewhere on it."""
    places = np.array([(60, 80), (400, 130), (90, 300), (331, 470)])
    image = np.random.default_rng(1).normal(0, 1, (512, 512)).astype(np.float32)
    for x, y in places:
        image[y - 20 : y + 21, x - 20 : x + 21] += 5 * blob_profile("disc", 5.0)
    match = MatchedFilter((5.0,)).respond(image)
    assert np.abs(np.stack([match.x, match.y], axis=1) - places).max() <= 1
    peaks = MatchedFilter((5.0,)).search(image)
    assert sorted(zip(peaks.x_px, peaks.y_px, strict=True)) == sorted(
        zip(match.x, match.y, strict=True)
    )
    assert (np.diff(peaks.score) <= 0).all()


@pytest.fixture
def stages(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Folders of difference, scale and cutout: training has seen the left half of a and b, 1024 px wide, and not c and d."""
    subframes = pd.DataFrame(
        [(0, "a", 0, 0, 0, 0, 0), (1, "b", 256, 0, 0, 0, 0)], columns=list(cutout.SUBFRAME_COLUMNS)
    )
    tables.write_table(tmp_path / "cutout/train_subframes.csv", subframes)
    tables.write_table(
        tmp_path / "cutout/train_blobs.csv", pd.DataFrame(columns=list(cutout.BLOB_COLUMNS))
    )
    pattern = np.random.default_rng(1).normal(0, 1, (32, 1024)).astype(np.float32)
    fits_images.write_images(
        tmp_path / "difference/reference.fits.fz", {"STACK": pattern, "PATTERN": pattern}, sigma=1.0
    )
    return tmp_path / "difference", tmp_path / "scale", tmp_path / "cutout"


QUIET = pd.DataFrame({"frame": list("abcd")})
LANDED = pd.DataFrame({"x_px": [9.0, 9.0], "y_px": 9.0, "radius_px": 2.0, "first_frame": ["", "d"]})


def test_held_out_is_what_training_has_not_seen_of_images_without_a_new_blob(
    stages: tuple[Path, Path, Path],
) -> None:
    candidates = pd.DataFrame(
        {"frame": list("aabccd"), "x_px": [511.9, 512.0, 1000.0, 3.0, 900.0, 900.0]}
    )
    aside = held_out.find_held_out(candidates, QUIET, LANDED, stages[2], 1024)
    assert aside.rows.tolist() == [False, True, True, True, True, False]
    assert aside.frames == 2.0  # all of c, half of a and b
    assert held_out.find_held_out(candidates, QUIET, LANDED, stages[2], 500).frames == 1.0


def test_the_operating_point_rests_on_held_out_candidates_that_may_be_blobs(
    stages: tuple[Path, Path, Path],
) -> None:
    scores = np.array([0.3, 0.6, 0.2, 0.35])
    kept = pd.DataFrame({"frame": list("abcc"), "x_px": 700.0, "score": scores, "status": "new"})
    others = pd.DataFrame(
        {"frame": list("acd"), "x_px": [9.0, 9, 700], "score": 0.9, "status": ["new", "dip", "new"]}
    )
    true = np.array([0.8, 0.9, 0.95])
    params = Detect(false_alarms_per_100_frames=25.0, new_blobs_per_100_frames=10.0)
    point = thresholds.set_operating_point(
        pd.concat([others, kept]), true, QUIET, LANDED, stages, params
    )
    assert point.frames == 2.0
    allowed = thresholds.allowed_alarms(0.5, params.confidence)
    assert point.threshold == pytest.approx(thresholds.tail_threshold(scores, allowed), abs=1e-5)
    assert point[1:3] == pytest.approx(thresholds.calibrate(true, scores, 2.0, 0.1), abs=1e-4)
    with pytest.raises(TableError, match="no image is held out"):
        thresholds.set_operating_point(
            kept, true, QUIET.query("frame == 'd'"), LANDED, stages, params
        )


def test_the_tail_is_exponential_in_the_logits() -> None:
    """Three false peaks of logits 1, 2 and 3: the highest two lie 1.5 above the third on average."""
    scores = 1 / (1 + np.exp(-np.array([1.0, 3.0, 2.0])))
    for allowed in (0.5, 1.0):
        level = logit(thresholds.tail_threshold(scores, allowed))
        assert level == pytest.approx(1 + 1.5 * math.log(3 / allowed))
        assert thresholds.tail_level(np.array([1.0, 3.0, 2.0]), allowed / 2) == pytest.approx(
            1 + 1.5 * math.log(6 / allowed)
        )
    assert thresholds.tail_threshold(scores, 3.0) == CANDIDATE
    assert thresholds.tail_threshold(scores[:1], 0.5) == CANDIDATE
    # nothing below is looked at
    assert thresholds.tail_threshold(np.linspace(1e-5, 1e-4, 40), 2.0) == CANDIDATE
    lower = np.concatenate([np.linspace(0.5, 0.9, thresholds.TAIL), np.linspace(0.001, 0.4, 50)])
    assert thresholds.tail_threshold(lower, 2.0) == thresholds.tail_threshold(
        lower[: thresholds.TAIL], 2.0
    )


def test_a_probability_is_a_logistic_function_of_the_logit() -> None:
    point = OperatingPoint(0.5, 2.0, -1.0, 1.0)
    expected = [1 / (1 + math.e), 81 / (81 + math.e)]  # odds of 1 and 9, squared, over e
    np.testing.assert_allclose(point.probability(np.array([0.5, 0.9])), expected)
    np.testing.assert_allclose(logit(np.array([0.0, 0.5, 1.0])), [-16.118, 0, 16.118], atol=1e-3)


def test_a_model_without_an_operating_point_gives_its_own_probability(tmp_path: Path) -> None:
    model_file.save_model(tmp_path / "model.safetensors", dense_network.DenseNetwork(), {})
    point = load_dense_detector(tmp_path / "model.safetensors").point
    assert point.threshold == 0.5
    np.testing.assert_allclose(point.probability(np.array([0.2, 0.7])), [0.2, 0.7])


def test_false_alarms_are_detections_that_no_new_blob_explains() -> None:
    images = pd.DataFrame(
        {
            "frame": ["a", "b", "c"],
            "mjd": [1.0, 2, 3],
            "shift_x_px": [0.3, 0, 0.3],
            "noise_frac": 0.01,
        }
    )
    images["shift_y_px"] = [-0.4, 0.1, 0.3]
    columns = ["frame", "score", "status", "is_blob"]
    rows = [("a", 0.6, "new", 0), ("a", 0.7, "new", 0), ("b", 0.59, "new", 0), ("b", 0.9, "dip", 0)]
    rows += [("c", 0.8, "new", 0), ("c", 0.9, "new", 1)]
    blobs = pd.DataFrame({"first_frame": ["", "c"]})
    table = detect.count_alarms(images, blobs, pd.DataFrame(rows, columns=columns), 0.6)
    assert table["false_alarms"].tolist() == [2, 0, 1]
    assert table["kind"].tolist() == ["quiet", "quiet", "historical"]
    assert table["shift_px"].to_numpy() == pytest.approx([0.5, 0.1, math.hypot(0.3, 0.3)])
    assert detect.summarise(table, OperatingPoint(0.6, 1.0, 0.0, 1.234)) == {
        **{"threshold": 0.6, "held_out_frames": 1.23, "n_quiet": 2, "n_shifted": 1},
        **{"false_alarms_per_100_quiet": 100.0, "false_alarms_per_100_shifted": 200.0},
    }
    assert (
        detect.summarise(table[1:2], OperatingPoint(0.6, 1.0, 0.0, 1.0))[
            "false_alarms_per_100_shifted"
        ]
        is None
    )


def test_a_detection_names_a_blob_within_six_pixels_or_its_radius() -> None:
    blobs = pd.DataFrame({"x_px": [50.0, 50.0], "y_px": [80.0, 80.0], "radius_px": [2.0, 10.0]})
    found = pd.DataFrame({"x_px": [53.6, 53.7, 42.0, 41.9], "y_px": [84.8, 84.9, 86.0, 86.0]})
    assert near_blobs(found, blobs).tolist() == [
        [True, True],
        [False, True],
        [False, True],
        [False, False],
    ]


def test_a_blob_has_landed_on_the_image_that_shows_it_first() -> None:
    blobs = pd.DataFrame({"first_frame": ["", "b", "of another campaign", "a"]})
    assert held_out.first_image_index(QUIET, blobs).tolist() == [-1, 1, -1, 0]


@pytest.mark.parametrize(
    ("x", "y"), [(0.3, 1.6), (88.7, 0.2), (1.1, 68.8), (89.4, 69.0), (19.6, 20.4), (50.0, 30.0)]
)
def test_a_blob_is_superimposed_as_far_as_the_image_reaches(x: float, y: float) -> None:
    image = np.ones((70, 90), np.float32)
    larger = np.ones((150, 170), np.float32)
    for each, margin in ((image, 0), (larger, 40)):
        add_blob(
            each, shape="ring", x_px=x + margin, y_px=y + margin, radius_px=6.0, depth_frac=0.2
        )
    np.testing.assert_allclose(image, larger[40:-40, 40:-40], atol=1e-7)
    assert image.max() > 1.15


def _with_disc(x: int = 40, y: int = 40, side: int = 128) -> np.ndarray:
    image = np.random.default_rng(1).normal(0, 0.01, (side, side)).astype(np.float32)
    image[y - 20 : y + 21, x - 20 : x + 21] += 0.1 * blob_profile("disc", 5.0)
    return image


def test_peaks_low_on_the_map_are_worth_a_fit_only_where_the_filter_sees_something() -> None:
    filtered = filter_image(_with_disc(), 0.01)
    x = np.array([100.0, 90, 80, 44])
    y = np.array([110.0, 80, 40, 36])
    peaks = Peaks(x, y, np.array([0.9, 0.2, 0.19, 0.06]))
    assert worth_fitting(peaks, filtered, None).score.tolist() == [0.9, 0.2, 0.06]
    assert worth_fitting(peaks, filtered, 0.02).score.tolist() == [0.9, 0.2, 0.06]


@pytest.mark.parametrize("unseen", [0.02, None])
def test_what_only_the_filter_sees_is_fitted_where_something_is_learnt(
    unseen: float | None,
) -> None:
    image = _with_disc()
    filtered = filter_image(image, 0.01)
    far = Peaks(np.array([100.0]), np.array([110.0]), np.array([0.9]))
    nothing = Peaks(*np.zeros((3, 0)))
    for peaks, there in ((far, [0.9]), (nothing, [])):
        worth = worth_fitting(peaks, filtered, unseen)
        assert worth.score.tolist() == there + ([] if unseen is None else [unseen])
    found = fit_peaks(worth_fitting(nothing, filtered, 0.02), image, 0.01, WHITE, filtered)
    assert np.hypot(found["x_px"] - 40, found["y_px"] - 40).max() < 0.5
    assert found["snr"][0] > 30


def test_a_strip_that_is_noisier_on_the_scale_of_blobs_lowers_the_snr_there() -> None:
    image = _with_disc()
    alone = fit_peaks(
        worth_fitting(Peaks(*np.zeros((3, 0))), filter_image(image, 0.01), 0.02), image, 0.01
    )
    strips = FilteredImage(
        np.zeros((64, 64), np.float32), np.ones(64), np.where(abs(np.arange(64) - 20) < 2, 1.5, 1.2)
    )
    peak = Peaks(np.array([40.0]), np.array([40.0]), np.array([0.9]))
    found = fit_peaks(peak, image, 0.01, WHITE, strips)
    assert found["snr"][0] == pytest.approx(alone["snr"][0] / 1.5, rel=1e-3)
    for error in ("x_err_px", "y_err_px", "radius_err_px", "depth_err_frac"):
        assert found[error][0] == pytest.approx(1.5 * alone[error][0], rel=1e-3)
    assert found["depth_frac"][0] == pytest.approx(alone["depth_frac"][0], rel=1e-3)


def test_probabilities_are_those_of_the_real_rate() -> None:
    """Logits of two normal distributions, a blob to twenty frames, ten false peaks to each: what Bayes' rule says."""
    rng = np.random.default_rng(2)
    true, false = (1 / (1 + np.exp(-rng.normal(mean, 1, n))) for mean, n in ((3, 4000), (-1, 4000)))
    slope, offset = thresholds.calibrate(true, false, 400.0, 0.05)
    z = np.array([0.0, 2.0, 4.0])
    right = 1 / (1 + 10 / 0.05 * np.exp(((z - 3) ** 2 - (z + 1) ** 2) / 2))
    np.testing.assert_allclose(1 / (1 + np.exp(-slope * z - offset)), right, atol=0.06)


POINT = {
    "threshold": 0.6,
    "slope": 2.0,
    "offset": -1.0,
    "frames": 10.0,
    "weights": [0.5] * N_WEIGHTS,
}


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"threshold": math.nan}, "threshold: found 'nan', expected a number from 0.05 to 1"),
        ({"threshold": 1.5}, "threshold: found '1.5'"),
        ({"threshold": "0.5"}, "threshold: found '0.5'"),
        ({"slope": math.inf}, "slope: found 'inf'"),
        ({"offset": -1e308}, "offset: found '-1e\\+308'"),
        ({"frames": None}, "frames: found 'None'"),
        ({"frames": True}, "frames: found 'True'"),
        ({"weights": [math.nan] * N_WEIGHTS}, r"weights\[0\]: found 'nan'"),
        (
            {"weights": [1.0] * 3},
            r"weights: found \[1.0, 1.0, 1.0\], expected a list of 87 numbers",
        ),
        ({"weights": "many"}, "weights: found many"),
        ({"colour": 1.0}, "found {.*, expected threshold, slope, offset, frames, weights"),
        (None, "found None, expected threshold"),
        ([], r"found \[\], expected threshold"),
    ],
)
def test_an_operating_point_that_is_none_is_refused(
    tmp_path: Path, change: object, found: str
) -> None:
    path = tmp_path / "m.safetensors"
    network = dense_network.new_dense_network(1)
    model_file.save_model(path, network, {"operating_point": POINT})
    assert load_dense_detector(path).point == OperatingPoint(
        0.6, 2.0, -1.0, 10.0, (0.5,) * N_WEIGHTS
    )
    point = {**POINT, **change} if isinstance(change, dict) else change
    model_file.save_model(path, network, {"operating_point": point})
    with pytest.raises(
        ModelError, match=f"m.safetensors: the operating point is invalid \\({found}"
    ):
        load_dense_detector(path)


@pytest.fixture
def two_days(tmp_path: Path) -> list[Path]:
    """The same new blob on two differences, and on the first something that is gone the next day."""
    rng = np.random.default_rng(3)
    paths = []
    for day in range(2):
        image = rng.normal(0, 0.01, (1024, 1024)).astype(np.float32)
        bad = rng.random(image.shape) < 0.01
        image[bad] += rng.choice([-0.1, 0.1], int(bad.sum()))
        image[280:321, 480:521] += 0.04 * blob_profile("disc", 5.0, 0.3, -0.2, 41)
        if day == 0:
            image[680:721, 180:221] += 0.04 * blob_profile("disc", 5.0, 0.0, 0.0, 41)
        paths.append(tmp_path / f"day{day}.fits")
        fits_images.write_image(paths[-1], image, name="DIFFERENCE")
    return paths


def test_a_scan_measures_and_says_what_is_seen_again(
    two_days: list[Path], dense_model: Path, tmp_path: Path
) -> None:
    argv = [
        "scan",
        *map(str, two_days),
        "--difference",
        "--model",
        str(dense_model),
        "--out",
        str(tmp_path / "out"),
    ]
    assert cli.main(argv) == 0
    table = pd.read_csv(tmp_path / "out/detections.csv")
    assert set(DETECTION_COLUMNS) <= set(table)
    stays, goes = (
        table[np.hypot(table["x_px"] - x, table["y_px"] - y) < 2]
        for x, y in ((500.3, 299.8), (200, 700))
    )
    assert list(stays["status"]) == ["seen_again", "new"]
    assert list(goes["status"]) == ["new"]
    np.testing.assert_allclose(stays["depth_frac"], 0.04, rtol=0.15)
    assert stays["probability"].between(0, 1).all()
    subframes = pd.read_csv(tmp_path / "out/subframes.csv")
    assert len(subframes) == 32
    row = subframes.query("frame == 'day0' and x0_px == 256 and y0_px == 256").iloc[0]
    assert row["is_blob"] == 1
    assert row["probability"] == pytest.approx(stays["probability"].iloc[0], rel=1e-6)
    assert len(list((tmp_path / "out").glob("day0_x*y*.png"))) >= 2


def test_two_versions_of_one_exposure_do_not_confirm_each_other(
    two_days: list[Path], dense_model: Path, tmp_path: Path
) -> None:
    for path, mjd in zip(two_days, (60000.25, 60000.25001), strict=True):
        plane = fits_images.read_frame(path).data
        fits_images.write_image(
            path, plane, name="DIFFERENCE", header={"EXPSTART": mjd, "ROOTNAME": "iabc01q"}
        )
    argv = [
        "scan",
        *map(str, two_days),
        "--difference",
        "--model",
        str(dense_model),
        "--out",
        str(tmp_path / "out"),
    ]
    assert cli.main(argv) == 0
    table = pd.read_csv(tmp_path / "out/detections.csv")
    there = table[np.hypot(table["x_px"] - 500.3, table["y_px"] - 299.8) < 2]
    assert list(there["status"]) == ["new", "new"]


@pytest.mark.parametrize(
    "factor", [40.0, *(pytest.param(f, marks=pytest.mark.long) for f in (1 / 40, 1e-10))]
)
def test_an_image_of_another_noise_than_its_stack_is_rejected(
    two_days: list[Path], dense_model: Path, tmp_path: Path, factor: float
) -> None:
    rng = np.random.default_rng(5)
    stack = rng.normal(0, 0.01, (1024, 1024)).astype(np.float32)
    fits_images.write_images(tmp_path / "stack.fits", {"STACK": stack})
    scatter = np.full((512, 512), 0.01, np.float32) + rng.normal(0, 1e-4, (512, 512)).astype(
        np.float32
    )
    for number, path in enumerate(two_days):
        plane = fits_images.read_frame(path).data * np.float32(factor if number == 0 else 1)
        noise = 0.01 * (factor if number == 0 else 1)
        fits_images.write_images(path, {"DIFFERENCE": plane, "SCATTER": scatter}, sigma=noise)
    for way in (["--difference"], ["--reference", str(tmp_path / "stack.fits")]):
        argv = [
            "scan",
            *map(str, two_days),
            *way,
            "--model",
            str(dense_model),
            "--out",
            str(tmp_path / "out"),
        ]
        assert cli.main(argv) == 1
        table = pd.read_csv(tmp_path / "out/frames.csv")
        assert list(table["status"]) == ["rejected", "ok"]
        assert "day0.fits: noise " in table["reason"][0]


def test_a_known_blob_is_known(two_days: list[Path], dense_model: Path, tmp_path: Path) -> None:
    catalogue = tmp_path / "blobs.csv"
    pd.DataFrame({"x_px": [500.0], "y_px": [300.0], "radius_px": [5.0]}).to_csv(
        catalogue, index=False
    )
    argv = [
        "scan",
        str(two_days[0]),
        "--difference",
        "--model",
        str(dense_model),
        "--catalogue",
        str(catalogue),
    ]
    assert cli.main([*argv, "--out", str(tmp_path / "out")]) == 0
    table = pd.read_csv(tmp_path / "out/detections.csv")
    near = np.hypot(table["x_px"] - 500, table["y_px"] - 300) < 2
    assert list(table["status"][near]) == ["known"]


@pytest.mark.parametrize("level", [-0.05, 0.0])
def test_what_is_bad_in_the_stack_is_no_blob(
    two_days: list[Path], dense_model: Path, tmp_path: Path, level: float
) -> None:
    """A cluster that reads high in the stack, and less so today, is like a blob; where the stack is clean, it is one."""
    stack = np.random.default_rng(4).normal(0, 0.002, (1024, 1024)).astype(np.float32)
    rows, columns = np.mgrid[:1024, :1024]
    stack[np.hypot(columns - 200, rows - 700) < 5] += level
    fits_images.write_image(tmp_path / "stack.fits", stack, name="STACK")
    argv = [
        "scan",
        str(two_days[0]),
        "--reference",
        str(tmp_path / "stack.fits"),
        "--model",
        str(dense_model),
    ]
    assert cli.main([*argv, "--out", str(tmp_path / "out")]) == 0
    table = pd.read_csv(tmp_path / "out/detections.csv")
    blob, cluster = (
        table[np.hypot(table["x_px"] - x, table["y_px"] - y) < 3]
        for x, y in ((500, 300), (200, 700))
    )
    assert list(blob["status"]) == ["new"]
    assert list(cluster["status"]) == (["new"] if level == 0 else ["bad_pixels"])
