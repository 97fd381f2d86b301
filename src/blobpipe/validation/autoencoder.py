"""A convolutional autoencoder that is trained without blobs, so that it reconstructs blobs badly (ISR 7)."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from blobpipe.core.random_streams import stream
from blobpipe.params import Explore

log = logging.getLogger(__name__)

Subframes = npt.NDArray[np.float32]

BATCH = 50  # subframes reconstructed at a time; bounds the memory


class Autoencoder(nn.Module):
    """An autoencoder of 256 x 256 pixels by way of 16 x 16 x 4 numbers, 64 times fewer: 20,724 parameters.

    Notes
    -----
    The report names an autoencoder without its shape. This one works on squares of 4 x 4 pixels, which makes it four
    times faster than one that starts with single pixels.
    """

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(
            nn.PixelUnshuffle(4),
            *(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
            nn.Conv2d(32, 4, 3, stride=2, padding=1),
        )
        self.decode = nn.Sequential(
            *(nn.ConvTranspose2d(4, 32, 4, stride=2, padding=1), nn.ReLU()),
            *(nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1), nn.ReLU()),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.PixelShuffle(4),
        )

    def forward(self, subframes: Tensor) -> Tensor:
        """Reconstruct subframes.

        Parameters
        ----------
        subframes : Tensor, shape (n, 1, ny, nx), float32
            Standardised; sides are multiples of 16.

        Returns
        -------
        Tensor, shape (n, 1, ny, nx), float32
        """
        reconstructed: Tensor = self.decode(self.encode(subframes))
        return reconstructed


def train(subframes: Subframes, params: Explore) -> Autoencoder:
    """Train an autoencoder to reconstruct subframes, by their mean squared error.

    Parameters
    ----------
    subframes : ndarray, shape (n, ny, nx), float32
        Standardised, without blobs.
    params : Explore

    Returns
    -------
    Autoencoder
        In evaluation mode; the same for the same subframes and settings.

    Notes
    -----
    Source: ISR section 7 names the method; shape and training are ours.
    """
    # PyTorch's random weights, without moving its global generator
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(params.seed)
        network = Autoencoder()
    optimiser = torch.optim.Adam(network.parameters(), params.rate)

    n = len(subframes)
    for epoch in range(params.epochs):
        order = stream(params.seed, "explore", epoch).permutation(n)
        error_sum = 0.0
        for rows in np.array_split(order, math.ceil(n / params.batch_size)):
            wanted = torch.from_numpy(subframes[rows, None])
            loss = F.mse_loss(network(wanted), wanted)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            error_sum += loss.item() * len(rows)
        log.info("epoch %d: mean squared error %.4f", epoch + 1, error_sum / n)
    return network.eval()


def reconstruct(network: Autoencoder, subframes: Subframes) -> Subframes:
    """Reconstruct subframes, shape (n, ny, nx), float32, batch by batch."""
    parts = []
    with torch.inference_mode():
        for start in range(0, len(subframes), BATCH):
            images = torch.from_numpy(subframes[start : start + BATCH, None])
            parts.append(network(images)[:, 0])
    return np.asarray(torch.cat(parts).numpy())


def error_maps(
    subframes: Subframes, reconstructed: Subframes | float, smooth_px: float
) -> Subframes:
    """Compute the squared errors of a reconstruction, smoothed with a Gaussian.

    Parameters
    ----------
    subframes, reconstructed : ndarray, shape (n, ny, nx), float32
        In sigma.
    smooth_px : float
        Standard deviation of the Gaussian (px).

    Returns
    -------
    ndarray, shape (n, ny, nx), float32
        In sigma squared.
    """
    squared: npt.NDArray[Any] = np.square(subframes - np.float32(reconstructed))
    return np.asarray(gaussian_filter(squared, (0, smooth_px, smooth_px)))
