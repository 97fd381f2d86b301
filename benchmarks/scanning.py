"""``blobpipe scan``: each run in a process of its own, which says how fast it was and how much memory it took."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import material
from benchmarks.material import Size
from benchmarks.measure import ROOT, Part, progress

THREADS = 2


def scan(size: Size) -> Part:
    """Plain FITS difference images to tables, for growing numbers of them."""
    from blobpipe.networks import model_file, report_network

    order = [n for _ in range(size.scans) for n in size.n_scanned] + [size.main_scan] * (
        size.least - size.scans
    )
    with tempfile.TemporaryDirectory() as folder:
        model_file.save_model(
            Path(folder) / "model.safetensors", report_network.new_network(1, "plain"), {}
        )
        (Path(folder) / "frames").mkdir()
        material.write_frames(Path(folder) / "frames", size, max(size.n_scanned))
        done = []
        for i, n in enumerate(order):
            progress(f"scan: {n} frames, run {i + 1} of {len(order)}")
            done.append(_in_a_process(folder, n))
    return _summary(size, done)


def _in_a_process(folder: str, n: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.scanning", folder, str(n)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if finished.returncode:
        raise RuntimeError(
            f"scanning {n} frames failed: {finished.stderr.strip().splitlines()[-1:]}"
        )
    return {"n": n, **json.loads(finished.stdout.splitlines()[-1])}


def _summary(size: Size, done: list[dict[str, float]]) -> Part:
    def of(n: int, key: str) -> Any:
        return np.array([run[key] for run in done if run["n"] == n])

    main = size.main_scan
    fewest = min(size.n_scanned)
    most = max(size.n_scanned)
    part = Part(f"blobpipe scan --difference, plain FITS, {THREADS} threads, one process each time")
    for n in size.n_scanned:
        target = {"at_least": 30.0} if n == main else {}
        part.add(f"frames_{n}", f"{n} frames, after start-up", "frames/s", of(n, "rate"), **target)
    for n in size.n_scanned:
        target = {"at_most": 1.5} if n in (main, most) else {}
        part.add(f"memory_{n}", f"peak memory, {n} frames", "GB", of(n, "peak_gb"), **target)
    pairs = min(len(of(most, "rate")), len(of(fewest, "rate")))
    memory = of(most, "peak_gb")[:pairs], of(fewest, "peak_gb")[:pairs]
    part.add_ratio(
        "memory_growth", f"peak memory, {most} frames / {fewest} frames", *memory, at_most=1.1
    )
    rates = of(most, "rate")[:pairs], of(fewest, "rate")[:pairs]
    part.add_ratio("rate_growth", f"frames/s, {most} frames / {fewest} frames", *rates)
    part.add_share(
        "reading_share",
        f"scanning / reading alone, {main} frames",
        of(main, "rate"),
        of(main, "reading"),
    )
    part.add("start_s", "start-up: imports, kernels, the first frame", "s", of(main, "start_s"))
    part.add(
        "picture_ms",
        "more for each positive subframe: its map and picture",
        "ms",
        of(main, "picture_ms"),
    )
    part.remarks.append(
        "The frames are links to a few simulated ones and lie in the memory that the system keeps files in. "
        "The network has random weights and the threshold is 1, so that no subframe is positive."
    )
    return part


def _measure(folder: Path, n: int) -> dict[str, float]:
    """In the process of its own."""
    started = time.perf_counter()
    from blobpipe.cli.run import keep_memory, rest_idle_threads
    from blobpipe.core import fits_images
    from blobpipe.monitor.scan import scan
    from blobpipe.params import Evaluate, Params, Train

    keep_memory()
    rest_idle_threads()
    params = Params(evaluate=Evaluate(threshold=1.0), train=Train(threads=THREADS))
    paths = sorted((folder / "frames").iterdir())[:n]

    def timed(paths: list[Path]) -> float:
        before = time.perf_counter()
        scan(paths, folder / "out", folder / "model.safetensors", params, difference=True)
        return time.perf_counter() - before

    timed(paths[:1])
    start_s = time.perf_counter() - started
    rate = n / timed(paths)
    peak = _peak_bytes()
    before = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(lambda path: fits_images.read_frame(path).data.shape, paths):
            pass
    reading = n / (time.perf_counter() - before)
    return {
        "rate": rate,
        "reading": reading,
        "peak_gb": peak / 1e9,
        "start_s": start_s,
        "picture_ms": 1e3 * _picture_seconds(folder),
    }


def _peak_bytes() -> int:
    """Most memory that this process has had; what Linux says of its resources counts the process that started it too."""
    import resource

    status = Path("/proc/self/status")
    if status.exists():
        [line] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def _picture_seconds(folder: Path) -> float:
    from blobpipe.monitor import pictures
    from blobpipe.networks import model_file, saliency

    network, _ = model_file.load_model(folder / "model.safetensors")
    subframe = np.random.default_rng(1).normal(size=(1, 256, 256)).astype(np.float32)
    seconds = []
    for _ in range(4):
        before = time.perf_counter()
        [heat] = saliency.saliency_maps(network, subframe)
        pictures.draw_detection(
            folder / "out" / "picture.png", subframe[0], heat, (0, 0), (128, 128), "a subframe"
        )
        seconds.append(time.perf_counter() - before)
    return float(np.median(seconds[1:]))


if __name__ == "__main__":
    print(json.dumps(_measure(Path(sys.argv[1]), int(sys.argv[2]))))
