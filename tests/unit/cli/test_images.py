"""Commands for images."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from tests.unit.cli.calls import PARAMS, Calls

import blobpipe
from blobpipe import cli
from blobpipe.params import Params


def test_check_answers_for_every_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = np.random.default_rng(1).normal(0, 0.01, (300, 300)).astype(np.float32)
    fits.PrimaryHDU(image).writeto(folder / "good.fits")
    (folder / "bad.fits").write_bytes(b"")
    assert cli.main(["check", "good.fits"]) == 0
    assert cli.main(["check", "bad.fits", "good.fits", "none.fits"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "good.fits",
        "bad.fits",
        "good.fits",
        "none.fits",
    ]
    assert ["not usable" in line for line in lines] == [False, True, False, True]


def test_check_says_how_to_name_the_files_of_a_folder(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "inbox").mkdir()
    assert cli.main(["check", "inbox"]) == 1
    assert capsys.readouterr().out == (
        "inbox: not usable: a folder, expected a FITS image; name its files: inbox/*.fits*\n"
    )


def test_flatten_refuses_a_long_name_and_goes_on(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "n" * 245
    assert cli.main(["flatten", f"{long}.fits", "none.fits", "--out", "o"]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first == (
        f"blobpipe: {long}.fits: found a name of 245 bytes, expected at most 200; rename the file"
    )
    assert second.startswith("blobpipe: none.fits: ")


@pytest.mark.parametrize("own", [True, False])
def test_scan_needs_no_settings_but_takes_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch, own: bool
) -> None:
    calls: Calls = []
    scan = importlib.import_module("blobpipe.monitor.scan")
    monkeypatch.setattr(
        scan, "scan", lambda *args, **settings: calls.append(("", args, settings)) or 0
    )
    if not own:
        (folder / "params.yaml").unlink()
    assert cli.main(["scan", "a.fits", "b.fits", "--difference", "--out", "o"]) == 0
    ((_, (paths, out, model, params), settings),) = calls
    assert paths == [Path("a.fits"), Path("b.fits")]
    assert out == Path("o")
    assert model == Path(blobpipe.__file__).with_name("model.safetensors")
    assert params == (PARAMS if own else Params())
    expected = {"difference": True, "reference": None, "catalogue": None, "bad_pixels": []}
    assert settings == {**expected, "operating_point": None}


@pytest.mark.parametrize(("n_images", "found"), [(0, "0 images"), (1, "1 image"), (3, "3 images")])
def test_detector_measure_says_that_it_has_too_little_to_measure(
    folder: Path, capsys: pytest.CaptureFixture[str], n_images: int, found: str
) -> None:
    assert cli.main(["detector", "measure", *["a.fits"] * n_images]) == 1
    assert capsys.readouterr() == (
        "",
        f"blobpipe: detector measure: found {found}, expected at least 4 for the noise, or --catalogue TABLE for the "
        "sizes; name them\n",
    )


def test_detector_measure_measures_sizes_without_images(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "known.csv").write_text("x_px,y_px,radius_px\n100,200,6\n")
    assert cli.main(["detector", "measure", "--catalogue", "known.csv"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "# difference_noise_frac: 0 images, expected 4 or more",
        "# radius_px: 95 % of 1 blobs lie between 6.0 and 6.0 px",
        "size_law: null  # 1 blobs show none; 40 with measured radii are needed",
    ]
