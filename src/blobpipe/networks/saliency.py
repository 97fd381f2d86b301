"""Saliency maps: where on a subframe the network looks for its blob (ISR section 6)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from scipy.ndimage import gaussian_filter

from blobpipe.core import threads
from blobpipe.networks.report_network import ReportNetwork

SMOOTHING_PX = (
    4.0  # Gaussian sigma, one pooling window; 0.93 of the peaks are on a blob (0: 0.78, 8 px: 0.95)
)
BATCH = 32  # subframes at a time; bounds the memory of the gradients
THREADS = 2  # maps smoothed at a time; their number changes no result


def saliency_maps(
    network: ReportNetwork, subframes: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """Compute the absolute gradient of the blob neuron by each pixel, smoothed.

    The raw gradient is a scatter of single pixels, because max pooling passes it on to one pixel of each 4 x 4; a
    blob shows as a dense part of that scatter. Smoothing by one pooling window turns density into height, so that
    the peak of the map lies on the blob.

    Parameters
    ----------
    network : ReportNetwork
        Is set to evaluation mode (no dropout).
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
        blob_logits = network(x)[:, 1]
        (gradient,) = torch.autograd.grad(blob_logits.sum(), x)
        scatter = gradient[:, 0].abs().cpu().numpy()

        # list waits for the threads and raises their errors
        smoothed = threads.pool("saliency", THREADS).map(
            _smooth, scatter, maps[start : start + BATCH]
        )
        list(smoothed)
    return maps


def _smooth(scatter: npt.NDArray[np.float32], out: npt.NDArray[np.float32]) -> None:
    gaussian_filter(scatter, SMOOTHING_PX, output=out)


def peaks(maps: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Find the highest pixel of each map.

    Parameters
    ----------
    maps : ndarray, shape (n, ny, nx)

    Returns
    -------
    ndarray, shape (n, 2), int64
        x, y (px, 0-based); the first one where several are equally high.
    """
    n, ny, nx = maps.shape
    highest = maps.reshape(n, ny * nx).argmax(axis=1)
    y, x = np.divmod(highest, nx)
    return np.stack([x, y], axis=1).astype(np.int64)
