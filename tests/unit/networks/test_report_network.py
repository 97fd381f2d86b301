"""The report's network: its shape, its first weights, its dropout and its probabilities, with either kernels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from blobpipe.networks import fused, report_network
from blobpipe.networks.kernels import Kernels
from blobpipe.params import ReportShape

from ..conftest import opinionated_network

SUBFRAMES = np.random.default_rng(1).normal(size=(5, 256, 256)).astype(np.float32)
KERNELS: tuple[Kernels, ...] = ("plain", "fused") if fused.available() else ("plain",)


def weights(network: report_network.ReportNetwork) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def test_it_is_the_reports_network() -> None:
    network = report_network.new_network(1, "plain")
    assert sum(parameter.numel() for parameter in network.parameters()) == 528_098
    assert network.blocks[0].weight.shape == (8, 1, 5, 5)
    assert network.blocks[1].weight.shape == (16, 8, 5, 5)
    assert network.layers[0].weight.shape == (128, 4096)
    assert network.layers[1].weight.shape == (2, 128)


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
    assert network.layers[1].weight.grad is not None
    assert network.layers[1].weight.grad.any()


def test_white_noise_leaves_each_block_balanced() -> None:
    """Before the rectifier: mean 0 and standard deviation 1, filter by filter."""
    network = report_network.new_network(1, "plain")
    x = torch.randn(6, 1, 256, 256, generator=torch.Generator().manual_seed(2))
    for conv in network.blocks:
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


SHAPES = [
    ReportShape(filters=(3,), dropout=(0.2,), kernel_px=7, pool_px=8, neurons=(9, 5)),
    ReportShape(filters=(4, 5, 6), dropout=(0.1, 0.2, 0.3), kernel_px=3, pool_px=2, neurons=(4,)),
    ReportShape(filters=(33, 2), dropout=(0.0, 0.5), kernel_px=1, pool_px=15, neurons=(3,)),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_other_shapes_can_be_built(shape: ReportShape) -> None:
    network = report_network.new_network(1, "plain", shape)
    assert sum(parameter.numel() for parameter in network.parameters()) == shape.n_weights
    assert [conv.out_channels for conv in network.blocks] == list(shape.filters)
    assert report_network.predict(network, SUBFRAMES).shape == (5,)


@pytest.mark.parametrize("shape", SHAPES)
def test_fused_and_plain_kernels_agree_on_other_shapes(shape: ReportShape) -> None:
    """Also in what their dropout keeps."""
    if "fused" not in KERNELS:
        pytest.skip("the fused kernels do not run here")
    found = []
    for kernels in KERNELS:
        network = report_network.new_network(2, kernels, shape).train()
        with torch.no_grad():
            network.layers[-1].weight.copy_(
                torch.linspace(-1, 1, 2 * shape.neurons[-1]).view(2, -1)
            )
        logits = network(torch.from_numpy(SUBFRAMES[:, None]), 7)
        torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 1, 0, 1])).backward()
        found.append([logits.detach(), *(parameter.grad for parameter in network.parameters())])
    for plain, fast in zip(*found, strict=True):
        assert plain is not None
        assert fast is not None
        assert (plain - fast).abs().max() <= 1e-4 * plain.abs().max() + 1e-7
