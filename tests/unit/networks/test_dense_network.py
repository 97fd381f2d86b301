"""The dense network as a module: its size, and the copy of it that searches."""

from __future__ import annotations

import torch

from blobpipe.images import tiles
from blobpipe.networks import dense_network
from blobpipe.simulation import clutter


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


def test_the_network_is_small() -> None:
    assert sum(weights.numel() for weights in dense_network.DenseNetwork().parameters()) < 500_000
    assert clutter.SIDE == tiles.SIDE
