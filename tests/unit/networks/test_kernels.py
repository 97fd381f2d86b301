"""The device, the kernels and the threads: settings, and what ``auto`` makes of them."""

from __future__ import annotations

import subprocess
import sys

import torch

from blobpipe.networks import fused, kernels


def test_a_device_is_chosen() -> None:
    assert kernels.choose_device("cpu").type == "cpu"
    assert kernels.choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_kernels_are_chosen() -> None:
    assert kernels.choose_kernels("plain") == "plain"
    assert kernels.choose_kernels("fused") == "fused"
    assert kernels.choose_kernels("auto") == ("fused" if fused.available() else "plain")


def test_threads_are_a_setting() -> None:
    """In a fresh process, where Numba has not yet started its own."""
    script = "import torch; from blobpipe.networks.kernels import set_threads; set_threads(3); print(torch.get_num_threads())"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "3"
