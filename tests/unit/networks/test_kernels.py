"""The device, the kernels and the threads: settings, and what ``auto`` makes of them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from blobpipe.errors import ParamsError
from blobpipe.networks import fused, kernels
from blobpipe.params import ReportShape


def test_a_device_is_chosen() -> None:
    assert kernels.choose_device("cpu").type == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises(ParamsError, match="found cuda, but PyTorch finds no CUDA device here"):
            kernels.choose_device("cuda")
    assert kernels.choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_kernels_are_chosen() -> None:
    assert kernels.choose_kernels("plain") == "plain"
    assert kernels.choose_kernels("fused") == "fused"
    assert kernels.choose_kernels("auto") == ("fused" if fused.available() else "plain")


def test_fused_kernels_on_cuda_are_those_of_the_reports_shape(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())  # as if Triton were there
    other = ReportShape(kernel_px=3)
    assert kernels.choose_kernels("auto", "cuda") == "fused"
    assert kernels.choose_kernels("auto", "cuda", ReportShape(filters=(4, 9))) == "fused"
    assert kernels.choose_kernels("auto", "cuda", other) == "plain"
    with pytest.raises(ParamsError, match="found fused with a kernel_px of 3"):
        kernels.choose_kernels("fused", "cuda", other)


def test_threads_are_a_setting() -> None:
    """In a fresh process, where Numba has not yet started its own."""
    script = "import torch; from blobpipe.networks.kernels import set_threads; set_threads(3); print(torch.get_num_threads())"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "3"
