"""Date the blobs of a catalogue from an archive of images: positions in, landing dates out."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from blobpipe.core import fits_images, plotting, tables
from blobpipe.core.arrays import Image
from blobpipe.core.dates import (
    SAME_EXPOSURE_D,
    Exposure,
    exposure_mjd,
    exposure_of,
    format_mjd,
    is_same_exposure,
)
from blobpipe.core.detector import DEFAULT, Detector
from blobpipe.errors import FrameError, TableError
from blobpipe.history import landing
from blobpipe.history.depths import Depths, measure_depths
from blobpipe.history.landing import Landing, date_history
from blobpipe.images.bad_pixels import BadPixels
from blobpipe.images.listing import list_images
from blobpipe.images.pattern import blob_pattern
from blobpipe.images.register import NO_SHIFT, Shift, measure_shift, register_images
from blobpipe.images.stack import running_median
from blobpipe.noise.level import clean_noise, noise_near, require_noise
from blobpipe.params import Difference

if TYPE_CHECKING:
    from matplotlib.axes import Axes

log = logging.getLogger(__name__)

# Depth over its error from which a blob without a landing was there before the first image; the pixels' own
# pattern, which a depth contains, stays below
OLDER_SNR = 10.0

# Columns that dating adds to a catalogue
DATED_COLUMNS = (
    *("first_frame", "first_mjd", "after_mjd", "before_mjd", "after_frame", "before_frame"),
    *("step_frac", "step_err_frac", "history", "log_odds"),
)

HISTORY_COLUMNS = ("blob", "frame", "mjd", "depth_frac", "depth_err_frac")
FRAME_COLUMNS = ("frame", "mjd", "status", "reason", "noise_frac")

# Blobs that a figure shows, the strongest first (count), and its columns
MOST_DRAWN = 24
N_COLUMNS = 3


@dataclass(frozen=True)
class Reference:
    """What images are compared with: their first ones.

    Attributes
    ----------
    stack : ndarray, shape (ny, nx), float32
        Median of the first images (fraction of the light).
    pattern : ndarray, shape (ny, nx), float32
        Its blobs, by which images are registered.
    pixels : ndarray, shape (ny, nx), float32
        The stack without blobs: the pixels' own pattern.
    """

    stack: Image
    pattern: Image
    pixels: Image


def date_catalogue(
    folder: Path,
    catalogue: Path,
    out_dir: Path,
    params: Difference,
    *,
    bad_pixels: BadPixels | None = None,
    detector: Detector = DEFAULT,
    threads: int = 2,
) -> int:
    """Find when the blobs of a catalogue landed, from all images of a folder.

    Parameters
    ----------
    folder : path
        Blob images. Their dates are those of ``frames.csv``, where the folder has one, else of the headers.
    catalogue : path
        x_px, y_px; if it has them, blob, radius_px (else the typical one of the place) and shape.
    out_dir : path
        ``blobs.csv``: the catalogue with `DATED_COLUMNS`; ``first_frame`` is empty for a blob that was there
        before the first image, or whose history shows no landing (column ``history``). ``history.csv``: the depth of
        each blob on each image. ``frames.csv``: the images by date, with the reason for which one was rejected.
        ``history.png``.
    params : Difference
        The first ``stack_size`` images define the usual place of the blobs.
    bad_pixels : BadPixels, optional
    detector : Detector, optional
        WFC3/IR if not given.
    threads : int
        Images measured in parallel; the results do not depend on it.

    Returns
    -------
    int
        0, or 1 if an image was rejected.

    Raises
    ------
    FrameError
        If the folder holds too few usable images.
    TableError
        If the catalogue cannot be read.
    """
    blobs = read_positions(catalogue, detector)
    bad = bad_pixels or BadPixels(dq_flags=detector.exposure.bad_dq)
    frames = _list_images(folder, bad, detector, threads)
    reference = _make_reference(
        _read_first(frames, params.stack_size, folder, bad, detector), blobs, detector
    )
    usable = _usable(frames, folder)

    # One image after the other: memory does not grow with their number

    def measure(path: Path) -> tuple[Shift, Depths] | FrameError:
        try:
            image = _read(path, bad, detector)
        except FrameError as error:  # it was sound when it was looked at
            return error
        shift = NO_SHIFT
        if params.register_shift and detector.moves:
            shift = measure_shift(
                image, reference.stack, reference.pattern, detector.motion.largest_px
            )
        noise = clean_noise(image - reference.stack)
        return shift, measure_depths(image - reference.pixels, blobs, noise, shift=shift)

    with ThreadPoolExecutor(threads) as pool:
        work = pool.map(measure, usable["path"])
        results = list(tqdm(work, "history", len(usable), unit="image", disable=None))
    for k, result in zip(usable.index, results, strict=True):
        if isinstance(result, FrameError):
            _reject(frames, k, result)
    usable = _usable(frames, folder)
    done = [result for result in results if not isinstance(result, FrameError)]
    depth = np.array([depths.depth_frac for _, depths in done])
    error = np.array([depths.error_frac for _, depths in done])

    # A landing for each blob
    usable = usable.reset_index(drop=True)
    histories = [History(usable, depth[:, k], error[:, k]) for k in range(len(blobs))]
    dated = blobs.join(pd.DataFrame([history.row() for history in histories], index=blobs.index))
    tables.write_table(out_dir / "history.csv", _long_table(blobs, histories))
    tables.write_table(out_dir / "frames.csv", frames[list(FRAME_COLUMNS)])
    tables.write_table(out_dir / "blobs.csv", dated)
    draw_histories(out_dir / "history.png", blobs, histories)
    counts = dated["history"].value_counts()
    log.info(
        "%d images, %d blobs: %s; tables and figure in %s",
        len(usable),
        len(blobs),
        ", ".join(f"{n} {name}" for name, n in counts.items()),
        out_dir,
    )
    return int((frames["status"] != "ok").any())


def read_positions(path: Path, detector: Detector = DEFAULT) -> pd.DataFrame:
    """Read a catalogue of positions; what it lacks of name, radius and shape is filled in.

    Raises
    ------
    TableError
        As `tables.read_known`, or if there is no row.
    """
    blobs = tables.read_known(path, ("x_px", "y_px"), detector)
    if blobs.empty:
        raise TableError(
            f"{path}: found no row below its header, expected one for each blob; list the positions"
        )
    if "blob" not in blobs:
        blobs.insert(0, "blob", [f"b{k + 1:04d}" for k in range(len(blobs))])
    if "radius_px" in blobs:
        blobs = tables.require_blobs(path, blobs, ("radius_px",), detector)
    else:
        blobs["radius_px"] = detector.typical_radius(
            blobs["x_px"].to_numpy(float), blobs["y_px"].to_numpy(float)
        )
    if "shape" not in blobs:
        blobs["shape"] = "disc"
    return blobs.drop(columns=[name for name in DATED_COLUMNS if name in blobs])


@dataclass(frozen=True)
class History:
    """The depth of one blob on each image, and what it says.

    Attributes
    ----------
    frames : DataFrame
        frame and mjd of the images, by date.
    depth_frac, error_frac : ndarray, shape (n,)
        Fraction of the light; NaN where it could not be measured.
    """

    frames: pd.DataFrame
    depth_frac: np.ndarray[Any, np.dtype[np.float64]]
    error_frac: np.ndarray[Any, np.dtype[np.float64]]

    def landing(self) -> Landing | None:
        """Return the landing; None if too few depths were measured."""
        mjd = self.frames["mjd"].to_numpy(float)
        return date_history(mjd, self.depth_frac, self.error_frac)

    def row(self) -> dict[str, Any]:
        """Return `DATED_COLUMNS`."""
        found = self.landing()
        row: dict[str, Any] = dict.fromkeys(DATED_COLUMNS, np.nan)
        row |= {"first_frame": "", "after_frame": "", "before_frame": "", "history": "not measured"}
        if found is None:
            return row
        row |= {"history": found.verdict, "log_odds": found.log_odds}
        if found.verdict == "landed":
            names = self.frames["frame"].to_numpy()
            mjd = self.frames["mjd"].to_numpy(float)
            first = {"first_frame": names[found.first], "first_mjd": mjd[found.first]}
            after = int(np.searchsorted(mjd, found.after_mjd, "right")) - 1
            before = int(np.searchsorted(mjd, found.before_mjd, "left"))
            between = {"after_frame": names[after], "before_frame": names[before]}
            interval = {"after_mjd": found.after_mjd, "before_mjd": found.before_mjd}
            step = {"step_frac": found.depth_frac, "step_err_frac": found.depth_err_frac}
            return row | first | between | interval | step

        # Without a step, a depth throughout is that of a blob older than the images
        if found.verdict == "nothing" and self._is_deep():
            row |= {"history": "older", "step_frac": float(np.nanmedian(self.depth_frac))}
        return row

    def _is_deep(self) -> bool:
        """Return whether a blob stands out of the images throughout."""
        n = np.isfinite(self.depth_frac).sum()
        return bool(np.nanmedian(self.depth_frac / self.error_frac) * np.sqrt(n) > OLDER_SNR)


def _list_images(folder: Path, bad: BadPixels, detector: Detector, threads: int) -> pd.DataFrame:
    """Return the images of a folder by date: frame, mjd, status (ok or rejected), reason, path, noise_frac."""
    if not folder.is_dir():
        raise FrameError(f"{folder}: not found, expected a folder of blob images; correct the name")
    paths = list_images(folder)
    listed: dict[str, float] = {}
    if (folder / "frames.csv").exists():
        table = tables.read_frame_list(folder)
        listed = dict(zip(table["frame"], table["mjd"].astype(float), strict=True))

    def look(path: Path) -> dict[str, Any]:
        name = fits_images.frame_name(path)
        row: dict[str, Any] = {"frame": name, "mjd": listed.get(name, np.nan), "path": path}
        try:
            frame = bad.blank(fits_images.read_frame(path, detector), path)
            noise = fits_images.require_usable(frame, path)
            row |= {"noise_frac": noise, "shape": frame.data.shape}
            row["exposure"] = exposure_of(frame, path, detector)
            if name not in listed:
                row["mjd"] = exposure_mjd(frame, path, detector)
        except FrameError as error:
            return row | {"status": "rejected", "reason": str(error)}
        return row | {"status": "ok", "reason": ""}

    with ThreadPoolExecutor(threads) as pool:
        rows = list(tqdm(pool.map(look, paths), "images", len(paths), unit="image", disable=None))
    columns = ["frame", "mjd", "status", "reason", "noise_frac", "shape", "path", "exposure"]
    frames = pd.DataFrame(rows, columns=columns)
    frames = frames.sort_values(["mjd", "frame"], ignore_index=True)
    _reject_others(frames)
    _reject_repeats(frames)
    for reason in frames.loc[frames["status"] == "rejected", "reason"]:
        _warn_of_rejected(reason)
    return frames.drop(columns=["shape", "exposure"])


def _reject(frames: pd.DataFrame, k: Any, error: FrameError) -> None:
    """Reject an image, in place, and say so."""
    frames.loc[k, ["status", "reason"]] = ["rejected", str(error)]
    _warn_of_rejected(str(error))


def _warn_of_rejected(reason: str) -> None:
    """Say in one line why an image is left out."""
    log.warning("blobpipe: %s (rejected)", " ".join(reason.split()))


def _usable(frames: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """Return the images that are not rejected, with their rows' numbers; refuse too few."""
    usable = frames[frames["status"] == "ok"]
    if len(usable) < landing.FEWEST:
        raise FrameError(
            f"{folder}: found {len(usable)} usable images, expected at least {landing.FEWEST}; add images"
        )
    return usable


def _reject_others(frames: pd.DataFrame) -> None:
    """Reject images whose noise or size is not that of most, in place."""
    usable = frames["status"] == "ok"
    if not usable.any():
        return
    expected = noise_near(float(frames.loc[usable, "noise_frac"].median()))
    shape = frames.loc[usable, "shape"].mode()[0]
    for k in frames.index[usable]:
        path = frames.loc[k, "path"]
        try:
            require_noise(float(frames.loc[k, "noise_frac"]), expected, path)
            if frames.loc[k, "shape"] != shape:
                (ny, nx), (ny_most, nx_most) = frames.loc[k, "shape"], shape
                raise FrameError(
                    f"{path}: found {nx}x{ny} pixels, expected {nx_most}x{ny_most} as most; leave it out"
                )
        except FrameError as error:
            frames.loc[k, ["status", "reason"]] = ["rejected", str(error)]


def _reject_repeats(frames: pd.DataFrame) -> None:
    """Reject further versions of an exposure, in place: they would count as further sightings of its blobs."""
    names: set[str] = set()
    recent: list[tuple[float, Exposure]] = []
    for k in frames.index[frames["status"] == "ok"]:
        name, mjd, exposure = frames.loc[k, ["frame", "mjd", "exposure"]]
        recent = [(day, other) for day, other in recent if mjd - day < SAME_EXPOSURE_D]
        if name in names or any(is_same_exposure(exposure, other) for _, other in recent):
            reason = f"{frames.loc[k, 'path']}: another version of an exposure, expected one; leave it out"
            frames.loc[k, ["status", "reason"]] = ["rejected", reason]
            continue
        names.add(name)
        recent.append((mjd, exposure))


def _read(path: Path, bad: BadPixels, detector: Detector) -> Image:
    """Read an image, NaN where it has no value."""
    data = bad.blank(fits_images.read_frame(path, detector), path).data
    return np.where(np.isfinite(data), data, np.float32(np.nan))


def _read_first(
    frames: pd.DataFrame, n: int, folder: Path, bad: BadPixels, detector: Detector
) -> Image:
    """Read the first usable images, shape (n, ny, nx); those that can no longer be read are rejected, in place, and the next ones read."""
    while True:
        paths = _usable(frames, folder)["path"].head(n)
        images = []
        for k, path in paths.items():
            try:
                images.append(_read(path, bad, detector))
            except FrameError as error:  # it was sound when it was looked at
                _reject(frames, k, error)
        if len(images) == len(paths):
            return np.stack(images)


def _make_reference(images: Image, blobs: pd.DataFrame, detector: Detector) -> Reference:
    """Make the reference of the first images, registered to each other."""
    blurred = running_median(images, len(images))[0]
    registered, _ = register_images(
        images, blurred, blob_pattern(blurred), largest_px=detector.motion.largest_px
    )
    stack = running_median(registered, len(registered))[0]
    return Reference(stack, blob_pattern(stack), stack - blob_pattern(stack, blobs))


def _long_table(blobs: pd.DataFrame, histories: list[History]) -> pd.DataFrame:
    """Return the depth of each blob on each image, one row each."""
    parts = []
    for name, history in zip(blobs["blob"], histories, strict=True):
        part = history.frames[["frame", "mjd"]].assign(
            blob=name, depth_frac=history.depth_frac, depth_err_frac=history.error_frac
        )
        parts.append(part)
    return pd.concat(parts, ignore_index=True)[list(HISTORY_COLUMNS)]


def draw_histories(path: Path, blobs: pd.DataFrame, histories: list[History]) -> None:
    """Draw the histories of the blobs whose landing is clearest, with error bars and the fitted step."""
    import matplotlib.pyplot as plt

    found = [history.landing() for history in histories]
    odds = [-np.inf if each is None else each.log_odds for each in found]
    order = np.argsort(odds)[::-1][:MOST_DRAWN]
    n_rows = max(int(np.ceil(len(order) / N_COLUMNS)), 1)
    figure, axes = plt.subplots(
        n_rows, N_COLUMNS, figsize=(4.2 * N_COLUMNS, 2.2 * n_rows), squeeze=False, sharex=True
    )
    for axis in axes.flat[len(order) :]:
        axis.set_axis_off()
    for axis, k in zip(axes.flat, order, strict=False):
        draw_history(axis, histories[k], found[k])
        axis.set_title(
            f"{blobs['blob'].iloc[k]}{_interval_text(found[k])}", fontsize=plotting.SMALL
        )
        axis.locator_params(axis="x", nbins=4)
    figure.suptitle(
        "Depth on each image, with its error (one sigma); orange: the fitted step; "
        "blue: when the blob landed (90 %)"
    )
    figure.supxlabel("date (MJD)")
    figure.supylabel("depth (% of the light)")
    figure.tight_layout()
    plotting.save(figure, path)


def draw_history(axis: Axes, history: History, found: Landing | None) -> None:
    """Draw one history: depths with error bars, the fitted step, the interval of the landing."""
    mjd = history.frames["mjd"].to_numpy(float)
    axis.errorbar(
        mjd,
        100 * history.depth_frac,
        100 * history.error_frac,
        fmt=".",
        markersize=3,
        linewidth=0.6,
        color=plotting.GREY,
    )
    if found is None or found.verdict != "landed":
        return
    level = 100 * found.level_frac
    step = [level, level + 100 * found.depth_frac]
    date = mjd[found.first]
    axis.plot([mjd[0], date, date, mjd[-1]], np.repeat(step, 2), color=plotting.ORANGE)
    axis.axvspan(found.after_mjd, found.before_mjd, color=plotting.BLUE, alpha=0.25)


def _interval_text(found: Landing | None) -> str:
    """Return the interval of a landing as the end of a title; empty without one."""
    if found is None or found.verdict != "landed":
        return ""
    return f": {format_mjd(found.after_mjd)} to {format_mjd(found.before_mjd)}"
