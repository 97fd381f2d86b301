"""What the search of the latest images together costs: time for each image, memory, a backlog at once.

    python -m tests.history_cost time --images 60
    python -m tests.history_cost memory --images 1000
    python -m tests.history_cost backlog --images 300

``time`` searches the same images with and without the deep search, in turn, and compares processor and wall time of
those that have one; run it on a quiet machine. ``memory`` reads the resident memory while a long series is searched.
``backlog`` compares one run over all images with a run after each. The status is 1 if a limit is exceeded.
"""

from __future__ import annotations

import argparse
import contextlib
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil
from astropy.io import fits

from blobpipe.networks import model_file
from blobpipe.params import Params, Quicklook
from blobpipe.quicklook import processing, search
from blobpipe.quicklook.options import Options
from blobpipe.quicklook.run import quicklook

# Limits: time with the deep search over that without; growth of the memory from the first to the last third;
# one run over a backlog over a run for each image
MAX_TIME_RATIO = 1.6
MAX_GROWTH = 1.05
MAX_BACKLOG_RATIO = 1.0

NOISE_FRAC = 0.0076
STACK = Params().difference.stack_size
PARAMS = Params().model_copy(update={"quicklook": Quicklook(settle_s=0.0)})


def main() -> int:
    """Measure one of the costs, and return 1 if its limit is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("time", "memory", "backlog"))
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--side", type=int, default=1024, help="of an image (px)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        match args.what:
            case "time":
                return report(
                    "time with / without", time_ratio(root, args.images, args.side), MAX_TIME_RATIO
                )
            case "memory":
                return report(
                    "memory, last / middle third", growth(root, args.images, args.side), MAX_GROWTH
                )
            case _:
                return report(
                    "at once / one by one",
                    backlog_ratio(root, args.images, args.side),
                    MAX_BACKLOG_RATIO,
                )


def report(name: str, found: float, limit: float) -> int:
    """Say what was found, and return whether it is beyond its limit."""
    print(f"{name}: {found:.3f}, at most {limit:g}")
    return int(found > limit)


def time_ratio(root: Path, n_images: int, side: int) -> float:
    """Return the processor time of an image with the deep search over that without."""
    spent: dict[str, list[tuple[float, float]]] = {"with": [], "without": []}
    logs = {name: options(root / name) for name in spent}
    for day in range(n_images):
        write(root / "inbox", day, side)
        for name, given in logs.items():
            processor = time.process_time()
            wall = time.perf_counter()
            with deep_search(on=name == "with"):
                quicklook(root / "inbox", given)
            spent[name].append((time.process_time() - processor, time.perf_counter() - wall))
    for given in logs.values():
        require_searched(given, n_images)

    # Those that have a whole stack and all depths before them
    settled = slice(min(STACK + 35, n_images // 2), None)
    means = {name: np.median(times[settled], axis=0) for name, times in spent.items()}
    for name, (processor, wall) in means.items():
        print(f"{name}: {processor:.3f} s of processor time, {wall:.3f} s (medians)")
    return float(means["with"][0] / means["without"][0])


def growth(root: Path, n_images: int, side: int) -> float:
    """Return the median resident memory of the last third of a series over that of the second third."""
    process = psutil.Process()
    used: list[int] = []
    log_result = processing._log_result

    def log_and_look(*args: Any) -> None:
        log_result(*args)
        used.append(process.memory_info().rss)

    # Files are written as they are needed, and removed when no stack needs them any more
    files: list[Path] = []
    with patch.object(processing, "_log_result", log_and_look):
        for start in range(0, n_images, 50):
            days = range(start, min(start + 50, n_images))
            files += [write(root / "inbox", day, side) for day in days]
            quicklook(root / "inbox", options(root))
            for file in files[: -2 * STACK]:
                file.unlink()
            files = files[-2 * STACK :]
    require_searched(options(root), n_images)
    thirds = np.array_split(np.array(used, float), 3)
    print(
        f"{len(used)} images; thirds: {', '.join(f'{np.median(part) / 1e6:.0f} MB' for part in thirds)}"
    )
    return float(np.median(thirds[2]) / np.median(thirds[1]))


def backlog_ratio(root: Path, n_images: int, side: int) -> float:
    """Return the time of one run over all images over that of a run after each."""
    files = [write(root / "all", day, side) for day in range(n_images)]
    wall = time.perf_counter()
    quicklook(root / "all", options(root / "at once"))
    at_once = time.perf_counter() - wall

    (root / "each").mkdir()
    wall = time.perf_counter()
    for file in files:
        (root / "each" / file.name).hardlink_to(file)
        quicklook(root / "each", options(root / "one by one"))
    one_by_one = time.perf_counter() - wall
    for name in ("at once", "one by one"):
        require_searched(options(root / name), n_images)
    print(f"{n_images} images: {at_once:.1f} s at once, {one_by_one:.1f} s one by one")
    return at_once / one_by_one


def require_searched(given: Options, n_images: int) -> None:
    """Make sure that all images but those of the first stack were searched: nothing costs nothing."""
    with contextlib.closing(sqlite3.connect(given.log_path)) as log:
        (n_searched,) = log.execute(
            "SELECT COUNT(*) FROM images WHERE outcome = 'searched'"
        ).fetchone()
    if n_searched != n_images - STACK:
        raise RuntimeError(f"{n_searched} images were searched, expected {n_images - STACK}")


def options(root: Path) -> Options:
    """Return the options of a run with the packaged model and a log of its own."""
    return Options(root / "out" / "log.sqlite", model_file.PACKAGED, PARAMS)


def write(folder: Path, day: int, side: int) -> Path:
    """Write an image of white noise."""
    folder.mkdir(exist_ok=True)
    path = folder / f"day{day:05d}.fits"
    noise = np.random.default_rng(day).normal(0, NOISE_FRAC, (side, side)).astype(np.float32)
    header = fits.Header({"EXPSTART": 60000.0 + day, "FILTER": "F153M"})
    fits.PrimaryHDU(noise, header).writeto(path)
    return path


@contextmanager
def deep_search(*, on: bool) -> Iterator[None]:
    """Leave the deep search as it is, or off."""
    if on:
        yield
    else:
        with patch.object(search, "_search_latest", lambda *args: None):
            yield


if __name__ == "__main__":
    raise SystemExit(main())
