"""Drift monitors over the log: is the search still fed with what it was made for, and does it still behave?

A reading is over the latest images in the order of the log, late and superseded ones left out, so that one odd image moves nothing. It
*crosses* its limit once, and can do so again only after it has come back within the limit by a margin (hysteresis).
"""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from blobpipe.monitor import logbook
from blobpipe.params import Health

if TYPE_CHECKING:
    import pandas as pd


class Monitor(NamedTuple):
    """What a reading is, and what to do when it is beyond its limit."""

    label: str
    advice: str


MONITORS = {
    "noise_frac": Monitor(
        "median noise of the differences (fraction of the light)",
        "faint blobs go unseen; look at the latest images, their flat field and their exposure times",
    ),
    "signal_e": Monitor(
        "median photon level (electrons per pixel)",
        "the airglow or the exposures have changed; so does the noise",
    ),
    "shift_px": Monitor(
        "median shift of the mirror (px)",
        "it stops elsewhere than on the stack; a stack of newer images ends that",
    ),
    "clipped_frac": Monitor(
        "median share of clipped pixels",
        "more bad pixels or structure than before; look at the differences",
    ),
    "false_alarms_per_100": Monitor(
        "candidates on 100 images that faded or were rejected (count)",
        "look at what they are; a higher threshold or a model trained with them ends that",
    ),
    "probability_distance": Monitor(
        "distance of the subframes' probabilities from those before (0 to 1)",
        "the model sees another kind of images than it used to; compare them",
    ),
    "rejected_frac": Monitor(
        "share of rejected images", "read their reasons: something in their making broke"
    ),
}
LATEST = "FROM images WHERE id <= ? AND late = 0 AND outcome = 'searched' AND superseded_by IS NULL ORDER BY id DESC LIMIT ?"


def crossed(connection: sqlite3.Connection, image_id: int, params: Health) -> list[str]:
    """Take the readings after an image, keep them in the log, and say which have crossed their limit with it.

    To be called within the transaction that logs the image, before `notices.queue`.

    Parameters
    ----------
    image_id : int
        The image's row in ``images``.

    Returns
    -------
    list of str
        A line for each reading that was within its limit, or not there, before. None while it stays beyond.

    Notes
    -----
    Source: ours.
    """
    lines = []
    for what, value in _readings_now(connection, image_id, params).items():
        bound = _nearest_bound(value, getattr(params, what))
        since = _since(
            connection,
            image_id,
            what,
            _excess(value, bound, getattr(params, what)),
            params.hysteresis_frac,
        )
        row = {"image": image_id, "what": what, "value": value, "bound": bound, "since": since}
        logbook.insert(connection, "health", row)
        if since == image_id:
            lines.append(line(row))
    return lines


def line(row: sqlite3.Row | dict[str, Any]) -> str:
    """A row of the table ``health`` that is beyond its limit, in words."""
    label, advice = MONITORS[row["what"]]
    return f"{label}: {row['value']:.4g}, limit {row['bound']:.4g}; {advice}"


def standing(connection: sqlite3.Connection) -> list[str]:
    """A line for each reading that is beyond its limit after the latest image."""
    rows = connection.execute(
        # SQLite: the other columns are of the row of the maximum
        "SELECT h.*, max(h.image) FROM health h GROUP BY h.what"
    ).fetchall()
    return [line(row) for row in rows if row["since"] is not None]


def readings(connection: sqlite3.Connection, most: int = 400) -> pd.DataFrame:
    """The readings for a timeline, thinned to about ``most`` images, the latest among them.

    Returns
    -------
    DataFrame
        image, name, mjd, then a column of each of `MONITORS`, NaN where there was no reading; in the order of the log.
    """
    import pandas as pd

    last = connection.execute("SELECT coalesce(max(id), 0) FROM images").fetchone()[0]
    step = max(1, -(-last // most))
    long = pd.read_sql_query(
        "SELECT i.id AS image, i.name, i.mjd, h.what, h.value FROM images i JOIN health h ON h.image = i.id "
        "WHERE i.id % ? = ? % ? ORDER BY i.id",
        connection,
        params=(step, last, step),
    )
    images = long[["image", "name", "mjd"]].drop_duplicates(ignore_index=True)
    wide = long.pivot(index="image", columns="what", values="value").reindex(columns=list(MONITORS))
    return images.join(wide.astype(float), on="image")


def _readings_now(connection: sqlite3.Connection, image: int, params: Health) -> dict[str, float]:
    """The reading of each monitor that has enough images."""
    found = {
        **_medians(connection, image, params.window),
        "false_alarms_per_100": _false_alarms_per_100(connection, image, params),
        "probability_distance": _probability_distance(connection, image, params),
        "rejected_frac": _rejected_frac(connection, image, params.window),
    }
    return {what: value for what, value in found.items() if value is not None}


def _medians(connection: sqlite3.Connection, image: int, window: int) -> dict[str, float | None]:
    columns = {"noise_frac": "noise_frac", "signal_e": "signal_e", "clipped_frac": "clipped_frac"}
    columns["shift_px"] = "sqrt(shift_x_px * shift_x_px + shift_y_px * shift_y_px)"
    rows = connection.execute(
        f"SELECT {', '.join(columns.values())} {LATEST}", (image, window)
    ).fetchall()
    values = [[row[i] for row in rows if row[i] is not None] for i in range(len(columns))]
    return {
        what: float(np.median(there)) if len(rows) == window and 2 * len(there) > window else None
        for what, there in zip(columns, values, strict=True)
    }


def _false_alarms_per_100(
    connection: sqlite3.Connection, image: int, params: Health
) -> float | None:
    """Candidates of the latest images that faded, unless somebody confirmed them, or that somebody rejected."""
    images = [
        row["id"] for row in connection.execute(f"SELECT id {LATEST}", (image, params.baseline))
    ]
    if len(images) < params.window:
        return None
    [alarms] = connection.execute(
        "SELECT count(*) FROM candidate_list WHERE first_image BETWEEN ? AND ? "
        "AND (decision = 'rejected' OR status = 'faded' AND decision != 'confirmed')",
        (images[-1], image),
    ).fetchone()
    return 100 * float(alarms) / len(images)


def _probability_distance(
    connection: sqlite3.Connection, image: int, params: Health
) -> float | None:
    """Kolmogorov-Smirnov distance of the window's subframes from the baseline's, of one and the same model."""
    from scipy.stats import ks_2samp

    images = connection.execute(
        "SELECT i.id FROM images i JOIN runs r ON r.id = i.run "
        "WHERE i.id <= ? AND late = 0 AND outcome = 'searched' AND superseded_by IS NULL "
        "AND r.model_sha256 = (SELECT r.model_sha256 FROM images i JOIN runs r ON r.id = i.run WHERE i.id = ?) "
        "ORDER BY i.id DESC LIMIT ?",
        (image, image, params.window + params.baseline),
    ).fetchall()
    if len(images) < 2 * params.window:
        return None
    now, before = (
        _probabilities(connection, [row["id"] for row in part])
        for part in (images[: params.window], images[params.window :])
    )
    return (
        float(ks_2samp(now, before, method="asymp").statistic) if len(now) and len(before) else None
    )


def _probabilities(connection: sqlite3.Connection, images: list[int]) -> npt.NDArray[np.float64]:
    marks = ", ".join("?" * len(images))
    rows = connection.execute(f"SELECT probability FROM subframes WHERE image IN ({marks})", images)
    return np.array([row["probability"] for row in rows])


def _rejected_frac(connection: sqlite3.Connection, image: int, window: int) -> float | None:
    rows = connection.execute(
        "SELECT outcome FROM images WHERE id <= ? AND superseded_by IS NULL ORDER BY id DESC LIMIT ?",
        (image, window),
    ).fetchall()
    return (
        sum(row["outcome"] == "rejected" for row in rows) / window if len(rows) == window else None
    )


def _nearest_bound(value: float, limit: float | tuple[float, float]) -> float:
    """The upper limit; of a range, the end that the value is beyond or, in factors, nearer to."""
    if not isinstance(limit, tuple):
        return limit
    low, high = limit
    return low if value * value < low * high else high


def _excess(value: float, bound: float, limit: float | tuple[float, float]) -> float:
    """How far a value is beyond its limit, as a share of the limit; negative within."""
    sign = -1 if isinstance(limit, tuple) and bound == limit[0] else 1
    return sign * (value - bound) / bound if bound else sign * float(value > 0)


def _since(
    connection: sqlite3.Connection, image: int, what: str, excess: float, hysteresis: float
) -> int | None:
    """The image that crossed the limit: this one, or that of the reading before, until the way back is far enough."""
    before = connection.execute(
        "SELECT since FROM health WHERE what = ? AND image < ? ORDER BY image DESC LIMIT 1",
        (what, image),
    ).fetchone()
    since = before["since"] if before else None
    if since is None:
        return image if excess > 0 else None
    return int(since) if excess > -hysteresis else None
