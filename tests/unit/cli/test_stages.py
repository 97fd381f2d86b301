"""Commands of the stages: each calls its function with the fixed folders."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.unit.cli.calls import PARAMS, Calls

from blobpipe import cli
from blobpipe.cli.paths import MODEL
from blobpipe.cli.stages import STAGES
from blobpipe.core.detector import DEFAULT
from blobpipe.images.bad_pixels import BadPixels
from blobpipe.params import Params

D = "data"
C = "results"

EXPECTED: dict[str, Calls] = {
    "campaign --threads 2": [
        (
            "simulation.campaign.simulate",
            (f"{D}/raw", PARAMS.campaign),
            {"threads": 2, "detector": DEFAULT},
        )
    ],
    "difference": [
        (
            "images.difference.reference",
            (f"{D}/raw", f"{D}/difference", PARAMS.difference, BadPixels(), DEFAULT),
            {},
        ),
        (
            "images.difference.write_differences",
            (f"{D}/raw", f"{D}/difference", PARAMS.difference, None, BadPixels(), DEFAULT),
            {},
        ),
    ],
    "difference --reference": [
        (
            "images.difference.reference",
            (f"{D}/raw", f"{D}/difference", PARAMS.difference, BadPixels(), DEFAULT),
            {},
        )
    ],
    "difference --batch 3": [
        (
            "images.difference.write_differences",
            (f"{D}/raw", f"{D}/difference", PARAMS.difference, 3, BadPixels(), DEFAULT),
            {},
        )
    ],
    "clip": [("images.clip.clip", (f"{D}/difference", f"{D}/clip", PARAMS.clip, None), {})],
    "scale --batch 0": [("images.scale.scale", (f"{D}/clip", f"{D}/scale", PARAMS.scale, 0), {})],
    "cutout": [
        (
            "simulation.cutout.cut",
            (f"{D}/raw", f"{D}/difference", f"{D}/scale", f"{C}/cutout", PARAMS.cutout),
            {"clip": PARAMS.clip, "scale": PARAMS.scale, "detector": DEFAULT},
        )
    ],
    "augment": [
        (
            "simulation.augment.augment",
            (f"{D}/difference", f"{D}/scale", f"{C}/cutout", f"{C}/augment", PARAMS.augment),
            {},
        )
    ],
    "train": [
        (
            "networks.train.train",
            (
                f"{D}/difference",
                f"{D}/scale",
                f"{C}/cutout",
                f"{C}/augment",
                f"{C}/train",
                PARAMS.train,
            ),
            {"noise_sigma": 0.75},
        )
    ],
    "dense": [
        (
            "networks.dense.train_dense",
            (
                f"{D}/difference",
                f"{D}/scale",
                f"{C}/cutout",
                f"{C}/augment",
                f"{C}/dense",
                PARAMS.dense,
            ),
            {},
        )
    ],
    "detect --batch 2": [
        (
            "detection.detect.search_batches",
            (
                *(f"{D}/raw", f"{D}/difference", f"{D}/scale"),
                *(f"{C}/dense/model.safetensors", f"{C}/detect", PARAMS, 2),
            ),
            {},
        )
    ],
    "detect --gather": [
        (
            "detection.detect.detect",
            (
                *(f"{D}/raw", f"{D}/difference", f"{D}/scale", f"{C}/cutout"),
                *(f"{C}/dense/model.safetensors", f"{C}/detect", PARAMS),
            ),
            {},
        )
    ],
    "evaluate": [
        (
            "validation.evaluate.evaluate",
            (
                *(f"{D}/difference", f"{D}/scale", f"{C}/cutout"),
                *((MODEL, f"{C}/detect/model.safetensors"), f"{C}/evaluate", PARAMS.evaluate),
            ),
            {"vetting": PARAMS.vetting},
        )
    ],
    "regression": [
        (
            "validation.regression.score_batches",
            (
                (f"{D}/raw", f"{D}/difference", f"{D}/scale", f"{C}/cutout"),
                *(MODEL, f"{C}/regression"),
            ),
            {"radii_px": PARAMS.evaluate.radii_px, "batch": None, "detector": DEFAULT},
        ),
        (
            "validation.regression.regress",
            (
                *((f"{D}/raw", f"{D}/difference", f"{D}/scale", f"{C}/cutout"), f"{C}/detect"),
                *(MODEL, f"{C}/regression", PARAMS.regression),
            ),
            {
                "radii_px": PARAMS.evaluate.radii_px,
                "per_100_frames": PARAMS.detect.false_alarms_per_100_frames,
                "detector": DEFAULT,
            },
        ),
        (
            "validation.cases_page.write_cases",
            (f"{D}/difference", f"{D}/scale", f"{C}/detect", MODEL, f"{C}/regression"),
            {},
        ),
    ],
    "completeness": [
        (
            "validation.completeness.measure_completeness",
            (
                *(f"{D}/raw", f"{D}/difference", f"{D}/scale", f"{C}/cutout"),
                *(
                    (f"{C}/detect/model.safetensors", MODEL),
                    f"{C}/regression/batches",
                    f"{C}/completeness",
                    PARAMS.completeness,
                ),
            ),
            {
                "setting": (
                    *(PARAMS.clip, PARAMS.scale, PARAMS.vetting, PARAMS.evaluate.radii_px),
                    *(PARAMS.detect.false_alarms_per_100_frames, DEFAULT),
                )
            },
        )
    ],
    "deep": [
        (
            "validation.deep.measure_deep",
            (
                *(f"{D}/raw", f"{D}/difference", f"{C}/detect/model.safetensors"),
                *(f"{C}/deep", PARAMS),
            ),
            {},
        )
    ],
    "explore": [
        (
            "validation.explore.explore",
            (
                *(f"{D}/difference", f"{D}/scale", f"{C}/cutout"),
                *((MODEL, f"{C}/dense/model.safetensors"), f"{C}/explore", PARAMS.explore),
            ),
            {},
        )
    ],
    "search": [
        (
            "validation.search.search",
            (
                *(f"{D}/difference", f"{D}/scale", f"{C}/cutout", f"{C}/augment"),
                *(f"{C}/search", PARAMS),
            ),
            {"worker": None},
        )
    ],
}


@pytest.mark.parametrize("command", EXPECTED)
def test_a_stage_calls_its_function_with_the_fixed_folders(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Calls = []
    names = {name for expected in EXPECTED.values() for name, _, _ in expected}
    for name in names:
        module, _, function = name.rpartition(".")

        def record(*args: Any, name: str = name, **settings: Any) -> None:
            calls.append((name, args, settings))

        monkeypatch.setattr(importlib.import_module(f"blobpipe.{module}"), function, record)
    assert cli.main(command.split()) == 0
    assert calls == EXPECTED[command]


def test_every_stage_of_the_settings_is_a_command() -> None:
    # those are of the daily routine
    stages = set(Params.model_fields) - {
        *("detector", "bad_pixels", "vetting", "quicklook", "notices", "health")
    }
    assert set(STAGES) == stages == {command.split()[0] for command in EXPECTED}


def test_the_commands_make_what_the_functions_make(project: Path, made_project: Path) -> None:
    """From clip to augment, byte for byte."""
    for made in ("data/clip", "data/scale", "results"):
        shutil.rmtree(project / made)
    for stage in ("clip", "scale", "cutout", "augment"):
        assert cli.main([stage]) == 0
    for made in ("data/clip", "data/scale", "results/cutout", "results/augment"):
        names = sorted(path.name for path in (made_project / made).iterdir())
        assert sorted(path.name for path in (project / made).iterdir()) == names
        for name in names:
            assert (project / made / name).read_bytes() == (
                made_project / made / name
            ).read_bytes(), name
