"""The scan with bad pixels and with a threshold that was set on quiet images."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from astropy.io import fits
from tests.unit.monitor import masked
from tests.unit.monitor.masked import CLUSTER, NEW

import blobpipe
from blobpipe import cli
from blobpipe.core import files
from blobpipe.core.blob_shapes import blob_profile
from blobpipe.detection.promise import PromisedPoint, read_promised_point, write_promised_point
from blobpipe.errors import FrameError, ModelError
from blobpipe.images import bad_pixels
from blobpipe.monitor import pictures
from blobpipe.monitor.scan import ScanTables, scan
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


def test_each_new_detection_is_drawn_with_its_own_radius(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    circles: list[tuple[float, float, float]] = []
    draw = pictures.draw_detection

    def listen(path: Path, *args: Any, **chosen: Any) -> None:
        _, _, (x0, y0), (x, y), _ = args
        circles.append((x0 + x, y0 + y, chosen["radius_px"]))
        draw(path, *args, **chosen)

    monkeypatch.setattr(pictures, "draw_detection", listen)
    scan([folder / "day.fits"], tmp_path, MODEL, Params(), reference=folder / "stack.fits")
    new = pd.read_csv(tmp_path / "detections.csv").query("status == 'new'")
    assert len(circles) == len(new) > 0
    assert np.array(circles) == pytest.approx(new[["x_px", "y_px", "radius_px"]], abs=0.01)
    drawn = {f"day_x{round(x)}y{round(y)}.png" for x, y, _ in circles}
    assert {path.name for path in tmp_path.glob("*.png")} == drawn


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


# --- other files than expected ---------------------------------------------------------------------------------------


def test_a_difference_of_the_pipeline_is_no_image_to_subtract_from(
    folder: Path, tmp_path: Path
) -> None:
    image, header = fits.getdata(folder / "day.fits", header=True)
    header["NSTACK"] = 30
    made = fits.ImageHDU(image, header, name="DIFFERENCE")
    fits.HDUList([fits.PrimaryHDU(), made]).writeto(tmp_path / "made.fits")
    out = tmp_path / "out"
    assert scan([tmp_path / "made.fits"], out, MODEL, Params(), reference=folder / "stack.fits")
    [frame] = pd.read_csv(out / "frames.csv").to_dict("records")
    assert "found a difference image, expected a blob image; give --difference" in frame["reason"]


def test_an_image_is_not_subtracted_from_itself(folder: Path, tmp_path: Path) -> None:
    image = folder / "day.fits"
    assert scan([image], tmp_path, MODEL, Params(), reference=image) == 1
    [reason] = pd.read_csv(tmp_path / "frames.csv")["reason"]
    assert "found the pixels of the stack that is subtracted" in reason


def test_a_mistyped_name_leaves_the_tables_of_the_last_scan(folder: Path, tmp_path: Path) -> None:
    scan([folder / "day.fits"], tmp_path, MODEL, Params(), difference=True)
    before = (tmp_path / "frames.csv").read_bytes()
    with pytest.raises(FrameError, match=r"dax.fits: not found, expected a FITS image; correct"):
        scan([folder / "dax.fits"], tmp_path, MODEL, Params(), difference=True)
    assert (tmp_path / "frames.csv").read_bytes() == before


def test_a_folder_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(FrameError, match=r"a folder, expected images; name its files"):
        scan([tmp_path], tmp_path / "out", MODEL, Params(), reference=tmp_path / "no_stack.fits")


def test_an_image_full_of_blobs_is_said_to_be_no_difference(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    grid = range(45, 500, 85)
    blobs = [(x, y, 6.0, 0.05) for x in grid for y in grid]
    images = [
        write_difference(tmp_path / "in" / "full.fits", 1, *blobs),
        write_difference(tmp_path / "in" / "usual.fits", 2, *blobs[:6]),
    ]
    scan(images, tmp_path / "out", MODEL, Params(), difference=True)
    said = [each for each in caplog.messages if "leave out --difference" in each]
    assert len(said) == 1
    assert "full.fits" in said[0]


@pytest.mark.parametrize("name", ["n" * 245, "\u00e9" * 120])
def test_an_image_of_a_long_name_is_rejected_and_the_others_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    blob = (200, 300, 6.0, 0.05)
    named = [
        write_difference(tmp_path / "in" / f"{each}.fits", day, blob)
        for day, each in enumerate([name, "n" * 200])
    ]
    assert scan(named, tmp_path / "out", MODEL, Params(), difference=True) == 1
    assert [line for line in caplog.messages if "rejected" in line] == [
        f"blobpipe: {named[0]}: found a name of {len(name.encode())} bytes, expected at most 200; rename the file (rejected)"
    ]
    frames = pd.read_csv(tmp_path / "out" / "frames.csv")
    assert frames["status"].tolist() == ["rejected", "ok"]
    drawn = [path.name for path in (tmp_path / "out").glob("*.png")]
    assert drawn == [f"{'n' * 200}_x200y300.png"]


# --- calibrate -------------------------------------------------------------------------------------------------------


def write_difference(path: Path, day: int, *blobs: masked.Blob) -> Path:
    """A small difference image of a day: noise, and blobs."""
    path.parent.mkdir(exist_ok=True)
    image = np.random.default_rng([41, day]).normal(0, 0.0076, (512, 512)).astype(np.float32)
    for x, y, radius, depth in blobs:
        image[y - 20 : y + 21, x - 20 : x + 21] += depth * blob_profile("disc", radius, 0.0, 0.0)
    header = fits.Header({"EXPSTART": 60000.0 + day, "FILTER": "F153M"})
    fits.PrimaryHDU(image, header).writeto(path)
    return path


# A false peak of one day, and a blob that nobody has named
ODD: masked.Blob = (200, 300, 6.0, 0.05)
UNNAMED: masked.Blob = (380, 120, 6.0, 0.05)


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of five quiet differences, one of which has an odd place, and another file."""
    root = tmp_path_factory.mktemp("quiet")
    for day in range(5):
        write_difference(root / "in" / f"day{day}.fits", day, *([ODD] if day == 2 else []))
    (root / "in" / "notes.txt").write_text("quiet")
    return root


def calibrated(quiet: Path, out: Path, *more: str) -> PromisedPoint:
    """Run the command; return what it has written."""
    words = ["calibrate", str(quiet / "in"), "--difference", "--model", str(MODEL)]
    assert cli.main([*words, "--out", str(out), "--confidence", "0.9", *more]) == 0
    return read_promised_point(out)


def test_calibrate_excludes_all_false_peaks_of_few_images_and_says_so(
    quiet: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "blobpipe")
    point = calibrated(quiet, tmp_path / "a.yaml")
    assert (
        "5 images promise at most 46.06 false alarms per 100 with confidence 0.9; 47 are needed for 5"
    ) in caplog.text
    assert (point.n_images, point.n_alarms, point.confidence) == (5, 0, 0.9)
    assert (point.subtracted, point.bad_pixels_sha256) == ("difference", "")
    assert (point.first_date, point.last_date) == ("2023-02-25", "2023-03-01")
    assert point.model_sha256 == files.sha256(MODEL)

    # The same images give the same bytes, and with this threshold no detection
    calibrated(quiet, tmp_path / "b.yaml")
    assert (tmp_path / "a.yaml").read_bytes() == (tmp_path / "b.yaml").read_bytes()
    images = sorted((quiet / "in").glob("*.fits"))
    chosen = {"difference": True, "operating_point": tmp_path / "a.yaml"}
    assert scan(images, tmp_path / "scan", MODEL, Params(), **chosen) == 0  # type: ignore[arg-type]
    assert pd.read_csv(tmp_path / "scan" / "detections.csv").empty
    frames = pd.read_csv(tmp_path / "scan" / "frames.csv")
    assert set(frames["operating_point_sha256"]) == {files.sha256(tmp_path / "a.yaml")}
    assert f"operating point: {tmp_path / 'a.yaml'}, threshold {point.threshold:.6g}" in caplog.text


def test_a_generous_budget_lets_the_odd_place_pass(quiet: Path, tmp_path: Path) -> None:
    strict = calibrated(quiet, tmp_path / "a.yaml", "--budget", "50")
    generous = calibrated(quiet, tmp_path / "b.yaml", "--budget", "100")
    assert (strict.n_alarms, generous.n_alarms) == (0, 1)
    assert generous.threshold < strict.threshold
    assert generous.false_alarms_per_100_images == pytest.approx(77.8, abs=0.01)
    images = sorted((quiet / "in").glob("*.fits"))
    chosen = {"difference": True, "operating_point": tmp_path / "b.yaml"}
    scan(images, tmp_path / "scan", MODEL, Params(), **chosen)  # type: ignore[arg-type]
    assert new_near(tmp_path / "scan", ODD) == 1


def test_known_blobs_are_left_out_and_unnamed_ones_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for day in range(4):
        write_difference(tmp_path / "in" / f"day{day}.fits", day, UNNAMED)
    point = calibrated(tmp_path, tmp_path / "a.yaml")
    assert "x 380, y 120: a false peak on 4 images; a blob belongs in --catalogue" in caplog.text
    caplog.clear()
    (tmp_path / "blobs.csv").write_text("blob,x_px,y_px,radius_px\nb1,380,120,6\n")
    named = calibrated(tmp_path, tmp_path / "b.yaml", "--catalogue", str(tmp_path / "blobs.csv"))
    assert named.threshold < point.threshold
    assert "a false peak on" not in caplog.text


def test_bad_images_and_second_versions_of_an_exposure_do_not_count(
    quiet: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(quiet / "in", tmp_path / "in")
    (tmp_path / "in" / "torn.fits").write_bytes(b"SIMPLE  =")
    with fits.open(tmp_path / "in" / "day0.fits") as hdus:
        hdus[0].header["EXPSTART"] = hdus[0].header["MJD-OBS"] = 60000.5
        for name in ("a.fits", "b.fits"):
            hdus[0].header["ROOTNAME"] = "same"
            hdus.writeto(tmp_path / "in" / name)
    assert calibrated(tmp_path, tmp_path / "a.yaml").n_images == 6
    assert "torn.fits" in caplog.text
    assert "b.fits: another version of an exposure (left out)" in caplog.text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "calibrate: expected images or folders of them, or --log LOG"),
        (["in", "--log", "log.sqlite"], "calibrate: expected images or folders of them, or --log"),
        (["--log", "log.sqlite", "--difference"], "calibrate: found --log with --difference"),
        (["--log", "log.sqlite"], "log.sqlite: not found, expected the log of"),
        (["empty", "--difference"], "empty: found no image, expected .fits.fz"),
        (["in"], "data/difference/reference.fits.fz: not found; name a median stack"),
        (["in/notes.txt", "--difference"], "found no quiet image, expected some"),
    ],
)
def test_calibrate_refuses_in_one_line(
    quiet: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").symlink_to(quiet / "in")
    (tmp_path / "empty").mkdir()
    assert cli.main(["calibrate", *words, "--model", str(MODEL)]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"blobpipe: {message}")
    assert not (tmp_path / "operating_point.yaml").exists()


def test_budget_and_confidence_have_bounds(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--budget", "0"], ["--budget", "nan"], ["--confidence", "1"]):
        with pytest.raises(SystemExit):
            cli.main(["calibrate", "in", *words])
        assert f"found {words[1]}, expected a number" in capsys.readouterr().err


def test_a_point_of_another_model_or_for_the_reports_network_stops_the_scan(
    quiet: Path, tmp_path: Path, dense_model: Path, model: Path
) -> None:
    calibrated(quiet, tmp_path / "a.yaml")
    images = [quiet / "in" / "day0.fits"]
    chosen = {"difference": True, "operating_point": tmp_path / "a.yaml"}
    for other, message in (
        (dense_model, "a.yaml: found the operating point of the model"),
        (model, "a.yaml: found an operating point for the report's network"),
    ):
        with pytest.raises(ModelError, match=message):
            scan(images, tmp_path / "o", other, Params(), **chosen)  # type: ignore[arg-type]
    assert not (tmp_path / "o").exists()
    assert cli.main(["calibrate", str(images[0]), "--difference", "--model", str(model)]) == 1


def test_another_mask_is_said(
    quiet: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calibrated(quiet, tmp_path / "a.yaml")
    write_promised_point(
        tmp_path / "b.yaml",
        replace(read_promised_point(tmp_path / "a.yaml"), bad_pixels_sha256="b" * 64),
    )
    for name, is_said in (("a", False), ("b", True)):
        caplog.clear()
        chosen = {"difference": True, "operating_point": tmp_path / f"{name}.yaml"}
        scan([quiet / "in" / "day0.fits"], tmp_path / "o", MODEL, Params(), **chosen)  # type: ignore[arg-type]
        assert ("set with other bad pixels than these" in caplog.text) == is_said


def test_the_last_line_counts_what_was_found() -> None:
    found = ScanTables("a" * 64, bad_pixels.BadPixels())
    assert found.count() == "0 new"
    assert found.made() == "tables"
    found.detections += [{"status": status} for status in ("bad_pixels", "new", "bad_pixels")]
    assert found.count() == "1 new, 2 on bad pixels"
    assert found.made() == "tables and pictures"
    found.detections.append({"status": "seen_again"})
    assert found.count() == "1 new, 1 new and seen again, 2 on bad pixels"
