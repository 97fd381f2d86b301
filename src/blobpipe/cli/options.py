"""Options that several commands have in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, TypeAlias

from blobpipe.cli.paths import LOG, PARAMS

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


class SharedOptions(NamedTuple):
    """Parsers of the options that several commands have in common."""

    common: argparse.ArgumentParser
    settings: argparse.ArgumentParser
    log: argparse.ArgumentParser
    detector: argparse.ArgumentParser


def shared_options() -> SharedOptions:
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
    return SharedOptions(common, settings, log, detector)


def add_subtraction(command: argparse.ArgumentParser, reference_help: str) -> None:
    """Add the options that say whether, and which stack, is to be subtracted."""
    which = command.add_mutually_exclusive_group()
    which.add_argument(
        "--difference", action="store_true", help="the images are difference images already"
    )
    which.add_argument("--reference", type=Path, metavar="STACK", help=reference_help)


def add_known_blobs(command: argparse.ArgumentParser) -> None:
    """Add the option ``--catalogue``."""
    command.add_argument(
        "--catalogue",
        type=Path,
        metavar="TABLE",
        help="table of known blobs: x_px, y_px, radius_px",
    )


def add_bad_pixels(command: argparse.ArgumentParser) -> None:
    """Add the option ``--bad-pixels``."""
    command.add_argument(
        "--bad-pixels",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="mask of bad pixels (not 0: bad) or bad-pixel table, besides those of the settings; may be repeated",
    )


def add_operating_point(command: argparse.ArgumentParser) -> None:
    """Add the option ``--operating-point``."""
    command.add_argument(
        "--operating-point",
        type=Path,
        metavar="FILE",
        help="file from 'blobpipe calibrate'; its threshold replaces the model's",
    )


def read_number(text: str, is_valid: Callable[[float], bool], expected: str) -> float:
    """Read a number within bounds."""
    with suppress(ValueError):
        value = float(text)
        if is_valid(value):
            return value
    raise argparse.ArgumentTypeError(f"found {text}, expected {expected}")
