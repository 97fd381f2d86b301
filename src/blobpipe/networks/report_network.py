"""The report's network: does a subframe of 256 x 256 pixels show a blob (ISR 4)?"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blobpipe.core import threads
from blobpipe.networks import fused
from blobpipe.networks.kernels import Kernels
from blobpipe.simulation import render_gpu

POOL_PX = 4  # side and step of the pooling windows (ISR 4)
DROPOUTS = (0.15, 0.30)  # of the outputs of the two blocks while training (ISR 4)
SAMPLE = 8  # subframes of white noise by which the first weights are scaled


class ReportNetwork(nn.Module):
    """Two convolution blocks and two dense layers: 528,098 parameters.

    Parameters
    ----------
    kernels : str
        Kernels of the convolution blocks, from `kernels.choose_kernels`.

    Notes
    -----
    Source: ISR section 4. Convolutions 5x5 (8 and 16 filters, zero padding 2), ReLU, 4x4 max pooling,
    dropout 0.15 and 0.30, dense 128, dense 2.
    """

    def __init__(self, kernels: Kernels = "plain") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 5, padding=2)
        self.conv2 = nn.Conv2d(8, 16, 5, padding=2)
        self.dense1 = nn.Linear(16 * 16 * 16, 128)
        self.dense2 = nn.Linear(128, 2)
        self.kernels = kernels

    def forward(self, subframes: Tensor, dropout_seed: int | Tensor = 0) -> Tensor:
        """Compute the logits of (no blob, blob).

        Parameters
        ----------
        subframes : Tensor, shape (n, 1, 256, 256), float32
            Standardised.
        dropout_seed : int, or on a GPU Tensor, shape (), int64
            Decides which outputs are dropped while training; fused and plain kernels drop the same.

        Returns
        -------
        Tensor, shape (n, 2), float32
        """
        x = self._block(subframes, self.conv1, DROPOUTS[0], 2 * dropout_seed)
        x = self._block(x, self.conv2, DROPOUTS[1], 2 * dropout_seed + 1)
        x = F.relu(self.dense1(x.flatten(1)))
        logits: Tensor = self.dense2(x)
        return logits

    def _block(self, x: Tensor, conv: nn.Conv2d, dropout: float, seed: int | Tensor) -> Tensor:
        """Convolve, rectify, pool, and drop while training: (n, c, ny, nx) to (n, filters, ny / 4, nx / 4)."""
        assert conv.bias is not None
        dropout = dropout if self.training else 0.0

        # all of it in one kernel
        if self.kernels == "fused" and x.device.type == "cpu":
            return fused.conv_relu_pool(
                x, conv.weight, conv.bias, POOL_PX, dropout=dropout, seed=int(seed)
            )
        if self.kernels == "fused" and x.device.type == "cuda":
            from blobpipe.networks import fused_gpu

            seed = torch.as_tensor(seed, device=x.device)
            return fused_gpu.conv_relu_pool(x, conv.weight, conv.bias, dropout=dropout, seed=seed)

        # or by PyTorch
        pooled = F.max_pool2d(F.relu(conv(x)), POOL_PX)
        if not dropout:
            return pooled
        seed = torch.as_tensor(seed, device=pooled.device)
        return pooled * render_gpu.keep_mask(pooled.shape, dropout, seed) / (1 - dropout)


def new_network(seed: int, kernels: Kernels) -> ReportNetwork:
    """Return a network with random weights that depend on the seed alone.

    Parameters
    ----------
    seed : int
    kernels : str

    Notes
    -----
    The report does not give its first weights. Here the convolutions are scaled so that white noise, which a
    subframe mostly is, leaves each block with mean 0 before the rectifier and standard deviation 1, and the last
    layer is initialised to zero, so that no random answer has to be unlearnt. The network then leaves the first
    plateau within an epoch; from PyTorch's own weights some seeds need several.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        network = ReportNetwork(kernels)

        # scale the convolutions by what they make of white noise
        x = torch.randn(SAMPLE, 1, 256, 256)
        for conv in (network.conv1, network.conv2):
            assert conv.bias is not None
            pooled = F.max_pool2d(F.conv2d(x, conv.weight, padding=2), POOL_PX)
            spread, mean = torch.std_mean(pooled, (0, 2, 3), keepdim=True)
            conv.weight /= spread.view(-1, 1, 1, 1)
            conv.bias.copy_((-mean / spread).flatten())
            x = F.relu((pooled - mean) / spread)

        nn.init.zeros_(network.dense2.weight)
        nn.init.zeros_(network.dense2.bias)
        return network


def predict(
    network: ReportNetwork, subframes: npt.NDArray[np.float32] | Tensor, batch: int = 256
) -> npt.NDArray[np.float64]:
    """Compute the probability of a blob for each subframe.

    Parameters
    ----------
    network : ReportNetwork
    subframes : ndarray, or Tensor on any device, shape (n, 256, 256), float32
        Standardised.
    batch : int
        Subframes at a time; bounds the memory.

    Returns
    -------
    ndarray, shape (n,), float64
        From 0 to 1.

    Notes
    -----
    Source: ISR section 5: softmax over the two neurons.
    """
    network.eval()
    device = next(network.parameters()).device

    def predict_from(start: int) -> npt.NDArray[np.float64]:
        """Compute the probabilities of one batch."""
        x = torch.as_tensor(subframes[start : start + batch, None], device=device)
        with torch.inference_mode():
            share = torch.softmax(network(x).double(), 1)
        probability: npt.NDArray[np.float64] = share[:, 1].cpu().numpy()
        return probability

    starts = range(0, len(subframes), batch)
    if len(starts) > 1 and network.kernels == "fused" and device.type == "cpu":
        # while one batch is in the dense layers, which run on one thread, the next is in the convolutions
        batches = list(threads.pool("predict", 2).map(predict_from, starts))
    else:
        batches = [predict_from(start) for start in starts]
    return np.concatenate([np.zeros(0), *batches])
