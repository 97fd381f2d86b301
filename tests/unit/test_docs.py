"""The documentation names only what exists: commands, options, columns, settings, functions, files."""

from __future__ import annotations

import ast
import csv
import importlib
import re
import shlex
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from blobpipe.cli.parser import build_parser
from blobpipe.cli.stages import STAGES
from blobpipe.core import metrics, tables
from blobpipe.core.detector import DEFAULT
from blobpipe.detection import detect, operating_point, promise
from blobpipe.detection.detectors import (
    DETECTORS,
    DenseDetector,
    MatchedFilter,
    ReportDetector,
)
from blobpipe.detection.fit import DETECTION_COLUMNS
from blobpipe.history import archive
from blobpipe.images.clip import Clipping
from blobpipe.images.scale import Scaling
from blobpipe.monitor import catalogue, logbook, scan
from blobpipe.networks import dense_network, loop, report_network
from blobpipe.params import Params
from blobpipe.simulation import augment, campaign, cutout
from blobpipe.validation import completeness, deep, evaluate, explore, regression, search

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(page for page in DOCS.rglob("*.md") if "_build" not in page.parts),
]
OTHER_PROGRAMS = {
    ".",
    "cp",
    "mkdir",
    "mv",
    "git",
    "pip",
    "pytest",
    "python",
    "python3",
    "ruff",
    "sed",
    "mypy",
    "snakefmt",
    "sphinx-build",
}
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

sys.path.insert(0, str(DOCS / "_ext"))
from measured import UNKNOWN, fill_in, measured  # noqa: E402


def _blocks(language: str) -> list[tuple[str, str]]:
    found = [(page, kind, code) for page in PAGES for kind, code in BLOCK.findall(page.read_text())]
    return [(str(page.relative_to(ROOT)), code) for page, kind, code in found if kind == language]


def _commands() -> list[tuple[str, str]]:
    return [
        (page, line) for page, code in _blocks("bash") for line in code.splitlines() if line.strip()
    ]


@pytest.mark.parametrize(("page", "line"), _commands())
def test_commands_exist(page: str, line: str) -> None:
    words = shlex.split(line, comments=True)
    if ">" in words:
        words = words[: words.index(">")]  # the shell writes the file
    while "=" in words[0]:
        words.pop(0)  # VARIABLE=value
    program, *rest = words
    match Path(program).name:
        case "blobpipe":
            _parses(build_parser(), rest)
        case "dvc":
            _parses(_dvc_parser(), rest)
        case "snakemake":
            options = {word.split("=")[0] for word in rest if word.startswith("-")}
            assert options <= _snakemake_options()
        case "make":
            assert set(rest) <= _make_targets()
        case other:
            assert other in OTHER_PROGRAMS or program == ".", f"{page}: {line}"


def _parses(parser: ArgumentParser, words: list[str]) -> None:
    parser.parse_args(words)  # leaves Python if it does not understand


@cache
def _dvc_parser() -> ArgumentParser:
    return importlib.import_module("dvc.cli.parser").get_main_parser()


@cache
def _snakemake_options() -> set[str]:
    parser = importlib.import_module("snakemake.cli").get_argument_parser()
    return set(parser._option_string_actions)


@cache
def _make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_the_image_of_the_tutorial_shows_what_it_says() -> None:
    params = Params()
    names = campaign.frame_names(params.campaign)
    [name] = {
        name for page in PAGES for code in _bash(page) for name in re.findall(r"id\w{7}_blob", code)
    }
    [blob] = [
        blob for blob in campaign.population(params.campaign) if names[max(blob.first, 0)] == name
    ]
    assert names.index(name) == params.difference.stack_size
    assert f"x = {blob.x_px:.0f}, y = {blob.y_px:.0f}" in (DOCS / "tutorial.md").read_text()
    assert regression.blob_snr(blob, DEFAULT.difference_noise_frac) > 20


def _bash(page: Path) -> list[str]:
    return [code for kind, code in BLOCK.findall(page.read_text()) if kind == "bash"]


@pytest.mark.parametrize(("page", "code"), _blocks("python"))
def test_python_examples_use_what_exists(page: str, code: str) -> None:
    tree = ast.parse(code)
    imported = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("blobpipe"):
            for alias in node.names:
                try:
                    imported[alias.name] = importlib.import_module(f"{node.module}.{alias.name}")
                except ModuleNotFoundError:
                    imported[alias.name] = getattr(importlib.import_module(node.module), alias.name)
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in imported
        ):
            assert hasattr(imported[node.value.id], node.attr), (
                f"{page}: {node.value.id}.{node.attr}"
            )


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_its_paragraphs(stage: str) -> None:
    for page in ("pipeline", "params", "outputs"):
        assert f"\n## {stage}\n" in (DOCS / f"{page}.md").read_text(), page
    assert f"```{{stage-params}} {stage}\n" in (DOCS / "params.md").read_text()


def test_every_command_is_in_the_reference() -> None:
    [commands] = [action for action in build_parser()._actions if action.dest == "command"]
    shown = re.findall(
        r"^```\{command-help\} (\w+)$", (DOCS / "commands.md").read_text(), re.MULTILINE
    )
    assert sorted(shown) == sorted(commands.choices)  # type: ignore[arg-type]


def test_every_module_is_in_the_python_interface() -> None:
    """All but the command line, whose functions are its commands."""
    source = ROOT / "src/blobpipe"
    modules = {
        ".".join(("blobpipe", *path.relative_to(source).with_suffix("").parts))
        for path in source.rglob("[!_]*.py")
    }
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^##+ (blobpipe\.[\w.]+)$", page, re.MULTILINE))
    rooms = {path.parent.name for path in source.glob("*/__init__.py")} - {"cli"}
    in_rooms = {name for name in modules if name.split(".")[1] in rooms}
    assert {"blobpipe.errors", "blobpipe.params"} | in_rooms <= listed
    assert listed <= modules | {f"blobpipe.{room}" for room in {*rooms, "cli"}}


def test_relative_links_lead_somewhere() -> None:
    links = [
        (page, link) for page in PAGES for link in re.findall(r"\]\(([^)\s]+)\)", _prose(page))
    ]
    paths = [
        (page, link.split("#")[0]) for page, link in links if not link.startswith(("http", "#"))
    ]
    assert [(page.name, path) for page, path in paths if not (page.parent / path).exists()] == []


def test_contents_are_complete() -> None:
    listed = re.findall(
        r"^[a-z/-]+$",
        "\n".join(re.findall(r":caption:.*?\n\n(.*?)```", _index(), re.DOTALL)),
        re.MULTILINE,
    )
    pages = {
        str(page.relative_to(DOCS).with_suffix("")) for page in PAGES if page.is_relative_to(DOCS)
    }
    assert set(listed) ^ pages == {"index"}


def _index() -> str:
    return (DOCS / "index.md").read_text()


def _prose(page: Path) -> str:
    return BLOCK.sub("", page.read_text())


# ------------------------------------------------------------------------------------------------------- outputs


def _tables() -> dict[str, list[str]]:
    """Heading of each table of outputs.md, and its first column."""
    sections = re.split(r"^### ", (DOCS / "outputs.md").read_text(), flags=re.MULTILINE)[1:]
    return {
        section.splitlines()[0]: re.findall(r"^\| `(\S+)` \|", section, re.MULTILINE)
        for section in sections
    }


def _step(report: type) -> tuple[str, ...]:
    return ("frame", "status", "reason", *(field.name for field in fields(report)), "sha256")


def _curve(name: str) -> Sequence[str]:
    labels = np.array([0, 1])
    probability = np.array([0.2, 0.8])
    return list({"calibration": metrics.reliability(labels, probability)}[name].columns)


def _detect_metrics() -> Sequence[str]:
    table = pd.DataFrame(columns=list(detect.FRAME_COLUMNS), dtype=float)
    return list(detect.summarise(table, operating_point.OperatingPoint(0.5, 1.0, 0.0, 1.0)))


NO_CASES = regression.gather([])
COMPARED = regression.compare_detectors(NO_CASES, dict.fromkeys(("isr", *DETECTORS), 0.5))


def _regression_metrics() -> Sequence[str]:
    parts = (
        regression.summarise(NO_CASES),
        regression.side_by_side(COMPARED),
        regression.accuracy(NO_CASES.cases),
    )
    return [*(key for part in parts for key in part), "passed", "dense_sha256"]


def _completeness_metrics() -> Sequence[str]:
    table = pd.DataFrame(columns=list(completeness.INJECTION_COLUMNS), dtype=float)
    detectors = completeness.Detectors(
        DenseDetector(dense_network.new_dense_network(1)),
        ReportDetector(report_network.ReportNetwork()),
        MatchedFilter(()),
    )
    return list(completeness.summarise(table, detectors, 1))


def _deep_metrics() -> Sequence[str]:
    found = pd.DataFrame(columns=list(deep.SUPERIMPOSED_COLUMNS), dtype=float)
    rows = {name: [1.0] * len(deep.SINCE) for name in deep.COMPLETENESS_COLUMNS}
    grid = pd.DataFrame(rows | {"n_since": deep.SINCE})
    cases = pd.DataFrame(columns=list(deep.CASE_COLUMNS), dtype=float)
    alarms = pd.DataFrame(columns=list(deep.ALARM_COLUMNS), dtype=float)
    return [*deep.summarise(found, grid, cases, alarms, 1), "margins"]


def _of_the_log(table: str) -> Sequence[str]:
    return list(logbook.table(logbook.connect(":memory:", make=True), table).columns)


KNOWN: dict[str, Sequence[str]] = {
    "data/raw/frames.csv": ("frame", "mjd", "label", "seed", *campaign.Conditions._fields),
    "data/raw/blobs.csv": (*campaign.Blob._fields[:-1], "first_frame"),
    "data/clip/frames-000.csv": _step(Clipping),
    "data/scale/frames-000.csv": _step(Scaling),
    "results/cutout/stamps.csv": cutout.STAMP_COLUMNS,
    "results/cutout/train_subframes.csv": cutout.SUBFRAME_COLUMNS,
    "results/cutout/train_blobs.csv": cutout.BLOB_COLUMNS,
    "results/augment/train.csv": augment.COLUMNS,
    "results/train/history.csv": loop.HISTORY,
    "results/evaluate/calibration.csv": _curve("calibration"),
    "results/regression/metrics.json": _regression_metrics(),
    "results/regression/cases.csv": regression.CASE_COLUMNS,
    "results/regression/frames.csv": regression.FRAME_COLUMNS,
    "results/regression/alarms.csv": regression.ALARM_COLUMNS,
    "results/detect/metrics.json": _detect_metrics(),
    "results/regression/detectors.csv": list(COMPARED.columns),
    "results/regression/recall.csv": list(regression.recall_by_bin(NO_CASES.cases).columns),
    "results/dense/history.csv": loop.HISTORY,
    "results/detect/candidates.csv": ("frame", *DETECTION_COLUMNS, "is_blob", "probability"),
    "results/detect/frames.csv": detect.FRAME_COLUMNS,
    "results/detect/reliability.csv": _curve("calibration"),
    "results/completeness/metrics.json": _completeness_metrics(),
    "results/completeness/injections.csv": completeness.INJECTION_COLUMNS,
    "results/completeness/completeness.csv": completeness.GRID_COLUMNS,
    "results/completeness/limits.csv": completeness.LIMIT_COLUMNS,
    "results/deep/superimposed.csv": deep.SUPERIMPOSED_COLUMNS,
    "results/deep/completeness.csv": deep.COMPLETENESS_COLUMNS,
    "results/deep/cases.csv": deep.CASE_COLUMNS,
    "results/deep/alarms.csv": deep.ALARM_COLUMNS,
    "results/deep/metrics.json": _deep_metrics(),
    "results/explore/scores.csv": explore.SCORE_COLUMNS,
    "results/explore/embedding.csv": explore.EMBEDDING_COLUMNS,
    "results/search/trials.csv": search.TRIAL_COLUMNS,
    "scan/frames.csv": scan.FRAME_COLUMNS,
    "scan/subframes.csv": scan.SUBFRAME_COLUMNS,
    "scan/detections.csv": (*scan.PLACE_COLUMNS, *scan.FIT_COLUMNS),
    "history/blobs.csv": ("blob", "x_px", "y_px", "radius_px", "shape", *archive.DATED_COLUMNS),
    "history/history.csv": archive.HISTORY_COLUMNS,
    "history/frames.csv": archive.FRAME_COLUMNS,
    "operating_point.yaml": [key.name for key in fields(promise.PromisedPoint)],
    **{f"quicklook/{table}.csv": _of_the_log(table) for table in logbook.TABLES},
    "known/blobs.csv": catalogue.COLUMNS,
}
NAMED_IN = {  # where no list of columns can be had without a run, they stand in the module as words
    "data/difference/frames-000.csv": ["images/difference"],
    "results/train/metrics.json": ["networks/loop"],
    "results/evaluate/metrics.json": ["validation/evaluate", "core/metrics"],
    "results/dense/metrics.json": ["networks/loop"],
    "results/explore/metrics.json": ["validation/explore"],
    "results/search/metrics.json": ["validation/search"],
    "results/evaluate/predictions.csv": ["validation/evaluate", "detection/matched_filter"],
    "results/evaluate/failures.csv": ["validation/evaluate"],
    "results/evaluate/roc.csv": ["validation/evaluate"],
    "results/evaluate/precision_recall.csv": ["validation/evaluate"],
    "results/evaluate/snr.csv": ["validation/evaluate", "core/metrics"],
}


def test_every_table_is_checked() -> None:
    assert set(_tables()) == set(KNOWN) | set(NAMED_IN)


@pytest.mark.parametrize("path", KNOWN)
def test_columns_are_those_of_the_code(path: str) -> None:
    assert set(_tables()[path]) ^ set(KNOWN[path]) == set()


@pytest.mark.parametrize("path", NAMED_IN)
def test_columns_stand_in_the_code(path: str) -> None:
    code = "".join((ROOT / f"src/blobpipe/{module}.py").read_text() for module in NAMED_IN[path])
    assert [column for column in _tables()[path] if f'"{column}"' not in code] == []


def test_columns_are_those_of_the_last_run() -> None:
    for path in _tables():
        if (
            path.startswith(("data/clip", "data/scale", "results"))
            and path.endswith(".csv")
            and (ROOT / path).exists()
        ):
            with open(ROOT / path, newline="") as file:
                found = set(next(csv.reader(file)))
            assert set(_tables()[path]) <= found, path
            assert found <= set(_tables()[path]) or path.endswith("failures.csv"), path


# ------------------------------------------------------------------------------------------------------- numbers


def test_measured_numbers_have_a_documented_name() -> None:
    roles = [
        key for page in PAGES for key in re.findall(r"\{measured\}`(\w+ \S+)`", page.read_text())
    ]
    places = re.findall(r"<!-- (\w+ \S+) -->", (ROOT / "README.md").read_text())
    assert len(roles) > 20
    assert places
    for stage, key in (name.split() for name in [*roles, *places]):
        # The packaged model's numbers are regression's
        file = "regression" if stage == "model" else stage
        documented = _tables()[f"results/{file}/metrics.json"]
        section = key.split(".")[0] if stage == "explore" else ""  # its numbers stand by method
        name = key.removeprefix("matched_filter.").removeprefix("dense.")
        assert name in documented or section in documented, (stage, key)


def test_numbers_come_from_the_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("measured.ROOT", tmp_path)
    assert measured("evaluate", "tpr") == UNKNOWN
    content = {
        "tpr": 0.95,
        "n": 12,
        "passed": True,
        "nothing": None,
        "seconds": 61.7,
        "tpr_at_fpr_0.01": 0.5,
    }
    content |= {"recall": 0.7, "recall_interval": [0.6, 0.8]}
    content |= {
        "matched_filter": {"tpr": 0.5},
        "interval": {"tpr": [0.94, 0.96], "matched_filter": {"tpr": [0.4, 0.6]}},
    }
    tables.write_json(tmp_path / "results/evaluate/metrics.json", content)
    assert measured("evaluate", "tpr") == "0.950 (0.940 to 0.960)"
    assert measured("evaluate", "matched_filter.tpr") == "0.500 (0.400 to 0.600)"
    assert measured("evaluate", "tpr_at_fpr_0.01") == "0.500"
    assert measured("evaluate", "recall") == "0.700 (0.600 to 0.800)"
    assert measured("evaluate", "matched_filter.brier") == UNKNOWN
    assert [measured("evaluate", key) for key in ("n", "passed", "nothing", "seconds")] == [
        "12",
        "yes",
        "none",
        "62",
    ]


def test_filling_in_keeps_the_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("measured.ROOT", tmp_path)
    page = tmp_path / "README.md"
    page.write_text("a <!-- train seconds -->old<!-- --> b <!-- train epochs --><!-- --> c\n")
    fill_in(page)
    once = page.read_text()
    assert (
        once
        == f"a <!-- train seconds -->{UNKNOWN}<!-- --> b <!-- train epochs -->{UNKNOWN}<!-- --> c\n"
    )
    fill_in(page)
    assert page.read_text() == once


def test_the_readme_has_the_numbers_of_the_last_run(tmp_path: Path) -> None:
    copy = tmp_path / "README.md"
    copy.write_text((ROOT / "README.md").read_text())
    fill_in(copy)
    assert copy.read_text() == (ROOT / "README.md").read_text()


def test_evaluation_kinds_are_explained() -> None:
    text = (DOCS / "pipeline.md").read_text() + (DOCS / "outputs.md").read_text()
    assert all(f"`{kind}`" in text for kind in (*evaluate.KINDS, *regression.ALARMS))
