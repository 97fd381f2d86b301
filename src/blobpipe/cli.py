"""The command ``blobpipe``: one command per stage, as the rules call them, and the daily ones."""

from __future__ import annotations

import argparse
import ctypes
import errno
import io
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from datetime import date
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from blobpipe import __version__
from blobpipe.errors import BlobpipeError, FrameError, ParamsError, printable
from blobpipe.params import Notices, Params, load_params, to_yaml

if TYPE_CHECKING:
    from blobpipe.core.detector import Detector

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

# Folders of the stages, relative to the working folder
RAW = "data/raw"
DIFFERENCE = "data/difference"
CLIP = "data/clip"
SCALE = "data/scale"
CUTOUT = "results/cutout"
AUGMENT = "results/augment"
TRAIN = "results/train"
EVALUATE = "results/evaluate"
REGRESSION = "results/regression"
DENSE = "results/dense"
DETECT = "results/detect"
COMPLETENESS = "results/completeness"
EXPLORE = "results/explore"
SEARCH = "results/search"

# The report's network; the dense network as trained; the same with its operating point
MODEL = f"{TRAIN}/model.safetensors"
DENSE_MODEL = f"{DENSE}/model.safetensors"
OWN_MODEL = f"{DETECT}/model.safetensors"

# Metrics of the regression test, which the gate reads
REGRESSION_METRICS = f"{REGRESSION}/metrics.json"
STAGES_PAGE = "stages.html"  # Snakemake's own report, beside ours
PARAMS = "params.yaml"
LOG = "quicklook/log.sqlite"

# Exit statuses of a program that SIGINT or SIGPIPE has ended: 128 + signal
INTERRUPTED = 130
PIPE_CLOSED = 141

# What to do about an error of the system, by its number
ADVICE = {
    **dict.fromkeys(
        (errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free some space or choose another folder"
    ),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "change its permissions or choose another"),
    errno.EROFS: "choose a folder you can write to",
    errno.ENAMETOOLONG: "choose a shorter one; most file systems take 255 bytes",
    **dict.fromkeys(
        (errno.ENOTDIR, errno.EEXIST), "correct the name; this is a file, expected a folder"
    ),
    errno.EISDIR: "name a file",
    errno.ELOOP: "correct the link; it leads back to itself",
    errno.EMFILE: "raise the limit with 'ulimit -n'",
    errno.EIO: "look at the disk; it could not be read or written",
}

# Parameters of mallopt; GNU C library, malloc.h
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
M_ARENA_MAX = -8

# Everything heavy is imported by the command that needs it: `blobpipe --help` answers at once.


def _campaign(args: argparse.Namespace) -> None:
    from blobpipe.simulation.campaign import simulate

    params = _params(args)
    simulate(RAW, params.campaign, threads=args.threads, detector=_detector(params))


def _difference(args: argparse.Namespace) -> None:
    from blobpipe.images import difference
    from blobpipe.images.bad_pixels import read_bad_pixels

    params = _params(args)
    detector = _detector(params)
    bad = read_bad_pixels(params.bad_pixels, detector=detector)
    if args.batch is None:
        difference.reference(RAW, DIFFERENCE, params.difference, bad, detector)
    if not args.reference:
        difference.write_differences(RAW, DIFFERENCE, params.difference, args.batch, bad, detector)


def _clip(args: argparse.Namespace) -> None:
    from blobpipe.images.clip import clip

    clip(DIFFERENCE, CLIP, _params(args).clip, args.batch)


def _scale(args: argparse.Namespace) -> None:
    from blobpipe.images.scale import scale

    scale(CLIP, SCALE, _params(args).scale, args.batch)


def _cutout(args: argparse.Namespace) -> None:
    from blobpipe.simulation.cutout import cut

    params = _params(args)
    cut(
        *(RAW, DIFFERENCE, SCALE, CUTOUT, params.cutout),
        clip=params.clip,
        scale=params.scale,
        detector=_detector(params),
    )


def _augment(args: argparse.Namespace) -> None:
    from blobpipe.simulation.augment import augment

    augment(DIFFERENCE, SCALE, CUTOUT, AUGMENT, _params(args).augment)


def _train(args: argparse.Namespace) -> None:
    from blobpipe.networks.train import train

    params = _params(args)
    train(
        DIFFERENCE,
        SCALE,
        CUTOUT,
        AUGMENT,
        TRAIN,
        params.train,
        noise_sigma=params.augment.noise_sigma,
    )


def _dense(args: argparse.Namespace) -> None:
    from blobpipe.networks.dense import train_dense

    train_dense(DIFFERENCE, SCALE, CUTOUT, AUGMENT, DENSE, _params(args).dense)


def _detect(args: argparse.Namespace) -> None:
    from blobpipe.detection.detect import detect, search_batches

    params = _params(args)
    folders = (RAW, DIFFERENCE, SCALE)
    if not args.gather:
        search_batches(*folders, DENSE_MODEL, DETECT, params, args.batch)
    if args.batch is None:
        detect(*folders, CUTOUT, DENSE_MODEL, DETECT, params)


def _evaluate(args: argparse.Namespace) -> None:
    from blobpipe.validation.evaluate import evaluate

    params = _params(args)
    models = (MODEL, f"{DETECT}/model.safetensors")
    folders = (DIFFERENCE, SCALE, CUTOUT)
    evaluate(*folders, models, EVALUATE, params.evaluate, vetting=params.vetting)


def _regression(args: argparse.Namespace) -> None:
    from blobpipe.validation import cases_page, regression

    params = _params(args)
    folders = (RAW, DIFFERENCE, SCALE, CUTOUT)
    radii_px = params.evaluate.radii_px
    if not args.gather:
        regression.score_batches(
            *(folders, MODEL, REGRESSION),
            radii_px=radii_px,
            batch=args.batch,
            detector=_detector(params),
        )
    if args.batch is not None:
        return
    rate = params.detect.false_alarms_per_100_frames
    regression.regress(
        folders,
        DETECT,
        MODEL,
        REGRESSION,
        params.regression,
        radii_px=radii_px,
        per_100_frames=rate,
        detector=_detector(params),
    )
    cases_page.write_cases(DIFFERENCE, SCALE, DETECT, MODEL, REGRESSION)


def _completeness(args: argparse.Namespace) -> None:
    from blobpipe.validation import completeness

    params = _params(args)
    rate = params.detect.false_alarms_per_100_frames
    radii_px = params.evaluate.radii_px
    setting = completeness.Setting(
        params.clip, params.scale, params.vetting, radii_px, rate, _detector(params)
    )
    models = (f"{DETECT}/model.safetensors", MODEL)
    folders = (RAW, DIFFERENCE, SCALE, CUTOUT)
    baselines = f"{REGRESSION}/batches"
    completeness.measure_completeness(
        *folders, models, baselines, COMPLETENESS, params.completeness, setting=setting
    )


def _explore(args: argparse.Namespace) -> None:
    from blobpipe.validation.explore import explore

    models = (MODEL, f"{DENSE}/model.safetensors")
    explore(DIFFERENCE, SCALE, CUTOUT, models, EXPLORE, _params(args).explore)


def _search(args: argparse.Namespace) -> None:
    from blobpipe.validation.search import search

    folders = (DIFFERENCE, SCALE, CUTOUT, AUGMENT)
    search(*folders, SEARCH, _params(args), worker=args.worker)


def _gate(args: argparse.Namespace) -> int:
    from blobpipe.validation import gate

    failed = gate.check_gate(REGRESSION_METRICS, _params(args).regression)
    for line in gate.against(f"{REGRESSION}/cases.csv", args.against) if args.against else []:
        print(line)
    print("\n".join(failed) or "passed")
    return 1 if failed else 0


def _report(args: argparse.Namespace) -> None:
    from blobpipe.validation.report_page import write_report

    pipeline = Path("dvc.yaml")
    write_report(
        Path("results"),
        args.out,
        _params(args),
        pipeline=pipeline,
        stages=STAGES_PAGE,
        revision=args.against,
    )
    print(args.out)


def _check(args: argparse.Namespace) -> int:
    from blobpipe.images.check import describe, unknown_entries

    usable = True
    detector = _detector(_params_if_any(args))
    named = args.detector or ""
    if Path(named).suffix and (unknown := unknown_entries(named)):
        print(f"{named}: not filled in from the example, correct them: {', '.join(unknown)}")
        usable = False
    for path in args.files:
        found = describe(path, detector)
        print(found)
        usable &= not found.fault
    return 0 if usable else 1


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
    from blobpipe.detection.size_law import measure_detector

    params = _params_if_any(args)
    for line in measure_detector(args.images, args.catalogue, _detector(params)):
        print(line)


def _say_when_compiling() -> None:
    """Say once if kernels have to be compiled, which takes a while at the first use on a machine."""
    from numba.core import event

    class Listener(event.Listener):
        said = False

        def on_start(self, event: object) -> None:
            if not self.said:
                logging.info("compiling for this processor, only at the first use")
            self.said = True

        def on_end(self, event: object) -> None:
            pass

    event.register("numba:compile", Listener())  # type: ignore[no-untyped-call]


def _scan(args: argparse.Namespace) -> int:
    _say_when_compiling()
    from blobpipe.monitor.scan import scan

    return scan(
        args.frames,
        args.out,
        args.model or _default_model(_params_if_any(args)),
        _params_if_any(args),
        difference=args.difference,
        reference=args.reference,
        catalogue=args.catalogue,
        bad_pixels=args.bad_pixels,
        operating_point=args.operating_point,
    )


def _history(args: argparse.Namespace) -> int:
    from blobpipe.history.archive import date_catalogue
    from blobpipe.images.bad_pixels import read_bad_pixels

    params = _params_if_any(args)
    detector = _detector(params)
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


def _calibrate(args: argparse.Namespace) -> None:
    _say_when_compiling()
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
    params = _params_if_any(args)
    model = args.model or _default_model(params)
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


def _quicklook(args: argparse.Namespace) -> None:
    _say_when_compiling()
    from blobpipe.monitor import quicklook

    params = _params_if_any(args)
    options = quicklook.Options(
        args.log,
        args.model or _default_model(params),
        params.model_copy(update={"notices": Notices()}) if args.silent else params,
        catalogue=args.catalogue,
        reference=args.reference,
        difference=args.difference,
        again=args.again,
        bad_pixels=tuple(args.bad_pixels),
        operating_point=args.operating_point,
    )
    if args.watch:
        quicklook.watch(args.folder, options)
    else:
        quicklook.quicklook(args.folder, options)


def _log(args: argparse.Namespace) -> None:
    from blobpipe.monitor import logbook

    connection = logbook.connect(args.log)
    if args.out:
        logbook.export_tables(connection, args.table, args.out)
    else:
        rows = logbook.table(connection, args.table)
        print(logbook.printed(rows, args.table, wide=args.wide))


def _catalogue(args: argparse.Namespace) -> None:
    from blobpipe.monitor import catalogue, logbook

    connection = logbook.connect(args.log)
    if args.frames:
        print(f"{args.frames}: {len(catalogue.list_images(connection, args.frames))} images added")
    added = catalogue.update(connection, args.catalogue)
    print(f"{args.catalogue}: {len(added)} blobs added{': ' if added else ''}{', '.join(added)}")
    if args.reviews:
        print(f"{args.reviews}: {catalogue.write_reviews(connection, args.reviews)} reviews")


def _fetch(args: argparse.Namespace) -> int:
    from blobpipe.monitor import mast

    detector = _detector(_params_if_any(args))
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


def _flatten(args: argparse.Namespace) -> int:
    from blobpipe.images.bad_pixels import read_bad_pixels
    from blobpipe.images.flatten import flatten_exposure, refuse_overwriting

    params = _params_if_any(args)
    detector = _detector(params)
    bad = read_bad_pixels(params.bad_pixels, args.bad_pixels, detector)
    failed = 0
    parts = detector.exposure.detectors or ("",)
    for (index, path), part in product(enumerate(args.files), parts):
        try:
            refuse_overwriting(args.files, index, args.out)
            print(flatten_exposure(path, args.out, bad, detector, part))
        except FrameError as error:
            print(f"blobpipe: {_one_line(error)}", file=sys.stderr)
            failed = 1
    return failed


def _notify(args: argparse.Namespace) -> None:
    from blobpipe.monitor import logbook, notices

    params = _params_if_any(args).notices
    if args.test:
        print(f"accepted by {', '.join(notices.send_test(params))}")
        return
    connection = logbook.connect(args.log)
    if args.dry_run:
        for notice in notices.waiting(connection):
            print(f"{notice['channel']}: {notice['key']}: {notice['subject']}\n{notice['text']}\n")
        return
    if args.again:
        print(f"put back: {notices.again(connection)}")
    with logbook.writing(connection):
        notices.queue_digest(connection, params, logbook.now())
    print(f"sent: {notices.send(connection, params)}, waiting: {len(notices.waiting(connection))}")


def _doctor(args: argparse.Namespace) -> int:
    from blobpipe.monitor.doctor import Setup, examine

    settings = Path(args.params or PARAMS)
    named = settings if args.params or settings.exists() else None
    model = args.model or _own_or_packaged()
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
        detector=_detector(_params_if_any(args)),
    )


def _serve(args: argparse.Namespace) -> None:
    with _extra("serve"):
        from blobpipe.review.server import serve
    serve(
        args.log, host=args.host, port=args.port, token_file=args.token_file, names=tuple(args.name)
    )


def _page(args: argparse.Namespace) -> None:
    with _extra("serve"):
        from blobpipe.monitor import logbook
        from blobpipe.review import pages

    with closing(logbook.connect(args.log)) as connection:
        day = None if args.all else args.date or pages.newest_day(connection)
        shown = pages.write(connection, args.out, day)
    logging.info("%s: %s", args.out, shown)


@contextmanager
def _extra(name: str) -> Iterator[None]:
    """Say how to install what an extra brings, where it is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise BlobpipeError(
            f"{error.name} is not installed; pip install 'blobpipe[{name}]'"
        ) from error


def _own_or_packaged() -> Path:
    """Return the pipeline's own dense network where there is one, else the packaged one."""
    own = Path(OWN_MODEL)
    return own if own.exists() else Path(__file__).with_name("model.safetensors")


def _default_model(params: Params) -> Path:
    """Return the same, for daily work: the pipeline's own must have passed the regression test."""
    model = _own_or_packaged()
    if model == Path(OWN_MODEL):
        from blobpipe.validation import gate

        gate.require_passed(model, Path(REGRESSION_METRICS), params.regression)
    return model


def _print_params(args: argparse.Namespace) -> None:
    print(to_yaml(Params()), end="")


def _params(args: argparse.Namespace) -> Params:
    return load_params(args.params or PARAMS)


def _params_if_any(args: argparse.Namespace) -> Params:
    """Read the named file; else ``params.yaml`` where there is one, else use the defaults.

    The option ``--detector`` replaces the detector of the settings.
    """
    params = _params(args) if args.params or Path(PARAMS).exists() else Params()
    return params.model_copy(update={"detector": args.detector}) if args.detector else params


def _detector(params: Params) -> Detector:
    """Read the detector of the settings, which may not contradict them."""
    from blobpipe.core.detector import read_detector

    detector = read_detector(params.detector)
    if params.clip.border_px < detector.border_px:
        raise ParamsError(
            f"clip.border_px={params.clip.border_px} is less than the border of {detector.title}, "
            f"{detector.border_px} px; raise it"
        )
    return detector


STAGES: dict[str, tuple[Callable[[argparse.Namespace], int | None], str]] = {
    "campaign": (_campaign, "simulate monitor images: data/raw"),
    "difference": (_difference, "register and subtract the median stack: data/difference (ISR 2)"),
    "clip": (_clip, "clip the difference images: data/clip (ISR 3.1)"),
    "scale": (_scale, "scale the clipped images: data/scale (ISR 3.2)"),
    "cutout": (_cutout, "draw subframes and superimposed blobs: results/cutout (ISR 3.3)"),
    "augment": (_augment, "draw noise, rotations and flips: results/augment (ISR 3.4)"),
    "train": (_train, "train the report's network: results/train (ISR 4, 5)"),
    "dense": (_dense, "train the dense network: results/dense"),
    "detect": (
        _detect,
        "search all images with the dense network and set its operating point: results/detect",
    ),
    "evaluate": (
        _evaluate,
        "evaluate all detectors on validation subframes: results/evaluate (ISR 6)",
    ),
    "regression": (
        _regression,
        "search the historical cases with all detectors: results/regression (ISR 7)",
    ),
    "completeness": (
        _completeness,
        "inject blobs and count those that each detector finds: results/completeness",
    ),
    "explore": (
        _explore,
        "optional: train an autoencoder and embed subframes: results/explore (ISR 7)",
    ),
    "search": (
        _search,
        "optional: search for better settings of the report's network: results/search (ISR 7)",
    ),
}
BATCHED = ("difference", "clip", "scale", "detect", "regression")
GATHERED = ("detect", "regression")

# Commands as --help lists them
GROUPS = {
    "every day": (
        *("quicklook", "serve", "log", "page", "catalogue", "export", "notify", "doctor"),
        *("fetch", "flatten", "detector"),
    ),
    "images": ("check", "scan", "calibrate", "history"),
    "settings and results of the pipeline": ("params", "gate", "report"),
    "stages of the pipeline, which Snakemake and DVC run": tuple(STAGES),
}

# A command line of each, for its help; a stage is called without options
EXAMPLES = {
    "quicklook": "blobpipe quicklook inbox --catalogue known/blobs.csv",
    "serve": "BLOBPIPE_TOKEN=... blobpipe serve --port 8000",
    "log": "blobpipe log candidate_list --out candidates.csv",
    "page": "blobpipe page --date 2024-05-01 --out day.html",
    "catalogue": "blobpipe catalogue update --catalogue known/blobs.csv",
    "export": "blobpipe export known/blobs.csv --bpixtab old_bpx.fits --out handover",
    "notify": "blobpipe notify --dry-run",
    "doctor": "blobpipe doctor --catalogue known/blobs.csv",
    "fetch": "blobpipe fetch --start 2024-05-01 --end 2024-05-31 --out exposures",
    "flatten": "blobpipe flatten exposures/*_flt.fits --out inbox",
    "detector": "blobpipe detector new flat.fits --out my_detector.yaml",
    "check": "blobpipe check inbox/*.fits",
    "scan": "blobpipe scan image.fits --reference stack.fits --out scan",
    "calibrate": "blobpipe calibrate quiet --budget 5 --out operating_point.yaml",
    "history": "blobpipe history archive --catalogue positions.csv --out dated",
    "params": "blobpipe params > params.yaml",
    "gate": "blobpipe gate --against HEAD",
    "report": "blobpipe report --against HEAD~1",
}

# What a status of 1 means besides an error, which one line on stderr describes
FAILURES = {
    "check": "or a file cannot be searched",
    "scan": "or an image was rejected",
    "history": "or an image was rejected",
    "gate": "or the regression test did not pass",
    "doctor": "or a check failed",
    "fetch": "or an exposure could not be downloaded",
    "flatten": "or an exposure could not be used",
}


# --------------------------------------------------------------------------------------------------------- parser


class _Shared(NamedTuple):
    """Parsers of the options that several commands have in common."""

    common: argparse.ArgumentParser
    settings: argparse.ArgumentParser
    log: argparse.ArgumentParser
    detector: argparse.ArgumentParser


def _shared_options() -> _Shared:
    """Make the parsers of the options ``--debug``, ``--params``, ``--log`` and ``--detector``."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="print the traceback of an error")
    settings = argparse.ArgumentParser(add_help=False)
    settings.add_argument("--params", metavar="FILE", help=f"parameter file (default: {PARAMS})")
    detector = argparse.ArgumentParser(add_help=False, parents=[settings])
    detector.add_argument(
        "--detector",
        metavar="NAME|FILE",
        help="detector: one that blobpipe knows, such as wfc3_ir, or a file (default: that of the settings)",
    )
    log = argparse.ArgumentParser(add_help=False)
    log.add_argument(
        "--log",
        type=Path,
        default=Path(LOG),
        metavar="FILE",
        help="log file (default: %(default)s)",
    )
    return _Shared(common, settings, log, detector)


class _Completion(argparse.Action):
    """Print the completion of a shell, and end."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        import shtab

        _complete_paths(parser, shtab.FILE)
        print(shtab.complete(parser, values))
        parser.exit()


def _complete_paths(parser: argparse.ArgumentParser, kind: dict[str, Any]) -> None:
    """Let every argument that is a path, of a command and of what it consists of, be completed as one."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                action.help = None
                # shtab completes the commands that the help lists by itself, which ours does not
                listed = action._ChoicesPseudoAction(name, [], command.description or name)
                action._choices_actions.append(listed)
                _complete_paths(command, kind)
        elif action.type is Path or action.dest == "params":
            action.complete = kind  # type: ignore[attr-defined]


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="blobpipe",
        description="Find blobs in WFC3/IR monitor images.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument(
        "--completion",
        action=_Completion,
        choices=("bash", "zsh", "tcsh"),
        metavar="SHELL",
        help="print the completion script for bash, zsh or tcsh",
    )
    # Commands without this option take the detector of the settings
    parser.set_defaults(detector=None)
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", help=argparse.SUPPRESS
    )
    shared = _shared_options()
    _add_stages(commands, shared)
    _add_check(commands, shared)
    _add_scan(commands, shared)
    _add_calibrate(commands, shared)
    _add_history(commands, shared)
    _add_quicklook(commands, shared)
    _add_log(commands, shared)
    _add_catalogue(commands, shared)
    _add_serve(commands, shared)
    _add_page(commands, shared)
    _add_export(commands, shared)
    _add_gate(commands, shared)
    _add_report(commands, shared)
    _add_notify(commands, shared)
    _add_doctor(commands, shared)
    _add_params(commands, shared)
    _add_fetch(commands, shared)
    _add_flatten(commands, shared)
    _add_detector(commands, shared)
    _describe_commands(parser, commands)
    return parser


def _describe_commands(parser: argparse.ArgumentParser, commands: Commands) -> None:
    """Add the list of commands to the help, and an example and the exit statuses to that of each."""
    lines = []
    for group, names in GROUPS.items():
        lines.append(f"{group}:")
        lines += [f"  {name:12} {commands.choices[name].description}" for name in names]
        lines.append("")
    lines.append("'blobpipe COMMAND --help' describes a command, with an example.")
    parser.epilog = "\n".join(lines)
    # argparse itself would leave out what has no help
    parser.usage = "%(prog)s [-h] [--version] [--completion SHELL] COMMAND ..."
    for name, command in commands.choices.items():
        one = f"an error{' ' * (name in FAILURES)}{FAILURES.get(name, '')}"
        command.formatter_class = argparse.RawDescriptionHelpFormatter
        command.epilog = (
            f"example: {EXAMPLES.get(name, f'blobpipe {name}')}\n"
            f"exit status: 0 done; 1 {one}; 2 a wrong command line"
        )


def _add_stages(commands: Commands, shared: _Shared) -> None:
    """Add one command for each stage."""
    for name, (work, text) in STAGES.items():
        stage = commands.add_parser(
            name,
            parents=[shared.settings, shared.common],
            description=text,
        )
        stage.set_defaults(work=work)
        if name in BATCHED:
            stage.add_argument(
                "--batch", type=int, help="process only this batch of images (default: all)"
            )
        if name in GATHERED:
            stage.add_argument(
                "--gather",
                action="store_true",
                help="use the finished batches, and do the rest",
            )
    commands.choices["campaign"].add_argument(
        "--threads", type=int, default=1, help="number of processes (default: %(default)s)"
    )
    commands.choices["search"].add_argument(
        "--worker",
        type=_worker,
        metavar="N",
        help="only try waiting points, as worker N (from 1) of several; write no results",
    )
    commands.choices["difference"].add_argument(
        "--reference", action="store_true", help="make only the reference stack"
    )


def _add_check(commands: Commands, shared: _Shared) -> None:
    """Add the command ``check``."""
    check = commands.add_parser(
        "check",
        parents=[shared.detector, shared.common],
        description="report what image files contain, and whether they can be searched",
    )
    check.add_argument("files", nargs="+", type=Path, metavar="FILE", help="FITS image")
    check.set_defaults(work=_check)


def _add_scan(commands: Commands, shared: _Shared) -> None:
    """Add the command ``scan``."""
    scan = commands.add_parser(
        "scan", parents=[shared.detector, shared.common], description="search images for new blobs"
    )
    scan.add_argument("frames", nargs="+", type=Path, metavar="FRAME", help="blob image")
    _add_subtraction(scan, "median stack to subtract")
    scan.add_argument(
        "--model",
        type=Path,
        help=f"trained dense or report network (default: {OWN_MODEL}, which must have passed the gate; else the packaged model)",
    )
    _add_known_blobs(scan)
    _add_bad_pixels(scan)
    _add_operating_point(scan)
    scan.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for tables and pictures"
    )
    scan.set_defaults(work=_scan)


def _add_subtraction(command: argparse.ArgumentParser, reference_help: str) -> None:
    """Add the options that say whether, and which stack, is to be subtracted."""
    which = command.add_mutually_exclusive_group()
    which.add_argument(
        "--difference", action="store_true", help="the images are difference images already"
    )
    which.add_argument("--reference", type=Path, metavar="STACK", help=reference_help)


def _add_known_blobs(command: argparse.ArgumentParser) -> None:
    """Add the option ``--catalogue``."""
    command.add_argument(
        "--catalogue",
        type=Path,
        metavar="TABLE",
        help="table of known blobs: x_px, y_px, radius_px",
    )


def _add_bad_pixels(command: argparse.ArgumentParser) -> None:
    """Add the option ``--bad-pixels``."""
    command.add_argument(
        "--bad-pixels",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="mask of bad pixels (not 0: bad) or bad-pixel table, besides those of the settings; may be repeated",
    )


def _add_operating_point(command: argparse.ArgumentParser) -> None:
    """Add the option ``--operating-point``."""
    command.add_argument(
        "--operating-point",
        type=Path,
        metavar="FILE",
        help="file from 'blobpipe calibrate'; its threshold replaces the model's",
    )


def _add_calibrate(commands: Commands, shared: _Shared) -> None:
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
    _add_subtraction(calibrate, "median stack to subtract")
    calibrate.add_argument(
        "--model", type=Path, help="trained dense network (default: as for scan)"
    )
    _add_known_blobs(calibrate)
    _add_bad_pixels(calibrate)
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


def _worker(text: str) -> int:
    """Read the number of a worker from the command line."""
    return int(
        _number(text, lambda value: value >= 1 and value.is_integer(), "a whole number from 1")
    )


def _budget(text: str) -> float:
    """Read a budget of false alarms from the command line."""
    return _number(text, lambda value: 0 < value < float("inf"), "a number above 0")


def _confidence(text: str) -> float:
    """Read a confidence from the command line."""
    return _number(text, lambda value: 0.5 <= value < 1, "a number from 0.5 to below 1")


def _number(text: str, is_valid: Callable[[float], bool], expected: str) -> float:
    """Read a number within bounds."""
    with suppress(ValueError):
        value = float(text)
        if is_valid(value):
            return value
    raise argparse.ArgumentTypeError(f"found {text}, expected {expected}")


def _add_quicklook(commands: Commands, shared: _Shared) -> None:
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
    _add_subtraction(quicklook, "median stack to subtract until enough images are logged")
    quicklook.add_argument(
        "--model", type=Path, help="trained dense network (default: as for scan)"
    )
    _add_known_blobs(quicklook)
    _add_bad_pixels(quicklook)
    _add_operating_point(quicklook)
    quicklook.add_argument(
        "--silent", action="store_true", help="do not queue notices (for a backlog of images)"
    )
    quicklook.add_argument("--again", action="store_true", help="search rejected images once more")
    quicklook.add_argument(
        "--watch", action="store_true", help="keep running and search images as they arrive"
    )
    quicklook.set_defaults(work=_quicklook)


def _add_history(commands: Commands, shared: _Shared) -> None:
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
    _add_bad_pixels(history)
    history.set_defaults(work=_history)


def _add_log(commands: Commands, shared: _Shared) -> None:
    """Add the command ``log``."""
    log = commands.add_parser(
        "log", parents=[shared.log, shared.common], description="print or export a table of the log"
    )
    log.add_argument(
        "table",
        nargs="?",
        default="candidate_list",
        metavar="TABLE",
        help="one of runs, images, files, subframes, peaks, candidates, detections, depths, reviews, notices, health, candidate_list (default: %(default)s)",
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


def _add_catalogue(commands: Commands, shared: _Shared) -> None:
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


def _add_serve(commands: Commands, shared: _Shared) -> None:
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


def _add_page(commands: Commands, shared: _Shared) -> None:
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


def _add_export(commands: Commands, shared: _Shared) -> None:
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


def _add_gate(commands: Commands, shared: _Shared) -> None:
    """Add the command ``gate``."""
    gate = commands.add_parser(
        "gate",
        parents=[shared.settings, shared.common],
        description="exit with status 1 unless the regression test passed",
    )
    gate.add_argument(
        "--against", metavar="REV", help="also list the cases won and lost since a git revision"
    )
    gate.set_defaults(work=_gate)


def _add_report(commands: Commands, shared: _Shared) -> None:
    """Add the command ``report``."""
    report = commands.add_parser(
        "report",
        parents=[shared.settings, shared.common],
        description="write the first page of the report: verdict, numbers, figures, what changed",
    )
    report.add_argument(
        "--against",
        default="HEAD",
        metavar="REV",
        help="git revision to compare with (default: %(default)s)",
    )
    report.add_argument(
        "--out",
        type=Path,
        default=Path("results/report.html"),
        metavar="FILE",
        help="HTML file to write (default: %(default)s)",
    )
    report.set_defaults(work=_report)


def _add_notify(commands: Commands, shared: _Shared) -> None:
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


def _add_doctor(commands: Commands, shared: _Shared) -> None:
    """Add the command ``doctor``."""
    doctor = commands.add_parser(
        "doctor",
        parents=[shared.detector, shared.log, shared.common],
        description="check everything that the daily routine needs",
    )
    doctor.add_argument("--model", type=Path, help="trained model (default: as for scan)")
    _add_known_blobs(doctor)
    _add_bad_pixels(doctor)
    _add_operating_point(doctor)
    doctor.add_argument(
        "--send-test", action="store_true", help="also send a test notice on every channel"
    )
    doctor.set_defaults(work=_doctor)


def _add_params(commands: Commands, shared: _Shared) -> None:
    """Add the command ``params``."""
    params = commands.add_parser(
        "params", parents=[shared.common], description="print all settings with their defaults"
    )
    params.set_defaults(work=_print_params)


def _add_fetch(commands: Commands, shared: _Shared) -> None:
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


def _add_flatten(commands: Commands, shared: _Shared) -> None:
    """Add the command ``flatten``."""
    flatten = commands.add_parser(
        "flatten",
        parents=[shared.detector, shared.common],
        description="make blob images from calibrated exposures",
    )
    flatten.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="full-frame calibrated exposure"
    )
    _add_bad_pixels(flatten)
    flatten.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for the blob images"
    )
    flatten.set_defaults(work=_flatten)


def _add_detector(commands: Commands, shared: _Shared) -> None:
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


# ------------------------------------------------------------------------------------------------------------ run


def main(argv: list[str] | None = None) -> int:
    """Run a command; input errors end as one line on stderr and exit status 1."""
    status = None
    try:
        status = _run(argv)
        if sys.stdout is not None:
            # Flushed here, where a failure can still be reported
            sys.stdout.flush()
    except BrokenPipeError:  # the reader has closed the pipe, as `head` does
        _discard_output(sys.stdout, sys.stderr)
        return PIPE_CLOSED
    except OSError as error:
        if status is None:
            raise  # asked for by --debug
        _discard_output(sys.stdout)
        if status == 0:
            print(f"blobpipe: {_one_line(error)}", file=sys.stderr)
        return status or 1
    return status


def _run(argv: list[str] | None) -> int:
    """Parse the command line and run its command; return the exit status."""
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("blobpipe").setLevel(logging.DEBUG if args.debug else logging.INFO)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # File names may be in another encoding than the terminal
        sys.stdout.reconfigure(errors="backslashreplace")
    keep_memory()
    rest_idle_threads()
    try:
        return args.work(args) or 0
    except BrokenPipeError:
        raise
    except Exception as error:
        line = _one_line(error)
        if args.debug or not line:
            raise
        print(f"blobpipe: {line}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("blobpipe: interrupted; the next run goes on where this one stopped", file=sys.stderr)
        return INTERRUPTED


def _discard_output(*streams: TextIO | None) -> None:
    """Discard what streams still hold, or Python would report an error when it exits."""
    # A replaced stream has no file number
    with open(os.devnull, "wb") as null, suppress(OSError, ValueError):
        for stream in streams:
            if stream is not None:
                os.dup2(null.fileno(), stream.fileno())


def keep_memory() -> None:
    """Keep freed memory in the process: asking the system for it again takes nearly as long as the work."""
    # Other C libraries than GNU's have no mallopt
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        # Otherwise each thread keeps a heap of its own after its end
        library.mallopt(M_ARENA_MAX, 1)
        library.mallopt(M_MMAP_THRESHOLD, 2**25)
        library.mallopt(M_TRIM_THRESHOLD, 2**30)


def rest_idle_threads() -> None:
    """Let idle OpenMP threads sleep; call it before PyTorch and Numba load OpenMP."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def _one_line(error: Exception) -> str:
    """Describe a fault of the input or the machine in one line; return "" for a bug, which needs a traceback."""
    import sqlite3

    match error:
        case BlobpipeError():
            line = str(error)
        case FileNotFoundError() if error.filename is not None:
            line = f"{error.filename}: not found; run the stage that makes it first, or correct the name"
        case OSError() if error.strerror:
            advice = f"; {ADVICE[error.errno]}" if error.errno in ADVICE else ""
            line = f"{'writing' if error.filename is None else error.filename}: {error.strerror}{advice}"
        case OSError():
            line = " ".join(str(error).split()) or type(error).__name__
        case sqlite3.Error():
            from blobpipe.monitor.logbook import reason

            line = f"the log: {reason(error)}"
        case MemoryError():
            line = "not enough memory; end other programs, or use smaller images or fewer threads"
        case RecursionError():
            line = "found an input that is nested too deeply to be read; --debug says where"
        case UnicodeError():  # its own message shows the bytes alone
            line = "found text in another encoding, expected UTF-8; --debug says where"
        case _:
            return ""
    return printable(line)
