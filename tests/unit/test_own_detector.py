"""An invented detector, from a folder of exposures to exported blobs, by the commands of the how-to alone."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from astropy.io import fits
from tests.exposures import DEPTH_FRAC, RADIUS_PX

from blobpipe import cli
from blobpipe.core.blob_shapes import blob_profile
from blobpipe.core.detector import read_detector
from blobpipe.images.check import UNKNOWN, unknown_entries
from blobpipe.monitor import logbook

NX, NY, BORDER = 1500, 900, 3
N_IMAGES = 7
FIRST = 5  # of the images that show the new blob
CORNERS = [(45.2, 44.7), (1454.6, 45.1), (44.9, 855.3), (1455.2, 854.8)]
KNOWN = (700.4, 300.1)


def exposure(number: int) -> fits.HDUList:
    """Return counts of an evenly lit sky, through two amplifiers side by side, with a border that sees no light."""
    rng = np.random.default_rng(number)
    # Pixels differ by what no flat has taken out
    pattern = np.random.default_rng(99).normal(1, 0.004, (NY, NX))
    light = 9000 * pattern * (1 + 0.008 * rng.standard_normal((NY, NX)))
    light *= np.linspace(0.95, 1.05, NX)
    light[:, NX // 2 :] *= 1.01
    for x, y in [KNOWN, *(CORNERS if number >= FIRST else [])]:
        column, row = round(x), round(y)
        profile = blob_profile("disc", RADIUS_PX, x - column, y - row, 41)
        light[row - 20 : row + 21, column - 20 : column + 21] *= 1 - DEPTH_FRAC * profile
    light[:BORDER] = light[-BORDER:] = 0
    light[:, :BORDER] = light[:, -BORDER:] = 0
    primary = fits.PrimaryHDU()
    primary.header.update(
        {
            "TELESCOP": "INVENTED",
            "INSTRUME": "CAMERA",
            "OBJECT": "SKY",
            "FILTER": "H",
            "GAIN": 3.1,
            "RDNOISE": 12.0,
            "DATE-OBS": f"2025-03-{number + 1:02d}T04:00:00",
        }
    )
    image = fits.ImageHDU(light.astype(np.float32), name="IMAGE")
    image.header["BUNIT"] = "adu"
    flags = np.zeros((NY, NX), np.int16)
    flags[200, 200:204] = 1
    return fits.HDUList([primary, image, fits.ImageHDU(flags, name="MASK")])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the exposures."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "sky").mkdir()
    for number in range(N_IMAGES):
        exposure(number).writeto(folder / "sky" / f"sky_{number}.fits")
    return folder


def corrected(text: str) -> str:
    """Return a draft in which a user has corrected what the example does not tell."""
    text = text.replace("amplifiers: [1, 1]", "amplifiers: [2, 1]")
    return "\n".join(line.removesuffix(UNKNOWN).rstrip() for line in text.splitlines()) + "\n"


@pytest.mark.slow
def test_from_a_folder_of_exposures_to_exported_blobs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    exposures = [f"sky/sky_{number}.fits" for number in range(N_IMAGES)]

    # 1: the draft is filled in as far as the image tells
    assert cli.main(["detector", "new", "sky/sky_0.fits", "--out", "mine.yaml"]) == 0
    draft = read_detector("mine.yaml")
    assert (draft.width_px, draft.height_px, draft.border_px) == (NX, NY, BORDER)
    assert (draft.gain_e, draft.read_noise_e) == (3.1, 12.0)
    assert draft.title == "INVENTED CAMERA"
    assert (draft.exposure.image, draft.exposure.dq) == ("IMAGE", "MASK")
    assert (draft.exposure.unit, draft.exposure.blobs) == ("counts", "negative")
    assert (draft.cards.date, draft.cards.target) == ("DATE-OBS", "OBJECT")
    assert {"amplifiers", "first_mjd", "bad_dq", "moves"} <= set(unknown_entries("mine.yaml"))
    assert cli.main(["detector", "new", "sky/sky_0.fits", "--out", "mine.yaml"]) == 1

    # 2: what is left to correct is named, and then no more
    capsys.readouterr()
    assert cli.main(["check", "--detector", "mine.yaml", "sky/sky_0.fits"]) == 1
    assert "not filled in from the example, correct them: amplifiers" in capsys.readouterr().out
    Path("mine.yaml").write_text(corrected(Path("mine.yaml").read_text()))
    assert cli.main(["check", "--detector", "mine.yaml", "sky/sky_0.fits"]) == 1
    said = capsys.readouterr().out
    assert "not told" not in said
    assert "divide it by the flat first" in said

    # 3 and 4: blob images, which can be searched, and their noise
    assert cli.main(["flatten", "--detector", "mine.yaml", *exposures, "--out", "inbox"]) == 0
    images = [f"inbox/sky_{number}_blob.fits.fz" for number in range(N_IMAGES)]
    assert cli.main(["check", "--detector", "mine.yaml", *images]) == 0
    capsys.readouterr()
    assert cli.main(["detector", "measure", "--detector", "mine.yaml", *images]) == 0
    measured = re.search(r"difference_noise_frac: ([\d.]+)", capsys.readouterr().out)
    assert measured is not None
    assert float(measured[1]) == pytest.approx(0.008 * 1.026, rel=0.1)

    # 5: the new blobs are found at all four corners, and the log knows the detector
    Path("params.yaml").write_text(settings())
    assert cli.main(["quicklook", "inbox", "--detector", "mine.yaml", "--silent"]) == 0
    connection = logbook.connect("quicklook/log.sqlite")
    assert logbook.detector_of(connection) == read_detector("mine.yaml")
    found = logbook.table(connection, "candidate_list").query("status == 'seen_again'")
    connection.close()
    for x, y in CORNERS:
        distance = np.hypot(found["x_px"] - x, found["y_px"] - y)
        assert distance.min() < 0.6
    assert len(found) == len(CORNERS)

    # Another detector's log is refused
    assert cli.main(["quicklook", "inbox", "--detector", "wfc3_ir", "--silent"]) == 1
    assert "found images of INVENTED CAMERA, expected WFC3/IR" in capsys.readouterr().err

    # Exports have the detector's layout: an image of flags, of the full frame
    catalogue = found[["x_px", "y_px", "radius_px", "depth_frac"]].assign(status="confirmed")
    pd.DataFrame(catalogue).to_csv("known.csv", index=False)
    export = ["export", "known.csv", "--detector", "mine.yaml", "--out", "handover"]
    assert cli.main(export) == 0
    assert not Path("handover/blobs_bpx.fits").exists()
    with fits.open("handover/blobs_dq.fits") as hdus:
        dq = hdus["DQ"].data
    assert dq.shape == (NY, NX)
    for x, y in CORNERS:
        assert dq[round(y), round(x)] == 1 << 14


def settings() -> str:
    """Return settings for few images."""
    from blobpipe.params import Difference, Params, Quicklook, to_yaml

    return to_yaml(Params(difference=Difference(stack_size=4), quicklook=Quicklook(settle_s=0.0)))
