"""The whole daily chain on the files of other detectors, by the commands: search, deep search, page, exports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from astropy.io import fits
from tests.exposures import DEPTH_FRAC, corners, lit, small, write_jwst

from blobpipe import cli
from blobpipe.core import fits_images, tables
from blobpipe.core.detector import Detector, read_detector
from blobpipe.monitor import logbook
from blobpipe.params import Difference, Params, Quicklook, to_yaml

# The shape of NIRCam's files, but small, so that a campaign of 24 takes seconds
NIRCAM = small("nircam_lw", width_px=648, height_px=520, exposure={"box_px": 64})
N_IMAGES = 24
FIRST = (
    15  # of the images that show the new blobs; earlier ones are the baseline of the deep search
)
FAINT_FRAC = 0.005  # S/N 4 on one image, 8 on eight

# Memory of a search (MiB). A process of 4096 x 4096 px holds image, stack and template: 64 MiB each.
MOST_MIB = 2000

pytestmark = pytest.mark.slow


def write_detector(path: Path, detector: Detector) -> None:
    """Write the file of a detector."""
    path.write_text(yaml.safe_dump(detector.model_dump(mode="json")))


def faint_places(detector: Detector) -> list[tuple[float, float]]:
    """Return a place farther from each corner than those of the clear blobs (px)."""
    middle = np.array([detector.width_px - 1, detector.height_px - 1]) / 2
    places = np.array(corners(detector))
    return [(float(x), float(y)) for x, y in places + 90 * np.sign(middle - places)]


def require_all_found(found: pd.DataFrame, places: list[tuple[float, float]], px: float) -> None:
    """Check that there is a candidate at each place."""
    for x, y in places:
        distance = np.hypot(found["x_px"] - x, found["y_px"] - y)
        assert distance.min() < px, (x, y)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of a campaign; the latest show a clear and a faint blob near each corner."""
    folder = tmp_path_factory.mktemp("nircam")
    write_detector(folder / "small.yaml", NIRCAM)
    settings = Params(difference=Difference(stack_size=15), quicklook=Quicklook(settle_s=0.0))
    (folder / "params.yaml").write_text(to_yaml(settings))
    (folder / "inbox").mkdir()
    dq = np.zeros(NIRCAM.shape, np.int64)
    dq[100, 100:103] = 1
    for number in range(N_IMAGES):
        image = lit(NIRCAM, corners(NIRCAM) if number >= FIRST else [], seed=number)
        if number >= FIRST:
            faint = lit(NIRCAM, faint_places(NIRCAM), noise_frac=0)
            without = lit(NIRCAM, [], noise_frac=0)
            image *= 1 + (faint / without - 1) * FAINT_FRAC / DEPTH_FRAC
        path = folder / "inbox" / f"jw01_{number:05d}_nrcalong_cal.fits"
        write_jwst(path, image, dq, 60000.0 + 10 * number)
    return folder


def test_files_of_jwst_from_an_inbox_to_a_page_and_exports(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert cli.main(["quicklook", "inbox", "--detector", "small.yaml", "--silent"]) == 0
    connection = logbook.connect("quicklook/log.sqlite")
    found = logbook.table(connection, "candidate_list")
    images = logbook.table(connection, "images")
    connection.close()
    assert set(images["outcome"]) == {"stack", "searched"}

    # Clear blobs are seen again and again; of the faint ones most show on several images together alone
    require_all_found(found[found["sightings"] > 5], corners(NIRCAM), px=0.5)
    require_all_found(found, faint_places(NIRCAM), px=3.0)
    assert (found["n_images"] > 1).sum() >= 2
    assert len(found) <= 2 * len(corners(NIRCAM)) + 1

    # The page has every candidate, and the map the size of the detector
    assert cli.main(["page", "--all", "--out", "all.html"]) == 0
    page = Path("all.html").read_text()
    for number in found["id"]:
        assert f'id="candidate-{number}"' in page

    # Exports: regions count from 1, the image of flags has the full frame
    known = found[["x_px", "y_px", "radius_px", "depth_frac"]].assign(status="confirmed")
    tables.write_table(folder / "known.csv", known)
    words = ["export", "known.csv", "--detector", "small.yaml", "--out", "handover"]
    assert cli.main(words) == 0
    with fits.open("handover/blobs_dq.fits") as hdus:
        dq = hdus["DQ"].data
    assert dq.shape == NIRCAM.shape
    regions = Path("handover/blobs.reg").read_text()
    for x, y in corners(NIRCAM):
        assert dq[round(y), round(x)] == NIRCAM.bad_pixel_table.blob_bit
    assert regions.count("circle(") == len(found)
    assert not Path("handover/blobs_bpx.fits").exists()


def test_an_image_of_4096_px_is_searched_within_two_gigabytes(tmp_path: Path) -> None:
    roman = read_detector("roman_wfi")
    rng = np.random.default_rng(1)
    stack = 0.002 * rng.standard_normal(roman.shape, np.float32)
    places = corners(roman)
    lost = 1 - lit(roman, places, noise_frac=0) / lit(roman, [], noise_frac=0)
    image = stack + 0.008 * rng.standard_normal(roman.shape, np.float32) + lost
    for name, pixels in {"image": image, "stack": stack}.items():
        header = {"EXPSTART": 61000.0}
        path = tmp_path / f"{name}.fits.fz"
        fits_images.write_image(path, pixels, name="SCI", header=header, sigma=0.008)
    del stack, image, lost

    # The process measures its own peak; its ru_maxrss would begin at that of the test that starts it
    script = (
        "import re, sys\n"
        "from blobpipe import cli\n"
        "status = cli.main(sys.argv[1:])\n"
        "about = open('/proc/self/status').read()\n"
        "print(int(re.search(r'VmHWM:\\s+(\\d+) kB', about)[1]) // 1024)\n"
        "sys.exit(status)\n"
    )
    words = ["scan", "image.fits.fz", "--reference", "stack.fits.fz", "--detector", "roman_wfi"]
    done = subprocess.run(
        [sys.executable, "-c", script, *words, "--out", "out"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    peak_mib = int(done.stdout.split()[-1])
    print(f"peak memory: {peak_mib} MiB")
    assert peak_mib < MOST_MIB

    # 16 times the area of WFC3/IR has a false alarm now and then, far below the S/N of the blobs
    found = pd.read_csv(tmp_path / "out" / "detections.csv").query("status == 'new'")
    require_all_found(found.nlargest(len(places), "snr"), places, px=0.5)
    assert (found["snr"] > 10).sum() == len(places)
