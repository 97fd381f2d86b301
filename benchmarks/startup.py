"""How long Python, PyTorch and each command take until they can begin."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

from benchmarks.material import Size
from benchmarks.measure import ROOT, Part, interleave

MODULES = {  # what each command imports, and the stages that it serves
    "campaign": ("simulation.campaign", "campaign"),
    "difference": ("images.difference", "difference"),
    "clip": ("images.clip", "clip"),
    "scale": ("images.scale", "scale"),
    "cutout": ("simulation.cutout", "cutout"),
    "augment": ("simulation.augment", "augment"),
    "train": ("networks.train", "train"),
    "evaluate": ("validation.evaluate", "evaluate"),
    "regression": ("validation.regression", "regression, gate"),
    "scan": ("monitor.scan", "scan"),
}
SECONDS = 60.0


def startup(size: Size) -> Part:
    """Each in a new process, seconds until it is done."""
    works = {
        "python": ["-c", "pass"],
        "help": ["-m", "blobpipe", "--help"],
        "torch": ["-c", "import torch"],
        **{name: ["-c", f"import blobpipe.{module}"] for name, (module, _) in MODULES.items()},
    }
    if not size.stages:
        works = {name: works[name] for name in ("python", "help", "torch", "scan")}
    rates = interleave(
        {name: _process(*arguments) for name, arguments in works.items()},
        least=size.least,
        most=size.most,
        seconds=SECONDS,
    )
    seconds = {name: 1 / values for name, values in rates.items()}
    part = Part("Start-up")
    part.add("python", "Python alone", "s", seconds["python"])
    part.add("help", "blobpipe --help", "s", seconds["help"], at_most=0.6)
    part.add("torch", "import torch", "s", seconds["torch"])
    for name in filter(seconds.__contains__, MODULES):
        part.add(name, f"imports of {MODULES[name][1]}", "s", seconds[name])
    part.add_ratio(
        "help_over_python", "blobpipe --help / Python alone", seconds["help"], seconds["python"]
    )
    part.add_ratio(
        "scan_over_torch", "imports of scan / import torch", seconds["scan"], seconds["torch"]
    )
    return part


def _process(*arguments: str) -> Callable[[], float]:
    def work() -> float:
        subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True)
        return 1.0

    return work
