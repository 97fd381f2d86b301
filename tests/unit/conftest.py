"""A project in miniature: 512 x 512 images of noise, bad pixels and a few blobs, shaped like a real one and made in a second."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from blobpipe.core import blob_shapes, fits_images, tables
from blobpipe.detection import detect
from blobpipe.images.clip import clip
from blobpipe.images.scale import scale
from blobpipe.networks import dense_network, kernels, model_file, report_network
from blobpipe.params import Augment, Cutout, Params, Train, to_yaml
from blobpipe.simulation import augment, cutout

SIDE = 512
KNOWN = (
    (60.0, 70.0, 7.0, 0.05),
    (200.3, 300.6, 5.0, 0.10),
    (400.5, 120.2, 6.0, 0.08),
    (350.0, 420.0, 4.0, 0.04),
)
NEW = (150.0, 380.0, 6.0, 0.08)
MINIATURE = Params(
    cutout=Cutout(n_train=60, n_validation=24, n_profiles=8),
    augment=Augment(copies=2),
    train=Train(batch_size=20, epochs=3, adam_epochs=2, n_monitor=24, device="cpu"),
)


@pytest.fixture(scope="session")
def made_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything up to the augment stage, by the library's functions; only for reading."""
    root = tmp_path_factory.mktemp("made")
    raw, difference, clipped, scaled = (
        root / "data" / name for name in ("raw", "difference", "clip", "scale")
    )
    (root / "params.yaml").write_text(to_yaml(MINIATURE))
    _write_images(raw, difference)
    clip(difference, clipped, MINIATURE.clip)
    scale(clipped, scaled, MINIATURE.scale)
    recipes = root / "results" / "cutout"
    cutout.cut(
        raw,
        difference,
        scaled,
        recipes,
        MINIATURE.cutout,
        clip=MINIATURE.clip,
        scale=MINIATURE.scale,
    )
    augment.augment(difference, scaled, recipes, root / "results" / "augment", MINIATURE.augment)
    return root


@pytest.fixture
def project(made_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to work in, and the current folder."""
    root = tmp_path / "project"
    shutil.copytree(made_project, root)
    monkeypatch.chdir(root)
    return root


@pytest.fixture
def blob_finder() -> report_network.ReportNetwork:
    """The report's network with weights by hand: a 5 x 5 mean above 1.2 sigma makes it say blob."""
    return _network_by_hand()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That network as a file; only for reading."""
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    model_file.save_model(path, _network_by_hand(), {})
    return path


@pytest.fixture(scope="session")
def dense_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense network by hand, with an operating point, as a file; only for reading."""
    path = tmp_path_factory.mktemp("dense") / "model.safetensors"
    point = {"threshold": 0.6, "slope": 2.0, "offset": -1.0, "frames": 10.0}
    model_file.save_model(path, _dense_network_by_hand(), {"operating_point": point})
    return path


@pytest.fixture(scope="session")
def detect_dir(
    made_project: Path, dense_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What the stage detect makes of the project with that network; only for reading."""
    out = tmp_path_factory.mktemp("detect") / "detect"
    data = made_project / "data"
    folders = (data / "raw", data / "difference", data / "scale", made_project / "results/cutout")
    detect.search_batches(*folders[:3], dense_model, out, Params())
    detect.detect(*folders, dense_model, out, Params())
    return out


def _dense_network_by_hand() -> dense_network.DenseNetwork:
    """One that says blob where a 4 x 4 mean, averaged over nine cells, is above about 0.6 sigma."""
    network = dense_network.DenseNetwork()
    with torch.no_grad():
        for weights in network.parameters():
            weights.zero_()
        for block in (network.at4, network.last):
            block[1].weight.fill_(1)
        network.at4[0].weight[0, :, 1, 1] = 1 / 16
        network.last[0].weight[0, 0] = 1 / 9
        network.head.weight[0, 0] = 20
        network.head.bias.fill_(-12)
    return network.eval()


def opinionated_network(
    seed: int, kernels: kernels.Kernels = "plain"
) -> report_network.ReportNetwork:
    """A new network that has an opinion: a new one's last layer is zero."""
    network = report_network.new_network(seed, kernels)
    torch.nn.init.normal_(
        network.layers[1].weight, std=0.1, generator=torch.Generator().manual_seed(seed)
    )
    return network


def _network_by_hand() -> report_network.ReportNetwork:
    network = report_network.ReportNetwork("plain")
    with torch.no_grad():
        for weight in network.parameters():
            weight.zero_()
        network.blocks[0].weight[0] = 1 / 25
        network.blocks[0].bias[0] = -1.2
        network.blocks[1].weight[0, 0, 2, 2] = 1
        network.layers[0].weight[0, :256] = 1
        network.layers[1].weight[1, 0] = 20
        network.layers[1].bias[1] = -4
    return network.eval()


def _write_images(raw: Path, difference: Path) -> None:
    rng = np.random.default_rng(1)
    pattern = np.zeros((SIDE, SIDE), np.float32)
    for x, y, radius, depth in KNOWN:
        _add_blob(pattern, x, y, radius, depth)
    names = [f"frame{i}" for i in range(6)]
    for i, name in enumerate(names):
        image = _noise(rng, 0.0101)
        if i == 5:
            _add_blob(image, *NEW)
        fits_images.write_image(difference / f"{name}.fits.fz", image, name="DIFFERENCE")
        fits_images.write_image(raw / f"{name}.fits.fz", image + pattern, name="SCI")
    stack = _noise(rng, 0.0055) + pattern
    fits_images.write_images(difference / "reference.fits.fz", {"STACK": stack, "PATTERN": pattern})
    done = pd.DataFrame(
        {"frame": names, "status": "ok", "reason": "", "shift_x_px": 0.0, "shift_y_px": 0.0}
    )
    tables.write_table(difference / "frames-000.csv", done.assign(noise_frac=0.0101, n_stack=4))
    tables.write_table(
        raw / "frames.csv", pd.DataFrame({"frame": names, "mjd": 55_000.0 + np.arange(len(names))})
    )
    blobs = pd.DataFrame([*KNOWN, NEW], columns=list(tables.BLOB_COLUMNS[1:]))
    blobs.insert(0, "blob", [f"b{i}" for i in range(len(blobs))])
    tables.write_table(
        raw / "blobs.csv", blobs.assign(shape="disc", first_frame=["", "", "", "", names[5]])
    )


def _noise(rng: np.random.Generator, sigma: float) -> np.ndarray:
    image = rng.normal(0, sigma, (SIDE, SIDE)).astype(np.float32)
    bad = rng.random(image.shape) < 0.01
    # without them zscale's limits would be the noise's extremes
    image[bad] += rng.choice([-0.1, 0.1], int(bad.sum()))
    return image


def _add_blob(image: np.ndarray, x: float, y: float, radius: float, depth: float) -> None:
    column = round(x)
    row = round(y)
    window = image[row - 20 : row + 21, column - 20 : column + 21]
    window += depth * blob_shapes.blob_profile("disc", radius, x - column, y - row, 41)
