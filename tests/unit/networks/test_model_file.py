"""Models on disk: what is written comes back, and what is no model is refused in one line."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from blobpipe.core import files
from blobpipe.errors import ModelError
from blobpipe.networks import dense_network, model_file, report_network
from blobpipe.params import Dense, DenseShape, ReportShape, Train

from ..conftest import opinionated_network

SUBFRAMES = np.random.default_rng(1).normal(size=(5, 256, 256)).astype(np.float32)


def weights(network: report_network.ReportNetwork) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def test_a_model_comes_back_with_its_story(tmp_path: Path) -> None:
    network = opinionated_network(1, "plain")
    model_file.save_model(
        tmp_path / "m.safetensors", network, {"params": {"seed": 1}, "version": "0"}
    )
    loaded, metadata = model_file.load_model(tmp_path / "m.safetensors", "plain")
    assert metadata == {"network": "report", "params": {"seed": 1}, "version": "0"}
    assert not loaded.training
    np.testing.assert_array_equal(
        report_network.predict(loaded, SUBFRAMES), report_network.predict(network, SUBFRAMES)
    )


def test_the_same_model_is_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        model_file.save_model(
            tmp_path / name, report_network.new_network(1, "plain"), {"b": 1, "a": 2}
        )
    assert files.sha256(tmp_path / "a") == files.sha256(tmp_path / "b")


def _replaced(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def _lying(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))


def _saved(path: Path, story: str, **more: torch.Tensor) -> None:
    save_file(
        {**weights(report_network.new_network(1, "plain")), **more}, path, {"blobpipe": story}
    )


REPORT = '{"network": "report"}'
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {  # and what is said of it
    "missing": (Path.unlink, "not found"),
    "empty": (lambda path: path.write_bytes(b""), ""),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-100]), ""),
    "no model": (
        lambda path: path.write_bytes(
            b"no model at all, but long enough to hold a header of eight bytes"
        ),
        "",
    ),
    "a folder": (lambda path: _replaced(path, Path.mkdir), "not a regular file"),
    "a pipe": (lambda path: _replaced(path, os.mkfifo), "not a regular file"),
    "a loop of links": (
        lambda path: _replaced(path, lambda path: path.symlink_to(path)),
        "symbolic links",
    ),
    "another network": (
        lambda path: save_file({"a": torch.zeros(4)}, path, {"blobpipe": REPORT}),
        "'a': found float32",
    ),
    "another shape": (
        lambda path: _saved(path, REPORT, **{"conv1.bias": torch.zeros(4)}),
        "[4], expected float32 [8]",
    ),
    "half precision": (
        lambda path: _saved(path, REPORT, **{"conv1.bias": torch.zeros(8).half()}),
        "found float16 [8]",
    ),
    "a tensor too many": (
        lambda path: _saved(path, REPORT, **{"z": torch.zeros(8)}),
        "[8], expected none",
    ),
    "a long header": (
        lambda path: _lying(path, path.read_bytes()[:8], (2**60).to_bytes(8, "little")),
        "",
    ),
    "overlapping tensors": (
        lambda path: _lying(path, b'"data_offsets":[32,', b'"data_offsets":[16,'),
        "",
    ),
    "no story": (
        lambda path: save_file(weights(report_network.new_network(1, "plain")), path),
        "__metadata__",
    ),
    "another story": (lambda path: _saved(path, "{}"), "network"),
    "a story that is a list": (lambda path: _saved(path, '["network"]'), "list"),
    "a story of an unknown network": (
        lambda path: _saved(path, '{"network": "other"}'),
        "found 'other'",
    ),
    "a nested story": (lambda path: _saved(path, "[" * 100_000), "recursion"),
    "huge": (lambda path: _saved(path, json.dumps({"x": "x" * 2**25})), "bytes, expected"),
}


@pytest.mark.parametrize("fault", DAMAGES)
def test_what_is_no_model_is_said_in_one_line(tmp_path: Path, fault: str) -> None:
    path = tmp_path / "m.safetensors"
    model_file.save_model(path, report_network.new_network(1, "plain"), {})
    damage, said = DAMAGES[fault]
    damage(path)
    with pytest.raises(ModelError) as caught:
        model_file.load_model(path, "plain")
    assert str(caught.value).startswith(f"{path}: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("dense1.weight", value) for value in (math.nan, math.inf, 3e38)),
        *(("head.weight", value) for value in (math.nan, -math.inf, 3e38)),
        ("at8.0.1.running_var", -1.0),
    ],
)
def test_weights_that_cannot_be_are_refused(tmp_path: Path, name: str, value: float) -> None:
    """What is not finite, what leads to answers that are not, and a variance below zero."""
    report = name.startswith("dense1")
    network = opinionated_network(1, "plain") if report else dense_network.new_dense_network(1)
    network.state_dict()[name].view(-1)[3] = value
    model_file.save_model(tmp_path / "m.safetensors", network, {})
    with pytest.raises(ModelError, match=r"NaN or infinite|may be infinite"):
        (model_file.load_model if report else model_file.load_dense)(tmp_path / "m.safetensors")


SHAPE = ReportShape(filters=(3,), dropout=(0.2,), kernel_px=7, pool_px=8, neurons=(9, 5))
WIDE = DenseShape(filters=(8, 9, 10), convolutions=(2, 1, 4))


def test_a_model_of_another_shape_comes_back(tmp_path: Path) -> None:
    settings = Train(network=SHAPE)
    network = report_network.new_network(1, "plain", SHAPE)
    about = {"params": model_file.recorded(settings)}
    model_file.save_model(tmp_path / "m.safetensors", network, about)
    loaded, _ = model_file.load_model(tmp_path / "m.safetensors", "plain")
    assert loaded.shape == SHAPE
    np.testing.assert_array_equal(
        report_network.predict(loaded, SUBFRAMES), report_network.predict(network, SUBFRAMES)
    )


def test_a_dense_model_of_another_shape_comes_back(tmp_path: Path) -> None:
    network = dense_network.new_dense_network(1, WIDE).eval()
    about = {"params": model_file.recorded(Dense(network=WIDE))}
    model_file.save_model(tmp_path / "m.safetensors", network, about)
    loaded, _ = model_file.load_dense(tmp_path / "m.safetensors")
    assert loaded.shape == WIDE
    image = torch.from_numpy(SUBFRAMES[:1, None])
    assert torch.equal(loaded(image), network(image))
    folded = dense_network.folded(network)
    assert torch.allclose(folded(image), network(image), atol=1e-4)


def test_the_usual_shape_is_not_recorded() -> None:
    """So that a model of it is the same bytes as before shapes could be chosen."""
    assert "network" not in model_file.recorded(Train())
    assert "network" not in model_file.recorded(Dense())
    assert model_file.recorded(Train(network=SHAPE))["network"]["filters"] == (3,)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (3, "the shape of its network"),
        ({"filters": []}, "filters: found [], expected"),
        ({"filters": [10**9], "dropout": [0.1]}, "filters.0: found 1000000000, expected"),
        ({"filters": [8]}, "expected one number per block"),
        ({"filters": [8], "dropout": [0.1]}, "tensor"),  # right by itself, but not of these weights
    ],
)
def test_a_shape_that_cannot_be_is_refused(tmp_path: Path, found: object, said: str) -> None:
    about = {"params": {"network": found}}
    path = tmp_path / "m.safetensors"
    model_file.save_model(path, report_network.new_network(1, "plain"), about)
    with pytest.raises(ModelError) as caught:
        model_file.load_model(path, "plain")
    assert said in str(caught.value)
    assert str(caught.value).isprintable()
