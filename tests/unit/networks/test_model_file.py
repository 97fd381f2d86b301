"""The report's network, its beginnings, and its life on disk."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from blobpipe.core import files
from blobpipe.errors import ModelError
from blobpipe.networks import dense_network, fused, model_file, report_network

from ..conftest import opinionated_network

SUBFRAMES = np.random.default_rng(1).normal(size=(5, 256, 256)).astype(np.float32)
KERNELS: tuple[report_network.Kernels, ...] = (
    ("plain", "fused") if fused.available() else ("plain",)
)


def weights(network: report_network.ReportNetwork) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def test_it_is_the_reports_network() -> None:
    network = report_network.new_network(1, "plain")
    assert sum(parameter.numel() for parameter in network.parameters()) == 528_098
    assert network.conv1.weight.shape == (8, 1, 5, 5)
    assert network.conv2.weight.shape == (16, 8, 5, 5)
    assert network.dense1.weight.shape == (128, 4096)
    assert network.dense2.weight.shape == (2, 128)


@pytest.mark.parametrize("kernels", KERNELS)
def test_it_answers_with_two_logits(kernels: report_network.Kernels) -> None:
    assert report_network.new_network(1, kernels)(torch.from_numpy(SUBFRAMES[:, None])).shape == (
        5,
        2,
    )


def test_weights_depend_on_the_seed_alone() -> None:
    state = torch.random.get_rng_state()
    one, two, other = (weights(report_network.new_network(seed, "plain")) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    for name in one:
        assert torch.equal(one[name], two[name])
        assert torch.equal(one[name], other[name]) == name.startswith("dense2")


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_new_network_has_no_opinion_yet_but_learns(kernels: report_network.Kernels) -> None:
    network = report_network.new_network(1, kernels)
    logits = network(torch.from_numpy(SUBFRAMES[:, None]))
    assert not logits.any()
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 1, 0, 1])).backward()
    assert network.dense2.weight.grad is not None
    assert network.dense2.weight.grad.any()


def test_white_noise_leaves_each_block_balanced() -> None:
    """Before the rectifier: mean 0 and standard deviation 1, filter by filter."""
    network = report_network.new_network(1, "plain")
    x = torch.randn(6, 1, 256, 256, generator=torch.Generator().manual_seed(2))
    for conv in (network.conv1, network.conv2):
        pooled = torch.nn.functional.max_pool2d(conv(x), 4)
        spread, mean = torch.std_mean(pooled, (0, 2, 3))
        assert mean.abs().max() < 0.15
        assert (spread - 1).abs().max() < 0.1
        x = torch.relu(pooled)


@pytest.mark.parametrize("kernels", KERNELS)
def test_dropout_is_for_training_and_follows_its_seed(kernels: report_network.Kernels) -> None:
    network = opinionated_network(1, kernels)
    x = torch.from_numpy(SUBFRAMES[:, None])
    assert torch.equal(network.eval()(x, 1), network(x, 2))
    network.train()
    assert torch.equal(network(x, 1), network(x, 1))
    assert not torch.equal(network(x, 1), network(x, 2))


@pytest.mark.parametrize("training", [False, True])
def test_fused_and_plain_kernels_agree(training: bool) -> None:
    if "fused" not in KERNELS:
        pytest.skip("the fused kernels do not run here")
    found = []
    for kernels in KERNELS:
        network = opinionated_network(3, kernels).train(training)
        x = torch.from_numpy(SUBFRAMES[:, None]).requires_grad_(not training)
        logits = network(x, 7)
        torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 1, 0, 1])).backward()
        gradients = [parameter.grad for parameter in network.parameters()]
        found.append([logits.detach(), *gradients, *([x.grad] if not training else [])])
    for plain, fast in zip(*found, strict=True):
        assert (plain - fast).abs().max() <= 1e-4 * plain.abs().max() + 1e-7


@pytest.mark.parametrize("kernels", KERNELS)
def test_probabilities_do_not_depend_on_the_company(kernels: report_network.Kernels) -> None:
    network = opinionated_network(1, kernels)
    together = report_network.predict(network, SUBFRAMES)
    assert together.shape == (5,)
    assert together.dtype == np.float64
    assert ((together > 0) & (together < 1)).all()
    np.testing.assert_allclose(
        report_network.predict(network, SUBFRAMES, batch=2), together, atol=1e-6
    )
    assert report_network.predict(network, SUBFRAMES[:0]).shape == (0,)


def test_kernels_are_chosen() -> None:
    assert report_network.choose_kernels("plain") == "plain"
    assert report_network.choose_kernels("fused") == "fused"
    assert report_network.choose_kernels("auto") == KERNELS[-1]


def test_threads_are_a_setting() -> None:
    """In a fresh process, where Numba has not yet started its own."""
    script = "import torch; from blobpipe.networks.report_network import set_threads; set_threads(3); print(torch.get_num_threads())"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "3"


def test_a_folded_network_gives_the_same_map_and_leaves_the_other_alone() -> None:
    network = dense_network.new_dense_network(1)
    # its own means and variances
    network(torch.randn(8, 1, 64, 64, generator=torch.Generator().manual_seed(2)))
    before = {name: tensor.clone() for name, tensor in network.eval().state_dict().items()}
    folded = dense_network.folded(network)
    x = torch.randn(1, 1, 64, 96, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert torch.allclose(folded(x), network(x), rtol=1e-4, atol=1e-5)
    assert not any(isinstance(part, torch.nn.BatchNorm2d) for part in folded.modules())
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in before.items())


# --- on disk ---------------------------------------------------------------------------------------------------------


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
    "a folder": (lambda path: _replaced(path, Path.mkdir), "no regular file"),
    "a pipe": (lambda path: _replaced(path, os.mkfifo), "no regular file"),
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
