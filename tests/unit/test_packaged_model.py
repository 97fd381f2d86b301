"""The model that comes with the package: small, told where it comes from, and of use."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import blobpipe
from blobpipe.core import files
from blobpipe.core.blob_shapes import SHAPES, blob_profile
from blobpipe.detection.detectors import load_dense_detector
from blobpipe.detection.search import find_blobs
from blobpipe.networks import model_file
from blobpipe.params import Params
from blobpipe.validation import regression

ROOT = Path(__file__).parents[2]
MODEL = Path(blobpipe.__file__).with_name("model.safetensors")


def difference(seed: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Noise, bad pixels, a streak, and on it away from all that six blobs of S/N 18 to 30."""
    rng = np.random.default_rng(seed)
    image = rng.normal(0, 0.0101, (1024, 1024)).astype(np.float32)
    bad = rng.random(image.shape) < 0.01
    image[bad] += rng.choice([-0.1, 0.1], int(bad.sum()))
    image[500:503, 300:520] += 0.03
    places = [(150, 200), (420, 180), (760, 220), (180, 800), (500, 760), (820, 850)]
    for k, (x, y) in enumerate(places):
        stamp = blob_profile(SHAPES[k % 3], 5.0 + k % 2, 0.2, -0.3, 41)
        image[y - 20 : y + 21, x - 20 : x + 21] += np.float32(0.03) * stamp
    return image, places


def test_it_is_small_and_says_where_it_comes_from() -> None:
    assert MODEL.stat().st_size < 2_000_000
    _, about = model_file.load_dense(MODEL)
    assert about["params"] == json.loads(json.dumps(model_file.recorded(Params().dense)))
    assert about["operating_point"]["frames"] > 20
    assert len(about["data_sha256"]) == 64


def test_it_is_that_of_the_last_default_run() -> None:
    """Its threshold is in the metrics that git has; a run that gives another says so here, and gives a new model."""
    point = load_dense_detector(MODEL).point
    assert (
        point.threshold
        == json.loads((ROOT / "results/detect/metrics.json").read_text())["threshold"]
    )


def test_its_numbers_lie_beside_it() -> None:
    """They are regression's metrics of this very file, and they have passed."""
    numbers = json.loads(MODEL.with_suffix(".json").read_text(encoding="utf-8"))
    assert numbers["dense_sha256"] == files.sha256(MODEL)
    assert numbers["dense_threshold"] == pytest.approx(
        load_dense_detector(MODEL).threshold, abs=1e-5
    )
    assert regression.failed_thresholds(numbers, Params().regression) == []


def test_the_model_page_shows_them_whatever_was_run() -> None:
    page = (ROOT / "docs/model.md").read_text(encoding="utf-8")
    assert "{measured}`model dense_recall_snr_gt_7`" in page
    assert "{measured}`regression" not in page


def test_it_finds_clear_blobs_and_keeps_its_budget() -> None:
    """On six images 0.3 false alarms are expected; two would be one chance in thirty."""
    detector = load_dense_detector(MODEL)
    n_false = 0
    for seed in range(1, 7):
        image, places = difference(seed)
        found = find_blobs(image, None, detector)
        new = found[(found["status"] == "new") & (found["score"] >= detector.threshold)]
        distance = np.hypot(
            new["x_px"].to_numpy()[:, None] - [x for x, _ in places],
            new["y_px"].to_numpy()[:, None] - [y for _, y in places],
        )
        assert (distance.min(axis=0) < 2).all()
        n_false += (distance.min(axis=1) >= 2).sum()
    assert n_false <= 1
