"""Commands for settings and results of the pipeline."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from blobpipe import cli
from blobpipe.core import tables
from blobpipe.params import Params, to_yaml

GOOD = {
    "n_cases": 7,
    "n_blobs": 9,
    "recall": 1.0,
    "recall_snr_gt_7": 1.0,
    "false_alarms_per_frame": 0.0,
    "dense_recall_snr_gt_7": 1.0,
    "dense_false_alarms_per_100_frames": 0.0,
    "passed": True,
}

# What DVC records of two stages, the second of which uses what the first makes; and the metrics of `GOOD`
LOCK = """schema: '2.0'
stages:
  campaign:
    deps: [{{path: src/a.py, md5: 1}}]
    params: {{params.yaml: {{detector: wfc3_ir, campaign.n_frames: {n_frames}}}}}
    outs: [{{path: data/raw, md5: {made}}}]
  explore:
    deps: [{{path: data/raw, md5: 2.dir}}]
    params: {{params.yaml: {{scale.clip_sigma: 99}}}}
    outs: [{{path: results/explore, md5: 4}}]
  regression:
    deps: [{{path: data/raw, md5: 2.dir}}, {{path: src/a.py, md5: 1}}]
    params: {{params.yaml: {{regression.min_cases: 1, regression.n_gallery: {n_gallery}}}}}
    outs: [{{path: results/regression/metrics.json, md5: {metrics}}}]
"""


def test_params_prints_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["params"]) == 0
    assert capsys.readouterr().out == to_yaml(Params())


@pytest.mark.parametrize("argv", [["gate"], ["report"], ["params", "--params", "params.yaml"]])
def test_settings_that_are_missing_are_said_to_be(
    folder: Path, argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "params.yaml").unlink()
    assert cli.main(argv) == 1
    said = "params.yaml: not found, expected a YAML file; correct the name, or run this where the file is"
    assert capsys.readouterr().err == f"blobpipe: {said}\n"


def test_params_gives_a_file_that_dvc_wrote_its_layout_back(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dvc.utils.hydra import apply_overrides

    path = folder / "params.yaml"
    path.write_text(to_yaml(Params()))
    apply_overrides(path, ["train.seed=7"])
    assert "  photons_e: [" not in path.read_text()
    assert cli.main(["params", "--params", "params.yaml"]) == 0
    seed = {"seed": 7}
    changed = Params().model_copy(update={"train": Params().train.model_copy(update=seed)})
    assert capsys.readouterr().out == to_yaml(changed)


def test_gate_passes_or_says_what_failed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for cases, code in ((7, 0), (6, 1)):
        tables.write_json(
            "results/regression/metrics.json", {**GOOD, "n_cases": cases, "passed": cases == 7}
        )
        assert cli.main(["gate"]) == code
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "passed"
    assert out[1] == "did not pass:"
    assert out[2:] == ["n_cases: found 6, expected at least 7"]


@pytest.fixture
def recorded(folder: Path) -> dict[str, object]:
    """What DVC records of a run that passed with the settings in force."""
    Path("params.yaml").write_text(to_yaml(Params()))
    tables.write_json("results/regression/metrics.json", GOOD | {"n_cases": 110})
    made = Path("results/regression/metrics.json").read_bytes()
    return {
        "n_frames": Params().campaign.n_frames,
        "n_gallery": Params().regression.n_gallery,
        "made": "2.dir",
        "metrics": hashlib.md5(made).hexdigest(),
    }


def test_gate_ignores_other_thresholds_and_stages_that_do_not_matter(
    recorded: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("dvc.lock").write_text(LOCK.format(**recorded))
    assert cli.main(["gate"]) == 0
    assert capsys.readouterr().out == "passed\n"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"n_frames": 16}, "campaign.n_frames: was 16, is 220"),
        ({"n_gallery": 3}, "regression.n_gallery: was 3, is 12"),
        ({"made": "3.dir"}, "data/raw: made again since the stage regression"),
        ({"metrics": "5"}, "results/regression/metrics.json: not the file that dvc.lock records"),
    ],
)
def test_gate_refuses_the_metrics_of_another_run(
    recorded: dict[str, object],
    capsys: pytest.CaptureFixture[str],
    change: dict[str, object],
    reason: str,
) -> None:
    Path("dvc.lock").write_text(LOCK.format(**recorded | change))
    assert cli.main(["gate"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "results/regression/metrics.json: not of a run with the settings in force; "
        "run the pipeline: snakemake --cores 2",
        f"  {reason}",
    ]
    assert cli.main(["report"]) == 0
    page = Path("results/report.html").read_text()
    assert "No verdict" in page
    assert reason in page
    assert "Passed" not in page


@pytest.mark.parametrize("text", ["stages: [regression]", "a", "stages: {regression: {}}"])
def test_gate_names_a_record_that_it_cannot_read(
    recorded: dict[str, object], capsys: pytest.CaptureFixture[str], text: str
) -> None:
    Path("dvc.lock").write_text(text)
    assert cli.main(["gate"]) != 0
    assert "dvc.lock: not a record of stages" in capsys.readouterr().err
