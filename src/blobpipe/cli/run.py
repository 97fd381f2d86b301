"""The entry point: parse the command line, run its command, report errors."""

from __future__ import annotations

import ctypes
import io
import logging
import os
import sys
from contextlib import suppress
from typing import TextIO

from blobpipe.cli.error_lines import one_line
from blobpipe.cli.parser import build_parser

# Exit statuses of a program that SIGINT or SIGPIPE has ended: 128 + signal
INTERRUPTED = 130
PIPE_CLOSED = 141

# Parameters of mallopt; GNU C library, malloc.h
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4
M_ARENA_MAX = -8

# Heaps of the C library (count). With one, two threads wait for each other: a tenth of the time of training
HEAPS = 2


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
            print(f"blobpipe: {one_line(error)}", file=sys.stderr)
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
        line = one_line(error)
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
        library.mallopt(M_ARENA_MAX, HEAPS)
        # Otherwise images of more than 32 MB are given back at once
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, 2**30)


def rest_idle_threads() -> None:
    """Let idle OpenMP threads sleep; call it before PyTorch and Numba load OpenMP."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
