"""List what an image shows, from the log or by a search of its own, and record what a person decides about it."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from blobpipe.core.arrays import Image
from blobpipe.core.detector import DEFAULT, Detector
from blobpipe.errors import LogError
from blobpipe.monitor import logbook
from blobpipe.review import decisions

Decision = Literal["confirmed", "rejected", "unsure"]


@dataclass(frozen=True)
class Sighting:
    """Something that an image shows at a place.

    Attributes
    ----------
    candidate : int or None
        Number of its candidate in the log; None for what is known, vetted or found without the log.
    detection : int or None
        Number of the detection in the log.
    x_px, y_px : float
        On this image (px, 0-based).
    radius_px, snr, depth_frac, probability : float
        NaN where they were not measured.
    status : str
        ``new``, ``known``, ``dip``, ``bad_pixels``; of a candidate of the log, ``seen_again`` or ``faded`` too.
    decision : str
        What the latest review says; empty without one.
    """

    candidate: int | None
    detection: int | None
    x_px: float
    y_px: float
    radius_px: float
    snr: float
    depth_frac: float
    probability: float
    status: str
    decision: str = ""

    @property
    def verdict(self) -> str:
        """Return the decision of people, else the status."""
        return self.decision or self.status


@dataclass(frozen=True)
class Searched:
    """What a search of an image gave.

    Attributes
    ----------
    sightings : list of Sighting
        Detections, the most probable first.
    difference, template, response : ndarray, float32, or None
        The difference image, what was subtracted, and the network's map, as large as the image.
    """

    sightings: list[Sighting]
    difference: Image
    template: Image | None
    response: Image


def ginga_plugin() -> Any:
    """Describe the plug-in to ginga; its entry points ``ginga.rv.plugins`` call this."""
    from ginga.misc.Bunch import Bunch

    return Bunch(
        path=str(Path(__file__).with_name("ginga_plugin.py")),
        module="ginga_plugin",
        klass="Blobs",
        name="Blobs",
        ptype="local",
        workspace="dialogs",
        category="Analysis",
        menu="Blobs",
        tab="Blobs",
    )


def of_log(connection: sqlite3.Connection, name: str) -> list[Sighting]:
    """List what the log has for an image, candidates first, then by S/N.

    Parameters
    ----------
    connection : Connection
        Of a log, from `logbook.connect`.
    name : str
        Of the image: its file name without the suffix.

    Raises
    ------
    LogError
        If the log has no searched image of this name.
    """
    image = connection.execute(
        "SELECT id FROM images WHERE name = ? AND outcome = 'searched' ORDER BY id DESC LIMIT 1",
        (name,),
    ).fetchone()
    if image is None:
        raise LogError(
            f"{name}: no searched image of this name in the log; run 'blobpipe quicklook' on its folder, or search it here"
        )
    rows = connection.execute(
        "SELECT d.candidate, d.id AS detection, d.x_px, d.y_px, d.radius_px, d.snr, d.depth_frac, d.probability, "
        "coalesce(c.status, d.status) AS status, coalesce(c.decision, '') AS decision "
        "FROM detections d LEFT JOIN candidate_list c ON c.id = d.candidate WHERE d.image = ? "
        "ORDER BY d.candidate IS NULL, d.snr DESC, d.id",
        (image["id"],),
    ).fetchall()
    measured = ("radius_px", "snr", "depth_frac", "probability")
    found = []
    for row in rows:
        values = dict(row)
        values |= {key: np.nan if values[key] is None else values[key] for key in measured}
        found.append(Sighting(**values))
    return found


def pictures(connection: sqlite3.Connection, detection: int) -> dict[str, bytes]:
    """Return the pictures of a detection in the log, PNG, by kind: difference, stack, map."""
    rows = connection.execute(
        "SELECT kind, bytes FROM pictures WHERE detection = ?", (detection,)
    ).fetchall()
    return {row["kind"]: bytes(row["bytes"]) for row in rows}


def decide(
    connection: sqlite3.Connection, candidate: int, decision: Decision, reviewer: str
) -> None:
    """Write a review of a candidate to the log.

    Raises
    ------
    LogError
        If the reviewer has no name, or there is no such candidate.
    """
    name = " ".join(reviewer.split())
    if not name:
        raise LogError("found no name, expected the reviewer's; fill it in")
    with logbook.writing(connection):
        decisions.review(connection, [candidate], decision, name, "")


def search(image: Image, reference: Path | None = None, detector: Detector = DEFAULT) -> Searched:
    """Search an image with the packaged network.

    Parameters
    ----------
    image : ndarray, shape (ny, nx), float32
        A blob image, or a difference image if there is no reference (fraction of the light).
    reference : path, optional
        Median stack to subtract.
    detector : Detector, optional

    Raises
    ------
    FrameError
        If the two differ in size, or the stack cannot be read.
    """
    # The networks are loaded only when a search is asked for
    from blobpipe.detection.detectors import load_dense_detector
    from blobpipe.detection.search import observe
    from blobpipe.images.difference import subtract
    from blobpipe.images.register import NO_SHIFT
    from blobpipe.images.template import read_template
    from blobpipe.networks import dense, model_file

    difference = np.asarray(image, np.float32)
    template = None
    shift = NO_SHIFT
    if reference is not None:
        template = read_template(reference, detector=detector)
        difference, shift = subtract(difference, template, detector=detector)
    observation = observe(difference, template, shift_px=shift, instrument=detector)

    network = load_dense_detector(model_file.PACKAGED)
    scaled = observation.scaled()
    response = network.respond(scaled)
    found = observation.find_blobs(network, peaks=network.peaks(response, scaled))
    found = found[found["score"] >= network.threshold].sort_values("score", ascending=False)
    columns = ["x_px", "y_px", "radius_px", "snr", "depth_frac", "probability", "status"]
    listed = [Sighting(None, None, *row) for row in found[columns].itertuples(index=False)]
    ny, nx = difference.shape
    cells = response.repeat(dense.STRIDE, 0).repeat(dense.STRIDE, 1)[:ny, :nx]
    return Searched(listed, difference, None if template is None else template.stack, cells)
