"""Models on disk: weights and metadata in one safetensors file, checked when they are read."""

from __future__ import annotations

import copy
import json
import stat
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from blobpipe.core import files
from blobpipe.errors import ModelError
from blobpipe.networks import dense_network
from blobpipe.networks.dense_network import DenseNetwork
from blobpipe.networks.kernels import Kernels, choose_kernels
from blobpipe.networks.report_network import ReportNetwork
from blobpipe.params import Dense, DenseShape, ReportShape, Train, short_fault

Shape = TypeVar("Shape", ReportShape, DenseShape)

PACKAGED = Path(__file__).parents[1] / "model.safetensors"
MAX_BYTES = (
    28 * 2**20
)  # size of a model file; the largest network has 24 MB of weights, the report's 2.1
MAX_SIGMA = (
    1000.0  # largest pixel for which answers must be finite; clipping leaves some three sigma
)


def save_model(
    path: str | Path,
    network: ReportNetwork | DenseNetwork,
    metadata: dict[str, Any],
) -> None:
    """Write weights and metadata as one safetensors file.

    Parameters
    ----------
    path : path
    network : ReportNetwork or DenseNetwork
        On any device.
    metadata : dict
        Anything that JSON can hold; the name of the network, ``report`` or ``dense``, is added.
    """
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()
    }
    name = "report" if isinstance(network, ReportNetwork) else "dense"
    header = {"blobpipe": json.dumps({**metadata, "network": name}, sort_keys=True)}
    with files.atomic(path) as temporary:
        temporary.write_bytes(save(tensors, header))


def load_model(
    path: str | Path, kernels: Kernels | None = None
) -> tuple[ReportNetwork, dict[str, Any]]:
    """Read a model of the report's network.

    Parameters
    ----------
    path : path
    kernels : str, optional
        As in `kernels.choose_kernels`; by default those that run on this CPU.

    Returns
    -------
    network : ReportNetwork
        On the CPU, in evaluation mode.
    metadata : dict

    Raises
    ------
    ModelError
        If the file is missing or damaged, or holds another network or weights that can give no finite answer.
    """
    tensors, metadata = _read(path, "report")
    shape = _shape_of(path, metadata, ReportShape)
    network = ReportNetwork(kernels or choose_kernels("auto"), shape)
    _fill(path, network, tensors)
    return network, metadata


def load_dense(path: str | Path) -> tuple[DenseNetwork, dict[str, Any]]:
    """Read a model of the dense network.

    Returns
    -------
    network : DenseNetwork
        On the CPU, in evaluation mode.
    metadata : dict

    Raises
    ------
    ModelError
        As `load_model`.
    """
    tensors, metadata = _read(path, "dense")
    network = DenseNetwork(_shape_of(path, metadata, DenseShape))
    _fill(path, network, tensors)
    return network, metadata


def kind_of_model(path: str | Path) -> str:
    """Return which network a model is of, ``report`` or ``dense``.

    Raises
    ------
    ModelError
        If the file is missing or is not a model.
    """
    return str(_read(path)[1]["network"])


def described(path: Path) -> str:
    """Return a line that names a model: its file, whether it is the packaged one, and a short hash."""
    where = "packaged" if path.resolve() == PACKAGED.resolve() else "local"
    return f"{path} ({where}, SHA-256 {files.sha256(path)[:12]})"


def recorded(params: Train | Dense) -> dict[str, Any]:
    """Return the settings of a training as its model records them; a shape that is not named is the default."""
    settings = params.model_dump()
    if params.network == type(params.network)():
        del settings["network"]
    return settings


def _shape_of(path: str | Path, metadata: dict[str, Any], kind: type[Shape]) -> Shape:
    """Return the shape that a model file records."""
    try:
        found = metadata["params"]["network"]
    except (LookupError, TypeError):
        return kind()
    try:
        return kind.model_validate_json(json.dumps(found))
    except ValueError as error:
        raise ModelError(
            f"{path}: not a model (the shape of its network: {short_fault(error)}); train it again or restore it"
        ) from error


def _fill(
    path: str | Path, network: ReportNetwork | DenseNetwork, tensors: dict[str, Tensor]
) -> None:
    """Load tensors into a network, and check them."""
    # names, types and shapes first: PyTorch would report a mismatch in many lines
    fault = _describe_mismatch(network, tensors)
    if not fault:
        network.load_state_dict(tensors)
        fault = _describe_unbounded(network.eval())
    if fault:
        kind = "report" if isinstance(network, ReportNetwork) else "dense"
        raise ModelError(
            f"{path}: not a model of the {kind} network ({fault}); train it again or restore it"
        )


def _read(path: str | Path, wanted: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors and metadata of a model file of the wanted network, or of either; only the form is checked."""
    try:
        content = _read_bytes(path)
        tensors = load(content)
        # the library does not return the metadata: the header is JSON after its length in eight bytes
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        metadata = json.loads(header["__metadata__"]["blobpipe"])
        kind = metadata["network"]
    except FileNotFoundError as error:
        raise ModelError(
            f"{path}: not found, expected a model; train one (blobpipe train, blobpipe dense) or name one (--model)"
        ) from error
    except (SafetensorError, OSError, LookupError, ValueError, TypeError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        in_one_line = " ".join(reason.split())[:150]
        raise ModelError(
            f"{path}: not a model of the report or dense network ({in_one_line}); train it again or restore it"
        ) from error
    if kind not in ("report", "dense"):
        raise ModelError(
            f"{path}: not a model of the report or dense network (found {str(kind)[:40]!r}); train it again or restore it"
        )
    if wanted and kind != wanted:
        raise ModelError(
            f"{path}: not a model of the {wanted} network (found {kind}); train it again or name another"
        )
    return tensors, metadata


def _read_bytes(path: str | Path) -> bytes:
    """Read a file after a look at its kind and size: a pipe would never end, a large file fill the memory."""
    status = Path(path).stat()
    if not stat.S_ISREG(status.st_mode):
        raise ModelError(f"{path}: not a regular file, expected a model; name its file (--model)")
    if status.st_size > MAX_BYTES:
        raise ModelError(
            f"{path}: {status.st_size} bytes, expected a model of at most {MAX_BYTES}; name its file (--model)"
        )
    return Path(path).read_bytes()


def _describe_mismatch(network: nn.Module, tensors: dict[str, Tensor]) -> str:
    """Describe the first tensor whose type or shape is not the network's; an empty string if there is none."""
    expected = network.state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        found_form = _form(tensors.get(name))
        expected_form = _form(expected.get(name))
        if found_form != expected_form:
            return f"tensor {name[:60]!r}: found {found_form}, expected {expected_form}"
    return ""


def _form(tensor: Tensor | None) -> str:
    """Return type and shape, such as ``float32 [8, 1, 5, 5]``, or ``none``."""
    if tensor is None:
        return "none"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _describe_unbounded(network: ReportNetwork | DenseNetwork) -> str:
    """Describe weights that can make an answer infinite or NaN; an empty string if there are none.

    Notes
    -----
    With each weight replaced by its absolute value, the answer to an image that is `MAX_SIGMA` everywhere is a bound
    of all answers: every layer is linear, or a rectifier, or a maximum.
    """
    for name, tensor in network.state_dict().items():
        if not torch.isfinite(tensor).all():
            return f"{name}: found weights that are NaN or infinite, expected numbers"

    # a copy of linear layers, rectifiers and maxima alone, in plain kernels
    if isinstance(network, DenseNetwork):
        bounding: ReportNetwork | DenseNetwork = dense_network.folded(network)
    else:
        bounding = copy.deepcopy(network)
        bounding.kernels = "plain"

    with torch.inference_mode():
        for parameter in bounding.parameters():
            parameter.abs_()
        bound = bounding(torch.full((1, 1, 256, 256), MAX_SIGMA))
    if torch.isfinite(bound).all():
        return ""
    return "found weights so large that an answer may be infinite"
