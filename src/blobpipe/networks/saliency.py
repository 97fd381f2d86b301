"""Saliency maps: where on a subframe the network looks for its blob (ISR section 6)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from scipy.ndimage import gaussian_filter

from blobpipe.core import threads
from blobpipe.networks.report_network import ReportNetwork

# Gaussian sigma: one pooling cell; 0.93 of the peaks then lie on a blob (raw 0.78, 8 px 0.95)
SMOOTHING_PX = 4.0
BATCH = 32  # subframes at a time: bounds the memory of the gradients
THREADS = 2  # maps smoothed at a time; their number changes no bit


def saliency_maps(
    network: ReportNetwork, subframes: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """How strongly each pixel moves the blob neuron: its gradient's absolute value, smoothed.

    The raw gradient is a scatter of single pixels, because max pooling hands it down to one pixel of
    each 4 x 4 and drops the others; a blob shows as a thick place of that scatter. Smoothing by about
    one pooling cell makes thickness out of scatter, and so gives the map a peak that means something.

    Parameters
    ----------
    network : ReportNetwork
        Set to evaluation (no dropout).
    subframes : ndarray, shape (n, 256, 256), float32
        Standardised.

    Returns
    -------
    ndarray, shape (n, 256, 256), float32
        In logits per sigma; zero or more.

    Notes
    -----
    Source: ISR section 6 (gradient of the blob neuron); the smoothing is ours.
    """
    network.eval()
    device = next(network.parameters()).device
    maps = np.empty(subframes.shape, np.float32)
    for start in range(0, len(subframes), BATCH):
        x = torch.from_numpy(subframes[start : start + BATCH, None]).to(device).requires_grad_()
        (gradient,) = torch.autograd.grad(network(x)[:, 1].sum(), x)
        scatter = gradient[:, 0].abs().cpu().numpy()
        list(threads.pool("saliency", THREADS).map(_smooth, scatter, maps[start : start + BATCH]))
    return maps


def _smooth(scatter: npt.NDArray[np.float32], out: npt.NDArray[np.float32]) -> None:
    gaussian_filter(scatter, SMOOTHING_PX, output=out)


def peaks(maps: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """The highest pixel of each map.

    Parameters
    ----------
    maps : ndarray, shape (n, ny, nx)

    Returns
    -------
    ndarray, shape (n, 2), int64
        x, y (px, 0-based); the first one where several are equally high.
    """
    y, x = np.divmod(
        maps.reshape(len(maps), maps.shape[1] * maps.shape[2]).argmax(axis=1), maps.shape[2]
    )
    return np.stack([x, y], axis=1).astype(np.int64)
