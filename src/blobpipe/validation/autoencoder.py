"""A convolutional autoencoder that has never seen a blob: what it cannot reconstruct should be one (ISR 7)."""

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

BATCH = 50  # subframes reconstructed at a time: bounds the memory


class Autoencoder(nn.Module):
    """256 x 256 pixels into 16 x 16 x 4 numbers and back, 64 times fewer: 20,724 parameters.

    Notes
    -----
    Source: ours; the report names an autoencoder, without its shape. It works on squares of 4 x 4 pixels, which makes it
    four times faster than one that starts with single pixels.
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
        """Reconstructions of subframes, both of shape (n, 1, ny, nx), float32; sides are multiples of 16."""
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
    Source: ISR section 7 names the method; the rest is ours.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(params.seed)
        network = Autoencoder()
    optimiser = torch.optim.Adam(network.parameters(), params.rate)
    for epoch in range(params.epochs):
        order = stream(params.seed, "explore", epoch).permutation(len(subframes))
        batches = np.array_split(order, math.ceil(len(order) / params.batch_size))
        total = sum(_update(network, optimiser, subframes[rows]) * len(rows) for rows in batches)
        log.info("epoch %d: mean squared error %.4f", epoch + 1, total / len(order))
    return network.eval()


def _update(network: Autoencoder, optimiser: torch.optim.Optimizer, subframes: Subframes) -> float:
    wanted = torch.from_numpy(subframes[:, None])
    loss = F.mse_loss(network(wanted), wanted)
    optimiser.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    optimiser.step()
    return loss.item()


def reconstruct(network: Autoencoder, subframes: Subframes) -> Subframes:
    """What the network makes of subframes, shape (n, ny, nx), float32."""
    starts = range(0, len(subframes), BATCH)
    with torch.inference_mode():
        parts = [
            network(torch.from_numpy(subframes[start : start + BATCH, None])) for start in starts
        ]
    return np.asarray(torch.cat(parts)[:, 0].numpy())


def error_maps(
    subframes: Subframes, reconstructed: Subframes | float, smooth_px: float
) -> Subframes:
    """Squared errors, each the mean of its surroundings with a Gaussian's weights.

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
