"""Describe an infrared detector by one file: its size, its files, its blobs, and how to simulate it.

The files that come with blobpipe are in ``blobpipe/detectors``; the user's own may be anywhere.
"""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import AfterValidator, Field, ValidationError, model_validator

from blobpipe.core.arrays import FloatArray
from blobpipe.errors import ParamsError
from blobpipe.params import SUBFRAME_PX, Range, Section, read_yaml, short_fault

# Zero of the modified Julian date; IAU
MJD_ZERO = datetime(1858, 11, 17)

# 1970-01-01, the zero of the system's clock (MJD)
UNIX_MJD = 40587.0

# Range of dates in tables (MJD), 1858 to 2132; Julian dates and times in seconds lie beyond it
MJD_RANGE = (0.0, 100_000.0)

# Folder of the files that come with blobpipe
FOLDER = Path(__file__).parents[1] / "detectors"

# Radii that the fit can measure (px); `detection.fit`
FITTED_PX = (0.7, 12.7)

# Side of the largest detector (px); images of 4096 x 4096 px are the largest that are read
MAX_SIDE_PX = 4096

# Smallest number of boxes of the background along a side; a cubic spline runs through their medians
MIN_BOXES = 4


def _card(text: str) -> str:
    """Refuse what is neither empty, nor the name of a FITS card, nor a path in an ASDF tree."""
    if not re.fullmatch(r"|[A-Z0-9_-]{1,8}|\w+(\.\w+)+", text):
        raise ValueError(
            f'found {text!r}, expected the name of a FITS card, a path such as roman.meta.filename, or ""'
        )
    return text


def _pattern(text: str) -> str:
    """Refuse what is no regular expression."""
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"found {text!r}, expected a regular expression ({error})") from error
    return text


Card = Annotated[str, AfterValidator(_card)]
Coordinate = Annotated[float, Field(ge=0, lt=MAX_SIDE_PX)]
CardValue = str | int | float


class Exposures(Section):
    """Files of calibrated exposures, from which `flatten` makes blob images."""

    format: Literal["fits", "asdf"] = Field(description="Format of the files.")
    image: str = Field(
        min_length=1,
        description="Extension (FITS) or path in the tree (ASDF) of the image; {detector} stands for each of detectors.",
    )
    dq: str = Field(description='The same of the data-quality flags; "": none.')
    error: str = Field(description='The same of the standard errors; "": none.')
    detectors: tuple[Annotated[str, Field(pattern=r"^\w+$")], ...] = Field(
        description="Names of the detectors whose images are in one file, each an image of its own; empty: one detector."
    )
    unit: Literal["light_lost", "counts", "surface_brightness"] = Field(
        description="light_lost: flattened already, around zero, a fraction of the light; the others: any unit that is proportional to the light."
    )
    blobs: Literal["negative", "positive"] = Field(
        description="Sign of a blob in these values; where light is measured, a blob is negative."
    )
    flat_card: Card = Field(
        description='Card that says whether the exposure has been divided by the flat; "": none.'
    )
    flat_done: str = Field(description="Its value once that has been done.")
    bad_dq: int = Field(
        ge=0,
        lt=2**32,
        description="Sum of the DQ flags that make a pixel bad; bad_pixels.dq_flags of the settings replaces it.",
    )
    box_px: int = Field(
        ge=16,
        le=500,
        description="Side of the boxes of the background (px): three times the largest blob.",
    )

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        names = (self.image, self.dq, self.error)
        if self.detectors and not all("{detector}" in name for name in names if name):
            raise ValueError(
                "found several detectors, expected {detector} in the names of image, dq and error"
            )
        if not self.detectors and any("{" in name for name in names):
            raise ValueError("found {...} in a name, expected detectors to list what it stands for")
        if len(set(self.detectors)) < len(self.detectors):
            raise ValueError("detectors lists one of them twice; remove it")
        if bool(self.flat_card) != bool(self.flat_done):
            raise ValueError('found one of flat_card and flat_done, expected both or "" for both')
        if self.bad_dq and not self.dq:
            raise ValueError(
                f"bad_dq is {self.bad_dq} and dq is empty; name the image dq, or set bad_dq to 0"
            )
        return self


class Cards(Section):
    """Header cards (FITS) or paths in the tree (ASDF); "" where there is none."""

    date: Card = Field(min_length=1, description="Start of the exposure: MJD, or ISO 8601 in UTC.")
    target: Card = Field(description="Target.")
    filter: Card = Field(description="Filter.")
    exposure: Card = Field(description="Name of the exposure, the same in all its versions.")
    level: Card = Field(description="Level of the light (electrons per pixel).")


class SizeLaw(Section):
    """Radius of a blob as a plane over the detector."""

    at_origin_px: float = Field(description="Radius at x = y = 0 (px).")
    per_x: float = Field(description="Its change per pixel along x.")
    per_y: float = Field(description="Its change per pixel along y.")
    scatter: float = Field(
        gt=0, le=1, description="Scatter of radii about it (1 sigma of the logarithm)."
    )


class Blobs(Section):
    """What blobs look like."""

    radius_px: Range = Field(description="Smallest and largest radius of the best top-hat (px).")
    size_law: SizeLaw | None = Field(
        description="Radius by position; null: not known, and any radius counts as usual."
    )

    @model_validator(mode="after")
    def _can_be_fitted(self) -> Self:
        low, high = FITTED_PX
        if self.radius_px[0] < low or self.radius_px[1] > high:
            raise ValueError(
                f"radius_px: found {list(self.radius_px)}, expected {low} to {high}, the radii that can be measured"
            )
        return self


class Motion(Section):
    """What moves on the detector from image to image."""

    moves: Literal["all_blobs", "nothing"] = Field(
        description="all_blobs: all blobs together, as particles on a mirror do."
    )
    largest_px: float = Field(
        ge=0,
        le=6,
        description="Largest shift (px); larger ones are mistakes, and more than 6 is not corrected.",
    )

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if (self.moves == "nothing") != (self.largest_px == 0):
            raise ValueError(
                f"found moves: {self.moves} and largest_px: {self.largest_px:g}, expected 0 if nothing moves, else more"
            )
        return self


class BadPixelTable(Section):
    """The detector's bad-pixel tables."""

    layout: Literal["runs", "image"] = Field(
        description="runs: rows of PIX1, PIX2, LENGTH, AXIS, VALUE (BPIXTAB); image: a DQ image alone."
    )
    frame: Literal["light", "full"] = Field(
        description="Where pixels are counted from: without the border (light), or with it (full)."
    )
    blob_bit: int = Field(ge=1, lt=2**31, description="DQ bit of a blob.")
    disc_px: Range = Field(description="Smallest and largest radius of a blob's disc (px).")
    columns: dict[str, CardValue] = Field(description="Further columns of a row, and their values.")
    header: dict[str, CardValue] = Field(description="Cards of the primary header.")

    @model_validator(mode="after")
    def _is_one_bit(self) -> Self:
        if self.blob_bit.bit_count() != 1:
            raise ValueError(f"blob_bit: found {self.blob_bit}, expected a power of 2")
        return self


class Archive(Section):
    """The monitor's exposures in MAST."""

    criteria: dict[str, str] = Field(min_length=1, description="Criteria of a query.")
    product: str = Field(min_length=1, description="Kind of product.")
    file_name: Annotated[str, AfterValidator(_pattern)] = Field(
        description="Regular expression of the names of its files."
    )


class Simulation(Section):
    """What is peculiar to simulated images of the detector; null where it has no such feature."""

    header: dict[str, CardValue] = Field(description="Cards of every image.")
    n_clusters: int = Field(ge=0, le=100_000, description="Clusters of bad pixels (count).")
    dead_disc_px: tuple[Coordinate, Coordinate, Coordinate] | None = Field(
        description="x, y and radius of a disc of dead pixels whose rim flickers (px)."
    )
    wagon_wheel_px: tuple[Coordinate, Coordinate] | None = Field(
        description="x, y of the hub of a pattern of rings and spokes (px)."
    )
    dark_streak_x_px: Coordinate | None = Field(
        description="x of a nearly vertical dark streak (px)."
    )
    notch_x_px: Coordinate | None = Field(
        description="x of the middle of a notch in the upper edge (px)."
    )


class Detector(Section):
    """An infrared detector, as its file describes it."""

    title: str = Field(min_length=1, max_length=40, description="Name, for pages and messages.")
    width_px: int = Field(
        ge=SUBFRAME_PX, le=MAX_SIDE_PX, description="Width, with the border (px)."
    )
    height_px: int = Field(
        ge=SUBFRAME_PX, le=MAX_SIDE_PX, description="Height, with the border (px)."
    )
    border_px: int = Field(ge=0, le=64, description="Reference pixels on each side (px).")
    amplifiers: tuple[Annotated[int, Field(ge=1, le=64)], Annotated[int, Field(ge=1, le=64)]] = (
        Field(description="Amplifiers along x and along y (count).")
    )
    gain_e: float = Field(gt=0, le=1000, description="Gain (electrons per DN).")
    read_noise_e: float = Field(ge=0, le=1000, description="Read noise of a pixel (electrons).")
    difference_noise_frac: float = Field(
        gt=0, lt=0.5, description="Noise of a usual difference image (fraction of the light)."
    )
    subframe_px: Literal[256] = Field(
        description="Side of the subframes of the report's network (px); both networks are made for 256."
    )
    first_mjd: float = Field(
        ge=MJD_RANGE[0], le=MJD_RANGE[1], description="Earliest date of an exposure (MJD)."
    )
    exposure: Exposures = Field(description="Files of exposures.")
    cards: Cards = Field(description="Header cards.")
    blobs: Blobs = Field(description="What blobs look like.")
    motion: Motion = Field(description="What moves.")
    bad_pixel_table: BadPixelTable = Field(description="Bad-pixel tables.")
    archive: Archive | None = Field(description="The archive; null: none.")
    simulation: Simulation = Field(description="Simulated images.")

    def __hash__(self) -> int:
        """Return the hash of all entries, so that what is drawn for a detector can be cached."""
        return hash(self.model_dump_json())

    @property
    def shape(self) -> tuple[int, int]:
        """Return the shape of a full frame, (ny, nx)."""
        return (self.height_px, self.width_px)

    @property
    def n_px(self) -> int:
        """Return the number of pixels of a full frame."""
        return self.width_px * self.height_px

    @property
    def light_shape(self) -> tuple[int, int]:
        """Return the shape of a full frame without its border, (ny, nx)."""
        return (self.height_px - 2 * self.border_px, self.width_px - 2 * self.border_px)

    @property
    def sizes(self) -> str:
        """Return both sizes in words, such as 1014x1014 or 1024x1024."""
        shapes = dict.fromkeys((self.light_shape, self.shape))
        return " or ".join(f"{nx}x{ny}" for ny, nx in shapes)

    @property
    def moves(self) -> bool:
        """Say whether blobs move from image to image."""
        return self.motion.moves == "all_blobs"

    @property
    def table_offset(self) -> int:
        """Return what is added to a 0-based coordinate to count pixels as bad-pixel tables do."""
        return 1 if self.bad_pixel_table.frame == "full" else 1 - self.border_px

    def typical_radius(self, x_px: FloatArray, y_px: FloatArray) -> FloatArray:
        """Return the typical best top-hat radius (px) of blobs at positions (px).

        Without a law of size it is the geometric mean of the smallest and the largest radius.
        """
        law = self.blobs.size_law
        if law is None:
            return np.full(np.shape(x_px), np.sqrt(np.prod(self.blobs.radius_px)))
        return law.at_origin_px + law.per_x * x_px + law.per_y * y_px

    def without_border(self, plane: Any) -> Any:
        """Return a plane without its border, if it has one."""
        b = self.border_px
        if plane.shape != self.shape or not b:
            return plane
        return plane[b:-b, b:-b]

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        self._check_sizes()
        self._check_blobs()
        self._check_features()
        return self

    def _check_sizes(self) -> None:
        """Refuse a border, boxes or amplifiers that do not fit the detector."""
        if min(self.light_shape) < SUBFRAME_PX:
            raise ValueError(
                f"border_px={self.border_px} leaves {self.light_shape[1]}x{self.light_shape[0]} pixels, expected at "
                f"least {SUBFRAME_PX}x{SUBFRAME_PX}"
            )
        for n, side, name in zip(
            self.amplifiers, (self.width_px, self.height_px), ("width_px", "height_px"), strict=True
        ):
            if side % n:
                raise ValueError(f"amplifiers: {n} do not divide {name}={side}")
        box = self.exposure.box_px
        if min(self.light_shape) < MIN_BOXES * box:
            raise ValueError(
                f"exposure.box_px={box}, expected at least {MIN_BOXES} boxes along each side of "
                f"{self.light_shape[1]}x{self.light_shape[0]} pixels"
            )

    def _check_blobs(self) -> None:
        """Refuse a law of size, discs, or flags that contradict the rest."""
        low, high = self.blobs.radius_px
        corners = np.array(
            [[0, self.width_px, 0, self.width_px], [0, 0, self.height_px, self.height_px]]
        )
        radii = self.typical_radius(*corners)
        if self.blobs.size_law and not (low <= radii.min() and radii.max() <= high):
            raise ValueError(
                f"blobs.size_law gives radii of {radii.min():.1f} to {radii.max():.1f} px in the corners, expected "
                f"them within radius_px, {low:g} to {high:g}"
            )
        if self.exposure.bad_dq & self.bad_pixel_table.blob_bit:
            raise ValueError(
                f"exposure.bad_dq={self.exposure.bad_dq} holds blob_bit={self.bad_pixel_table.blob_bit}: known blobs "
                "would be bad pixels; subtract it"
            )
        if self.bad_pixel_table.disc_px[1] >= min(self.shape):
            raise ValueError(
                f"bad_pixel_table.disc_px: found {list(self.bad_pixel_table.disc_px)}, expected radii smaller than the detector"
            )

    def _check_features(self) -> None:
        """Refuse features of the simulation that lie off the detector."""
        found = self.simulation
        places = {
            "dead_disc_px": (found.dead_disc_px or ())[:2],
            "wagon_wheel_px": found.wagon_wheel_px or (),
            "dark_streak_x_px": () if found.dark_streak_x_px is None else (found.dark_streak_x_px,),
            "notch_x_px": () if found.notch_x_px is None else (found.notch_x_px,),
        }
        for name, place in places.items():
            if any(
                value >= side
                for value, side in zip(place, (self.width_px, self.height_px), strict=False)
            ):
                raise ValueError(
                    f"simulation.{name}: found {list(place)}, expected a place on {self.width_px}x{self.height_px} pixels"
                )
        if self.cards.date[:1].islower() != (self.exposure.format == "asdf"):
            raise ValueError(
                f"cards.date is {self.cards.date}, expected a card of a FITS file or a path in an ASDF tree, as "
                f"exposure.format is {self.exposure.format}"
            )


def read_detector(named: str | Path) -> Detector:
    """Read the file of a detector, by the name of one that comes with blobpipe or by its path.

    Raises
    ------
    ParamsError
        One line that names the file, the entry, what was found and what was expected.
    """
    path = find_detector(named)
    found = read_yaml(path)
    if not isinstance(found, dict):
        kind = "nothing" if found is None else type(found).__name__
        raise ParamsError(
            f"{path}: found {kind}, expected the entries of a detector; 'blobpipe detector new' writes them"
        )
    try:
        return Detector.model_validate_json(json.dumps(found))
    except (ValidationError, TypeError, ValueError) as error:
        fault = short_fault(error).replace("'blobpipe params'", "'blobpipe detector show wfc3_ir'")
        raise ParamsError(f"{path}: {fault}") from error


def find_detector(named: str | Path) -> Path:
    """Return the path of a detector's file, by the name of one that comes with blobpipe or by its path.

    Raises
    ------
    ParamsError
        If there is none of that name.
    """
    if not re.fullmatch(r"\w+", str(named)):
        return Path(named)
    path = FOLDER / f"{named}.yaml"
    if not path.exists():
        raise ParamsError(
            f"detector: found {named}, expected {', '.join(detector_names())}, or the path of a file such as "
            f"./{named}.yaml"
        )
    return path


def detector_names() -> list[str]:
    """Return the names of the detectors whose files come with blobpipe."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


# The detector of functions that are given none
DEFAULT = read_detector("wfc3_ir")
