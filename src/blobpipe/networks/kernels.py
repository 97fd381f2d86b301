"""The device, the kernels and the number of threads that the networks run on."""

from __future__ import annotations

import importlib.util
import logging
from typing import Literal

import torch

from blobpipe.errors import ParamsError
from blobpipe.networks import fused
from blobpipe.params import ReportShape

log = logging.getLogger(__name__)

Kernels = Literal["fused", "plain"]


def choose_device(device: str) -> torch.device:
    """Return the device of a setting; ``auto`` is CUDA where there is a CUDA device, the CPU elsewhere.

    Raises
    ------
    ParamsError
        If it is CUDA and there is no CUDA device.
    """
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise ParamsError(
            "device: found cuda, but PyTorch finds no CUDA device here, expected auto or cpu; set it to one of these"
        )
    if device == "auto":
        device = "cuda" if has_cuda else "cpu"
    return torch.device(device)


def choose_kernels(
    kernels: Literal["auto", "fused", "plain"],
    device: str = "cpu",
    shape: ReportShape | None = None,
) -> Kernels:
    """Return the kernels of a setting; ``auto`` is ``fused`` where these run, ``plain`` elsewhere.

    Parameters
    ----------
    kernels : str
    device : str
        ``cpu`` or ``cuda``: fused kernels run on a CPU that `fused.available` has tried, and on CUDA with Triton.
    shape : ReportShape, optional
        Of the network; the report's if not given. On CUDA fused kernels exist for the report's kernel and
        pooling window alone.

    Raises
    ------
    ParamsError
        If fused kernels are asked for where there are none of this shape.
    """
    usual = ReportShape()
    shape = shape or usual
    is_usual = (shape.kernel_px, shape.pool_px) == (usual.kernel_px, usual.pool_px)
    if kernels == "fused" and device == "cuda" and not is_usual:
        raise ParamsError(
            f"train.kernels: found fused with a kernel_px of {shape.kernel_px} and a pool_px of {shape.pool_px}, "
            f"expected {usual.kernel_px} and {usual.pool_px} on CUDA; set it to auto"
        )
    if kernels != "auto":
        return kernels
    if device == "cpu":
        return "fused" if fused.available() else "plain"
    if importlib.util.find_spec("triton") is None:
        return "plain"
    if not is_usual:
        log.info(
            "plain kernels: on CUDA there are no fused ones for this kernel and pooling window"
        )
    return "fused" if is_usual else "plain"


def set_threads(threads: int) -> None:
    """Compute with ``threads`` threads, on a machine with any number of cores, so that sums come out the same."""
    import numba

    most = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    numba.set_num_threads(min(threads, most))
    fused.set_threads(threads)
    # last: numba, as it starts, sets the threads of OpenMP, which PyTorch shares, to all cores
    torch.set_num_threads(threads)
