"""The whole chain on the images of other detectors, by both tools."""

from __future__ import annotations

import json
import resource
import shutil
import time
from collections.abc import Callable

import numpy as np
import pytest
from astropy.io import fits

from .conftest import HERE, Project

SHAPES = {"nircam": (2048, 2048), "roman": (4096, 4096)}  # of an image, by settings
TOOLS = {"snakemake": ("snakemake", "--cores", "2"), "dvc": ("dvc", "repro")}

# Three minutes of two cores (s): the machine of a test may be busy with others, so wall time says little
MOST_CPU_S = 2 * 180.0


@pytest.mark.long
@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("name", SHAPES)
def test_the_pipeline_runs_on_another_detector(
    name: str, tool: str, pristine: Project, copy_of: Callable[[Project], Project]
) -> None:
    shape = SHAPES[name]
    project = copy_of(pristine)
    shutil.copy(HERE / f"experiments/{name}.yaml", project.root / "params.yaml")
    project.commit(f"settings of {name}")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.monotonic()
    project.run(*TOOLS[tool])
    wall_s = time.monotonic() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{name} by {tool}: {wall_s:.0f} s, {cpu_s:.0f} s of CPU")
    assert cpu_s < MOST_CPU_S
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
    settings.write_text(settings.read_text().replace("detector: wfc3_ir", "detector: ./mine.yaml"))
    shutil.copy(project.root / "src/blobpipe/detectors/wfc3_ir.yaml", project.root / "mine.yaml")
    printed = project.fails("snakemake", "-n")
    assert "expected the name of a file in src/blobpipe/detectors" in printed
    assert "Traceback" not in printed
