"""The fuzzers: a few hundred damaged inputs at once, ten thousand where there is time; and that their runner notices."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.fuzz import runner

BROKEN = """
import os, time
from tests.fuzz import runner

def case(seed, folder):
    match seed:
        case 1: os.abort()
        case 3: time.sleep(60)
        case 5: raise ValueError("two\\nlines")
        case 7:
            taken = b"1" * (30 << 20)
            return str(len(taken))
    assert not list(folder.iterdir())
    return "well"

runner.SECONDS, runner.MEMORY_BYTES = 1, 20 << 20
runner.main(case)
"""


def test_the_runner_names_the_seed_of_a_crash_a_hang_and_a_memory_hog_and_goes_on(
    tmp_path: Path,
) -> None:
    (tmp_path / "broken.py").write_text(BROKEN)
    command = [sys.executable, "broken.py", "--count", "9"]
    environment = {"PYTHONPATH": str(runner.ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    for line in (
        "--- seed 1: the process died: SIGABRT",
        "--- seed 3: hangs: no end after 1 s",
        "--- seed 5: Traceback",
        "--- seed 7: took ",
        "9 cases from seed 0: 4 faults; {'well': 5}",
    ):
        assert line in done.stdout


def test_damaged_images_are_read_right_or_refused() -> None:
    assert "300 cases from seed 0: 0 faults" in runner.check("tests.fuzz.fits", seed=0, count=300)


@pytest.mark.long
def test_ten_thousand_damaged_images_are_read_right_or_refused() -> None:
    assert "10000 cases from seed 1000: 0 faults" in runner.check(
        "tests.fuzz.fits", seed=1000, count=10_000
    )
