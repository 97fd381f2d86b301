"""The report's network, and models on disk."""

from __future__ import annotations

import copy
import importlib.util
import json
import stat
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from blobpipe.core import frames
from blobpipe.core import threads as lasting
from blobpipe.errors import ModelError
from blobpipe.networks import fused
from blobpipe.simulation import render_gpu

Kernels = Literal["fused", "plain"]

PACKAGED = Path(__file__).parents[1] / "model.safetensors"
LARGEST_BYTES = 16 * 2**20  # of a model file; the report's network has 2.1 MB of weights
LARGEST_SIGMA = 1000.0  # of a pixel that a network is asked about; clipping leaves some three sigma


class ReportNetwork(nn.Module):
    """Two convolution blocks and two dense layers: 528,098 parameters.

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
        """Logits of (no blob, blob).

        Parameters
        ----------
        subframes : Tensor, shape (n, 1, 256, 256), float32
            Standardised.
        dropout_seed : int, or on a GPU Tensor, shape (), int64
            Which outputs are dropped while training; fused and plain kernels drop the same.

        Returns
        -------
        Tensor, shape (n, 2), float32
        """
        x = self._block(subframes, self.conv1, 0.15, 2 * dropout_seed)
        x = self._block(x, self.conv2, 0.30, 2 * dropout_seed + 1)
        logits: Tensor = self.dense2(F.relu(self.dense1(x.flatten(1))))
        return logits

    def _block(self, x: Tensor, conv: nn.Conv2d, dropout: float, seed: int | Tensor) -> Tensor:
        assert conv.bias is not None
        dropout = dropout if self.training else 0.0
        if self.kernels == "fused" and x.device.type == "cpu":
            return fused.conv_relu_pool(x, conv.weight, conv.bias, 4, dropout=dropout, seed=int(seed))
        if self.kernels == "fused" and x.device.type == "cuda":
            from blobpipe.networks import fused_gpu

            seed = torch.as_tensor(seed, device=x.device)
            return fused_gpu.conv_relu_pool(x, conv.weight, conv.bias, dropout=dropout, seed=seed)
        pooled = F.max_pool2d(F.relu(conv(x)), 4)
        if not dropout:
            return pooled
        seed = torch.as_tensor(seed, device=pooled.device)
        return pooled * render_gpu.keep_mask(pooled.shape, dropout, seed) / (1 - dropout)


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
            _convolution(40, 48, stride=2), _convolution(48, 48, dilation=2), _convolution(48, 48, dilation=4)
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


def _convolution(channels: int, filters: int, *, stride: int = 1, dilation: int = 1) -> nn.Sequential:
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


def choose_kernels(kernels: Literal["auto", "fused", "plain"], device: str = "cpu") -> Kernels:
    """``auto`` is ``fused`` where it runs: on this CPU, or on a CUDA device with Triton."""
    if kernels == "auto":
        runs = fused.available() if device == "cpu" else importlib.util.find_spec("triton") is not None
        return "fused" if runs else "plain"
    return kernels


def new_network(seed: int, kernels: Kernels) -> ReportNetwork:
    """A network with random weights that depend on the seed alone.

    Notes
    -----
    Source: ours; the report does not say how it starts. The convolutions are scaled so that white noise, which a
    subframe mostly is, leaves each block with mean 0 before the rectifier and standard deviation 1; the last layer
    begins at zero, so that no answer of chance has to be unlearnt. The network then leaves the first plateau within
    an epoch; from PyTorch's own weights some seeds need several.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        network = ReportNetwork(kernels)
        x = torch.randn(8, 1, 256, 256)
        for conv in (network.conv1, network.conv2):
            assert conv.bias is not None
            pooled = F.max_pool2d(F.conv2d(x, conv.weight, padding=2), 4)
            spread, mean = torch.std_mean(pooled, (0, 2, 3), keepdim=True)
            conv.weight /= spread.view(-1, 1, 1, 1)
            conv.bias.copy_((-mean / spread).flatten())
            x = F.relu((pooled - mean) / spread)
        nn.init.zeros_(network.dense2.weight)
        nn.init.zeros_(network.dense2.bias)
        return network


def set_threads(threads: int) -> None:
    """Use so many threads, however many cores there are: sums then come out the same anywhere."""
    import numba

    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
    fused.set_threads(threads)
    # last: Numba, as it starts, sets OpenMP, which PyTorch shares, to all cores
    torch.set_num_threads(threads)


def predict(
    network: ReportNetwork, subframes: npt.NDArray[np.float32] | Tensor, batch: int = 256
) -> npt.NDArray[np.float64]:
    """Probability of a blob for each subframe.

    Parameters
    ----------
    network : ReportNetwork
    subframes : ndarray, or Tensor on any device, shape (n, 256, 256), float32
        Standardised.
    batch : int
        Subframes at a time.

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

    def ask(start: int) -> npt.NDArray[np.float64]:
        x = torch.as_tensor(subframes[start : start + batch, None], device=device)
        with torch.inference_mode():
            answer: npt.NDArray[np.float64] = torch.softmax(network(x).double(), 1)[:, 1].cpu().numpy()
        return answer

    starts = range(0, len(subframes), batch)
    if len(starts) > 1 and network.kernels == "fused" and device.type == "cpu":
        # while one batch is in the dense layers, which run on one thread, the next is in the convolutions
        return np.concatenate(list(lasting.pool("predict", 2).map(ask, starts)))
    return np.concatenate([np.zeros(0), *map(ask, starts)])


def save_model(path: str | Path, network: ReportNetwork | DenseNetwork, metadata: dict[str, Any]) -> None:
    """Write weights and ``metadata`` (JSON) as one safetensors file."""
    with frames.atomic(path) as temporary:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
        name = "report" if isinstance(network, ReportNetwork) else "dense"
        story = {"blobpipe": json.dumps({**metadata, "network": name}, sort_keys=True)}
        temporary.write_bytes(save(tensors, story))


def load_model(path: str | Path, kernels: Kernels | None = None) -> tuple[ReportNetwork, dict[str, Any]]:
    """Read a model back.

    Raises
    ------
    ModelError
        If the file is missing, damaged, or holds another network, or one with weights that cannot be.
    """
    network = ReportNetwork(kernels or choose_kernels("auto"))
    return network, _load(path, network, "report")


def load_dense(path: str | Path) -> tuple[DenseNetwork, dict[str, Any]]:
    """Read a dense network back.

    Raises
    ------
    ModelError
        As `load_model`.
    """
    network = DenseNetwork()
    return network, _load(path, network, "dense")


def kind_of_model(path: str | Path) -> str:
    """``report`` or ``dense``.

    Raises
    ------
    ModelError
        If the file is missing or no model.
    """
    return str(_read(path)[1]["network"])


def described(path: Path) -> str:
    """A model as every run names it: its file, whether that is the packaged one, and a short hash."""
    where = "packaged" if path.resolve() == PACKAGED.resolve() else "local"
    return f"{path} ({where}, SHA-256 {frames.sha256(path)[:12]})"


def _load(path: str | Path, network: ReportNetwork | DenseNetwork, kind: str) -> dict[str, Any]:
    tensors, metadata = _read(path)
    if metadata["network"] != kind:
        raise ModelError(
            f"{path}: no model of the {kind} network (found {metadata['network']}); train it again or name another"
        )
    fault = _misfit(network, tensors)
    if not fault:
        network.load_state_dict(tensors)
        fault = _unbounded(network.eval())
    if fault:
        raise ModelError(f"{path}: no model of the {kind} network ({fault}); train it again or restore it")
    return metadata


def _read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a model file, whatever network it says it holds; nothing but the file's form is checked."""
    try:
        about = Path(path).stat()
        if not stat.S_ISREG(about.st_mode):
            raise ModelError(f"{path}: no regular file, expected a model; name its file (--model)")
        if about.st_size > LARGEST_BYTES:
            raise ModelError(
                f"{path}: {about.st_size} bytes, expected a model of at most {LARGEST_BYTES}; name its file (--model)"
            )
        content = Path(path).read_bytes()
        tensors = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        metadata = json.loads(header["__metadata__"]["blobpipe"])
        kind = metadata["network"]
    except FileNotFoundError as error:
        raise ModelError(
            f"{path}: not found, expected a model; train one (blobpipe train, blobpipe dense) or name one (--model)"
        ) from error
    except (SafetensorError, OSError, LookupError, ValueError, TypeError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:150]
        raise ModelError(
            f"{path}: no model of the report or dense network ({reason}); train it again or restore it"
        ) from error
    if kind not in ("report", "dense"):
        raise ModelError(
            f"{path}: no model of the report or dense network (found {str(kind)[:40]!r}); train it again or restore it"
        )
    return tensors, metadata


def _misfit(network: nn.Module, tensors: dict[str, Tensor]) -> str:
    """The first tensor that the network does not have so; empty if all are as they must be."""
    expected = network.state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        found, wanted = (
            f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}" if tensor is not None else "none"
            for tensor in (tensors.get(name), expected.get(name))
        )
        if found != wanted:
            return f"tensor {name[:60]!r}: found {found}, expected {wanted}"
    return ""


def _unbounded(network: ReportNetwork | DenseNetwork) -> str:
    """What in the weights can make an answer that is no finite number; empty if nothing can.

    Notes
    -----
    Source: ours. With each weight replaced by its absolute value, the answer to an image that is `LARGEST_SIGMA`
    everywhere is a bound of all answers: every layer is linear, or a rectifier or maximum of what came before.
    """
    for name, tensor in network.state_dict().items():
        if not torch.isfinite(tensor).all():
            return f"{name}: found weights that are NaN or infinite, expected numbers"
    bounding = folded(network) if isinstance(network, DenseNetwork) else copy.deepcopy(network)
    if isinstance(bounding, ReportNetwork):
        bounding.kernels = "plain"
    with torch.inference_mode():
        for parameter in bounding.parameters():
            parameter.abs_()
        bound = bounding(torch.full((1, 1, 256, 256), LARGEST_SIGMA))
    return "" if torch.isfinite(bound).all() else "found weights so large that an answer may be infinite"
