"""Commands for settings and results of the pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest

from blobpipe import cli
from blobpipe.core import tables
from blobpipe.params import Params, to_yaml


def test_params_prints_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["params"]) == 0
    assert capsys.readouterr().out == to_yaml(Params())


def test_gate_passes_or_says_what_failed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = {
        "n_cases": 7,
        "n_blobs": 9,
        "recall": 1.0,
        "recall_snr_gt_7": 1.0,
        "false_alarms_per_frame": 0.0,
        "dense_recall_snr_gt_7": 1.0,
        "dense_false_alarms_per_100_frames": 0.0,
        "passed": True,
    }
    for cases, code in ((7, 0), (6, 1)):
        tables.write_json(
            "results/regression/metrics.json", {**good, "n_cases": cases, "passed": cases == 7}
        )
        assert cli.main(["gate"]) == code
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "passed"
    assert len(out) == 2
    assert "cases" in out[1]
