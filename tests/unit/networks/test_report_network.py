"""The report's network: its shape, its first weights, its dropout and its probabilities, with either kernels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from blobpipe.networks import fused, report_network
from blobpipe.networks.kernels import Kernels

from ..conftest import opinionated_network

SUBFRAMES = np.random.default_rng(1).normal(size=(5, 256, 256)).astype(np.float32)
KERNELS: tuple[Kernels, ...] = ("plain", "fused") if fused.available() else ("plain",)


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
def test_it_answers_with_two_logits(kernels: Kernels) -> None:
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
def test_a_new_network_has_no_opinion_yet_but_learns(kernels: Kernels) -> None:
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
def test_dropout_is_for_training_and_follows_its_seed(kernels: Kernels) -> None:
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
def test_probabilities_do_not_depend_on_the_company(kernels: Kernels) -> None:
    network = opinionated_network(1, kernels)
    together = report_network.predict(network, SUBFRAMES)
    assert together.shape == (5,)
    assert together.dtype == np.float64
    assert ((together > 0) & (together < 1)).all()
    np.testing.assert_allclose(
        report_network.predict(network, SUBFRAMES, batch=2), together, atol=1e-6
    )
    assert report_network.predict(network, SUBFRAMES[:0]).shape == (0,)
