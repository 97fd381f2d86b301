"""The dense network: is a blob in each cell of 4 x 4 pixels of an image?"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from blobpipe.params import DenseShape


class DenseNetwork(nn.Module):
    """A convolutional network that answers for every 4 x 4 pixels of an image of any size.

    Parameters
    ----------
    shape : DenseShape, optional
        The default has 76,321 weights.

    Notes
    -----
    Convolutions at strides 4, 8 and 16, the last ones dilated, so that a streak is seen as a whole; their results
    are upsampled and added at strides 8 and 4 (a feature pyramid).
    """

    STRIDE = 4  # side of a cell (px)
    MULTIPLE = 16  # sides of an image are multiples of it (px)
    FIRST_LOGIT = -5.0  # of every cell before training: most cells hold no blob

    def __init__(self, shape: DenseShape | None = None) -> None:
        super().__init__()
        self.shape = shape = shape or DenseShape()
        (n4, n8, n16), (depth4, depth8, depth16) = shape.filters, shape.convolutions
        self.at4 = _convolution(self.STRIDE**2, n4)
        self.more4 = nn.Sequential(*(_convolution(n4, n4) for _ in range(depth4 - 1)))
        self.at8 = nn.Sequential(
            _convolution(n4, n8, stride=2), *(_convolution(n8, n8) for _ in range(depth8 - 1))
        )
        self.at16 = nn.Sequential(
            _convolution(n8, n16, stride=2),
            *(_convolution(n16, n16, dilation=2**number) for number in range(1, depth16)),
        )
        self.to8 = nn.Conv2d(n16, n8, 1)
        self.to4 = nn.Conv2d(n8, n4, 1)
        self.last = _convolution(n4, n4)
        self.head = nn.Conv2d(n4, 1, 1)
        nn.init.constant_(self.head.bias, self.FIRST_LOGIT)  # type: ignore[arg-type]

    @property
    def reach_px(self) -> int:
        """Return how far from a cell pixels can change its logit (px), as a multiple of `MULTIPLE`."""
        depth4, depth8, depth16 = self.shape.convolutions
        at4 = 4 * (depth4 + 1)  # with the last convolution
        at8 = 4 + 8 * (depth8 - 1)
        at16 = 8 + sum(16 * 2**number for number in range(1, depth16))
        # A cell at stride 4 lies anywhere within its cell at stride 16
        reach = at4 + at8 + at16 + 16
        return int(-(-reach // self.MULTIPLE) * self.MULTIPLE)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logit of a blob's core in each cell of 4 x 4 pixels.

        Parameters
        ----------
        images : Tensor, shape (n, 1, ny, nx), float32
            Clipped and scaled (sigma); sides are multiples of 16.

        Returns
        -------
        Tensor, shape (n, ny / 4, nx / 4), float32
        """
        # down to stride 16
        at4 = self.more4(self.at4(_cells(images)))
        at8 = self.at8(at4)
        at16 = self.at16(at8)

        # and up again
        at8 = at8 + F.interpolate(self.to8(at16), scale_factor=2.0)
        at4 = at4 + F.interpolate(self.to4(at8), scale_factor=2.0)
        logits: Tensor = self.head(self.last(at4))
        return logits[:, 0]


def _cells(images: Tensor) -> Tensor:
    """Return images of 4 x 4 times fewer pixels, whose channels are the 16 pixels of a cell and come last in memory.

    As ``F.pixel_unshuffle`` does, in a sixth of the time: the four pixels of a row of a cell move as one number.
    """
    n, _, ny, nx = images.shape
    side = DenseNetwork.STRIDE
    quads = images.contiguous().view(torch.complex128)
    quads = quads.view(n, ny // side, side, nx // side).transpose(2, 3).contiguous()
    return quads.view(images.dtype).view(n, ny // side, nx // side, side**2).permute(0, 3, 1, 2)


def _convolution(
    channels: int, filters: int, *, stride: int = 1, dilation: int = 1
) -> nn.Sequential:
    """Return a 3 x 3 convolution, batch normalisation and a rectifier."""
    convolution = nn.Conv2d(channels, filters, 3, stride, dilation, dilation, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(filters), nn.ReLU(inplace=True))


def new_dense_network(seed: int, shape: DenseShape | None = None) -> DenseNetwork:
    """Return a network with PyTorch's random weights, which depend on the seed and the shape alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DenseNetwork(shape)


def folded(network: DenseNetwork) -> DenseNetwork:
    """Return a copy of a network for inference, whose convolutions include the batch normalisation.

    Parameters
    ----------
    network : DenseNetwork
        Is left as it is.

    Returns
    -------
    DenseNetwork
        In evaluation mode. Equal up to rounding, in three quarters of the time; its weights have other names, so that
        it cannot be saved.
    """
    network = copy.deepcopy(network).eval()
    for part in network.modules():
        if isinstance(part, nn.Sequential) and len(part) and isinstance(part[0], nn.Conv2d):
            assert isinstance(part[1], nn.BatchNorm2d)
            part[0] = fuse_conv_bn_eval(part[0], part[1])
            part[1] = nn.Identity()
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network
