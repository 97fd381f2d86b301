"""Models on disk: weights and metadata in one safetensors file, checked when they are read."""

from __future__ import annotations

import copy
import json
import stat
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from blobpipe.core import files
from blobpipe.errors import ModelError
from blobpipe.networks import dense_network, report_network

PACKAGED = Path(__file__).parents[1] / "model.safetensors"
LARGEST_BYTES = 16 * 2**20  # of a model file; the report's network has 2.1 MB of weights
LARGEST_SIGMA = 1000.0  # of a pixel that a network is asked about; clipping leaves some three sigma


def save_model(
    path: str | Path,
    network: report_network.ReportNetwork | dense_network.DenseNetwork,
    metadata: dict[str, Any],
) -> None:
    """Write weights and ``metadata`` (JSON) as one safetensors file."""
    with files.atomic(path) as temporary:
        tensors = {
            name: tensor.detach().cpu().contiguous()
            for name, tensor in network.state_dict().items()
        }
        name = "report" if isinstance(network, report_network.ReportNetwork) else "dense"
        story = {"blobpipe": json.dumps({**metadata, "network": name}, sort_keys=True)}
        temporary.write_bytes(save(tensors, story))


def load_model(
    path: str | Path, kernels: report_network.Kernels | None = None
) -> tuple[report_network.ReportNetwork, dict[str, Any]]:
    """Read a model back.

    Raises
    ------
    ModelError
        If the file is missing, damaged, or holds another network, or one with weights that cannot be.
    """
    network = report_network.ReportNetwork(kernels or report_network.choose_kernels("auto"))
    return network, _load(path, network, "report")


def load_dense(path: str | Path) -> tuple[dense_network.DenseNetwork, dict[str, Any]]:
    """Read a dense network back.

    Raises
    ------
    ModelError
        As `load_model`.
    """
    network = dense_network.DenseNetwork()
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
    return f"{path} ({where}, SHA-256 {files.sha256(path)[:12]})"


def _load(
    path: str | Path, network: report_network.ReportNetwork | dense_network.DenseNetwork, kind: str
) -> dict[str, Any]:
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
        raise ModelError(
            f"{path}: no model of the {kind} network ({fault}); train it again or restore it"
        )
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
        reason = (
            f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:150]
        )
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
            f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            if tensor is not None
            else "none"
            for tensor in (tensors.get(name), expected.get(name))
        )
        if found != wanted:
            return f"tensor {name[:60]!r}: found {found}, expected {wanted}"
    return ""


def _unbounded(network: report_network.ReportNetwork | dense_network.DenseNetwork) -> str:
    """What in the weights can make an answer that is no finite number; empty if nothing can.

    Notes
    -----
    Source: ours. With each weight replaced by its absolute value, the answer to an image that is `LARGEST_SIGMA`
    everywhere is a bound of all answers: every layer is linear, or a rectifier or maximum of what came before.
    """
    for name, tensor in network.state_dict().items():
        if not torch.isfinite(tensor).all():
            return f"{name}: found weights that are NaN or infinite, expected numbers"
    bounding = (
        dense_network.folded(network)
        if isinstance(network, dense_network.DenseNetwork)
        else copy.deepcopy(network)
    )
    if isinstance(bounding, report_network.ReportNetwork):
        bounding.kernels = "plain"
    with torch.inference_mode():
        for parameter in bounding.parameters():
            parameter.abs_()
        bound = bounding(torch.full((1, 1, 256, 256), LARGEST_SIGMA))
    return (
        ""
        if torch.isfinite(bound).all()
        else "found weights so large that an answer may be infinite"
    )
