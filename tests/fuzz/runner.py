"""Run one case per seed in a way that survives a crash, a hang or a memory hog of the code under test.

A fuzzer is a module with a function ``case(seed, folder)``. It makes its input from the seed alone, reads it in the
empty folder, returns the outcome in a word or two (they are counted), and raises for anything wrong::

    if __name__ == "__main__":
        runner.main(case)

By hand: ``python -m tests.fuzz.fits --seed 0 --count 300``; one seed again, with its traceback: ``--count 1``.
In a test: ``runner.check("tests.fuzz.fits", seed=0, count=300)``, which runs the same in a process of its own: pytest's
has threads, which no fork survives for certain.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

ROOT = Path(__file__).parents[2]
SECONDS = 20  # of wall time for one case; beyond it, it hangs
MEMORY_BYTES = 2 << 30  # that one case may add to those of the process

Case = Callable[[int, Path], str]


def main(case: Case) -> None:
    """Run the cases that the command line names; exit with 1 if one went wrong."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the others follow")
    parser.add_argument("--count", type=int, default=300, help="of cases")
    wanted = parser.parse_args()
    outcomes: Counter[str] = Counter()
    faults = 0
    for seed, outcome, fault in run(case, range(wanted.seed, wanted.seed + wanted.count)):
        if fault:
            faults += 1
            print(f"--- seed {seed}: {fault}", flush=True)
        else:
            outcomes[outcome] += 1
    print(
        f"{wanted.count} cases from seed {wanted.seed}: {faults} faults; {dict(outcomes.most_common())}"
    )
    sys.exit(faults > 0)


def check(module: str, *, seed: int, count: int) -> str:
    """Run a fuzzer in a process of its own; what it printed. Raises AssertionError for a fault."""
    command = [
        sys.executable,
        "-W",
        "error",
        "-m",
        module,
        "--seed",
        str(seed),
        "--count",
        str(count),
    ]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def run(case: Case, seeds: range) -> Iterator[tuple[int, str, str]]:
    """Yield (seed, outcome, fault) of each case; the fault is empty where all was well."""
    left = list(seeds)
    while left:
        done = 0
        for seed, outcome, fault in _until_it_dies(case, left):
            done += 1
            yield seed, outcome, fault
        left = left[done:]


def _until_it_dies(case: Case, seeds: list[int]) -> Iterator[tuple[int, str, str]]:
    """The cases in one forked worker; one that dies or hangs is the fault of the seed that it was at."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    reading, writing = os.pipe()
    worker = os.fork()
    if not worker:
        os.close(reading)
        _work(case, seeds, folder, writing)
    os.close(writing)
    try:
        with os.fdopen(reading, "rb", buffering=0) as pipe:
            for seed in seeds:
                answer = _line(pipe, SECONDS)
                if answer is None:
                    os.kill(worker, signal.SIGKILL)
                    yield seed, "", f"hangs: no end after {SECONDS} s"
                    return
                if not answer:
                    _, status = os.waitpid(worker, 0)
                    worker = 0
                    yield seed, "", f"the process died: {_death(status)}"
                    return
                good, _, text = answer.decode(errors="backslashreplace").partition(" ")
                text = text.replace("\0", "\n").rstrip()
                yield (seed, text, "") if good == "1" else (seed, "", text)
                if good == "2":  # its memory is not the next one's
                    return
    finally:
        if worker:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
            os.waitpid(worker, 0)
        shutil.rmtree(folder, ignore_errors=True)


def _death(status: int) -> str:
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    return f"exit status {os.waitstatus_to_exitcode(status)}"


def _line(pipe: BinaryIO, seconds: float) -> bytes | None:
    """One line; empty at the end of the pipe, None if it does not come in time."""
    end = time.monotonic() + seconds
    line = b""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while not line.endswith(b"\n"):
            if not selector.select(max(0.0, end - time.monotonic())):
                return None
            if not (part := pipe.read(1)):
                return b""
            line += part
    return line


def _work(case: Case, seeds: list[int], folder: Path, writing: int) -> None:
    """In the worker: an answer per seed. A `MemoryError` that the code swallows shows in the peak of its memory."""
    code = 1
    try:
        # the backstop; what counts is what is really used
        limit = _address_space() + 2 * MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        before = _peak_bytes()
        for seed in seeds:
            good, text = _one(case, seed, folder / str(seed))
            used = _peak_bytes() - before
            if used > MEMORY_BYTES:
                good = 2
                text = f"took {used >> 20} MB of memory ({text})"
            os.write(
                writing,
                f"{good} {text}".replace("\n", "\0").encode(errors="backslashreplace") + b"\n",
            )
        code = 0
    finally:
        os._exit(code)


def _one(case: Case, seed: int, folder: Path) -> tuple[int, str]:
    folder.mkdir()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return 1, case(seed, folder)
    except BaseException:
        return 0, traceback.format_exc()[-3000:]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
