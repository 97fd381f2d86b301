"""What the options of a command stand for: its settings, detector and model."""

from __future__ import annotations

import argparse
import functools
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import blobpipe
from blobpipe.cli.paths import OWN_MODEL, PARAMS, REGRESSION_METRICS
from blobpipe.errors import BlobpipeError, ParamsError
from blobpipe.params import Params, load_params

if TYPE_CHECKING:
    from blobpipe.core.detector import Detector


def params_of(args: argparse.Namespace) -> Params:
    """Read the named file, else ``params.yaml``."""
    return load_params(args.params or PARAMS)


def params_if_any(args: argparse.Namespace) -> Params:
    """Read the named file; else ``params.yaml`` where there is one, else use the defaults.

    The option ``--detector`` replaces the detector of the settings.
    """
    params = params_of(args) if args.params or Path(PARAMS).exists() else Params()
    return params.model_copy(update={"detector": args.detector}) if args.detector else params


def detector_of(params: Params) -> Detector:
    """Read the detector of the settings, which may not contradict them."""
    from blobpipe.core.detector import read_detector

    detector = read_detector(params.detector)
    if params.clip.border_px < detector.border_px:
        raise ParamsError(
            f"clip.border_px={params.clip.border_px} is less than the border of {detector.title}, "
            f"{detector.border_px} px; raise it"
        )
    return detector


def default_model(params: Params) -> Path:
    """Return the same, for daily work: the pipeline's own must have passed the regression test."""
    model = own_or_packaged()
    if model == Path(OWN_MODEL):
        from blobpipe.validation import gate

        gate.require_passed(model, Path(REGRESSION_METRICS), params.regression)
    return model


def own_or_packaged() -> Path:
    """Return the pipeline's own dense network where there is one, else the packaged one."""
    own = Path(OWN_MODEL)
    return own if own.exists() else Path(blobpipe.__file__).with_name("model.safetensors")


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Say how to install what an extra brings, where it is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise BlobpipeError(
            f"{error.name} is not installed; pip install 'blobpipe[{name}]'"
        ) from error


@functools.cache
def say_when_compiling() -> None:
    """Say once if kernels have to be compiled, which takes a while at the first use on a machine."""
    from numba.core import event

    # Threads begin to compile at the same time: the one that gets the lock says so, and keeps it
    unsaid = threading.Lock()

    class Listener(event.Listener):
        def on_start(self, event: object) -> None:
            if unsaid.acquire(blocking=False):
                logging.info("compiling for this processor, only at the first use")

        def on_end(self, event: object) -> None:
            pass

    event.register("numba:compile", Listener())  # type: ignore[no-untyped-call]
