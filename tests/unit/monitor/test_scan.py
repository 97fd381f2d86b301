"""The scan with bad pixels: clusters that look like blobs are gone, blobs that they touch are found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tests.unit.monitor import masked
from tests.unit.monitor.masked import CLUSTER, NEW

import blobpipe
from blobpipe import cli
from blobpipe.core import files
from blobpipe.monitor.scan import scan
from blobpipe.params import BadPixels, Params

MODEL = Path(blobpipe.__file__).with_name("model.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stack, an image with a new blob and a cluster, and a mask of the cluster and of half of the blob."""
    root = tmp_path_factory.mktemp("masked")
    masked.write_stack(root / "stack.fits")
    masked.write(root / "day.fits", 1, NEW, CLUSTER)
    cluster = masked.around(*CLUSTER[:2], 9)
    half = masked.around(*NEW[:2], 20)
    half[:, NEW[0] - 5 :] = False
    masked.write_mask(root / "cluster.fits", cluster)
    masked.write_mask(root / "half.fits", half)
    dq = np.zeros((1024, 1024), int)
    dq[5:-5, 5:-5] = np.where(cluster, 32, 0) | np.where(masked.around(*NEW[:2], 9), 512, 0)
    masked.write(root / "flagged.fits", 1, NEW, CLUSTER, dq=dq)
    return root


def new_near(out: Path, blob: masked.Blob) -> int:
    """Number of new detections within 3 px of a blob."""
    found = pd.read_csv(out / "detections.csv").query("status == 'new'")
    return int((np.hypot(found["x_px"] - blob[0], found["y_px"] - blob[1]) < 3).sum())


def test_without_a_mask_the_cluster_is_a_false_alarm(folder: Path, tmp_path: Path) -> None:
    scan([folder / "day.fits"], tmp_path, MODEL, Params(), reference=folder / "stack.fits")
    assert (new_near(tmp_path, NEW), new_near(tmp_path, CLUSTER)) == (1, 1)
    frames = pd.read_csv(tmp_path / "frames.csv", keep_default_na=False)
    assert frames[["n_bad_px", "bad_pixels_sha256"]].to_numpy().tolist() == [[0, ""]]


@pytest.mark.parametrize("where", ["option", "settings", "both"])
def test_with_a_mask_it_is_none_and_a_blob_half_covered_is_found(
    folder: Path, tmp_path: Path, where: str
) -> None:
    named = [folder / "cluster.fits", folder / "half.fits"]
    in_settings = {"option": [], "settings": named, "both": named[:1]}[where]
    given = {"option": named, "settings": [], "both": named[1:]}[where]
    params = Params(bad_pixels=BadPixels(files=tuple(map(str, in_settings))))
    reference = folder / "stack.fits"
    done = scan(
        [folder / "day.fits"], tmp_path, MODEL, params, reference=reference, bad_pixels=given
    )
    assert done == 0
    assert (new_near(tmp_path, NEW), new_near(tmp_path, CLUSTER)) == (1, 0)
    [frame] = pd.read_csv(tmp_path / "frames.csv").to_dict("records")
    n_bad = (
        masked.around(*CLUSTER[:2], 9).sum() + masked.around(*NEW[:2], 20)[:, : NEW[0] - 5].sum()
    )
    assert frame["n_bad_px"] == n_bad
    assert frame["bad_pixels_sha256"] == " ".join(map(files.sha256, named))
    # known blobs are known as before
    found = pd.read_csv(tmp_path / "detections.csv")
    assert set(found["status"]) <= {"new", "known"}


def test_the_images_own_flags_count_but_not_those_of_known_blobs(
    folder: Path, tmp_path: Path
) -> None:
    reference = folder / "stack.fits"
    scan([folder / "flagged.fits"], tmp_path / "a", MODEL, Params(), reference=reference)
    assert (new_near(tmp_path / "a", NEW), new_near(tmp_path / "a", CLUSTER)) == (1, 0)
    other = Params(bad_pixels=BadPixels(dq_flags=512))
    scan([folder / "flagged.fits"], tmp_path / "b", MODEL, other, reference=reference)
    assert (new_near(tmp_path / "b", NEW), new_near(tmp_path / "b", CLUSTER)) == (0, 1)


def test_a_mask_that_cannot_be_read_stops_the_scan_first(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mask.txt").write_text("3 4\n")
    words = ["scan", str(folder / "day.fits"), "--reference", str(folder / "stack.fits")]
    assert cli.main([*words, "--out", "o", "--bad-pixels", "mask.txt"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("blobpipe: mask.txt: 4 bytes that are not a whole FITS file")
    assert not (tmp_path / "o").exists()
