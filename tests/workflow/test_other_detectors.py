"""The whole chain on the images of other detectors, by both tools."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable

import numpy as np
import pytest
from astropy.io import fits

from .conftest import HERE, Project

RUNS = {  # settings: command, shape of an image
    "nircam": (["snakemake", "--cores", "2"], (2048, 2048)),
    "roman": (["dvc", "repro"], (4096, 4096)),
}


@pytest.mark.long
@pytest.mark.parametrize("name", RUNS)
def test_the_pipeline_runs_on_another_detector(
    name: str, pristine: Project, copy_of: Callable[[Project], Project]
) -> None:
    command, shape = RUNS[name]
    project = copy_of(pristine)
    shutil.copy(HERE / f"experiments/{name}.yaml", project.root / "params.yaml")
    project.commit(f"settings of {name}")
    project.run(*command)
    assert project.is_at_rest()

    # Full frames, with the border of this detector
    [first, *_] = sorted((project.root / "data/raw").glob("*.fits.fz"))
    with fits.open(first) as hdus:
        image = hdus["SCI"].data
    assert image.shape == shape
    assert np.isnan(image[3]).all()
    assert np.isfinite(image[4, 4:-4]).all()

    # Blobs lie all over it, and the report tells what became of them
    blobs = np.genfromtxt(
        project.root / "data/raw/blobs.csv", delimiter=",", names=True, dtype=None, encoding=None
    )
    assert blobs["x_px"].max() > 0.9 * shape[1]
    metrics = json.loads((project.root / "results/regression/metrics.json").read_text())
    assert {"dense_recall", "dense_false_alarms_per_100_frames", "recall"} <= set(metrics)


def test_a_detector_that_dvc_cannot_see_is_refused(
    pristine: Project, copy_of: Callable[[Project], Project]
) -> None:
    project = copy_of(pristine)
    settings = project.root / "params.yaml"
    settings.write_text(settings.read_text().replace('"wfc3_ir"', '"./mine.yaml"'))
    shutil.copy(project.root / "src/blobpipe/detectors/wfc3_ir.yaml", project.root / "mine.yaml")
    printed = project.fails("snakemake", "-n")
    assert "expected the name of a file in src/blobpipe/detectors" in printed
    assert "Traceback" not in printed
