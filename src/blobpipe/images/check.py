"""Describe what a file is, say if it can be searched for blobs, and draft the file of a detector from an example."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from blobpipe.core import fits_images, hdus
from blobpipe.core.dates import DATE_CARDS, MJD_CARDS
from blobpipe.core.detector import DEFAULT, Detector
from blobpipe.errors import FrameError, printable
from blobpipe.params import short_fault, yaml_lines

# Mark of an entry that the example does not tell
UNKNOWN = "(?)"

# Names of the flags and of the standard errors of an image, in order of preference
DQ_NAMES = ("DQ", "MASK", "FLAGS", "BPM")
ERROR_NAMES = ("ERR", "RMS", "SIGMA", "STDDEV", "UNCERT")

# Cards of instruments, by what they hold, in order of preference
CARDS = {
    "date": (*MJD_CARDS, *DATE_CARDS),
    "target": ("TARGNAME", "TARGPROP", "OBJECT"),
    "filter": ("FILTER", "FILTER1", "FILTNAM1"),
    "exposure": ("ROOTNAME", "EXPID", "OBS_ID"),
    "gain_e": ("GAIN", "ATODGNA", "EGAIN"),
    "read_noise_e": ("RDNOISE", "READNSEA", "READNOIS", "RON"),
    "flat": ("FLATCORR", "S_FLAT"),
}

# Entries that no header tells
ALWAYS_UNKNOWN = ("amplifiers", "difference_noise_frac", "first_mjd", "moves", "blob_bit")

# Cards that say whose image it is
IDENTITY = ("TELESCOP", "INSTRUME", "DETECTOR", "FILTER")

# Widest border that is looked for (px)
MAX_BORDER_PX = 16

# Smallest number of boxes of the background along a side, and their largest side (px)
MIN_BOXES = 4
LARGEST_BOX_PX = 100


@dataclass(frozen=True)
class Description:
    """Description of a file in words.

    Attributes
    ----------
    path : Path
    found : str
        Layout, size, target, filter and noise; empty if the file cannot be read.
    fault : str
        Why it cannot be searched; empty for a usable image.
    """

    path: Path
    found: str
    fault: str

    def __str__(self) -> str:
        verdict = f"not usable: {self.fault}" if self.fault else "usable"
        text = f"{self.found}; {verdict}" if self.found else verdict
        return printable(f"{self.path}: {text}")


def describe(path: str | Path, detector: Detector = DEFAULT) -> Description:
    """Describe the layout, size, target, filter, finite fraction and noise of a FITS file, and say if it is usable.

    A bad file raises no error; its fault is part of the description.
    """
    path = Path(path)
    # Faults are told without the path, which the description has anyway
    prefix = printable(f"{path}: ")
    try:
        if detector.exposure.format == "asdf" and path.suffix == ".asdf":
            from blobpipe.images.flatten import read_exposure

            frame = read_exposure(path, detector)
        else:
            frame = fits_images.read_frame(path, detector)
    except FrameError as error:
        return Description(path, "", str(error).removeprefix(prefix))
    finite = np.isfinite(frame.data)
    header = frame.header
    parts = [
        f"{frame.layout} px",
        f"target {header.get('TARGNAME', 'unknown')}",
        f"filter {header.get('FILTER', 'unknown')}",
        f"{finite.mean():.1%} finite",
    ]
    if finite.any():
        median, noise = fits_images.median_and_noise(frame.data)
        parts.append(f"median {median:.4g}, noise {noise:.4g} {header.get('BUNIT', '')}".strip())
    if fits_images.is_exposure(frame, detector):
        fault = (
            "a calibrated exposure, expected a blob image; make one with 'blobpipe flatten' "
            "(quicklook takes the exposure as it is)"
        )
        return Description(path, ", ".join(parts), fault)
    fault = ""
    try:
        fits_images.require_usable(frame, path)
    except FrameError as error:
        fault = str(error).removeprefix(prefix)
    return Description(path, ", ".join(parts), fault)


def unknown_entries(path: str | Path) -> list[str]:
    """List the entries of a detector's file that still bear the mark of `draft_detector`."""
    lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    return [line.split(":")[0].strip() for line in lines if line.rstrip().endswith(UNKNOWN)]


def draft_detector(path: str | Path) -> str:
    """Draft the file of a detector from an example image, as far as its header tells.

    Parameters
    ----------
    path : path
        A FITS file of the detector: an exposure, a flat, or a blob image.

    Returns
    -------
    str
        YAML with a comment for each entry. Those that the example does not tell have a common value, and their comments
        end in `UNKNOWN`.

    Raises
    ------
    FrameError
        If the file cannot be read, or its image is too small for a detector.
    """
    path = Path(path)
    # A detector without a border leaves the image as it is
    frame = fits_images.read_frame(path, DEFAULT.model_copy(update={"border_px": 0}))
    with hdus.opened(path, fits_images.IMAGE) as file:
        names = [hdu.name for hdu in file.hdus if hdu.shape]
    ny, nx = frame.data.shape
    if min(ny, nx) < fits_images.MIN_PX:
        raise FrameError(
            f"{path}: found {nx}x{ny} pixels, expected a full frame of at least {fits_images.MIN_PX}x{fits_images.MIN_PX}; "
            "name another"
        )

    # Entries that the header may tell, by their place in the file; None: it does not
    header = frame.header
    border = _border(frame)
    gain = _number(header, "gain_e")
    read_noise = _number(header, "read_noise_e")
    unit = _unit(frame)
    cards = {
        key: next((card for card in CARDS[key] if card in header), None)
        for key in ("date", "target", "filter", "exposure", "flat")
    }
    dq = next((name for name in DQ_NAMES if name in names), "")
    told = {
        "border_px": border > 0,
        "gain_e": gain is not None,
        "read_noise_e": read_noise is not None,
        "date": cards["date"] is not None,
        "bad_dq": not dq,
        **dict.fromkeys(ALWAYS_UNKNOWN, False),
    }

    box = _box_px(min(nx, ny) - 2 * border)
    flat = cards["flat"] if cards["flat"] and header.get(cards["flat"]) == "COMPLETE" else None
    entries = {
        "title": _title(frame),
        "width_px": nx,
        "height_px": ny,
        "border_px": border,
        "amplifiers": (1, 1),
        "gain_e": gain or 2.0,
        "read_noise_e": DEFAULT.read_noise_e if read_noise is None else read_noise,
        "difference_noise_frac": DEFAULT.difference_noise_frac,
        "subframe_px": DEFAULT.subframe_px,
        "first_mjd": 50000.0,
        "exposure": {
            "format": "fits",
            "image": _image_name(names),
            "dq": dq,
            "error": next((name for name in ERROR_NAMES if name in names), ""),
            "detectors": (),
            "unit": unit,
            "blobs": "positive" if unit == "light_lost" else "negative",
            "flat_card": flat or "",
            "flat_done": "COMPLETE" if flat else "",
            "bad_dq": 1 if dq else 0,
            "box_px": box,
        },
        "cards": {key: cards[key] or "" for key in ("target", "filter", "exposure")}
        | {"date": cards["date"] or "DATE-OBS", "level": "LEVEL_E"},
        "blobs": {"radius_px": DEFAULT.blobs.radius_px, "size_law": None},
        "motion": {"moves": "nothing", "largest_px": 0.0},
        "bad_pixel_table": {
            "layout": "image",
            "frame": "full",
            "blob_bit": 1 << 14,
            "disc_px": (4.0, 12.7),
            "columns": {},
            "header": {},
        },
        "archive": None,
        "simulation": {
            "header": {card: header[card] for card in IDENTITY if card in header},
            "n_clusters": round(DEFAULT.simulation.n_clusters * nx * ny / DEFAULT.n_px),
            "dead_disc_px": None,
            "wagon_wheel_px": None,
            "dark_streak_x_px": None,
            "notch_x_px": None,
        },
    }
    try:
        detector = Detector.model_validate(entries)
    except ValidationError as error:
        raise FrameError(
            f"{path}: {short_fault(error)}; write the detector's file from that of another one"
        ) from error
    lines = [
        f"# {detector.title}, drafted from {printable(path.name)}. The marks {UNKNOWN} are at entries that it does not tell:",
        "# correct each and remove its mark. 'blobpipe check --detector FILE IMAGE' lists those that are left.",
        "",
    ]
    for line in yaml_lines(detector):
        key = line.split(":")[0].strip()
        lines.append(line if told.get(key, True) else f"{line} {UNKNOWN}")
    return "\n".join(lines) + "\n"


def _title(frame: fits_images.Frame) -> str:
    """Return the names of telescope, instrument and detector, or that of the file."""
    names = [str(frame.header.get(card, "")).strip() for card in IDENTITY[:3]]
    return (" ".join(filter(None, names)) or frame.name)[:40]


def _number(header: Mapping[str, hdus.Value], key: str) -> float | None:
    """Return the first positive number among the cards of an entry."""
    for card in CARDS[key]:
        value = header.get(card)
        if isinstance(value, int | float) and 0 < value < 1000:
            return float(value)
    return None


def _border(frame: fits_images.Frame) -> int:
    """Return the width of the border without light (px): its pixels have no value, are 0, or far from all others."""
    inside = frame.data[frame.data.shape[0] // 4 : -frame.data.shape[0] // 4]
    level, noise = fits_images.median_and_noise(inside)
    limit = max(abs(level) / 2, 20 * noise)
    for width in range(MAX_BORDER_PX + 1):
        sides = (
            frame.data[width],
            frame.data[-1 - width],
            frame.data[:, width],
            frame.data[:, -1 - width],
        )
        lit = [np.isfinite(side) & (side != 0) & (np.abs(side - level) < limit) for side in sides]
        if all(side.mean() > 0.5 for side in lit):
            return width
    return 0


def _unit(frame: fits_images.Frame) -> str:
    """Return the kind of unit of an image, by its card BUNIT and its values."""
    unit = str(frame.header.get("BUNIT", "")).upper()
    level, noise = fits_images.median_and_noise(frame.data)
    if not unit and abs(level) < 5 * noise and noise < fits_images.MAX_NOISE_FRAC:
        return "light_lost"
    return (
        "surface_brightness"
        if any(word in unit for word in fits_images.OF_BRIGHTNESS)
        else "counts"
    )


def _image_name(names: list[str]) -> str:
    """Return the name of the extension with the image."""
    return "SCI" if "SCI" in names or not names else names[0]


def _box_px(side: int) -> int:
    """Return the largest side of boxes that fill a side of an image, at most `LARGEST_BOX_PX`, or a common one."""
    sides = [box for box in range(60, LARGEST_BOX_PX + 1) if side % box == 0]
    return max(sides, default=min(DEFAULT.exposure.box_px, side // MIN_BOXES))
