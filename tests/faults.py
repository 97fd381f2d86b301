"""A short month of the daily routine, with a fault at every call of the system that writes.

    python -m tests.faults                            # every point
    python -m tests.faults --every 97 --offset 3      # every 97th, from the third on
    python -m tests.faults --kills 1000 --seed 1      # kills at random instead, one after the other

A point is an image of the month, a call below the log's folder while that image is taken in (open, write, rename,
unlink, ftruncate, fsync, mkdir), and a fault: the process is killed before the call, or with half of it done; the call
fails with EIO or EACCES; the disk is full from then on; another process holds every lock from then on. From the state
before the image, the routine runs into the fault: it dies, or ends with one line, or survives. Then it runs once more
without one, and log and cache must be what they are without any fault. As each image starts from the state that the one
before must lead to, this covers the month.

`tests/faults.c` counts the calls, and fails them; it is preloaded, so the points run in a process of its own. That process
has everything imported and forks for each run.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import functools
import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from astropy.io import fits
from tqdm import tqdm

from blobpipe import cli
from blobpipe.cli import run as command
from blobpipe.cli import settings as read
from blobpipe.core.blob_shapes import blob_profile
from blobpipe.monitor import delivery, logbook
from blobpipe.networks import dense, kernels, model_file
from blobpipe.params import Detect, Difference, Health, Notices, Params, Quicklook, to_yaml
from blobpipe.quicklook import arrivals, run
from tests import month
from tests.servers import Hook, HookServer

SHIM = "BLOBPIPE_FAULTS"  # variable with the file of the compiled tests/faults.c
ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1"
)  # no fork survives more
PATIENCE_S = 0.05  # of a run for another's lock
STACK = 3
DAYS = (*["plain"] * (STACK + 3), "late", "duplicate", "cut", "renamed", "plain")
LANDS = STACK + 1  # the day of a new blob: found, and the day after seen again
SIDE = 256
KNOWN = ((60.0, 80.0, 6.5, 0.08), (200.0, 190.0, 5.5, 0.1))
NEW = (150.0, 60.0, 6.0, 0.08)
COUNT, KILL, TORN, FAIL, FULL, LOCKED = range(6)  # as in faults.c


class Fault(NamedTuple):
    """How calls fail: a number of faults.c, and of the error."""

    how: int
    error: int = 0


FAULTS = {
    "kill": Fault(KILL),
    "torn": Fault(TORN),
    "EIO": Fault(FAIL, errno.EIO),
    "EACCES": Fault(FAIL, errno.EACCES),
    "ENOSPC": Fault(FULL, errno.ENOSPC),
    "locked": Fault(LOCKED),
}


def content(day: int, kind: str) -> bytes:
    """An image as a FITS file; one that is late is of two and a half days before its day."""
    mjd = day - 2.5 if kind == "late" else day
    image = np.random.default_rng([7, day]).normal(0, 0.0076, (SIDE, SIDE)).astype(np.float32)
    for x, y, radius, depth in (*KNOWN, NEW)[: None if mjd >= LANDS else -1]:
        row = round(y)
        col = round(x)
        image[row - 20 : row + 21, col - 20 : col + 21] += depth * blob_profile(
            "disc", radius, x - col, y - row
        )
    buffer = io.BytesIO()
    header = fits.Header(
        {"FILTER": "F153M", "EXPSTART": 60000.0 + mjd, "ROOTNAME": f"ibay{day:02d}010"}
    )
    fits.PrimaryHDU(image, header).writeto(buffer)
    return buffer.getvalue()[: 100_000 if kind == "cut" else None]


def drop(folder: Path, day: int, kind: str) -> None:
    """What comes on a day."""
    match kind:
        case "duplicate":
            shutil.copy(folder / "day001.fits", folder / f"copy{day:03d}.fits")
        case "renamed":
            (folder / "day002.fits").rename(folder / f"moved{day:03d}.fits")
        case _:
            (folder / f"day{day:03d}.fits").write_bytes(content(day, kind))


# --- one run of the routine ------------------------------------------------------------------------------------------


class Ended(NamedTuple):
    """How a run ended: its status (below zero: the signal), what it said, and the calls that were counted."""

    status: int
    said: str
    writes: int
    locks: int


@dataclass
class Month:
    """The folder of a month: images in ``in``, log and cache in ``out``, and copies of the latter before each day."""

    root: Path
    shim: ctypes.CDLL
    states: list[Any] = field(default_factory=list)

    @property
    def out(self) -> Path:
        """Folder of the log."""
        return self.root / "out"

    def run(self, fault: Fault, at: int = 0, kill_after_s: float | None = None) -> Ended:
        """Run the routine once in a fork, with a fault at a call."""
        said = self.root / "said.txt"
        counted = self.root / "counted.txt"
        counted.unlink(missing_ok=True)
        process = os.fork()
        if not process:
            self._child(fault, at, said, counted)
        if kill_after_s is not None:
            time.sleep(kill_after_s)
            os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        writes, locks = map(int, counted.read_text().split()) if counted.exists() else (0, 0)
        return Ended(
            os.waitstatus_to_exitcode(status), said.read_text(errors="replace"), writes, locks
        )

    def _child(self, fault: Fault, at: int, said: Path, counted: Path) -> None:
        status = 99
        try:
            descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            os.chdir(self.root)
            self.shim.faults_arm(os.fsencode(self.out), fault.how, fault.error, at)
            words = ["quicklook", str(self.root / "in"), "--log", str(self.out / "log.sqlite")]
            status = cli.main([*words, "--params", str(self.root / "params.yaml")])
            counted.write_text(f"{self.shim.faults_writes()} {self.shim.faults_locks()}")
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)

    def restore(self, day: int) -> None:
        """Put log and cache back to what they were before a day."""
        shutil.rmtree(self.out, ignore_errors=True)
        if (self.root / f"before{day}").exists():
            shutil.copytree(self.root / f"before{day}", self.out)

    def keep(self, day: int) -> None:
        """Keep log and cache as they are before a day."""
        shutil.copytree(self.out, self.root / f"before{day}")

    def state(self) -> Any:
        """What must not depend on faults: the rows of the log, and the files beside it."""
        files = {}
        for path in sorted(self.out.rglob("*")):
            if path.is_file():
                files[str(path.relative_to(self.out))] = (
                    path.read_bytes() if path.suffix == ".npy" else b""
                )
        return {**month.state(self.root), "files": sorted(files.items())}


def fault_of(ended: Ended) -> str:
    """What is wrong with how a run ended that met a fault; empty if nothing is."""
    if "Traceback" in ended.said or ended.status not in (0, 1, -signal.SIGKILL):
        return f"status {ended.status}: {ended.said[-1500:]}"
    lines = [line for line in ended.said.splitlines() if line.startswith("blobpipe: ")]
    # sending never ends the search
    lines = [line for line in lines if not line.endswith("notices wait")]
    if ended.status == 1 and len(lines) != 1:
        return f"{len(lines)} lines, expected one: {ended.said[-1500:]}"
    return ""


# --- the points ------------------------------------------------------------------------------------------------------


def settings() -> Params:
    """A short stack; notices by a webhook, tried again at once."""
    return Params(
        difference=Difference(stack_size=STACK),
        detect=Detect(threads=1),
        quicklook=Quicklook(settle_s=0.0),
        health=Health(window=5),
        notices=Notices(webhook=True, first_wait_s=0.001, longest_wait_s=0.001, attempts=1000),
    )


def prepare(root: Path) -> Month:
    """Import, compile and remember what every run needs, so that a fork begins with its work."""
    (root / "in").mkdir(parents=True)
    (root / "params.yaml").write_text(to_yaml(settings()))
    logbook.PATIENCE_S = PATIENCE_S
    command.build_parser = functools.cache(command.build_parser)
    read.load_params = functools.cache(read.load_params)
    tqdm.monitor_interval = 0
    arrivals._fatal_to_read = lambda path: (
        ""
    )  # a process of its own for each image at which a run was killed takes seconds
    kernels.set_threads(1)
    for module, name in ((model_file, "kind_of_model"), (run, "load_dense_detector")):
        setattr(module, name, _remembering(getattr(module, name), str))
    dense.probability_map = _remembering(
        dense.probability_map, lambda network, image: image.tobytes()
    )  # type: ignore[assignment]
    shim = ctypes.CDLL(os.environ[SHIM])
    shim.faults_writes.restype = shim.faults_locks.restype = ctypes.c_long
    shim.faults_arm.argtypes = (ctypes.c_char_p, ctypes.c_int, ctypes.c_int, ctypes.c_long)
    shim.faults_arm(b"/nowhere", -1, 0, 0)
    return Month(root, shim)


def _remembering(function: Any, key: Any) -> Any:
    known: dict[Any, Any] = {}

    def found(*arguments: Any) -> Any:
        if (at := key(*arguments)) not in known:
            known[at] = function(*arguments)
        return known[at]

    return found


def days(month_: Month) -> Iterator[tuple[int, str, Ended]]:
    """Let one day after the other come, and run it without a fault; then its points are to be tried."""
    for day, kind in enumerate(DAYS):
        drop(month_.root / "in", day, kind)
        if day:
            month_.restore(day)
        # in this process, so that all its forks remember what was computed
        arguments = ["quicklook", str(month_.root / "in"), "--log", str(month_.out / "log.sqlite")]
        if cli.main([*arguments, "--params", str(month_.root / "params.yaml")]):
            raise SystemExit(f"day {day}: failed without a fault")
        month_.states.append(month_.state())
        month_.keep(day + 1)
        month_.restore(day)
        counted = month_.run(Fault(COUNT))
        if counted.status or month_.state() != month_.states[day]:
            raise SystemExit(f"day {day}: two undisturbed runs differ:\n{counted.said}")
        yield day, kind, counted


def every_point(
    month_: Month, every: int, offset: int, only: list[int] | None
) -> tuple[Counter[str], list[str]]:
    """Try every n-th point, of all days or some; how many of each outcome, and what was wrong."""
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    number = 0
    for day, kind, counted in days(month_):
        points = [
            (name, k)
            for name, fault in FAULTS.items()
            for k in range(1, (counted.locks if fault.how == LOCKED else counted.writes) + 1)
        ]
        chosen = [point for i, point in enumerate(points, number) if i % every == offset]
        chosen = chosen if only is None or day in only else []
        number += len(points)
        for name, k in tqdm(chosen, f"day {day} ({kind})", unit="point", disable=None):
            month_.restore(day)
            ended = month_.run(FAULTS[name], k)
            found = fault_of(ended) or _again(month_, day)
            end = {0: "survived", 1: "one line"}.get(ended.status, "killed")
            outcomes[f"{name}: {end}"] += 1
            if found:
                _note(wrong, f"day {day} ({kind}), {name} at call {k}: {found}")
    outcomes["points of the month"] = number
    return outcomes, wrong


def random_kills(month_: Month, kills: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Kill runs at random calls and moments, each from where the one before left the log; every day has its share."""
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    rng = np.random.default_rng(seed)
    for day, kind, counted in days(month_):
        left = kills * (day + 1) // len(DAYS) - kills * day // len(DAYS)
        while left > 0:
            month_.restore(day)
            while left > 0:
                by_time = rng.random() < 0.5
                fault = Fault(COUNT) if by_time else FAULTS[str(rng.choice(["kill", "torn"]))]
                moment = float(rng.uniform(0, 0.5)) if by_time else None
                ended = month_.run(fault, int(rng.integers(1, counted.writes + 1)), moment)
                if ended.status != -signal.SIGKILL:
                    if found := fault_of(ended):
                        _note(wrong, f"day {day} ({kind}): {found}")
                    break
                outcomes["killed at a moment" if by_time else "killed at a call"] += 1
                left -= 1
            if found := _again(month_, day):
                _note(wrong, f"day {day} ({kind}), seed {seed}: {found}")
            outcomes["states compared"] += 1
    return outcomes, wrong


def _note(wrong: list[str], line: str) -> None:
    wrong.append(line)
    print(f"FAULT: {line}", flush=True)


def _again(month_: Month, day: int) -> str:
    """Run once more without a fault; what is wrong then."""
    ended = month_.run(Fault(COUNT))
    if ended.status:
        return f"then status {ended.status}: {ended.said[-1500:]}"
    found = month_.state()
    expected = month_.states[day]
    return "; ".join(
        f"{name} differ: {str(found[name])[:300]} and {str(expected[name])[:300]}"
        for name in expected
        if found[name] != expected[name]
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--every", type=int, default=1, help="try only each n-th point")
    parser.add_argument("--offset", type=int, default=0, help="of the first point")
    parser.add_argument(
        "--days", type=int, nargs="+", metavar="DAY", help="only the points of these days"
    )
    parser.add_argument("--kills", type=int, default=0, help="kill so often at random instead")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if SHIM not in os.environ:
        sys.exit(_serve_and_run())
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # where syncing takes no time
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        month_ = prepare(Path(folder).resolve() / "month")
        if args.kills:
            outcomes, wrong = random_kills(month_, args.kills, args.seed)
        else:
            outcomes, wrong = every_point(month_, args.every, args.offset, args.days)
        tried = sum(
            count for name, count in outcomes.items() if ":" in name or name.startswith("killed")
        )
        print(f"{tried} tried, {len(wrong)} failed; {dict(sorted(outcomes.items()))}")
        sys.exit(bool(wrong))


def _serve_and_run() -> int:
    """Compile the shim, and run the same command under it, with a webhook that takes its notices."""
    hook = Hook()
    with tempfile.TemporaryDirectory() as folder, HookServer(hook) as web:
        shim = Path(folder) / "faults.so"
        compiled = (
            "gcc",
            "-shared",
            "-fPIC",
            "-O2",
            "-o",
            str(shim),
            str(Path(__file__).with_suffix(".c")),
            "-ldl",
        )
        subprocess.run(compiled, check=True)
        environ = (
            os.environ
            | ONE_THREAD
            | {SHIM: str(shim), "LD_PRELOAD": str(shim), delivery.WEBHOOK: web.url}
        )
        status = subprocess.run(
            [sys.executable, "-m", "tests.faults", *sys.argv[1:]], env=environ, check=False
        ).returncode
    told = {(letter["id"], letter["text"].splitlines()[0]) for letter in hook.taken}
    repeated = len(hook.taken) - len(told)
    if len(dict(told)) != len(told):
        print(f"FAULT: notices of one id differ: {sorted(told)}")
        return 1
    print(f"{len(told)} notices came, again under their id {repeated} times")
    return status


if __name__ == "__main__":
    main()
