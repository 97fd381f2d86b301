"""Which machine and which versions the figures belong to."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from typing import Any

from benchmarks.measure import in_gib

PACKAGES = ("blobpipe", "torch", "numba", "numpy", "bottleneck", "astropy")


def describe() -> dict[str, Any]:
    """Processor, cores, memory, versions; nothing that names the machine or its folders."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_gib": round(in_gib(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))),
        "gpu": _gpu(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
    }


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            found = dict(line.rstrip().split("\t: ", 1) for line in file if "\t: " in line)
    except OSError:
        return platform.processor() or "unknown"
    name = found.get("model name", "unknown")
    family = found.get("cpu family\t", found.get("cpu family", ""))
    model = found.get("model\t", "")
    kind = f" (family {family.strip()}, model {model.strip()})" if family else ""
    wide = next(
        (f", {flag}" for flag in ("avx512f", "avx2") if flag in found.get("flags\t", "").split()),
        "",
    )
    return f"{name}{kind}{wide}"


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
