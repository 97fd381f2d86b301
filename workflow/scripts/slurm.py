"""What SLURM says: which jobs still work in this folder, which can never start, which wait and why."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

# Reasons to wait that pass by themselves
ORDINARY = frozenset({"None", "Priority", "Resources", "Dependency", "BeginTime", "Cleaning"})

# Time between two looks at what is waiting (s); the first one is early, for a reason is given in seconds
FIRST_LOOK_S = 10.0
LOOK_S = 60.0

# Time that SLURM has to answer (s)
ANSWER_S = 60.0


class SlurmError(Exception):
    """SLURM cannot be asked, or a job of a run can never start."""


class Queued(NamedTuple):
    """A job in SLURM's queue: waiting, running, or about to end."""

    number: str
    state: str
    reason: str
    rule: str


def ask(*command: str) -> str:
    """Run one of SLURM's commands; what it printed.

    Raises
    ------
    SlurmError
        If it is not here, does not answer, or complains.
    """
    try:
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=ANSWER_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SlurmError(f"{command[0]}: {error}") from error
    if done.returncode:
        raise SlurmError(f"{command[0]}: {' '.join(done.stderr.split())}")
    return done.stdout


def queued_here() -> list[Queued]:
    """The jobs in SLURM's queue that work, or will work, in this folder, whoever submitted them from wherever.

    Raises
    ------
    SlurmError
        If SLURM cannot be asked.
    """
    here = Path.cwd().resolve()
    found = []
    for line in ask("squeue", "--noheader", "--format=%i|%T|%r|%k|%Z").splitlines():
        number, state, reason, comment, folder = line.split("|", 4)
        if Path(folder).resolve() == here:
            found.append(Queued(number, state, reason, comment.removeprefix("rule_")))
    return found


# ---------------------------------------------------------------- jobs that can never start


def limits() -> tuple[dict[str, float], str]:
    """The longest time (min) that a job may take in each partition, and the name of the default partition.

    Raises
    ------
    SlurmError
        If SLURM cannot be asked.
    """
    longest = {}
    default = ""
    for line in ask("sinfo", "--noheader", "--format=%P|%l").splitlines():
        name, _, limit = line.partition("|")
        default = name.removesuffix("*") if name.endswith("*") else default
        longest[name.removesuffix("*")] = minutes(limit)
    return longest, default


def minutes(limit: str) -> float:
    """Minutes of a time as SLURM prints it: ``5:00``, ``1-00:00:00``, ``infinite``; infinite for what is no time."""
    days, _, clock = limit.strip().rpartition("-")
    try:
        parts = [int(part) for part in clock.split(":")]
        seconds = 0
        for part in parts:
            seconds = 60 * seconds + part
        return 1440 * int(days or 0) + seconds / 60
    except ValueError:
        return float("inf")


def refuse_endless_waits(jobs: Iterable[Any]) -> None:
    """Refuse jobs that ask for more time than their partition gives: SLURM takes them, and never starts them.

    Jobs with a quality of service are left to SLURM, for that may lift the limit.

    Parameters
    ----------
    jobs : iterable
        Of Snakemake, with their resources, groups as one.

    Raises
    ------
    SlurmError
        One line that names the rule, both times, and what to do.
    """
    longest, default = limits()
    for job in jobs:
        asked = job.resources.get("runtime")
        if not isinstance(asked, int) or job.resources.get("qos"):
            continue
        partition = str(job.resources.get("slurm_partition") or default)
        known = [longest[name] for name in partition.split(",") if name in longest]
        if known and asked > max(known):
            raise SlurmError(
                f"{job.name}: asks for {asked} min, partition {partition} gives {max(known):g} at most, so it would "
                "wait for ever; name another partition, or less time, in profiles/slurm/config.yaml (set-resources)"
            )


def tell_reasons(tell: Callable[[str], None]) -> threading.Thread:
    """Say, once for each rule and reason, why a job does not start, where that may not pass by itself."""

    def look() -> None:
        told: set[tuple[str, str]] = set()
        pause_s = FIRST_LOOK_S
        while True:
            time.sleep(pause_s)
            pause_s = LOOK_S
            try:
                waiting = [job for job in queued_here() if job.state == "PENDING"]
            except SlurmError:
                continue  # at the next look
            for job in waiting:
                if job.reason not in ORDINARY and (job.rule, job.reason) not in told:
                    told.add((job.rule, job.reason))
                    tell(f"{job.rule}: job {job.number} of SLURM does not start: {job.reason}")

    thread = threading.Thread(target=look, name="reasons", daemon=True)
    thread.start()
    return thread
