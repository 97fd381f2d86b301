"""An image has one list of detections and one probability per subframe, wherever it is looked up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from astropy.io import fits

import blobpipe
from blobpipe.core.blob_shapes import blob_profile
from blobpipe.detection.search import subframe_scores
from blobpipe.monitor import logbook
from blobpipe.monitor.scan import scan
from blobpipe.params import Detect, Params, Quicklook
from blobpipe.quicklook.options import Options
from blobpipe.quicklook.run import quicklook

SIDE = 512
KNOWN = ((100, 120, 6.0, 0.1), (400, 300, 5.0, 0.08), (250, 420, 7.0, 0.05))
NEW = ((180, 330, 5.0, 0.08), (420, 90, 4.0, 0.03), (60, 460, 6.0, 0.02))
SETTINGS = Params(detect=Detect(threads=1), quicklook=Quicklook(settle_s=0.0))
MODEL = Path(blobpipe.__file__).with_name("model.safetensors")
COLUMNS = ["x_px", "y_px", "radius_px", "depth_frac", "snr", "score", "status", "probability"]


def image(
    seed: int, blobs: tuple[tuple[int, int, float, float], ...], shift: float = 0.0
) -> np.ndarray:
    data = np.random.default_rng(seed).normal(0, 0.0076, (SIDE, SIDE)).astype(np.float32)
    for x, y, radius, depth in blobs:
        profile = blob_profile("disc", radius, shift, 0.0)
        data[y - 20 : y + 21, x - 20 : x + 21] += depth * profile
    return data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stack, and an image on which the mirror has moved the known blobs and new ones have landed."""
    root = tmp_path_factory.mktemp("one_search")
    stack = np.median([image(seed, KNOWN) for seed in range(8)], axis=0)
    stack[200:204, 300:303] += 0.06  # bad pixels
    fits.PrimaryHDU(stack.astype(np.float32)).writeto(root / "stack.fits")
    (root / "in").mkdir()
    header = fits.Header({"EXPSTART": 60000.0})
    data = image(9, (*KNOWN, *NEW), shift=0.8)
    fits.PrimaryHDU(data, header).writeto(root / "in" / "day.fits")
    rows = [(x, y, radius) for x, y, radius, _ in (*KNOWN, NEW[1])]
    pd.DataFrame(rows, columns=["x_px", "y_px", "radius_px"]).to_csv(
        root / "known.csv", index=False
    )
    return root


@pytest.mark.parametrize("named", [False, True])
def test_scan_quicklook_and_notebook_agree(folder: Path, tmp_path: Path, named: bool) -> None:
    catalogue = folder / "known.csv" if named else None
    reference = folder / "stack.fits"
    about = {"reference": reference, "catalogue": catalogue}
    scan([folder / "in" / "day.fits"], tmp_path / "scan", MODEL, SETTINGS, **about)
    options = Options(tmp_path / "log.sqlite", MODEL, SETTINGS, **about)
    assert quicklook(folder / "in", options) == 1

    scanned = pd.read_csv(tmp_path / "scan" / "detections.csv")
    log = logbook.connect(tmp_path / "log.sqlite")
    logged = logbook.table(log, "detections")
    detector = blobpipe.load_detector(MODEL)
    logged = logged[logged["score"] >= detector.threshold]
    assert {"new", "bad_pixels"} & set(scanned["status"])
    pd.testing.assert_frame_equal(
        scanned[COLUMNS], logged[COLUMNS].reset_index(drop=True), check_dtype=False, rtol=1e-6
    )
    assert (scanned["status"] == "known").any() == named

    # Subframes, and the same by hand.
    subframes = pd.read_csv(tmp_path / "scan" / "subframes.csv")["probability"].to_numpy()
    in_log = logbook.table(log, "subframes").sort_values(["row", "col"])["probability"].to_numpy()
    np.testing.assert_allclose(subframes, in_log, rtol=1e-6)
    known = None if catalogue is None else pd.read_csv(catalogue)
    template = blobpipe.read_template(reference, known)
    data = blobpipe.read_image(folder / "in" / "day.fits").data
    difference, shift = blobpipe.subtract(data, template)
    found = blobpipe.find_blobs(difference, template, detector, catalogue=known, shift_px=shift)
    scores = subframe_scores(found, difference.shape)
    np.testing.assert_allclose(detector.probability(scores), subframes, rtol=1e-6)
