"""The daily routine with a fault at every call that writes; ``python -m tests.faults`` is the whole of it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    shutil.which("gcc") is None, reason="no gcc, which compiles tests/faults.c"
)


def run(*words: str) -> str:
    """What the command says at its end; in a process of its own, as faults are preloaded."""
    command = (sys.executable, "-m", "tests.faults", *words)
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.mark.slow
def test_a_fault_at_some_of_the_calls_that_write_loses_nothing() -> None:
    said = run("--every", "401", "--offset", "7")
    [(tried, failed)] = re.findall(r"^(\d+) tried, (\d+) failed", said, re.MULTILINE)
    assert int(tried) >= 10
    assert failed == "0"


@pytest.mark.long
def test_a_fault_at_every_call_that_writes_loses_nothing() -> None:
    print(run())


@pytest.mark.long
def test_a_thousand_kills_lose_nothing() -> None:
    print(run("--kills", "1000"))
