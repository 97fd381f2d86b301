"""Images of days with and without a new blob, and runs of the daily routine over them."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from astropy.io import fits

import blobpipe
from blobpipe.core.blob_shapes import blob_profile
from blobpipe.detection.fit import DETECTION_COLUMNS
from blobpipe.monitor import logbook
from blobpipe.params import Difference, Params, Quicklook
from blobpipe.quicklook.options import Options
from blobpipe.quicklook.run import quicklook

SIDE = 512
STACK = 4
MODEL = Path(blobpipe.__file__).with_name("model.safetensors")
SETTINGS = Params().model_copy(
    update={
        "difference": Difference(stack_size=STACK),
        "quicklook": Quicklook(settle_s=0.0),
    }
)
NEW = (300.0, 200.0, 6.0, 0.08)
KNOWN = ((100.0, 120.0, 6.5, 0.08), (400.0, 380.0, 5.5, 0.1), (220.0, 400.0, 7.0, 0.06))


def long(*values: object) -> object:
    """A case that only the whole of the tests tries."""
    return pytest.param(*values, marks=pytest.mark.long)


Blob = tuple[float, float, float, float]


def pixels(day: int, blobs: Sequence[Blob]) -> np.ndarray:
    image = np.random.default_rng([7, day]).normal(0, 0.0076, (SIDE, SIDE)).astype(np.float32)
    for x, y, radius, depth in blobs:
        row = round(y)
        col = round(x)
        image[row - 20 : row + 21, col - 20 : col + 21] += depth * blob_profile(
            "disc", radius, x - col, y - row
        )
    return image


def write(folder: Path, day: int, *blobs: Blob, name: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name or f'day{day:03d}'}.fits"
    header = fits.Header({"EXPSTART": 60000.0 + day, "FILTER": "F153M"})
    hdu = fits.PrimaryHDU(pixels(day, (*KNOWN, *blobs)), header)
    hdu.writeto(folder / f".{path.name}.part")
    os.replace(folder / f".{path.name}.part", path)
    return path


def options(tmp_path: Path, **more: object) -> Options:
    return Options(tmp_path / "out" / "log.sqlite", MODEL, SETTINGS, **more)  # type: ignore[arg-type]


def run(tmp_path: Path, **more: object) -> sqlite3.Connection:
    made = options(tmp_path, **more)
    quicklook(tmp_path / "in", made)
    return logbook.connect(made.log_path)


def outcomes(log: sqlite3.Connection) -> dict[str, str]:
    return {row["name"]: row["outcome"] for row in log.execute("SELECT name, outcome FROM images")}


def candidates(log: sqlite3.Connection) -> pd.DataFrame:
    return logbook.table(log, "candidate_list")


LONG_STACK = 10  # images: what lands on one of them is in the RMS map before the median has it
# day, x, y, radius (px), depth: strong, faint, strong beside another, and on the image after it
LANDED = (
    *((LONG_STACK + 1, 90.0, 80.0, 6.0, 0.2), (LONG_STACK + 1, 180.0, 90.0, 6.0, 0.02)),
    *((LONG_STACK + 3, 106.0, 84.0, 5.0, 0.1), (LONG_STACK + 4, 200.0, 190.0, 3.5, 0.08)),
)
OLD = ((60, 200, 6.5, 0.08), (130, 150, 5.5, 0.1), (40, 40, 7.0, 0.06), (215, 30, 6.0, 0.08))


def write_small(folder: Path, day: int) -> Path:
    """An image of 256 x 256 pixels with what has landed so far; on every fourth the mirror has stopped elsewhere."""
    folder.mkdir(exist_ok=True)
    image = np.random.default_rng([17, day]).normal(0, 0.0076, (256, 256)).astype(np.float32)
    shift_x, shift_y = (1.4, -0.9) if day % 4 == 2 else (0.0, 0.0)
    for x, y, radius, depth in (*OLD, *(blob[1:] for blob in LANDED if blob[0] <= day)):
        row = round(y)
        col = round(x)
        stamp = blob_profile("disc", radius, x - col + shift_x, y - row + shift_y)
        image[row - 20 : row + 21, col - 20 : col + 21] += depth * stamp
    path = folder / f"day{day:03d}.fits"
    fits.PrimaryHDU(image, fits.Header({"EXPSTART": 60000.0 + day})).writeto(path)
    return path


def deep_log(tmp_path: Path, decision: str, status: str) -> tuple[sqlite3.Connection, int]:
    """A log of two images and a candidate of the first, decided on."""
    log = logbook.connect(tmp_path / "log.sqlite", make=True)
    fixed = {"version": "0", "model": "m", "model_sha256": "", "params_sha256": ""}
    logbook.insert(log, "runs", fixed | {"started": "", "catalogue_sha256": "", "threshold": 0.9})
    for k in (1, 2):
        row = {"run": 1, "sha256": f"{k:064}", "name": f"day{k}", "kind": "image"}
        row |= {"mjd": 60000.0 + k, "logged": "", "outcome": "searched"}
        logbook.insert(log, "images", row)
    candidate = logbook.insert(
        log, "candidates", {"image": 1, "status": status, "x_px": 100.0, "y_px": 90.0}
    )
    logbook.insert(log, "detections", deep_row(1) | {"image": 1, "candidate": candidate})
    if decision:
        review = {"candidate": candidate, "decision": decision, "reviewer": "me", "at": ""}
        logbook.insert(log, "reviews", review)
    return log, candidate


def deep_row(n_images: int) -> dict[str, object]:
    """What is measured of a blob."""
    measured = dict.fromkeys(DETECTION_COLUMNS, 1.0)
    place = {"x_px": 100.5, "y_px": 90.0, "radius_px": 6.0, "status": "new"}
    return measured | place | {"probability": 0.9, "n_images": n_images}


def part(day: int, path: Path) -> None:
    """Make an image of a day smaller."""
    with fits.open(path, mode="update") as hdus:
        hdus[0].data = hdus[0].data[:300, 50:350].copy()


def start(root: Path, *words: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    command = (
        sys.executable,
        "-m",
        "blobpipe",
        "quicklook",
        "in",
        "--log",
        "out/log.sqlite",
        *words,
    )
    return subprocess.Popen(
        command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
    )


def until(true: Callable[[], bool], seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.2)


def places(log: sqlite3.Connection) -> set[tuple[int, int]]:
    """Candidates, to 10 px."""
    found = candidates(log)
    return {(round(x, -1), round(y, -1)) for x, y in zip(found["x_px"], found["y_px"], strict=True)}
