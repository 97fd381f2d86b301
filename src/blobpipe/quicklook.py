"""The daily routine (ISR 6): every new image of a folder searched, logged, and told of, each exactly once.

All that an image leads to is one transaction of the log, and the same inputs lead to the same rows: whatever moment a
run ends at, the next one goes on as if nothing had happened. Several runs may share a log; one at a time works.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from tqdm import tqdm

from blobpipe import (
    __version__,
    dense,
    detect,
    frames,
    health,
    measure,
    networks,
    normalize,
    notify,
    pictures,
    render,
    stacks,
    store,
    verdict,
)
from blobpipe import difference as subtraction
from blobpipe.errors import BlobpipeError, FrameError, ModelError
from blobpipe.params import Params, to_yaml

log = logging.getLogger(__name__)

Image = npt.NDArray[np.float32]

KEPT_CARDS = (*dict.fromkeys((*subtraction.KEPT_CARDS, "EXPTIME", "PROPOSID", "BUNIT", *frames.EXPOSURE_CARDS)),)
LEVEL_CARD = "LEVEL_E"  # photon level of the airglow (electrons per pixel), where the image's maker wrote it
PLACE_COLUMNS = ("x_px", "y_px", "radius_px")
PAUSE_S = 1.0  # between two looks at a watched folder at most


@dataclass(frozen=True)
class Routine:
    """What every image of a run is judged with."""

    log_path: Path
    model: Path
    params: Params
    catalogue: Path | None = None
    reference: Path | None = None
    difference: bool = False

    @property
    def cache(self) -> Path:
        """Folder of the images that the next stack takes."""
        return self.log_path.with_name("stack")


class Tools(NamedTuple):
    """The same, read and ready."""

    connection: sqlite3.Connection
    run: int
    network: networks.DenseNetwork
    point: detect.OperatingPoint
    known: pd.DataFrame | None


class Blobs(NamedTuple):
    """What is known of blobs before an image is searched.

    Attributes
    ----------
    known : DataFrame
        x_px, y_px, radius_px of the catalogue's, and of those that the log has found since.
    landed : DataFrame
        The same of what the log has found, ``first``: date (MJD) of the image that showed it first; in order of date.
    """

    known: pd.DataFrame
    landed: pd.DataFrame


class Arrival(NamedTuple):
    """A file that the log does not know as it is now."""

    path: Path
    sha256: str
    size_bytes: int
    modified_ns: int


@dataclass(frozen=True)
class Searched:
    """An image after the search.

    Attributes
    ----------
    row : dict
        Columns of ``images``.
    table : DataFrame
        Candidates above `detect.CANDIDATE`, judged, with their probability; none for an image that was not searched.
    subframes : list of dict
        Columns of ``subframes``.
    overview : bytes
        Picture of the whole image; empty if it was not searched.
    draw : callable
        Pictures of one row of ``table``, by kind.
    corrections : dict of bytes
        By SHA-256, of images that a stack has taken for the first time, this one among them (`stacks.correction`).
    rejected : dict of str
        By SHA-256, why images of the log cannot be in a stack after all.
    """

    row: dict[str, Any]
    table: pd.DataFrame
    subframes: list[dict[str, Any]]
    overview: bytes
    draw: Callable[[dict[str, Any]], dict[str, bytes]]
    corrections: dict[str, bytes] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)


def quicklook(folder: Path, routine: Routine) -> int:
    """Process every image of a folder that the log does not have yet, in order of date.

    Parameters
    ----------
    folder : path
        Blob images, or ready differences; other files are left alone.
    routine : Routine

    Returns
    -------
    int
        Images logged.

    Raises
    ------
    FrameError, ModelError, TableError, LogError
        If the folder, the model, the catalogue or the log cannot be used. A bad image is logged as rejected instead.
    """
    if not folder.is_dir():
        raise FrameError(f"{folder}: not found, expected a folder of images; make it or correct the name")
    with _tools(routine) as tools:
        logged = _process(_images_in(folder), tools, routine)
        notify.send(tools.connection, routine.params.notices)
        return logged


def watch(folder: Path, routine: Routine) -> None:
    """Process images as they appear, until interrupted.

    The folder is also looked through every second, so that an event that never came (as on network drives) costs a
    moment and not an image.
    """
    from watchfiles import watch as changes

    if not folder.is_dir():
        raise FrameError(f"{folder}: not found, expected a folder of images; make it or correct the name")
    pause = int(1000 * min(PAUSE_S, max(routine.params.quicklook.settle_s, 0.05)))
    with _tools(routine) as tools:
        log.info("watching %s; Ctrl-C ends it", folder)
        for _ in changes(folder, rust_timeout=pause, yield_on_timeout=True, debounce=50, recursive=False):
            _process(_settled(_images_in(folder), routine.params), tools, routine)
            notify.send(tools.connection, routine.params.notices)


@contextmanager
def _tools(routine: Routine) -> Iterator[Tools]:
    if networks.kind_of_model(routine.model) != "dense":
        raise ModelError(
            f"{routine.model}: the report's network, expected the dense one, which measures; name its file"
        )
    network, point = detect.load_operating_point(routine.model)
    known = None
    if routine.catalogue is not None:
        known = frames.read_known(routine.catalogue, PLACE_COLUMNS)
    networks.set_threads(routine.params.detect.threads)
    connection = store.connect(routine.log_path, make=True)
    try:
        log.info("model: %s", networks.described(routine.model))
        with store.writing(connection):
            run = store.insert(connection, "runs", _run_row(routine, point))
        yield Tools(connection, run, network, point, known)
        with store.writing(connection):
            connection.execute("UPDATE runs SET ended = ? WHERE id = ?", (store.now(), run))
    finally:
        connection.close()


def _run_row(routine: Routine, point: detect.OperatingPoint) -> dict[str, Any]:
    return {
        "started": store.now(),
        "version": __version__,
        "model": str(routine.model),
        "model_sha256": frames.sha256(routine.model),
        "params_sha256": hashlib.sha256(to_yaml(routine.params).encode()).hexdigest(),
        "catalogue_sha256": frames.sha256(routine.catalogue) if routine.catalogue else "",
        "threshold": point.threshold,
    }


def _images_in(folder: Path) -> list[Path]:
    return sorted(
        path for path in folder.iterdir() if path.name.endswith(frames.SUFFIXES) and not path.name.startswith(".")
    )


def _settled(paths: list[Path], params: Params) -> list[Path]:
    """Those that nobody has written to for a while; the others are for the next look."""
    return [path for path in paths if _age_s(path) >= params.quicklook.settle_s]


def _age_s(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0  # gone again: moved while we looked


def _process(paths: list[Path], tools: Tools, routine: Routine) -> int:
    """Log what is new among files; how many images that were."""
    arrivals = [arrival for path in paths if (arrival := _arrival(tools.connection, path, routine.params)) is not None]
    dated = sorted(arrivals, key=lambda arrival: (_date(arrival.path), arrival.path.name))
    logged = 0
    for arrival in tqdm(dated, "quicklook", unit="image", disable=None if dated else True):
        with _one_at_a_time(routine.log_path):
            logged += _log_arrival(arrival, tools, routine)
        notify.send(tools.connection, routine.params.notices)
    return logged


def _arrival(connection: sqlite3.Connection, path: Path, params: Params) -> Arrival | None:
    """What a file is, if the log does not know it so; None if it does, or it is still being written."""
    time.sleep(max(0.0, min(params.quicklook.settle_s - _age_s(path), params.quicklook.settle_s)))
    try:
        before = path.stat()
        known = connection.execute(
            "SELECT 1 FROM files WHERE path = ? AND size_bytes = ? AND modified_ns = ?",
            (str(path.resolve()), before.st_size, before.st_mtime_ns),
        ).fetchone()
        sha256 = "" if known else frames.sha256(path)
        after = path.stat()
    except FileNotFoundError:
        return None
    if known:
        return None
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        log.info("%s: still being written; left for the next look", path)
        return None
    return Arrival(path.resolve(), sha256, after.st_size, after.st_mtime_ns)


def _date(path: Path) -> float:
    """Date of the exposure (MJD); what cannot be read comes last."""
    try:
        return frames.exposure_mjd(frames.read_frame(path), path)
    except FrameError:
        return np.inf


@contextmanager
def _one_at_a_time(log_path: Path) -> Iterator[None]:
    """Wait until no other process works on an image of this log; the system frees the lock of one that is killed."""
    with open(log_path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _log_arrival(arrival: Arrival, tools: Tools, routine: Routine) -> bool:
    """Bring a file into the log; whether it was a new image."""
    connection = tools.connection
    image = connection.execute("SELECT id FROM images WHERE sha256 = ?", (arrival.sha256,)).fetchone()
    if image is not None:  # another process, another name, or the time of the file has changed
        with store.writing(connection):
            _log_file(connection, arrival, image["id"], _known_as(connection, arrival, image["id"]))
        return False
    changed = connection.execute("SELECT 1 FROM files WHERE path = ?", (str(arrival.path),)).fetchone()
    stacks.prune(connection, routine.cache, routine.params.difference.stack_size)  # a run that was killed has not
    searched = search(arrival, tools, routine)
    if not _as_it_was(arrival):
        log.info("%s: moved or changed meanwhile; left for the next look", arrival.path)
        return False
    with store.writing(connection):
        number = store.insert(connection, "images", searched.row)
        _log_file(connection, arrival, number, "changed" if changed else "logged")
        _supersede(connection, number)
        _log_findings(connection, number, searched, tools, routine.params)
        health.crossed(connection, number, routine.params.health)
        notify.queue(connection, number, routine.params.notices)
    stacks.prune(connection, routine.cache, routine.params.difference.stack_size)
    row = searched.row
    log.info("%s: %s%s", row["name"], row["outcome"], f" ({row['reason']})" if row["reason"] else "")
    return True


def _as_it_was(arrival: Arrival) -> bool:
    """Whether a file is still what was hashed: else what was searched could be another image, or none."""
    try:
        found = arrival.path.stat()
    except FileNotFoundError:
        return False
    return (found.st_size, found.st_mtime_ns) == (arrival.size_bytes, arrival.modified_ns)


def _known_as(connection: sqlite3.Connection, arrival: Arrival, image: int) -> str:
    """Whether the bytes are there under another name too, or have only been moved."""
    earlier = connection.execute("SELECT path FROM files WHERE image = ? AND path != ?", (image, str(arrival.path)))
    return "duplicate" if any(Path(row["path"]).exists() for row in earlier) else "renamed"


def _log_file(connection: sqlite3.Connection, arrival: Arrival, image: int, outcome: str) -> None:
    connection.execute(
        "INSERT INTO files (path, sha256, size_bytes, modified_ns, seen, outcome, image) VALUES (?, ?, ?, ?, ?, ?, ?) "
        "ON CONFLICT (path, sha256) DO UPDATE SET size_bytes = excluded.size_bytes, modified_ns = excluded.modified_ns",
        (str(arrival.path), arrival.sha256, arrival.size_bytes, arrival.modified_ns, store.now(), outcome, image),
    )


def search(arrival: Arrival, tools: Tools, routine: Routine) -> Searched:
    """Subtract the stack from an image and search the difference; nothing is written but the cache of the stack."""
    row: dict[str, Any] = {
        "run": tools.run,
        "sha256": arrival.sha256,
        "name": frames.frame_name(arrival.path),
        "kind": "difference" if routine.difference else "image",
        "logged": store.now(),
        "outcome": "rejected",
        "reason": "",
    }
    try:
        frame = frames.usable_image(arrival.path)
        row["header"] = json.dumps({card: frame.header[card] for card in KEPT_CARDS if card in frame.header})
        row["mjd"] = mjd = frames.exposure_mjd(frame, arrival.path)
        row["late"] = _is_late(tools.connection, mjd)
        if (newer := _newer_version(tools.connection, row)) is not None:
            return _not_searched(row | newer)
        level = frame.header.get(LEVEL_CARD)
        row["signal_e"] = float(level) if isinstance(level, (int, float)) and not isinstance(level, bool) else None
        if routine.difference:
            scatter = frames.find_plane(arrival.path, "SCATTER")
            subtraction.insist_on_noise_of_scatter(frame.data, scatter, arrival.path)
            blobs = _blobs(tools, mjd)
            return _search(row, frame.data, (None, scatter), subtraction.NOWHERE, blobs, tools, routine.params)
        return _subtract_and_search(row, frame.data, tools, routine)
    except BlobpipeError as error:
        return _not_searched(row | {"reason": " ".join(str(error).split())})


def _versions(connection: sqlite3.Connection, row: Mapping[str, Any]) -> list[sqlite3.Row]:
    """The images of the log that are of the same exposure and count, in the order in which they were logged."""
    near = connection.execute(
        "SELECT id, name, mjd, header, kind, outcome FROM images "
        "WHERE outcome != 'rejected' AND superseded_by IS NULL AND sha256 != ? AND mjd BETWEEN ? AND ? ORDER BY id",
        (row["sha256"], row["mjd"] - frames.SAME_EXPOSURE_D, row["mjd"] + frames.SAME_EXPOSURE_D),
    ).fetchall()
    return [other for other in near if frames.is_same_exposure(_exposure(row), _exposure(other))]


def _exposure(row: Mapping[str, Any] | sqlite3.Row) -> frames.Exposure:
    return frames.Exposure(row["name"], row["mjd"], json.loads(row["header"]))


def _newer_version(connection: sqlite3.Connection, row: Mapping[str, Any]) -> dict[str, Any] | None:
    """Columns of an image of whose exposure the log has a newer version; None if it has none.

    An image is newer than a difference: stacks take it.
    """
    for other in _versions(connection, row):
        is_image = [each["kind"] == "image" for each in (other, row)]
        if is_image[0] > is_image[1] or (
            is_image[0] == is_image[1] and frames.is_older_version(_exposure(row), _exposure(other))
        ):
            reason = f"an older version of the exposure that the log has as image {other['id']}, {other['name']}"
            return {"reason": reason, "superseded_by": other["id"]}
    return None


def _supersede(connection: sqlite3.Connection, image: int) -> None:
    """Have an image replace the older versions of its exposure, to be called before its findings are logged.

    One that could not be searched, for want of a stack, does not replace one that was: it is superseded itself.
    """
    row = connection.execute("SELECT * FROM images WHERE id = ?", (image,)).fetchone()
    if row["outcome"] == "rejected":
        return
    for other in _versions(connection, row):
        replaces = row["outcome"] == "searched" or other["outcome"] == "stack"
        pair = (image, other["id"]) if replaces else (other["id"], image)
        connection.execute("UPDATE images SET superseded_by = ? WHERE id = ?", pair)


def _is_late(connection: sqlite3.Connection, mjd: float) -> int:
    found = connection.execute(
        "SELECT 1 FROM images WHERE outcome != 'rejected' AND superseded_by IS NULL AND mjd > ? LIMIT 1", (mjd,)
    )
    return int(found.fetchone() is not None)


def _not_searched(row: dict[str, Any]) -> Searched:
    return Searched(row, pd.DataFrame(), [], b"", lambda _: {})


def _subtract_and_search(row: dict[str, Any], image: Image, tools: Tools, routine: Routine) -> Searched:
    params, blobs = routine.params.difference, _blobs(tools, row["mjd"])
    reason = f"fewer than {params.stack_size} usable images before it: it waits for the first stack"
    try:
        stack = stacks.stack_before(
            tools.connection, routine.cache, row["mjd"], params, routine.reference, blobs.landed
        )
    except FrameError as error:  # no fault of this image
        stack, reason = None, " ".join(str(error).split())
    if stack is None:
        return _not_searched(row | {"outcome": "stack", "reason": reason})
    expected = subtraction.noise_for_stack(stack.data, stack.scatter)
    subtraction.insist_on_noise(frames.median_and_noise(image)[1], expected, row["name"])
    data, shift = subtraction.difference_image(image, stack.data, params, blobs.known)
    corrections = dict(stack.corrections)
    if stack.n_images:
        packed = corrections[row["sha256"]] = stacks.correction(image, data, stack.data, shift)
        stacks.keep(routine.cache, row["sha256"], image, packed)
    row |= {"n_stack": stack.n_images, "stack_sha256": stack.sha256}
    searched = _search(row, data, (stack.data, stack.scatter), shift, blobs, tools, routine.params)
    return replace(searched, corrections=corrections, rejected=stack.rejected)


def _search(
    row: dict[str, Any],
    data: Image,
    subtracted: tuple[Image | None, Image | None],
    shift: subtraction.Shift,
    blobs: Blobs,
    tools: Tools,
    params: Params,
) -> Searched:
    """Search a difference, the stack that was subtracted and its scatter known or not."""
    stack, scatter = subtracted
    clipped, clipping = normalize.clip_image(data, params.clip)
    scaled, _ = normalize.scale_image(clipped, params.scale)
    noise = frames.median_and_noise(data)[1]
    cells = dense.probability_map(tools.network, scaled)
    pattern = None if stack is None else subtraction.blob_pattern(stack, blobs.known)
    bad = None if stack is None or pattern is None else measure.bad_pixels(stack, pattern)
    found = detect.judged(
        cells,
        data,
        catalogue=blobs.known,
        shift_px=shift,
        pattern=pattern,
        noise_frac=noise,
        scatter=scatter,
        bad=bad,
        stack=stack,
        seen=blobs.landed[["x_px", "y_px"]].to_numpy(float),
    )
    table = verdict.score(found, tools.point.weights)
    table["probability"] = tools.point.probability(table["score"].to_numpy())
    row |= {"outcome": "searched", "shift_x_px": shift.x_px, "shift_y_px": shift.y_px, "noise_frac": noise}
    row |= {"clipped_frac": clipping.clipped_frac}

    def draw(at: dict[str, Any]) -> dict[str, bytes]:
        x, y = at["x_px"], at["y_px"]
        drawn = {
            "difference": pictures.cutout(data, x, y, noise),
            "map": pictures.probability(cells, x, y, dense.STRIDE),
        }
        if stack is not None:
            drawn["stack"] = pictures.cutout(stack, x, y, frames.median_and_noise(stack)[1])
        return drawn | {"surface": pictures.surface(data, x, y)}

    return Searched(row, table, _subframes(cells, table, tools.point), pictures.overview(scaled), draw)


def _blobs(tools: Tools, mjd: float) -> Blobs:
    """What is known before an image of this date: people and later images confirm; what faded may be a flickering pixel."""
    found = tools.connection.execute(
        "SELECT x_px, y_px, radius_px, first_mjd, decision = 'confirmed' OR status = 'seen_again' FROM candidate_list "
        "WHERE radius_px IS NOT NULL AND (decision = 'confirmed' OR decision != 'rejected' AND status != 'faded') "
        "ORDER BY first_mjd, id"
    ).fetchall()
    rows = pd.DataFrame([tuple(row) for row in found], columns=[*PLACE_COLUMNS, "first", "known"], dtype=float)
    known = [rows.loc[rows["known"] == 1, list(PLACE_COLUMNS)]]
    if tools.known is not None:
        known.insert(0, tools.known[list(PLACE_COLUMNS)])
    return Blobs(pd.concat(known, ignore_index=True), rows[rows["first"] < mjd])


def _subframes(cells: Image, table: pd.DataFrame, point: detect.OperatingPoint) -> list[dict[str, Any]]:
    side = render.SIDE // dense.STRIDE
    rows = []
    for row in range(-(-cells.shape[0] // side)):
        for col in range(-(-cells.shape[1] // side)):
            part = cells[row * side : (row + 1) * side, col * side : (col + 1) * side]
            highest = detect.highest_scores(table, render.SIDE * np.array([[col, row]]))
            rows.append(
                {
                    "row": row,
                    "col": col,
                    "probability": float(point.probability(highest)[0]),
                    "positive": int(highest[0] >= point.threshold),
                    "saliency": pictures.subframe_map(part),
                }
            )
    return rows


def _log_findings(connection: sqlite3.Connection, image: int, searched: Searched, tools: Tools, params: Params) -> None:
    for row in searched.subframes:
        store.insert(connection, "subframes", {"image": image, **row})
    for sha256, packed in searched.corrections.items():
        connection.execute(
            "INSERT INTO corrections (image, bytes) SELECT id, ? FROM images WHERE sha256 = ?", (packed, sha256)
        )
    for sha256, reason in searched.rejected.items():
        connection.execute("UPDATE images SET outcome = 'rejected', reason = ? WHERE sha256 = ?", (reason, sha256))
    if searched.overview:
        whole = {"image": image, "kind": "difference", "type": "image/jpeg", "bytes": searched.overview}
        store.insert(connection, "pictures", whole)
    if searched.row["outcome"] == "searched":
        for number, row in _log_detections(connection, image, searched, tools.point, params):
            for kind, png in searched.draw(row).items():
                picture = {"image": image, "detection": number, "kind": kind, "type": "image/png", "bytes": png}
                store.insert(connection, "pictures", picture)


def _log_detections(
    connection: sqlite3.Connection, image: int, searched: Searched, point: detect.OperatingPoint, params: Params
) -> list[tuple[int, dict[str, Any]]]:
    """Detections, and fainter sightings of candidates; those to be drawn: a candidate's first two sightings."""
    columns = (*measure.DETECTION_COLUMNS, "probability")
    shift = np.array([searched.row["shift_x_px"], searched.row["shift_y_px"]])
    pending = {row["id"] for row in connection.execute("SELECT id FROM candidates WHERE status = 'new'")}
    drawn = []
    seen = set()
    for row, candidate in _with_candidates(connection, searched.table, shift, params.quicklook.match_px):
        above = row["score"] >= point.threshold
        fresh = candidate is None and above and row["status"] == "new"
        if fresh:
            place = {"x_px": row["x_px"] - shift[0], "y_px": row["y_px"] - shift[1]}
            candidate = store.insert(connection, "candidates", {"image": image, "status": "new", **place})
        if candidate is not None:
            seen.add(candidate)
        if candidate is not None or above:
            waiting = fresh or candidate in pending
            detection = {"image": image, "candidate": candidate, **{name: row[name] for name in columns}}
            number = store.insert(connection, "detections", detection)
            drawn += [(number, row)] if waiting else []
    _update_candidates(connection, image, seen, params.quicklook.fade_after)
    return drawn


def _with_candidates(
    connection: sqlite3.Connection, table: pd.DataFrame, shift: npt.NDArray[np.float64], match_px: float
) -> Iterator[tuple[dict[str, Any], int | None]]:
    """Each row of a search, with the candidate of the log that lies there; bad pixels show none.

    What the stack has not learnt yet of a known blob may be measured off its centre: it is matched in a second round.
    """
    places = connection.execute("SELECT id, status, x_px, y_px FROM candidates ORDER BY id").fetchall()
    rows = [dict(row) for _, row in table.iterrows()]
    candidate: dict[int, int] = {}
    for of, status, within_px in ((("new", "known", "dip"), "", match_px), (("known",), "seen_again", detect.NEAR_PX)):
        open_rows = [k for k, row in enumerate(rows) if row["status"] in of and k not in candidate]
        taken = set(candidate.values())
        free = [place for place in places if place["id"] not in taken and status in ("", place["status"])]
        found = np.array([[rows[k]["x_px"], rows[k]["y_px"]] for k in open_rows]).reshape(-1, 2) - shift
        there = np.array([[place["x_px"], place["y_px"]] for place in free]).reshape(-1, 2)
        candidate |= {open_rows[i]: int(free[j]["id"]) for i, j in measure.match(found, there, within_px)}
    for k, row in enumerate(rows):
        yield row, candidate.get(k)


def _update_candidates(connection: sqlite3.Connection, image: int, seen: set[int], fade_after: int) -> None:
    """Mark what is seen again; let fade what later images do not show: a blob never vanishes.

    Where the image replaces older versions of its exposure, what these have shown or missed is counted anew.
    """
    mjd = connection.execute("SELECT mjd FROM images WHERE id = ?", (image,)).fetchone()["mjd"]
    replaced = [row["id"] for row in connection.execute("SELECT id FROM images WHERE superseded_by = ?", (image,))]
    rows = connection.execute(
        "SELECT c.id, c.status, c.missed, c.image, i.mjd, i.superseded_by FROM candidates c JOIN images i ON i.id = c.image"
    ).fetchall()
    shown = {
        row["candidate"]
        for older in replaced
        for row in connection.execute("SELECT candidate FROM detections WHERE image = ?", (older,))
    }
    for row in rows:
        of_old = row["superseded_by"] is not None and row["id"] in seen
        if of_old or row["id"] in shown or (replaced and row["status"] == "new" and row["image"] != image):
            _count_anew(connection, row["id"], fade_after)
        elif row["id"] in seen and row["image"] != image:
            earliest = image if mjd < row["mjd"] else row["image"]
            connection.execute(
                "UPDATE candidates SET status = 'seen_again', image = ? WHERE id = ?", (earliest, row["id"])
            )
        elif row["id"] not in seen and row["status"] == "new" and mjd > row["mjd"]:
            status = "faded" if row["missed"] + 1 >= fade_after else "new"
            connection.execute(
                "UPDATE candidates SET missed = missed + 1, status = ? WHERE id = ?", (status, row["id"])
            )


def _count_anew(connection: sqlite3.Connection, candidate: int, fade_after: int) -> None:
    """Status of a candidate from the versions that count; without a sighting on one of them it has faded."""
    sightings = connection.execute(
        "SELECT DISTINCT i.id, i.mjd FROM detections d JOIN images i ON i.id = d.image "
        "WHERE d.candidate = ? AND i.superseded_by IS NULL ORDER BY i.mjd, i.id",
        (candidate,),
    ).fetchall()
    if not sightings:  # it keeps the one of a superseded version, for those who look back
        connection.execute("UPDATE candidates SET status = 'faded' WHERE id = ?", (candidate,))
        return
    connection.execute(
        "UPDATE detections SET candidate = NULL WHERE candidate = ? "
        "AND image IN (SELECT id FROM images WHERE superseded_by IS NOT NULL)",
        (candidate,),
    )
    image, mjd = sightings[0]
    if len(sightings) > 1:
        connection.execute("UPDATE candidates SET status = 'seen_again', image = ? WHERE id = ?", (image, candidate))
        return
    [missed] = connection.execute(
        "SELECT count(*) FROM images WHERE outcome = 'searched' AND superseded_by IS NULL AND mjd > ? AND id > ?",
        (mjd, _first_version(connection, image)),
    ).fetchone()
    status = "faded" if missed >= fade_after else "new"
    connection.execute(
        "UPDATE candidates SET status = ?, image = ?, missed = ? WHERE id = ?",
        (status, image, min(missed, fade_after), candidate),
    )


def _first_version(connection: sqlite3.Connection, image: int) -> int:
    """The image by which the log came to know an exposure."""
    query = "SELECT min(id) AS id FROM images WHERE superseded_by = ? AND id < ?"
    while (older := connection.execute(query, (image, image)).fetchone()["id"]) is not None:
        image = older
    return image
