"""One command per stage, as the rules of the pipeline call them."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from blobpipe.cli.options import Commands, SharedOptions, read_number
from blobpipe.cli.paths import (
    AUGMENT,
    CLIP,
    COMPLETENESS,
    CUTOUT,
    DEEP,
    DENSE,
    DENSE_MODEL,
    DETECT,
    DIFFERENCE,
    EVALUATE,
    EXPLORE,
    MODEL,
    OWN_MODEL,
    RAW,
    REGRESSION,
    SCALE,
    SEARCH,
    TRAIN,
)
from blobpipe.cli.settings import detector_of, params_of


def _campaign(args: argparse.Namespace) -> None:
    from blobpipe.simulation.campaign import simulate

    params = params_of(args)
    simulate(RAW, params.campaign, threads=args.threads, detector=detector_of(params))


def _difference(args: argparse.Namespace) -> None:
    from blobpipe.images import difference
    from blobpipe.images.bad_pixels import read_bad_pixels

    params = params_of(args)
    detector = detector_of(params)
    bad = read_bad_pixels(params.bad_pixels, detector=detector)
    if args.batch is None:
        difference.reference(RAW, DIFFERENCE, params.difference, bad, detector)
    if not args.reference:
        difference.write_differences(RAW, DIFFERENCE, params.difference, args.batch, bad, detector)


def _clip(args: argparse.Namespace) -> None:
    from blobpipe.images.clip import clip

    clip(DIFFERENCE, CLIP, params_of(args).clip, args.batch)


def _scale(args: argparse.Namespace) -> None:
    from blobpipe.images.scale import scale

    scale(CLIP, SCALE, params_of(args).scale, args.batch)


def _cutout(args: argparse.Namespace) -> None:
    from blobpipe.simulation.cutout import cut

    params = params_of(args)
    cut(
        *(RAW, DIFFERENCE, SCALE, CUTOUT, params.cutout),
        clip=params.clip,
        scale=params.scale,
        detector=detector_of(params),
    )


def _augment(args: argparse.Namespace) -> None:
    from blobpipe.simulation.augment import augment

    augment(DIFFERENCE, SCALE, CUTOUT, AUGMENT, params_of(args).augment)


def _train(args: argparse.Namespace) -> None:
    from blobpipe.networks.train import train

    params = params_of(args)
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

    train_dense(DIFFERENCE, SCALE, CUTOUT, AUGMENT, DENSE, params_of(args).dense)


def _detect(args: argparse.Namespace) -> None:
    from blobpipe.detection.detect import detect, search_batches

    params = params_of(args)
    folders = (RAW, DIFFERENCE, SCALE)
    if not args.gather:
        search_batches(*folders, DENSE_MODEL, DETECT, params, args.batch)
    if args.batch is None:
        detect(*folders, CUTOUT, DENSE_MODEL, DETECT, params)


def _evaluate(args: argparse.Namespace) -> None:
    from blobpipe.validation.evaluate import evaluate

    params = params_of(args)
    models = (MODEL, f"{DETECT}/model.safetensors")
    folders = (DIFFERENCE, SCALE, CUTOUT)
    evaluate(*folders, models, EVALUATE, params.evaluate, vetting=params.vetting)


def _regression(args: argparse.Namespace) -> None:
    from blobpipe.validation import cases_page, regression

    params = params_of(args)
    folders = (RAW, DIFFERENCE, SCALE, CUTOUT)
    radii_px = params.evaluate.radii_px
    if not args.gather:
        regression.score_batches(
            *(folders, MODEL, REGRESSION),
            radii_px=radii_px,
            batch=args.batch,
            detector=detector_of(params),
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
        detector=detector_of(params),
    )
    cases_page.write_cases(DIFFERENCE, SCALE, DETECT, MODEL, REGRESSION)


def _completeness(args: argparse.Namespace) -> None:
    from blobpipe.validation import completeness

    params = params_of(args)
    rate = params.detect.false_alarms_per_100_frames
    radii_px = params.evaluate.radii_px
    setting = completeness.Setting(
        params.clip, params.scale, params.vetting, radii_px, rate, detector_of(params)
    )
    models = (f"{DETECT}/model.safetensors", MODEL)
    folders = (RAW, DIFFERENCE, SCALE, CUTOUT)
    baselines = f"{REGRESSION}/batches"
    completeness.measure_completeness(
        *folders, models, baselines, COMPLETENESS, params.completeness, setting=setting
    )


def _deep(args: argparse.Namespace) -> None:
    from blobpipe.validation.deep import measure_deep

    measure_deep(RAW, DIFFERENCE, OWN_MODEL, DEEP, params_of(args))


def _explore(args: argparse.Namespace) -> None:
    from blobpipe.validation.explore import explore

    models = (MODEL, f"{DENSE}/model.safetensors")
    explore(DIFFERENCE, SCALE, CUTOUT, models, EXPLORE, params_of(args).explore)


def _search(args: argparse.Namespace) -> None:
    from blobpipe.validation.search import search

    folders = (DIFFERENCE, SCALE, CUTOUT, AUGMENT)
    search(*folders, SEARCH, params_of(args), worker=args.worker)


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
    "deep": (
        _deep,
        "optional: measure the search of the latest images together: results/deep",
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


def add_commands(commands: Commands, shared: SharedOptions) -> None:
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


def _worker(text: str) -> int:
    """Read the number of a worker from the command line."""
    return int(
        read_number(text, lambda value: value >= 1 and value.is_integer(), "a whole number from 1")
    )
