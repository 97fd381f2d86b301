"""A log as years of the daily routine would leave it, made in seconds: rows with realistic numbers, small pictures."""

from __future__ import annotations

import io
import math
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits
from PIL import Image

from blobpipe.core import files
from blobpipe.monitor import logbook, thumbnails
from blobpipe.review import planes

FIRST_MJD = 55000.0
CADENCE_DAYS = 0.6
SIGHTINGS = 12  # of a blob, until the stack shows it too

# Height of the step of a faint candidate, and the error of a depth (fraction of the light)
STEP_FRAC = 0.006
DEPTH_ERR_FRAC = 0.002

Rows = list[dict[str, Any]]


def make_log(path: Path, n_images: int, seed: int = 1) -> sqlite3.Connection:
    """A log of ``n_images``, of which one in 50 is rejected, with two candidates on 100 images and their reviews.

    The newest image shows an undecided candidate.
    """
    connection = logbook.connect(path, make=True)
    connection.execute("PRAGMA synchronous = OFF")
    rng = np.random.default_rng(seed)
    with logbook.writing(connection):
        logbook.insert(connection, "runs", RUN)
        _insert_all(
            connection, "images", [_image(number, rng) for number in range(1, n_images + 1)]
        )
        searched = [
            row["id"]
            for row in connection.execute("SELECT id FROM images WHERE outcome = 'searched'")
        ]
        _insert_all(connection, "subframes", _subframes(searched, rng))
        _log_candidates(connection, searched, rng)
        _insert_all(
            connection,
            "pictures",
            [_picture(number, None, "difference", OVERVIEW) for number in searched[-50:]],
        )
    return connection


RUN = {
    "started": "2024-05-01T00:00:00.000Z",
    "version": "0.1.0",
    "model": "model.safetensors",
    "model_sha256": "a" * 64,
    "params_sha256": "b" * 64,
    "catalogue_sha256": "",
    "threshold": 0.957583261,
}


def grey(side: int, seed: int = 0) -> bytes:
    """A PNG of noise with a bright spot."""
    y, x = np.mgrid[:side, :side] - side / 2
    values = 110 + 30 * np.random.default_rng(seed).standard_normal((side, side))
    values += 90 * np.exp(-(x**2 + y**2) / (2 * (side / 12) ** 2))
    buffer = io.BytesIO()
    Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


OVERVIEW = grey(256)
CUTOUT = grey(96)
MAP = grey(16)


def _insert_all(connection: sqlite3.Connection, table: str, rows: Rows) -> None:
    marks = ", ".join(f":{name}" for name in rows[0])
    connection.executemany(f"INSERT INTO {table} ({', '.join(rows[0])}) VALUES ({marks})", rows)


def _image(number: int, rng: np.random.Generator) -> dict[str, Any]:
    bad = number % 50 == 3
    searched = number > 30 and not bad
    shift = 0.05 * rng.standard_normal(2) + (rng.random() < 0.05) * rng.uniform(-2, 2, 2)
    return {
        "id": number,
        "run": 1,
        "sha256": f"{number:064x}",
        "name": f"i{number:07d}q_blob",
        "kind": "image",
        "mjd": FIRST_MJD + CADENCE_DAYS * number,
        "logged": "2024-05-01T00:00:00.000Z",
        "outcome": "rejected" if bad else "searched" if searched else "stack",
        "reason": "no finite pixels, expected an image; check the file" if bad else "",
        "shift_x_px": float(shift[0]) if searched else None,
        "shift_y_px": float(shift[1]) if searched else None,
        "noise_frac": float(0.0101 * rng.lognormal(0, 0.05)) if searched else None,
        "signal_e": float(rng.uniform(12_000, 30_000)) if searched else None,
        "clipped_frac": float(rng.uniform(0.001, 0.01)) if searched else None,
        "n_stack": 30 if searched else 0,
        "stack_sha256": f"{number - 1:064x}" if searched else "",
    }


def _subframes(images: list[int], rng: np.random.Generator) -> Rows:
    probability = rng.beta(0.3, 8, (len(images), 16))
    return [
        {
            "image": image,
            "row": k // 4,
            "col": k % 4,
            "probability": float(probability[i, k]),
            "positive": int(probability[i, k] > 0.5),
            "saliency": MAP,
        }
        for i, image in enumerate(images)
        for k in range(16)
    ]


def _log_candidates(
    connection: sqlite3.Connection, searched: list[int], rng: np.random.Generator
) -> None:
    """Two on 100 images; false ones are seen once, and on every third image the shift leaves a dip."""
    starts = sorted({*range(0, len(searched), 50), len(searched) - 1})
    for start in starts:
        blob = rng.random() < 0.7 or start == starts[-1]
        sightings = searched[start : start + (SIGHTINGS if blob else 1)]
        _log_candidate(connection, sightings, blob and len(sightings) > 1, rng)
    for image in searched[::3]:
        place = {"x_px": float(rng.uniform(20, 1000)), "y_px": float(rng.uniform(20, 1000))}
        logbook.insert(
            connection,
            "detections",
            {"image": image, "status": "dip", **place, **_strength(0.02, rng)},
        )


def _log_candidate(
    connection: sqlite3.Connection, images: list[int], blob: bool, rng: np.random.Generator
) -> None:
    x, y = (float(value) for value in rng.uniform(30, 990, 2))
    depth = float(np.clip(rng.lognormal(-3.5, 0.6), 0.008, 0.25))
    row = {"image": images[0], "status": "seen_again" if blob else "new", "x_px": x, "y_px": y}
    candidate = logbook.insert(connection, "candidates", row)
    for image in images:
        dx, dy = 0.3 * rng.standard_normal(2)
        place = {"x_px": x + float(dx), "y_px": y + float(dy)}
        found = {
            "image": image,
            "candidate": candidate,
            "status": "new",
            **place,
            **_strength(depth, rng),
        }
        number = logbook.insert(connection, "detections", found)
        for kind in ("difference", "stack", "map", "surface"):
            logbook.insert(connection, "pictures", _picture(image, number, kind, CUTOUT))
    if images[-1] < searched_end(connection) - 200:
        decision = "confirmed" if blob else "rejected"
        reason = "seen again" if blob else "a streak"
        review = {"candidate": candidate, "decision": decision, "reviewer": "Ada", "reason": reason}
        logbook.insert(connection, "reviews", review | {"at": "2024-05-01T12:00:00.000Z"})


def log_history(connection: sqlite3.Connection, candidate: int, n_images: int = 8) -> int:
    """Log depths of a faint candidate, found in the mean of some images, and its landing; return how many depths."""
    first = connection.execute(
        "SELECT i.id, i.mjd FROM candidates c JOIN images i ON i.id = c.image WHERE c.id = ?",
        (candidate,),
    ).fetchone()
    images = [
        row["id"]
        for row in connection.execute(
            "SELECT id FROM images WHERE outcome = 'searched' AND id BETWEEN ? AND ?",
            (first["id"] - 30, first["id"] + 20),
        )
    ]
    rng = np.random.default_rng(candidate)
    depth = np.where(np.array(images) >= first["id"], STEP_FRAC, 0.0)
    measured = depth + DEPTH_ERR_FRAC * rng.standard_normal(len(images))
    rows = [
        {
            "image": image,
            "candidate": candidate,
            "depth_frac": value,
            "depth_err_frac": DEPTH_ERR_FRAC,
        }
        for image, value in zip(images, measured.tolist(), strict=True)
    ]
    _insert_all(connection, "depths", rows)
    landing = {
        "history": "landed",
        "after_mjd": first["mjd"] - CADENCE_DAYS,
        "before_mjd": first["mjd"],
        "level_frac": 0.0,
        "step_frac": STEP_FRAC,
        "step_err_frac": 0.0006,
    }
    logbook.update(connection, "candidates", candidate, landing)
    connection.execute(
        "UPDATE detections SET n_images = ? WHERE candidate = ?", (n_images, candidate)
    )
    return len(images)


def searched_end(connection: sqlite3.Connection) -> int:
    """Number of the newest image."""
    return int(connection.execute("SELECT max(id) FROM images").fetchone()[0])


def _strength(depth: float, rng: np.random.Generator) -> dict[str, float]:
    error = 0.0015
    measured = max(0.001, depth + error * float(rng.standard_normal()))
    return {
        "x_err_px": 0.2,
        "y_err_px": 0.2,
        "radius_px": float(rng.uniform(3, 9)),
        "radius_err_px": 0.4,
        "depth_frac": measured,
        "depth_err_frac": error,
        "loss_frac_px2": measured * 60,
        "snr": measured / error * math.sqrt(3),
        "score": 0.98,
        "probability": float(rng.uniform(0.6, 0.999)),
    }


MISSED = (612.0, 344.0)  # where `keep_pixels` puts a blob that the log does not have (px)
DEPTH = 0.08


def keep_pixels(connection: sqlite3.Connection, number: int, side: int = 1024) -> None:
    """Write the file of a searched image and its pixels as quicklook keeps them, its blobs in them, and one more."""
    path = planes.log_path(connection)
    rng = np.random.default_rng(number)
    image = connection.execute("SELECT * FROM images WHERE id = ?", (number,)).fetchone()
    found = connection.execute("SELECT x_px, y_px FROM detections WHERE image = ?", (number,))
    y, x = np.mgrid[:side, :side]
    difference = rng.normal(0, image["noise_frac"], (side, side))
    cells = np.full((side // 4, side // 4), 0.02, np.float32)
    for x_px, y_px in (*map(tuple, found), MISSED):
        difference += DEPTH * (np.hypot(x - x_px, y - y_px) < 6)
        cells[min(int(y_px), side - 1) // 4, min(int(x_px), side - 1) // 4] = 0.6
    difference[:5] = np.nan
    template = 0.004 * np.sin(x / 40) + 0.002 * rng.standard_normal((side, side))

    file = path.with_name(f"{image['name']}.fits")
    fits.PrimaryHDU((difference + template).astype(np.float32)).writeto(file)
    sha256 = files.sha256(file)
    step = thumbnails.step_of(image["noise_frac"])
    kept = {
        "difference": thumbnails.pack(difference.astype(np.float32), step),
        "map": thumbnails.pack(cells, thumbnails.MAP_STEP),
    }
    for plane, content in kept.items():
        target = thumbnails.pixels_path(path, sha256, plane)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(content)
    with logbook.writing(connection):
        size = {"sha256": sha256, "nx_px": side, "ny_px": side}
        logbook.update(connection, "images", number, size)
        row = {"path": str(file), "sha256": sha256, "size_bytes": file.stat().st_size}
        row |= {"modified_ns": 0, "seen": logbook.now(), "outcome": "logged", "image": number}
        logbook.insert(connection, "files", row)


def _picture(image: int, detection: int | None, kind: str, content: bytes) -> dict[str, Any]:
    return {
        "image": image,
        "detection": detection,
        "kind": kind,
        "type": "image/png",
        "bytes": content,
    }
