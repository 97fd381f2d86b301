"""Commands of every day: quicklook, its log and pages, notices, the catalogue and exports."""

from __future__ import annotations

import argparse
import logging
import os
from contextlib import closing
from pathlib import Path

from blobpipe.cli.options import (
    Commands,
    SharedOptions,
    add_bad_pixels,
    add_known_blobs,
    add_operating_point,
    add_subtraction,
)
from blobpipe.cli.paths import OWN_MODEL, PARAMS, REGRESSION_METRICS
from blobpipe.cli.settings import (
    default_model,
    detector_of,
    extra,
    own_or_packaged,
    params_if_any,
    say_when_compiling,
)
from blobpipe.params import Notices


def add_commands(commands: Commands, shared: SharedOptions) -> None:
    """Add the commands of every day."""
    _add_quicklook(commands, shared)
    _add_serve(commands, shared)
    _add_log(commands, shared)
    _add_page(commands, shared)
    _add_catalogue(commands, shared)
    _add_export(commands, shared)
    _add_notify(commands, shared)
    _add_doctor(commands, shared)


def _add_quicklook(commands: Commands, shared: SharedOptions) -> None:
    """Add the command ``quicklook``."""
    quicklook = commands.add_parser(
        "quicklook",
        parents=[shared.detector, shared.log, shared.common],
        description="search every new image in a folder, log the results and send notices",
    )
    quicklook.add_argument(
        "folder",
        type=Path,
        metavar="FOLDER",
        help="folder of blob images or calibrated exposures",
    )
    add_subtraction(quicklook, "median stack to subtract until enough images are logged")
    quicklook.add_argument(
        "--model", type=Path, help="trained dense network (default: as for scan)"
    )
    add_known_blobs(quicklook)
    add_bad_pixels(quicklook)
    add_operating_point(quicklook)
    quicklook.add_argument(
        "--silent", action="store_true", help="do not queue notices (for a backlog of images)"
    )
    quicklook.add_argument(
        "--again",
        action="store_true",
        help="search images once more that were rejected, or kept for the stack alone",
    )
    which = quicklook.add_mutually_exclusive_group()
    which.add_argument(
        "--watch", action="store_true", help="keep running and search images as they arrive"
    )
    which.add_argument(
        "--batch",
        type=int,
        help="process only this batch of the images in FOLDER/frames.csv (default: all of the folder)",
    )
    quicklook.set_defaults(work=_quicklook)


def _quicklook(args: argparse.Namespace) -> None:
    from blobpipe.quicklook.folder import require_folder

    require_folder(args.folder)
    say_when_compiling()
    from blobpipe.quicklook import run
    from blobpipe.quicklook.options import Options

    params = params_if_any(args)
    options = Options(
        args.log,
        args.model or default_model(params),
        params.model_copy(update={"notices": Notices()}) if args.silent else params,
        catalogue=args.catalogue,
        reference=args.reference,
        difference=args.difference,
        again=args.again,
        bad_pixels=tuple(args.bad_pixels),
        operating_point=args.operating_point,
        batch=args.batch,
    )
    if args.watch:
        run.watch(args.folder, options)
    else:
        run.quicklook(args.folder, options)


def _add_serve(commands: Commands, shared: SharedOptions) -> None:
    """Add the command ``serve``."""
    serve = commands.add_parser(
        "serve", parents=[shared.log, shared.common], description="review candidates in the browser"
    )
    serve.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: %(default)s)"
    )
    serve.add_argument(
        "--port", type=int, default=8000, help="port to listen on (default: %(default)s)"
    )
    serve.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="file with the token for reviews (default: the environment variable BLOBPIPE_TOKEN)",
    )
    serve.add_argument(
        "--name",
        action="append",
        default=[],
        metavar="HOST",
        help="host name by which browsers reach this server; may be repeated",
    )
    serve.set_defaults(work=_serve)


def _serve(args: argparse.Namespace) -> None:
    with extra("serve"):
        from blobpipe.review.server import serve
    serve(
        args.log, host=args.host, port=args.port, token_file=args.token_file, names=tuple(args.name)
    )


def _add_log(commands: Commands, shared: SharedOptions) -> None:
    """Add the command ``log``."""
    log = commands.add_parser(
        "log", parents=[shared.log, shared.common], description="print or export a table of the log"
    )
    log.add_argument(
        "table",
        nargs="?",
        default="candidate_list",
        metavar="TABLE",
        help="one of runs, images, files, subframes, peaks, candidates, detections, depths, nearly_found, reviews, notices, health, candidate_list (default: %(default)s)",
    )
    log.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="write the table to a .csv, .ecsv or .json file instead",
    )
    log.add_argument(
        "--wide",
        action="store_true",
        help="print all columns and whole checksums, in lines longer than 100 characters",
    )
    log.set_defaults(work=_log)


def _log(args: argparse.Namespace) -> None:
    from blobpipe.monitor import logbook

    connection = logbook.connect(args.log)
    if args.out:
        logbook.export_tables(connection, args.table, args.out)
    else:
        rows = logbook.table(connection, args.table)
        if len(rows):
            print(logbook.printed(rows, args.table, wide=args.wide))
        else:
            print(logbook.describe_empty(connection, args.table))


def _add_page(commands: Commands, shared: SharedOptions) -> None:
    """Add the command ``page``."""
    page = commands.add_parser(
        "page",
        parents=[shared.log, shared.common],
        description="write the log, or a day of it, as one HTML file",
    )
    page.add_argument("--out", type=Path, required=True, metavar="FILE", help="HTML file to write")
    which = page.add_mutually_exclusive_group()
    which.add_argument(
        "--date", metavar="YYYY-MM-DD", help="day of the exposures (default: the newest)"
    )
    which.add_argument(
        "--all", action="store_true", help="all images that are not rejected, with map and timeline"
    )
    page.set_defaults(work=_page)


def _page(args: argparse.Namespace) -> None:
    with extra("serve"):
        from blobpipe.monitor import logbook
        from blobpipe.review import pages

    with closing(logbook.connect(args.log)) as connection:
        day = None if args.all else args.date or pages.newest_day(connection)
        shown = pages.write(connection, args.out, day)
    logging.info("%s: %s", args.out, shown)


def _add_catalogue(commands: Commands, shared: SharedOptions) -> None:
    """Add the command ``catalogue update``."""
    catalogue = commands.add_parser("catalogue", description="update the catalogue of known blobs")
    actions = catalogue.add_subparsers(dest="action", required=True, metavar="ACTION")
    update = actions.add_parser(
        "update",
        parents=[shared.log, shared.common],
        help="add the candidates that reviewers have confirmed",
    )
    update.add_argument(
        "--catalogue",
        type=Path,
        required=True,
        metavar="TABLE",
        help="catalogue to which they are added",
    )
    update.add_argument(
        "--frames",
        type=Path,
        metavar="TABLE",
        help="list of images (frames.csv); first add to it the images in its folder that are in the log",
    )
    update.add_argument(
        "--reviews", type=Path, metavar="FILE", help="also write all reviews as CSV"
    )
    update.set_defaults(work=_catalogue)


def _catalogue(args: argparse.Namespace) -> None:
    from blobpipe.monitor import catalogue, logbook

    connection = logbook.connect(args.log)
    if args.frames:
        listed = len(catalogue.list_images(connection, args.frames))
        print(f"{args.frames}: {logbook.counted(listed, 'image')} added")
    added = catalogue.update(connection, args.catalogue)
    names = f": {', '.join(added)}" if added else ""
    print(f"{args.catalogue}: {logbook.counted(len(added), 'blob')} added{names}")
    if args.reviews:
        written = catalogue.write_reviews(connection, args.reviews)
        print(f"{args.reviews}: {logbook.counted(written, 'review')}")


def _add_export(commands: Commands, shared: SharedOptions) -> None:
    """Add the command ``export``."""
    export = commands.add_parser(
        "export",
        parents=[shared.detector, shared.common],
        description="export blobs: DS9 regions, ECSV, bad-pixel table, DQ image",
    )
    export.add_argument(
        "catalogue", type=Path, metavar="CATALOGUE", help="table of blobs, CSV or ECSV"
    )
    export.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for the files"
    )

    # Which blobs
    export.add_argument(
        "--until",
        metavar="DATE",
        help="only blobs first seen by the end of this day or by this MJD",
    )
    export.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="STATUS",
        help="besides known and confirmed blobs, also export this status: seen_again, new, ...; may be repeated",
    )
    export.add_argument(
        "--frames",
        type=Path,
        metavar="TABLE",
        help="dates of the images: frame, mjd (default: frames.csv beside CATALOGUE)",
    )

    # Bad-pixel table and DQ image
    export.add_argument(
        "--bpixtab",
        type=Path,
        metavar="FITS",
        help="bad-pixel table or DQ image to which the discs are added",
    )
    export.add_argument(
        "--useafter",
        metavar="DATE",
        help="USEAFTER of the new table (default: the later of its own date and that of its latest blob)",
    )
    export.add_argument(
        "--disc-radii",
        type=float,
        nargs=2,
        metavar=("MIN", "MAX"),
        help="limits of the disc radii in px (default: those of the detector)",
    )
    export.add_argument(
        "--flt",
        action="store_true",
        help="write regions and DQ image without the reference pixels, as in FLT files",
    )
    export.add_argument(
        "--all-flags",
        action="store_true",
        help="write all bits of the table to the DQ image, not only that of blobs",
    )
    export.set_defaults(work=_export)


def _export(args: argparse.Namespace) -> None:
    from blobpipe.monitor import export

    export.export_blobs(
        args.catalogue,
        args.out,
        until=args.until,
        statuses=(*export.STATUSES, *args.also),
        dates=args.frames,
        bpixtab=args.bpixtab,
        useafter=args.useafter,
        radii_px=tuple(args.disc_radii) if args.disc_radii else None,
        flt=args.flt,
        all_flags=args.all_flags,
        detector=detector_of(params_if_any(args)),
    )


def _add_notify(commands: Commands, shared: SharedOptions) -> None:
    """Add the command ``notify``."""
    notify = commands.add_parser(
        "notify",
        parents=[shared.settings, shared.log, shared.common],
        description="send the notices that wait in the log",
    )
    instead = notify.add_mutually_exclusive_group()
    instead.add_argument("--dry-run", action="store_true", help="only print the waiting notices")
    instead.add_argument(
        "--test", action="store_true", help="only send a test notice on every channel"
    )
    instead.add_argument(
        "--again", action="store_true", help="also send notices that were given up"
    )
    notify.set_defaults(work=_notify)


def _notify(args: argparse.Namespace) -> None:
    from blobpipe.monitor import logbook, notices

    params = params_if_any(args).notices
    if args.test:
        print(f"accepted by {', '.join(notices.send_test(params))}")
        return
    connection = logbook.connect(args.log)
    if args.dry_run:
        found = notices.waiting(connection)
        for notice in found:
            print(f"{notice['channel']}: {notice['key']}: {notice['subject']}\n{notice['text']}\n")
        if not found:
            print("no notice waits")
        if not notices.channels(params):
            print("no channel is set up: notices.mail_to is empty, notices.webhook is false")
        return
    if args.again:
        print(f"put back: {notices.again(connection)}")
    with logbook.writing(connection):
        notices.queue_digest(connection, params, logbook.now())
    print(f"sent: {notices.send(connection, params)}, waiting: {len(notices.waiting(connection))}")


def _add_doctor(commands: Commands, shared: SharedOptions) -> None:
    """Add the command ``doctor``."""
    doctor = commands.add_parser(
        "doctor",
        parents=[shared.detector, shared.log, shared.common],
        description="check everything that the daily routine needs",
    )
    doctor.add_argument("--model", type=Path, help="trained model (default: as for scan)")
    add_known_blobs(doctor)
    add_bad_pixels(doctor)
    add_operating_point(doctor)
    doctor.add_argument(
        "--send-test", action="store_true", help="also send a test notice on every channel"
    )
    doctor.set_defaults(work=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    from blobpipe.monitor.doctor import Setup, examine

    settings = Path(args.params or PARAMS)
    named = settings if args.params or settings.exists() else None
    model = args.model or own_or_packaged()
    judged = Path(REGRESSION_METRICS) if not args.model and model == Path(OWN_MODEL) else None
    bad_pixels = tuple(args.bad_pixels)
    setup = Setup(
        *(named, model, args.catalogue, args.log, judged, bad_pixels),
        operating_point=args.operating_point,
        detector=args.detector,
    )
    failed = False
    for check in examine(setup, os.environ, send_test=args.send_test):
        print(f"{check.state:4}  {check.what}: {check.found}")
        failed |= check.state == "fail"
    return int(failed)
