"""The report's network: does a subframe of 256 x 256 pixels show a blob (ISR 4)?"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blobpipe.core import threads
from blobpipe.networks import fused
from blobpipe.networks.kernels import Kernels
from blobpipe.params import N_CLASSES, ReportShape
from blobpipe.simulation import render_gpu

MIN_SPREAD = (
    1e-3  # of what a filter makes of noise: one that sees nothing of a small map is left as it is
)
SAMPLE = 8  # subframes of white noise by which the first weights are scaled


class ReportNetwork(nn.Module):
    """Blocks of convolution, rectifier, pooling and dropout, then layers of neurons and two answers.

    Parameters
    ----------
    kernels : str
        Kernels of the blocks, from `kernels.choose_kernels`.
    shape : ReportShape
        The report's if not given, with 528,098 weights.

    Attributes
    ----------
    blocks : list of Conv2d
        The convolutions; their weights are ``conv1``, ``conv2``, ... in a model file.
    layers : list of Linear
        The layers of neurons, of which the last gives the answers: ``dense1``, ``dense2``, ...

    Notes
    -----
    Source: ISR section 4. Convolutions 5x5 (8 and 16 filters, zero padding 2), ReLU, 4x4 max pooling,
    dropout 0.15 and 0.30, dense 128, dense 2.
    """

    def __init__(self, kernels: Kernels = "plain", shape: ReportShape | None = None) -> None:
        super().__init__()
        self.kernels = kernels
        self.shape = shape = shape or ReportShape()

        # convolutions, with zeros around the image so that it keeps its size
        side, pad = shape.kernel_px, shape.kernel_px // 2
        channels = (1, *shape.filters)
        self.blocks = [nn.Conv2d(a, b, side, padding=pad) for a, b in pairwise(channels)]
        for number, block in enumerate(self.blocks, 1):
            self.add_module(f"conv{number}", block)

        # layers of neurons
        neurons = (shape.filters[-1] * shape.n_last_cells, *shape.neurons, N_CLASSES)
        self.layers = [nn.Linear(a, b) for a, b in pairwise(neurons)]
        for number, layer in enumerate(self.layers, 1):
            self.add_module(f"dense{number}", layer)

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
        x = subframes
        for number, (block, dropout) in enumerate(
            zip(self.blocks, self.shape.dropout, strict=True)
        ):
            x = self._block(x, block, dropout, len(self.blocks) * dropout_seed + number)
        x = x.flatten(1)
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        logits: Tensor = self.layers[-1](x)
        return logits

    def _block(self, x: Tensor, conv: nn.Conv2d, dropout: float, seed: int | Tensor) -> Tensor:
        """Convolve, rectify, pool, and drop while training: (n, c, ny, nx) to (n, filters, ny / pool, nx / pool)."""
        assert conv.bias is not None
        pool = self.shape.pool_px
        dropout = dropout if self.training else 0.0

        # all of it in one kernel
        if self.kernels == "fused" and x.device.type == "cpu":
            return fused.conv_relu_pool(
                x, conv.weight, conv.bias, pool, dropout=dropout, seed=int(seed)
            )
        if self.kernels == "fused" and x.device.type == "cuda":
            from blobpipe.networks import fused_gpu

            seed = torch.as_tensor(seed, device=x.device)
            return fused_gpu.conv_relu_pool(x, conv.weight, conv.bias, dropout=dropout, seed=seed)

        # or by PyTorch
        pooled = F.max_pool2d(F.relu(conv(x)), pool)
        if not dropout:
            return pooled
        seed = torch.as_tensor(seed, device=pooled.device)
        return pooled * render_gpu.keep_mask(pooled.shape, dropout, seed) / (1 - dropout)


def new_network(seed: int, kernels: Kernels, shape: ReportShape | None = None) -> ReportNetwork:
    """Return a network with random weights that depend on the seed alone.

    Parameters
    ----------
    seed : int
    kernels : str
    shape : ReportShape, optional
        The report's if not given.

    Notes
    -----
    The report does not give its first weights. Here the convolutions are scaled so that white noise, which a
    subframe mostly is, leaves each block with mean 0 before the rectifier and standard deviation 1, and the last
    layer is initialised to zero, so that no random answer has to be unlearnt. The network then leaves the first
    plateau within an epoch; from PyTorch's own weights some seeds need several.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        network = ReportNetwork(kernels, shape)

        # scale the convolutions by what they make of white noise
        x = torch.randn(SAMPLE, 1, 256, 256)
        for conv in network.blocks:
            assert conv.bias is not None
            convolved = F.conv2d(x, conv.weight, padding=network.shape.kernel_px // 2)
            pooled = F.max_pool2d(convolved, network.shape.pool_px)
            spread, mean = torch.std_mean(pooled, (0, 2, 3), keepdim=True)
            spread = spread.clamp(min=MIN_SPREAD)
            conv.weight /= spread.view(-1, 1, 1, 1)
            conv.bias.copy_((-mean / spread).flatten())
            x = F.relu((pooled - mean) / spread)

        nn.init.zeros_(network.layers[-1].weight)
        nn.init.zeros_(network.layers[-1].bias)
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
