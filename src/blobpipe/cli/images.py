"""Commands for images: fetch, flatten, check, scan, calibrate, date their blobs, describe their detector."""

from __future__ import annotations

import argparse
import sys
from datetime import date
from itertools import product
from pathlib import Path

from blobpipe.cli.error_lines import one_line
from blobpipe.cli.options import (
    Commands,
    SharedOptions,
    add_bad_pixels,
    add_known_blobs,
    add_operating_point,
    add_subtraction,
    read_number,
)
from blobpipe.cli.paths import DIFFERENCE, OWN_MODEL
from blobpipe.cli.settings import default_model, detector_of, params_if_any, say_when_compiling
from blobpipe.errors import BlobpipeError, FrameError


def add_commands(commands: Commands, shared: SharedOptions) -> None:
    """Add the commands for images."""
    _add_fetch(commands, shared)
    _add_flatten(commands, shared)
    _add_check(commands, shared)
    _add_scan(commands, shared)
    _add_calibrate(commands, shared)
    _add_history(commands, shared)
    _add_detector(commands, shared)


def _add_fetch(commands: Commands, shared: SharedOptions) -> None:
    """Add the command ``fetch``."""
    fetch = commands.add_parser(
        "fetch",
        parents=[shared.detector, shared.common],
        description="download CSM-monitor exposures from MAST by date",
    )
    fetch.add_argument(
        "--start", type=_date, required=True, metavar="DATE", help="first day, YYYY-MM-DD"
    )
    fetch.add_argument(
        "--end", type=_date, required=True, metavar="DATE", help="last day, inclusive"
    )
    fetch.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder for the files and manifest.csv",
    )
    fetch.add_argument("--dry-run", action="store_true", help="only list the exposures")
    fetch.set_defaults(work=_fetch)


def _date(text: str) -> date:
    """Read a day from the command line."""
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} is no day, expected YYYY-MM-DD") from error


def _fetch(args: argparse.Namespace) -> int:
    from blobpipe.monitor import mast

    detector = detector_of(params_if_any(args))
    exposures = mast.find_exposures(args.start, args.end, detector)
    if args.dry_run:
        for exposure in exposures:
            print(f"{exposure.file} {exposure.size_bytes / 1e6:.1f} MB")
        return 0
    failed = mast.fetch(exposures, args.out)
    print(f"{len(exposures) - len(failed)} of {len(exposures)} exposures are in {args.out}")
    for line in failed:
        print(f"blobpipe: {line}", file=sys.stderr)
    return 1 if failed else 0


def _add_flatten(commands: Commands, shared: SharedOptions) -> None:
    """Add the command ``flatten``."""
    flatten = commands.add_parser(
        "flatten",
        parents=[shared.detector, shared.common],
        description="make blob images from calibrated exposures",
    )
    flatten.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="full-frame calibrated exposure"
    )
    add_bad_pixels(flatten)
    flatten.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for the blob images"
    )
    flatten.set_defaults(work=_flatten)


def _flatten(args: argparse.Namespace) -> int:
    from blobpipe.images.bad_pixels import read_bad_pixels
    from blobpipe.images.flatten import flatten_exposure, refuse_overwriting
    from blobpipe.monitor.inbox import require_short_name

    params = params_if_any(args)
    detector = detector_of(params)
    bad = read_bad_pixels(params.bad_pixels, args.bad_pixels, detector)
    failed = 0
    parts = detector.exposure.detectors or ("",)
    for (index, path), part in product(enumerate(args.files), parts):
        try:
            require_short_name(path)
            refuse_overwriting(args.files, index, args.out)
            print(flatten_exposure(path, args.out, bad, detector, part))
        except FrameError as error:
            print(f"blobpipe: {one_line(error)}", file=sys.stderr)
            failed = 1
    return failed


def _add_check(commands: Commands, shared: SharedOptions) -> None:
    """Add the command ``check``."""
    check = commands.add_parser(
        "check",
        parents=[shared.detector, shared.common],
        description="report what image files contain, and whether they can be searched",
    )
    check.add_argument("files", nargs="+", type=Path, metavar="FILE", help="FITS image")
    check.set_defaults(work=_check)


def _check(args: argparse.Namespace) -> int:
    from blobpipe.images.check import describe, unknown_entries

    usable = True
    detector = detector_of(params_if_any(args))
    named = args.detector or ""
    if Path(named).suffix and (unknown := unknown_entries(named)):
        print(f"{named}: not filled in from the example, correct them: {', '.join(unknown)}")
        usable = False
    for path in args.files:
        if path.is_dir():
            print(
                f"{path}: not usable: a folder, expected a FITS image; name its files: {path}/*.fits*"
            )
            usable = False
            continue
        found = describe(path, detector)
        print(found)
        usable &= not found.fault
    return 0 if usable else 1


def _add_scan(commands: Commands, shared: SharedOptions) -> None:
    """Add the command ``scan``."""
    scan = commands.add_parser(
        "scan", parents=[shared.detector, shared.common], description="search images for new blobs"
    )
    scan.add_argument("frames", nargs="+", type=Path, metavar="FRAME", help="blob image")
    add_subtraction(scan, f"median stack to subtract (default: {DIFFERENCE}/reference.fits.fz)")
    scan.add_argument(
        "--model",
        type=Path,
        help=f"trained dense or report network (default: {OWN_MODEL}, which must have passed the gate; else the packaged model)",
    )
    add_known_blobs(scan)
    add_bad_pixels(scan)
    add_operating_point(scan)
    scan.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for tables and pictures"
    )
    scan.set_defaults(work=_scan)


def _scan(args: argparse.Namespace) -> int:
    say_when_compiling()
    from blobpipe.monitor.scan import scan

    return scan(
        args.frames,
        args.out,
        args.model or default_model(params_if_any(args)),
        params_if_any(args),
        difference=args.difference,
        reference=args.reference,
        catalogue=args.catalogue,
        bad_pixels=args.bad_pixels,
        operating_point=args.operating_point,
    )


def _add_calibrate(commands: Commands, shared: SharedOptions) -> None:
    """Add the command ``calibrate``."""
    calibrate = commands.add_parser(
        "calibrate",
        parents=[shared.detector, shared.common],
        description="set the threshold by a false-alarm budget, on images without a new blob",
    )
    calibrate.add_argument(
        "images",
        nargs="*",
        type=Path,
        metavar="IMAGES",
        help="image without a new blob, or a folder of them",
    )
    calibrate.add_argument(
        "--log",
        type=Path,
        metavar="LOG",
        help="log of quicklook: use its images instead, leaving out blobs confirmed or seen again",
    )
    add_subtraction(
        calibrate, f"median stack to subtract (default: {DIFFERENCE}/reference.fits.fz)"
    )
    calibrate.add_argument(
        "--model", type=Path, help="trained dense network (default: as for scan)"
    )
    add_known_blobs(calibrate)
    add_bad_pixels(calibrate)
    calibrate.add_argument(
        "--budget",
        type=_budget,
        metavar="N",
        help="accepted false alarms per 100 images (default: detect.false_alarms_per_100_frames)",
    )
    calibrate.add_argument(
        "--confidence",
        type=_confidence,
        metavar="P",
        help="one-sided confidence with which the budget is kept (default: detect.confidence)",
    )
    calibrate.add_argument(
        "--out",
        type=Path,
        default=Path("operating_point.yaml"),
        metavar="FILE",
        help="file to write (default: %(default)s)",
    )
    calibrate.set_defaults(work=_calibrate)


def _budget(text: str) -> float:
    """Read a budget of false alarms from the command line."""
    return read_number(text, lambda value: 0 < value < float("inf"), "a number above 0")


def _confidence(text: str) -> float:
    """Read a confidence from the command line."""
    return read_number(text, lambda value: 0.5 <= value < 1, "a number from 0.5 to below 1")


def _calibrate(args: argparse.Namespace) -> None:
    say_when_compiling()
    from blobpipe.monitor.scan import calibrate, calibrate_log

    if (args.log is None) == (not args.images):
        raise BlobpipeError("calibrate: expected images or folders of them, or --log LOG")
    named = args.difference or args.reference or args.catalogue or args.bad_pixels
    if args.log is not None and named:
        raise BlobpipeError(
            "calibrate: found --log with --difference, --reference, --catalogue or --bad-pixels, expected --log alone: "
            "the log's images have been searched already; leave them out"
        )

    # The budget is that of the settings, unless an option says otherwise
    params = params_if_any(args)
    model = args.model or default_model(params)
    budget = args.budget or params.detect.false_alarms_per_100_frames
    confidence = args.confidence or params.detect.confidence
    if args.log is not None:
        calibrate_log(args.log, args.out, model, budget=budget, confidence=confidence)
        return
    calibrate(
        args.images,
        args.out,
        model,
        params,
        budget=budget,
        confidence=confidence,
        difference=args.difference,
        reference=args.reference,
        catalogue=args.catalogue,
        bad_pixels=args.bad_pixels,
    )


def _add_history(commands: Commands, shared: SharedOptions) -> None:
    """Add the command ``history``."""
    history = commands.add_parser(
        "history",
        parents=[shared.detector, shared.common],
        description="find when the blobs of a catalogue landed, from all images of a folder",
    )
    history.add_argument("folder", type=Path, metavar="FOLDER", help="folder of blob images")
    history.add_argument(
        "--catalogue",
        type=Path,
        required=True,
        metavar="TABLE",
        help="positions of blobs: x_px, y_px, and radius_px if it is known",
    )
    history.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for the tables"
    )
    add_bad_pixels(history)
    history.set_defaults(work=_history)


def _history(args: argparse.Namespace) -> int:
    from blobpipe.history.archive import date_catalogue
    from blobpipe.images.bad_pixels import read_bad_pixels

    params = params_if_any(args)
    detector = detector_of(params)
    bad = read_bad_pixels(params.bad_pixels, args.bad_pixels, detector)
    return date_catalogue(
        args.folder,
        args.catalogue,
        args.out,
        params.difference,
        bad_pixels=bad,
        detector=detector,
        threads=params.detect.threads,
    )


def _add_detector(commands: Commands, shared: SharedOptions) -> None:
    """Add the command ``detector`` with its three actions."""
    detector = commands.add_parser(
        "detector",
        description="describe another detector: draft its file, show one, measure its entries",
    )
    actions = detector.add_subparsers(dest="action", required=True, metavar="ACTION")
    new = actions.add_parser(
        "new", parents=[shared.common], help="draft the file of a detector from an example image"
    )
    new.add_argument("image", type=Path, metavar="IMAGE", help="FITS image of the detector")
    new.add_argument("--out", type=Path, metavar="FILE", help="file to write (default: print it)")
    new.set_defaults(work=_detector_new)
    show = actions.add_parser(
        "show", parents=[shared.common], help="print the file of a detector that blobpipe knows"
    )
    show.add_argument("name", metavar="NAME", help="such as wfc3_ir")
    show.set_defaults(work=_detector_show)
    measure = actions.add_parser(
        "measure",
        parents=[shared.detector, shared.common],
        help="measure noise and sizes of blobs, as entries of a detector's file",
    )
    measure.add_argument(
        "images",
        nargs="*",
        type=Path,
        metavar="IMAGE",
        help="blob images, at least four, for the noise",
    )
    measure.add_argument(
        "--catalogue",
        type=Path,
        metavar="TABLE",
        help="blobs with measured radii: x_px, y_px, radius_px, for the law of size",
    )
    measure.set_defaults(work=_detector_measure)


def _detector_new(args: argparse.Namespace) -> None:
    from blobpipe.core import files
    from blobpipe.images.check import draft_detector

    text = draft_detector(args.image)
    if args.out is None:
        print(text, end="")
        return
    if args.out.exists():
        raise BlobpipeError(f"{args.out}: exists already, expected a new file; name another --out")
    with files.atomic(args.out) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _detector_show(args: argparse.Namespace) -> None:
    from blobpipe.core.detector import find_detector

    print(find_detector(args.name).read_text(encoding="utf-8"), end="")


def _detector_measure(args: argparse.Namespace) -> None:
    from blobpipe.detection.size_law import FEWEST_IMAGES, measure_detector

    n_images = len(args.images)
    if n_images < FEWEST_IMAGES and args.catalogue is None:
        raise BlobpipeError(
            f"detector measure: found {n_images} image{'s' * (n_images != 1)}, expected at least {FEWEST_IMAGES} for the "
            "noise, or --catalogue TABLE for the sizes; name them"
        )
    params = params_if_any(args)
    for line in measure_detector(args.images, args.catalogue, detector_of(params)):
        print(line)
