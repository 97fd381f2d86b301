"""The device, the kernels and the number of threads that the networks run on."""

from __future__ import annotations

import importlib.util
from typing import Literal

import torch

from blobpipe.networks import fused

Kernels = Literal["fused", "plain"]


def choose_device(device: str) -> torch.device:
    """Return the device of a setting; ``auto`` is CUDA where there is a CUDA device, the CPU elsewhere."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def choose_kernels(kernels: Literal["auto", "fused", "plain"], device: str = "cpu") -> Kernels:
    """Return the kernels of a setting; ``auto`` is ``fused`` where these run, ``plain`` elsewhere.

    Parameters
    ----------
    kernels : str
    device : str
        ``cpu`` or ``cuda``: fused kernels run on a CPU that `fused.available` has tried, and on CUDA with Triton.
    """
    if kernels != "auto":
        return kernels
    has_triton = importlib.util.find_spec("triton") is not None
    runs = fused.available() if device == "cpu" else has_triton
    return "fused" if runs else "plain"


def set_threads(threads: int) -> None:
    """Compute with ``threads`` threads, on a machine with any number of cores, so that sums come out the same."""
    import numba

    most = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    numba.set_num_threads(min(threads, most))
    fused.set_threads(threads)
    # last: numba, as it starts, sets the threads of OpenMP, which PyTorch shares, to all cores
    torch.set_num_threads(threads)
