"""The dense network: is there a blob in each cell of 4 x 4 pixels of an image?"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval


class DenseNetwork(nn.Module):
    """Blob or not, for every 4 x 4 pixels of an image of any size: 93,945 parameters.

    Notes
    -----
    Source: ours. Convolutions at strides 4, 8 and 16, the last ones dilated, so that a streak is seen as a whole;
    what they found is handed down again to stride 4.
    """

    STRIDE = 4
    MULTIPLE = 16  # of this many pixels are the sides that the network takes

    def __init__(self) -> None:
        super().__init__()
        self.at4 = _convolution(16, 24)
        self.at8 = nn.Sequential(_convolution(24, 40, stride=2), _convolution(40, 40))
        self.at16 = nn.Sequential(
            _convolution(40, 48, stride=2),
            _convolution(48, 48, dilation=2),
            _convolution(48, 48, dilation=4),
        )
        self.to8, self.to4 = nn.Conv2d(48, 40, 1), nn.Conv2d(40, 24, 1)
        self.last, self.head = _convolution(24, 24), nn.Conv2d(24, 1, 1)
        nn.init.constant_(self.head.bias, -5.0)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        """Logit of a blob's core in each cell of 4 x 4 pixels.

        Parameters
        ----------
        images : Tensor, shape (n, 1, ny, nx), float32
            Clipped and scaled (sigma); sides are multiples of 16.

        Returns
        -------
        Tensor, shape (n, ny / 4, nx / 4), float32
        """
        cells = F.pixel_unshuffle(images, self.STRIDE).contiguous(memory_format=torch.channels_last)
        at4 = self.at4(cells)
        at8 = self.at8(at4)
        at8 = at8 + F.interpolate(self.to8(self.at16(at8)), scale_factor=2.0)
        at4 = at4 + F.interpolate(self.to4(at8), scale_factor=2.0)
        logits: Tensor = self.head(self.last(at4))
        return logits[:, 0]


def _convolution(
    channels: int, filters: int, *, stride: int = 1, dilation: int = 1
) -> nn.Sequential:
    convolution = nn.Conv2d(channels, filters, 3, stride, dilation, dilation, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(filters), nn.ReLU(inplace=True))


def new_dense_network(seed: int) -> DenseNetwork:
    """A network with PyTorch's random weights, which depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DenseNetwork()


def folded(network: DenseNetwork) -> DenseNetwork:
    """The same network for searching alone, in three quarters of the time: its convolutions normalise too.

    Parameters
    ----------
    network : DenseNetwork
        Stays as it is.

    Notes
    -----
    Source: ours. Equal up to rounding; its weights have other names, so it is not for saving.
    """
    network = copy.deepcopy(network).eval()
    for part in network.modules():
        if isinstance(part, nn.Sequential) and isinstance(part[0], nn.Conv2d):
            assert isinstance(part[1], nn.BatchNorm2d)
            part[0], part[1] = fuse_conv_bn_eval(part[0], part[1]), nn.Identity()
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network
