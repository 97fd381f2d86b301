"""Options of a run of quicklook, and what is opened and read for it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from blobpipe.core.detector import Detector, read_detector
from blobpipe.detection.detectors import DenseDetector
from blobpipe.images.bad_pixels import BadPixels
from blobpipe.monitor import logbook
from blobpipe.params import Params
from blobpipe.quicklook import running_stack

# Columns of a table of known blobs
PLACE_COLUMNS = ("x_px", "y_px", "radius_px")


@dataclass(frozen=True)
class Options:
    """Settings and files of a run.

    Attributes
    ----------
    log_path : path
    model : path
        Dense network.
    params : Params
    catalogue : path, optional
        Known blobs: a table with x_px, y_px, radius_px.
    reference : path, optional
        Median stack to subtract as long as the log has too few images.
    difference : bool
        The images are difference images already.
    again : bool
        Search images once more that were rejected, or kept for stacks alone.
    bad_pixels : tuple of path
        Files of bad pixels, besides those of the settings.
    operating_point : path, optional
        From `blobpipe calibrate`; its threshold replaces the model's. By default the file of the settings, if any.
    batch : int, optional
        Only this batch of the images in the folder's ``frames.csv``; by default all images of the folder.
    """

    log_path: Path
    model: Path
    params: Params
    catalogue: Path | None = None
    reference: Path | None = None
    difference: bool = False
    again: bool = False
    bad_pixels: tuple[Path, ...] = ()
    operating_point: Path | None = None
    batch: int | None = None

    @cached_property
    def instrument(self) -> Detector:
        """Return the detector of the settings."""
        return read_detector(self.params.detector)

    @property
    def point_path(self) -> Path | None:
        """Return the file of the operating point: the option's, else that of the settings."""
        named = self.params.quicklook.operating_point
        return self.operating_point or (Path(named) if named else None)


@dataclass(frozen=True)
class Run:
    """A run of quicklook: its options, and what has been opened and read for it.

    Attributes
    ----------
    options : Options
    connection : logbook.Log
        The open log.
    number : int
        Row of the run in the table ``runs``.
    detector : DenseDetector
    catalogue : DataFrame or None
        Known blobs.
    cache : running_stack.Cache
        Images that the next stack takes, beside the log.
    """

    options: Options
    connection: logbook.Log
    number: int
    detector: DenseDetector
    catalogue: pd.DataFrame | None
    cache: running_stack.Cache

    @property
    def params(self) -> Params:
        """Return the settings."""
        return self.options.params

    @property
    def instrument(self) -> Detector:
        """Return the detector whose images are searched."""
        return self.options.instrument

    @property
    def bad_pixels(self) -> BadPixels:
        """Return the pixels that have no value."""
        return self.cache.bad_pixels
