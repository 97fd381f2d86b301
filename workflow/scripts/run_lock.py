"""One run at a time in a folder, whichever tool was started first.

Snakemake's own lock names no process, so a killed run leaves one that a person has to judge; and `dvc repro` removes a
stage's files before its command meets that lock. So each run writes down its processes (`claim`), a later one says
who is working or clears what a dead one left, and a Snakemake run makes itself known to DVC before it starts (`hold`).
Jobs on a cluster outlive the run that submitted them; SLURM knows those that work here (`refuse_orphans`).
"""

from __future__ import annotations

import atexit
import fcntl
import json
import math
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
from records import NOTES, snakemake
from slurm import SlurmError, queued_here
from stages import stages

from blobpipe.errors import BlobpipeError

OWNER = NOTES / "owner.json"
SNAKEMAKE_LOCKS = Path(".snakemake/locks")


class BusyError(Exception):
    """Another run is working in this folder."""


def claim() -> None:
    """Take the folder for this process, clearing the lock of a run that is gone.

    Raises
    ------
    BusyError
        One line that names the process at work.
    """
    with only_one(OWNER.with_suffix(".lock")):
        refuse_if_busy(owners())
        refuse_orphans(owners())
        if _is_locked() and OWNER.exists():
            _unlock()
        _write_owners([_identity(process) for process in _processes()])


def note_executor(name: str) -> None:
    """Write down, beside this run's processes, who runs its jobs."""
    _write_owners([{**owner, "executor": name} for owner in owners()])


def hold() -> None:
    """Make DVC refuse to run a stage until this process ends; it may go on committing.

    DVC locks what a stage reads and what it writes before it removes anything. Only its runs read the rules files.
    """
    from dvc.fs import localfs
    from dvc.lock import LockError
    from dvc.rwlock import rwlock

    rules = [
        str(Path(path).resolve())
        for stage in stages().values()
        for path in stage.deps
        if path.endswith(".smk")
    ]
    Path(".dvc/tmp").mkdir(exist_ok=True)
    lock = rwlock(
        str(Path(".dvc/tmp").resolve()), localfs, _command(psutil.Process()), [], rules, False
    )
    try:
        lock.__enter__()
    except LockError as error:
        raise BusyError(" ".join(str(error).split())) from error
    atexit.register(lock.__exit__, None, None, None)


def unlock() -> None:
    """What `make unlock` does: clear every lock of runs that are over.

    Raises
    ------
    BusyError
        If one is still working.
    """
    refuse_if_busy([owner for owner in owners() if owner["host"] == platform.node()])
    refuse_orphans(owners(), trust=True)
    OWNER.unlink(missing_ok=True)
    _unlock()


@contextmanager
def only_one(path: Path) -> Iterator[None]:
    """Keep every other process out of the block that names the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def owners() -> list[dict[str, Any]]:
    """The processes of the last run here, whether they still live or not."""
    try:
        found: list[dict[str, Any]] = json.loads(OWNER.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return []
    return found


def cut_off() -> float:
    """Return when the last run here began, if it was killed and its jobs were on SLURM; else infinity."""
    on_cluster = any(owner.get("executor") == "slurm" for owner in owners())
    return OWNER.stat().st_mtime if on_cluster and _is_locked() else math.inf


def refuse_if_busy(candidates: list[dict[str, Any]]) -> None:
    """Let none of those that wrote themselves down be at work.

    Raises
    ------
    BusyError
        One line that names the process at work.
    """
    family = {os.getpid(), *(process.pid for process in psutil.Process().parents())}
    for owner in candidates:
        if owner["host"] != platform.node() and _is_locked():
            raise BusyError(
                f"'{owner['command']}' was started here on {owner['host']} (process {owner['pid']}): wait until it ends; "
                "if it is over, 'make unlock'"
            )
        if owner["pid"] not in family and _alive(owner):
            raise BusyError(
                f"'{owner['command']}' (process {owner['pid']}) is working in this folder: wait until it ends"
            )


def refuse_orphans(candidates: list[dict[str, Any]], *, trust: bool = False) -> None:
    """Let no job on SLURM, of a run that is gone, write what a new run writes too.

    Parameters
    ----------
    candidates : list of dict
        From `owners`.
    trust : bool
        Take a person's word for it where SLURM cannot be asked.

    Raises
    ------
    BusyError
        One line that names the jobs, and how to end them.
    """
    if not any(owner.get("executor") == "slurm" for owner in candidates):
        return
    try:
        jobs = queued_here()
    except SlurmError as error:
        if trust or not _is_locked():
            return
        raise BusyError(
            f"the last run here had its jobs on SLURM, which cannot be asked whether they are over ({error}): "
            "run this on a machine of the cluster, or 'make unlock' if they are"
        ) from error
    if jobs:
        numbers = " ".join(job.number for job in jobs)
        rules = ", ".join(sorted({job.rule for job in jobs}))
        raise BusyError(
            f"SLURM still has jobs of an earlier run here ({rules}): wait until they end, and what they make is kept, "
            f"or 'scancel {numbers}'"
        )


def _write_owners(found: list[dict[str, Any]]) -> None:
    OWNER.write_text(json.dumps(found), encoding="utf-8")


def _is_locked() -> bool:
    return any(SNAKEMAKE_LOCKS.glob("*.lock"))


def _alive(owner: dict[str, Any]) -> bool:
    """Whether it still runs here: a killed process that nobody has waited for (a zombie) does not."""
    if owner["host"] != platform.node():
        return False
    try:
        process = psutil.Process(owner["pid"])
        return bool(
            process.create_time() == owner["started"] and process.status() != psutil.STATUS_ZOMBIE
        )
    except psutil.NoSuchProcess:
        return False


def _unlock() -> None:
    for process in psutil.process_iter(["cmdline"]):
        if _is_job_here(process):
            raise BusyError(
                f"'{_command(process)}' (process {process.pid}) of a killed run is still working: end it first"
            )
    snakemake("--unlock")


def _is_job_here(process: psutil.Process) -> bool:
    words = process.info["cmdline"] or []
    if not any(
        Path(word).name == "blobpipe" and stage in stages() for word, stage in pairwise(words)
    ):
        return False
    try:
        return Path(process.cwd()) == Path.cwd()
    except psutil.Error:
        return False


def _processes() -> list[psutil.Process]:
    """This process, and the DVC that started it: between two stages that one alone is left."""
    me = psutil.Process()
    return [
        me,
        *(parent for parent in me.parents() if "DVC_STAGE" in os.environ and _is_dvc(parent)),
    ]


def _is_dvc(process: psutil.Process) -> bool:
    return any(Path(word).name == "dvc" for word in process.cmdline()[:3])


def _identity(process: psutil.Process) -> dict[str, Any]:
    started = process.create_time()
    return {
        "pid": process.pid,
        "started": started,
        "command": _command(process),
        "host": platform.node(),
    }


def _command(process: psutil.Process) -> str:
    words = process.cmdline()
    if len(words) > 1 and Path(words[0]).name.startswith("python"):
        words = words[1:]
    return " ".join([Path(words[0]).name, *words[1:]])[:80]


if __name__ == "__main__":
    try:
        unlock()
    except (BusyError, BlobpipeError) as busy:
        sys.exit(str(busy))
