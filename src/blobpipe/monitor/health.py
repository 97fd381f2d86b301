"""Monitor the search for drift: are its images still those it was made for, and does it still behave?

A reading is taken over the latest images in the order of the log. Late and superseded images are left out, and a
single odd image moves no median. A reading *crosses* its limit once; it can do so again only after it has come back
within the limit by a margin (hysteresis).
"""

from __future__ import annotations

import sqlite3
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from blobpipe.history.watch import BlobHealth
from blobpipe.monitor import logbook
from blobpipe.params import Health

Limit = float | tuple[float, float]  # upper limit, or the ends of a range


class Monitor(NamedTuple):
    """Describe a reading, and say what to do when it is beyond its limit."""

    label: str
    advice: str


MONITORS = {
    "noise_frac": Monitor(
        "median noise of the differences (fraction of the light)",
        "faint blobs are missed; look at the latest images, their flat field and their exposure times",
    ),
    "signal_e": Monitor(
        "median photon level (electrons per pixel)",
        "the airglow or the exposures have changed, and so has the noise; look at the latest images",
    ),
    "shift_px": Monitor(
        "median shift of the mirror (px)",
        "it no longer stops where it did in the images of the stack; make a stack of newer images",
    ),
    "clipped_frac": Monitor(
        "median share of clipped pixels",
        "there are more bad pixels or more structure than before; look at the differences",
    ),
    "false_alarms_per_100": Monitor(
        "candidates on 100 images that faded or were rejected (count)",
        "look at them; raise the threshold ('blobpipe calibrate'), or train a model with them",
    ),
    "broken_promise": Monitor(
        "candidates that faded or were rejected, against the promise of the operating point (count)",
        "the images are no longer those that the threshold was set on; look at them, and run 'blobpipe calibrate' again",
    ),
    "probability_distance": Monitor(
        "distance of the subframes' probabilities from those of earlier images (0 to 1)",
        "the images differ from earlier ones; compare them",
    ),
    "rejected_frac": Monitor(
        "share of rejected images", "read their reasons: something upstream may have broken"
    ),
    "blobs_deeper_frac": Monitor(
        "median change of the depth of the known blobs, up or down (fraction)",
        "blobs do not change all together: the filter, the flat field or the focus has changed",
    ),
    "blobs_moved_px": Monitor(
        "median displacement of the known blobs beyond the shift of the mirror (px)",
        "the mirror stops at another angle, or the registration fails; make a stack of newer images",
    ),
    "blobs_grown_px": Monitor(
        "median change of the radius of the known blobs, up or down (px)",
        "the focus or the mirror has changed; look at large blobs",
    ),
    "blobs_changed": Monitor(
        "single known blobs that have faded, grown or moved (count)",
        "blobs do not change: look at them, and for particles that landed on them",
    ),
}
# Probability of so many false alarms, or more, if the promise holds, below which it counts as broken
UNLIKELY = 0.01

# end of a query for the latest images up to one, of which a reading is taken
LATEST = (
    "FROM images WHERE id <= ? AND late = 0 AND outcome = 'searched' AND superseded_by IS NULL "
    "ORDER BY id DESC LIMIT ?"
)


def log_readings(
    connection: sqlite3.Connection,
    image_id: int,
    params: Health,
    blobs: BlobHealth | None = None,
) -> list[str]:
    """Take the readings after an image, log them, and describe those that crossed their limit with it.

    Call it within the transaction that logs the image, before `notices.queue`.

    Parameters
    ----------
    image_id : int
        Row of the image in ``images``.
    params : Health
    blobs : BlobHealth, optional
        How the known blobs have changed.

    Returns
    -------
    list of str
        One line for each reading that is beyond its limit and was not so before.
    """
    lines = []
    readings = _readings(connection, image_id, params)
    if blobs is not None:
        readings |= _blob_readings(blobs, params)
    for what, (value, limit) in readings.items():
        bound, excess = _compare(value, limit)
        since = _crossing(connection, image_id, what, excess, params.hysteresis_frac)

        row = {"image": image_id, "what": what, "value": value, "bound": bound, "since": since}
        logbook.insert(connection, "health", row)
        if since == image_id:
            lines.append(describe(row))
    return lines


def describe(row: sqlite3.Row | dict[str, Any]) -> str:
    """Describe a row of the table ``health`` that is beyond its limit."""
    label, advice = MONITORS[row["what"]]
    return f"{label}: {row['value']:.4g}, limit {row['bound']:.4g}; {advice}"


def current_warnings(connection: sqlite3.Connection) -> list[str]:
    """Describe each reading that is beyond its limit after the latest image, one line each."""
    # SQLite takes the other columns from the row of the maximum
    query = "SELECT h.*, max(h.image) FROM health h GROUP BY h.what"
    rows = connection.execute(query).fetchall()
    return [describe(row) for row in rows if row["since"] is not None]


# ------------------------------------------------------------------------------------------------------- readings


def _readings(
    connection: sqlite3.Connection, image: int, params: Health
) -> dict[str, tuple[float, Limit]]:
    """Take the reading of each monitor for which there are enough images, with its limit."""
    found = {
        **_medians(connection, image, params.window),
        "false_alarms_per_100": _false_alarms_per_100(connection, image, params),
        "probability_distance": _probability_distance(connection, image, params),
        "rejected_frac": _rejected_frac(connection, image, params.window),
    }
    readings: dict[str, tuple[float, Limit]] = {
        what: (value, getattr(params, what)) for what, value in found.items() if value is not None
    }
    promise = _broken_promise(connection, image, params)
    return readings if promise is None else readings | {"broken_promise": promise}


def _blob_readings(blobs: BlobHealth, params: Health) -> dict[str, tuple[float, Limit]]:
    """Return what the known blobs have changed by, with the limits."""
    found = {
        "blobs_deeper_frac": abs(blobs.deeper_frac),
        "blobs_moved_px": float(np.hypot(blobs.x_px, blobs.y_px)),
        "blobs_grown_px": abs(blobs.radius_px),
        "blobs_changed": float(blobs.n_changed),
    }
    return {what: (value, getattr(params, what)) for what, value in found.items()}


def _medians(connection: sqlite3.Connection, image: int, window: int) -> dict[str, float | None]:
    """Return the medians of columns of the latest images; None without enough values."""
    columns = {
        "noise_frac": "noise_frac",
        "signal_e": "signal_e",
        "clipped_frac": "clipped_frac",
        "shift_px": "sqrt(shift_x_px * shift_x_px + shift_y_px * shift_y_px)",
    }
    # all columns in one query
    query = f"SELECT {', '.join(columns.values())} {LATEST}"
    rows = connection.execute(query, (image, window)).fetchall()

    medians: dict[str, float | None] = {}
    for i, what in enumerate(columns):
        values = [row[i] for row in rows if row[i] is not None]
        # a full window, with a value for more than half of its images
        enough = len(rows) == window and 2 * len(values) > window
        medians[what] = float(np.median(values)) if enough else None
    return medians


def _false_alarms_per_100(
    connection: sqlite3.Connection, image: int, params: Health
) -> float | None:
    """Count the candidates per 100 images that were rejected, or faded and were not confirmed."""
    rows = connection.execute(f"SELECT id {LATEST}", (image, params.baseline))
    images = [row["id"] for row in rows]
    if len(images) < params.window:
        return None
    return 100 * float(_count_false_alarms(connection, images)) / len(images)


def _count_false_alarms(connection: sqlite3.Connection, images: list[int]) -> int:
    """Count the candidates that were rejected, or faded and were not confirmed, and that one of some images showed first."""
    marks = ", ".join("?" * len(images))
    [alarms] = connection.execute(
        f"SELECT count(*) FROM candidate_list WHERE first_image IN ({marks}) "
        "AND (decision = 'rejected' OR status = 'faded' AND decision != 'confirmed')",
        images,
    ).fetchone()
    return int(alarms)


def _broken_promise(
    connection: sqlite3.Connection, image: int, params: Health
) -> tuple[float, float] | None:
    """Count the false alarms since the operating point was set, and give the most that its promise allows.

    None if the latest image was searched without an operating point, or too few with it.
    """
    from scipy.stats import poisson

    # images that were searched with the same threshold and promise as the latest
    rows = connection.execute(
        "SELECT i.id, r.false_alarms_per_100 FROM images i JOIN runs r ON r.id = i.run "
        "JOIN (SELECT r.* FROM images i JOIN runs r ON r.id = i.run WHERE i.id = ?) now "
        "ON r.operating_point_sha256 = now.operating_point_sha256 AND r.false_alarms_per_100 = now.false_alarms_per_100 "
        "WHERE i.id <= ? AND i.late = 0 AND i.outcome = 'searched' AND i.superseded_by IS NULL "
        "ORDER BY i.id DESC LIMIT ?",
        (image, image, params.baseline),
    ).fetchall()
    if len(rows) < params.window:
        return None
    promised = rows[0]["false_alarms_per_100"] / 100 * len(rows)
    alarms = _count_false_alarms(connection, [row["id"] for row in rows])
    return float(alarms), float(poisson.isf(UNLIKELY, promised))


def _probability_distance(
    connection: sqlite3.Connection, image: int, params: Health
) -> float | None:
    """Return the Kolmogorov-Smirnov distance between the window's subframes and the baseline's.

    Only images that were searched with the model of the latest one are compared.
    """
    from scipy.stats import ks_2samp

    # the images of the window and of the baseline before it
    rows = connection.execute(
        "SELECT i.id FROM images i JOIN runs r ON r.id = i.run "
        "WHERE i.id <= ? AND late = 0 AND outcome = 'searched' AND superseded_by IS NULL "
        "AND r.model_sha256 = (SELECT r.model_sha256 FROM images i JOIN runs r ON r.id = i.run WHERE i.id = ?) "
        "ORDER BY i.id DESC LIMIT ?",
        (image, image, params.window + params.baseline),
    ).fetchall()
    if len(rows) < 2 * params.window:
        return None

    # the latest come first; without any subframes there is no distance
    images = [row["id"] for row in rows]
    latest = _probabilities(connection, images[: params.window])
    earlier = _probabilities(connection, images[params.window :])
    if not len(latest) or not len(earlier):
        return None
    return float(ks_2samp(latest, earlier, method="asymp").statistic)


def _probabilities(connection: sqlite3.Connection, images: list[int]) -> npt.NDArray[np.float64]:
    """Return the probabilities of all subframes of some images."""
    marks = ", ".join("?" * len(images))
    rows = connection.execute(f"SELECT probability FROM subframes WHERE image IN ({marks})", images)
    return np.array([row["probability"] for row in rows])


def _rejected_frac(connection: sqlite3.Connection, image: int, window: int) -> float | None:
    """Return the share of rejected images among the latest; None without a full window."""
    rows = connection.execute(
        "SELECT outcome FROM images WHERE id <= ? AND superseded_by IS NULL ORDER BY id DESC LIMIT ?",
        (image, window),
    ).fetchall()
    if len(rows) < window:
        return None
    n_rejected: int = sum(row["outcome"] == "rejected" for row in rows)
    return n_rejected / window


# --------------------------------------------------------------------------------------------------------- limits


def _compare(value: float, limit: Limit) -> tuple[float, float]:
    """Compare a value with its limit.

    Returns
    -------
    float
        The upper limit or, of a range, the end that the value is beyond or nearer to in factors.
    float
        How far the value is beyond it, as a share of the limit; negative within it.
    """
    bound = limit if not isinstance(limit, tuple) else limit[1]
    sign = 1

    # below the geometric mean of a range, its lower end counts
    if isinstance(limit, tuple):
        low, high = limit
        if value * value < low * high:
            bound = low
        # beyond the lower end is below it
        if bound == low:
            sign = -1

    # there are no shares of a limit of 0
    excess = sign * (value - bound) / bound if bound else sign * float(value > 0)
    return bound, excess


def _crossing(
    connection: sqlite3.Connection, image: int, what: str, excess: float, hysteresis: float
) -> int | None:
    """Return the image with which the reading crossed its limit; None while it is within.

    A reading that had crossed counts as beyond until it is back by the hysteresis.
    """
    before = connection.execute(
        "SELECT since FROM health WHERE what = ? AND image < ? ORDER BY image DESC LIMIT 1",
        (what, image),
    ).fetchone()
    since = before["since"] if before else None
    if since is None:
        return image if excess > 0 else None
    return int(since) if excess > -hysteresis else None
