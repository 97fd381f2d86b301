"""A log of some days, to go on with."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tests.unit.monitor import masked
from tests.unit.quicklook.days import NEW, STACK, run, write

from blobpipe.monitor import logbook
from blobpipe.monitor.inbox import Stamp


@pytest.fixture(scope="session")
def month(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the log of a stack and five images after it, of which all but the first show a new blob."""
    root = tmp_path_factory.mktemp("month")
    for day in range(STACK + 1):
        write(root / "in", day)
    for day in range(STACK + 1, STACK + 5):
        write(root / "in", day, NEW)
    run(root).close()
    return root


@pytest.fixture
def again(month: Path, tmp_path: Path) -> Path:
    """A copy of it to go on with."""
    shutil.copytree(month, tmp_path, dirs_exist_ok=True)
    log = logbook.connect(tmp_path / "out" / "log.sqlite")
    with logbook.writing(log):
        log.execute("UPDATE files SET path = replace(path, ?, ?)", (str(month), str(tmp_path)))
        for path in (tmp_path / "in").iterdir():
            stamp = Stamp.of(path.stat())
            log.execute(
                "UPDATE files SET size_bytes = ?, modified_ns = ?, changed_ns = ?, inode = ? WHERE path = ?",
                (*stamp, str(path)),
            )
    return tmp_path


@pytest.fixture(scope="session")
def full_frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stack of full frames, and two days on which a new blob and a cluster of bad pixels show."""
    root = tmp_path_factory.mktemp("full")
    for day in range(STACK):
        masked.write(root / "in" / f"day{day:03d}.fits", day)
    for day in range(STACK, STACK + 2):
        blobs = (masked.NEW, masked.CLUSTER)
        masked.write(root / "in" / f"day{day:03d}.fits", day, *blobs)
    masked.write_mask(root / "mask.fits", masked.around(*masked.CLUSTER[:2], 9))
    return root
