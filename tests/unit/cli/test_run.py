"""The command line: each stage calls its function with the fixed folders, and errors end as one line."""

from __future__ import annotations

import argparse
import ctypes
import errno
import importlib
import os
import shlex
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astropy.io import fits
from tests.unit import synthetic_log

import blobpipe
from blobpipe import __version__, cli
from blobpipe.cli.parser import EXAMPLES, GROUPS, build_parser
from blobpipe.cli.paths import LOG, MODEL, OWN_MODEL, REGRESSION_METRICS
from blobpipe.cli.run import PIPE_CLOSED
from blobpipe.cli.stages import STAGES
from blobpipe.core import files, fits_images, tables
from blobpipe.core.detector import DEFAULT
from blobpipe.errors import BlobpipeError
from blobpipe.images.bad_pixels import BadPixels
from blobpipe.monitor import logbook
from blobpipe.params import Notices, Params, Regression, to_yaml
from blobpipe.quicklook import run
from blobpipe.quicklook.options import Options

Calls = list[tuple[str, tuple[Any, ...], dict[str, Any]]]
D = "data"
C = "results"
PARAMS = Params(regression=Regression(min_cases=7))
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


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text(to_yaml(PARAMS))
    return tmp_path


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
        *("detector", "bad_pixels", "vetting", "quicklook", "deep", "notices", "health")
    }
    assert set(STAGES) == stages == {command.split()[0] for command in EXPECTED}


@pytest.mark.parametrize("argv", [["--help"], ["scan", "--help"], ["--version"]])
def test_help_and_version_go_to_stdout(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main(argv)
    assert done.value.code == 0
    out, err = capsys.readouterr()
    assert not err
    assert __version__ in out if argv == ["--version"] else "usage: blobpipe" in out


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    out = capsys.readouterr().out
    [commands] = [action for action in build_parser()._actions if action.dest == "command"]
    listed = [name for names in GROUPS.values() for name in names]
    assert sorted(listed) == sorted(commands.choices)  # type: ignore[arg-type]
    assert all(f"\n  {command}" in out for command in listed)
    # what is used every day comes first, and all of it fits on a screen
    assert out.index("quicklook") < out.index("campaign")
    assert len(out.splitlines()) <= 50
    assert max(map(len, out.splitlines())) <= 110


def test_the_help_of_a_command_has_purpose_example_and_statuses() -> None:
    [commands] = [action for action in build_parser()._actions if action.dest == "command"]
    choices: dict[str, argparse.ArgumentParser] = commands.choices  # type: ignore[assignment]
    for name, command in choices.items():
        text = command.format_help()
        assert command.description, name
        assert f"example: {'BLOBPIPE_TOKEN=... ' * (name == 'serve')}blobpipe {name}" in text
        assert "exit status: 0 done; 1 an error" in text
        assert len(text.splitlines()) <= 60, name


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_a_shell_can_complete_commands_options_and_files(
    shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--completion", shell])
    assert ended.value.code == 0
    script = capsys.readouterr().out
    assert all(word in script for word in ("quicklook", "catalogue", "completion"))


def test_the_completion_of_bash_works(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--completion", "bash"])
    script = capsys.readouterr().out
    words = script + (
        "\nCOMP_WORDS=(blobpipe quick); COMP_CWORD=1; _shtab_blobpipe; echo ${COMPREPLY[@]}\n"
        "COMP_WORDS=(blobpipe quicklook --catal); COMP_CWORD=2; _shtab_blobpipe; echo ${COMPREPLY[@]}\n"
    )
    done = subprocess.run(["bash"], input=words, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["quicklook", "--catalogue"]


def test_the_help_of_log_names_its_tables() -> None:
    [commands] = [action for action in build_parser()._actions if action.dest == "command"]
    choices: dict[str, argparse.ArgumentParser] = commands.choices  # type: ignore[assignment]
    text = " ".join(choices["log"].format_help().split())
    assert f"one of {', '.join(logbook.TABLES)} (default: candidate_list)" in text


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_command_lines(name: str) -> None:
    words = shlex.split(EXAMPLES[name].partition(">")[0])
    words = words[words.index("blobpipe") + 1 :]
    assert build_parser().parse_args(words).command == name


@pytest.mark.parametrize(
    "argv",
    [
        *([], ["unknown"], ["clip", "--batch", "x"], ["scan", "a.fits"], ["check"]),
        *(["search", "--worker", number] for number in ("0", "-1", "1.5", "x")),
    ],
)
def test_a_wrong_command_line_is_explained(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main(argv)
    assert done.value.code == 2
    assert "usage: blobpipe" in capsys.readouterr().err


def test_params_prints_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["params"]) == 0
    assert capsys.readouterr().out == to_yaml(Params())


def test_check_answers_for_every_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = np.random.default_rng(1).normal(0, 0.01, (300, 300)).astype(np.float32)
    fits.PrimaryHDU(image).writeto(folder / "good.fits")
    (folder / "bad.fits").write_bytes(b"")
    assert cli.main(["check", "good.fits"]) == 0
    assert cli.main(["check", "bad.fits", "good.fits", "none.fits"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "good.fits",
        "bad.fits",
        "good.fits",
        "none.fits",
    ]
    assert ["not usable" in line for line in lines] == [False, True, False, True]


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


@pytest.mark.parametrize("own", [True, False])
def test_scan_needs_no_settings_but_takes_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch, own: bool
) -> None:
    calls: Calls = []
    scan = importlib.import_module("blobpipe.monitor.scan")
    monkeypatch.setattr(
        scan, "scan", lambda *args, **settings: calls.append(("", args, settings)) or 0
    )
    if not own:
        (folder / "params.yaml").unlink()
    assert cli.main(["scan", "a.fits", "b.fits", "--difference", "--out", "o"]) == 0
    ((_, (paths, out, model, params), settings),) = calls
    assert paths == [Path("a.fits"), Path("b.fits")]
    assert out == Path("o")
    assert model == Path(blobpipe.__file__).with_name("model.safetensors")
    assert params == (PARAMS if own else Params())
    expected = {"difference": True, "reference": None, "catalogue": None, "bad_pixels": []}
    assert settings == {**expected, "operating_point": None}


def test_scan_takes_the_pipelines_own_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Calls = []
    scan = importlib.import_module("blobpipe.monitor.scan")
    monkeypatch.setattr(
        scan, "scan", lambda *args, **settings: calls.append(("", args, settings)) or 0
    )
    own = _own_model(folder)
    assert cli.main(["scan", "a.fits", "--out", "o"]) == 0
    assert cli.main(["scan", "a.fits", "--out", "o", "--model", "m"]) == 0
    assert [args[2] for _, args, _ in calls] == [own, Path("m")]


PASSES = {
    **{"n_cases": 7, "recall": 0.9, "recall_snr_gt_7": 0.9, "false_alarms_per_frame": 1.0},
    **{"dense_recall_snr_gt_7": 0.9, "dense_false_alarms_per_100_frames": 0.0},
}


def _own_model(folder: Path, **metrics: object) -> Path:
    """What the stages detect and regression leave: a model, and that it passed."""
    own = Path(OWN_MODEL)
    own.parent.mkdir(parents=True)
    shutil.copy(Path(blobpipe.__file__).with_name("model.safetensors"), own)
    tables.write_json(
        folder / REGRESSION_METRICS, {**PASSES, "dense_sha256": files.sha256(own), **metrics}
    )
    return own


@pytest.mark.parametrize(
    ("metrics", "found"),
    [
        ({"recall": 0.0, "passed": False}, "recall: found 0.0, expected at least 0.6"),
        # by the settings of today
        ({"n_cases": 6, "passed": True}, "n_cases: found 6, expected at least 7"),
        ({"recall": "high"}, "recall: found high, expected at least 0.6"),
        (
            {"dense_sha256": "0" * 64},
            "results/regression/metrics.json is of the model 000000000000, not of this one",
        ),
        (
            {"dense_sha256": None},
            "results/regression/metrics.json is of the model None, not of this one",
        ),
        (None, "results/regression/metrics.json: not found; run the stage regression"),
        ("[", "results/regression/metrics.json: cannot be read as JSON"),
        ("[" * 100_000, "results/regression/metrics.json: cannot be read as JSON"),
        ("[]", "results/regression/metrics.json: found list"),
    ],
)
def test_a_model_that_the_regression_test_has_not_passed_is_refused(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    metrics: dict[str, object] | str | None,
    found: str,
) -> None:
    """By scan, quicklook and doctor alike, unless it is named."""
    caplog.set_level("INFO")
    _own_model(folder, **(metrics if isinstance(metrics, dict) else {}))
    if isinstance(metrics, str):
        (folder / REGRESSION_METRICS).write_text(metrics)
    elif metrics is None:
        (folder / REGRESSION_METRICS).unlink()
    (folder / "in").mkdir()
    noise = np.random.default_rng(1).normal(0, 0.01, (256, 256)).astype(np.float32)
    fits_images.write_image(folder / "a.fits", noise, name="DIFFERENCE")
    scan = ["scan", "a.fits", "--difference", "--out", "o"]
    quicklook = ["quicklook", "in", "--difference"]
    for words in (scan, quicklook):
        assert cli.main(words) == 1
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith(
            f"blobpipe: {OWN_MODEL}: has not passed the regression test ({found}"
        )
        assert f"--model {OWN_MODEL}, or the packaged one, --model " in line
    assert not Path("o").exists()
    assert not Path(LOG).exists()
    assert cli.main(["doctor"]) == 1
    [said] = [line for line in capsys.readouterr().out.splitlines() if "model: " in line]
    assert said == f"fail  model: {line.removeprefix('blobpipe: ')}"
    for words in (scan, quicklook):
        caplog.clear()
        assert cli.main([*words, "--model", OWN_MODEL]) == 0
        assert f"model: {OWN_MODEL} (local, SHA-256 " in caplog.text
    cli.main(["doctor", "--model", OWN_MODEL])
    assert f"ok    model: {OWN_MODEL} (local, SHA-256 " in capsys.readouterr().out


@pytest.mark.parametrize("own", [True, False])
def test_every_run_names_its_model(
    folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, own: bool
) -> None:
    caplog.set_level("INFO")
    model = _own_model(folder) if own else Path(blobpipe.__file__).with_name("model.safetensors")
    sha256 = files.sha256(model)
    named = f"model: {model} ({'local' if own else 'packaged'}, SHA-256 {sha256[:12]})"
    (folder / "in").mkdir()
    noise = np.random.default_rng(1).normal(0, 0.01, (256, 256)).astype(np.float32)
    fits_images.write_image(folder / "a.fits", noise, name="DIFFERENCE")
    for words in (["scan", "a.fits", "--difference", "--out", "o"], ["quicklook", "in"]):
        caplog.clear()
        assert cli.main(words) == 0
        assert named in caplog.messages
    cli.main(["doctor"])
    assert f"ok    {named}, threshold " in capsys.readouterr().out
    assert list(tables.read_table("o/frames.csv", ("model_sha256",))["model_sha256"]) == [sha256]
    [run] = logbook.connect(LOG).execute("SELECT model, model_sha256 FROM runs").fetchall()
    assert tuple(run) == (str(model), sha256)


@pytest.mark.parametrize("words", [[], ["--watch"], ["--silent"]], ids=" ".join)
def test_quicklook_has_its_folder_log_and_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    calls: Calls = []
    for name in ("quicklook", "watch"):
        monkeypatch.setattr(run, name, lambda *args, name=name: calls.append((name, args, {})))
    told = PARAMS.model_copy(update={"notices": Notices(digest="daily")})
    (folder / "params.yaml").write_text(to_yaml(told))
    assert cli.main(["quicklook", "in", *words]) == 0
    expected = told.model_copy(update={"notices": Notices()}) if words == ["--silent"] else told
    options = Options(Path(LOG), Path(blobpipe.__file__).with_name("model.safetensors"), expected)
    assert calls == [("watch" if "--watch" in words else "quicklook", (Path("in"), options), {})]


def test_the_log_is_printed_without_hashes_unless_all_of_it_is_asked_for(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    synthetic_log.make_log(Path(LOG), 40).close()
    assert cli.main(["log", "runs"]) == 0
    out = capsys.readouterr().out
    assert "aaa" not in out
    assert "not shown: model_sha256" in out
    assert cli.main(["log", "runs", "--wide"]) == 0
    assert f" {'a' * 64} " in capsys.readouterr().out
    assert cli.main(["log", "notices"]) == 0
    assert capsys.readouterr().out == "notices: no rows\n"
    assert cli.main(["log", "runs", "--out", "runs.csv"]) == 0
    assert "a" * 64 in (folder / "runs.csv").read_text()


# --- errors ----------------------------------------------------------------------------------------------------------

ERRORS = {
    "a.fits: 3\\npixels": BlobpipeError("a.fits: 3\npixels"),
    "data/clip/a.fits.fz: No space left on device; free some": OSError(errno.ENOSPC, "No space left on device", "data/clip/a.fits.fz"),
    "out: Read-only file system; choose a folder": OSError(errno.EROFS, "Read-only file system", "out"),
    "a.csv: not found": FileNotFoundError(errno.ENOENT, "No such file or directory", "a.csv"),
    "writing: No such file or directory": FileNotFoundError(errno.ENOENT, "No such file or directory"),
    "without a number": OSError("without a number"),
    "OSError": OSError(),
    "writing: Disk quota exceeded; free some space": OSError(errno.EDQUOT, "Disk quota exceeded"),
    "a: Permission denied; change its permissions or choose another": OSError(errno.EACCES, "Permission denied", "a"),
    "a\\nb: Is a directory; name a file": OSError(errno.EISDIR, "Is a directory", "a\nb"),
    "a: Input/output error; look at the disk": OSError(errno.EIO, "Input/output error", "a"),
    "a: Connection refused": OSError(errno.ECONNREFUSED, "Connection refused", "a"),
    "the log: disk I/O error; expected": sqlite3.OperationalError("disk I/O error"),
    "not enough memory; end other programs": MemoryError(),
    "found an input that is nested too deeply": RecursionError("maximum recursion depth exceeded"),
    "found text in another encoding, expected UTF-8; --debug": UnicodeEncodeError("ascii", "\xdc", 0, 1, "not in range"),
}  # fmt: skip


def fail_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(importlib.import_module("blobpipe.images.clip"), "clip", fail)


@pytest.mark.parametrize("message", ERRORS)
def test_an_error_is_one_line_and_status_1(
    message: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(ERRORS[message], monkeypatch)
    assert cli.main(["clip"]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith(f"blobpipe: {message}")
    assert err.count("\n") == 1
    assert ("space" in err) == (
        getattr(ERRORS[message], "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    )
    assert "xdc" not in err


@pytest.mark.parametrize("message", ERRORS)
def test_debug_shows_the_traceback(
    message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(ERRORS[message], monkeypatch)
    with pytest.raises(type(ERRORS[message])):
        cli.main(["clip", "--debug"])


def test_an_interrupt_is_one_line_and_status_130(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(KeyboardInterrupt(), monkeypatch)
    assert cli.main(["clip"]) == 130
    assert capsys.readouterr().err.count("\n") == 1


def test_a_fault_of_ours_is_not_hidden(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(ZeroDivisionError(), monkeypatch)
    with pytest.raises(ZeroDivisionError):
        cli.main(["clip"])


@pytest.mark.parametrize(
    "words",
    [["params"], ["log", "images"], ["log", "notices"], ["check", "none.fits", "none.fits"]],
)
def test_a_closed_pipe_ends_it_without_a_word(folder: Path, words: list[str]) -> None:
    synthetic_log.make_log(Path(LOG), 40).close()
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "blobpipe", *words],
        stdout=write,
        stderr=subprocess.PIPE,
        timeout=60,
        check=False,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (PIPE_CLOSED, b"")


def test_output_without_space_is_one_line(folder: Path) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "blobpipe", "params"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert (
        done.stderr
        == "blobpipe: writing: No space left on device; free some space or choose another folder\n"
    )


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["log", "images", "--log", "x" * 300], "File name too long; choose a shorter one"),
        (["quicklook", "x" * 300], "File name too long; choose a shorter one"),
        (["page", "--log", "there/x", "--out", "out"], "there/x: not found"),
        (["log", "images", "--log", "there"], "it cannot be opened"),
        (
            ["log", "images", "--log", LOG, "--out", "there/file/x.csv"],
            "this is a file, expected a folder",
        ),
        (["log", "images", "--log", LOG, "--out", f"{'y' * 300}.csv"], "File name too long"),
    ],
)
def test_a_name_that_cannot_be_used_has_its_reason(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], reason: str
) -> None:
    synthetic_log.make_log(Path(LOG), 40).close()
    Path("there").mkdir()
    Path("there/file").touch()
    assert cli.main(words) == 1
    err = capsys.readouterr().err
    assert reason in err
    assert err.count("\n") == 1
    assert "free some space" not in err


# --- the real thing --------------------------------------------------------------------------------------------------


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


def test_the_installed_command_and_the_module_are_the_same() -> None:
    """One line on stderr, and no traceback unless asked for."""
    command = [sys.executable, "-m", "blobpipe", "clip", "--params", "none.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("blobpipe: none.yaml: ")
    assert done.stderr.count("\n") == 1
    done = subprocess.run([*command, "--debug"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    script = shutil.which("blobpipe", path=str(Path(sys.executable).parent))
    if script:
        version = subprocess.run(
            [script, "--version"], capture_output=True, text=True, check=True
        ).stdout
        assert version.split()[-1] == __version__


HEAPS = """
import ctypes, sys, threading
from blobpipe.cli.run import keep_memory

keep_memory()
library = ctypes.CDLL(None)
library.malloc.restype = library.fopen.restype = ctypes.c_void_p
library.free.argtypes = library.fclose.argtypes = (ctypes.c_void_p,)
library.malloc_info.argtypes = (ctypes.c_int, ctypes.c_void_p)
together = threading.Barrier(4)

def work():
    held = library.malloc(2**20)
    together.wait()
    library.free(held)

threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
file = library.fopen(sys.argv[1].encode(), b"w")
library.malloc_info(0, file)
library.fclose(file)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="not the GNU C library")
def test_threads_leave_no_heaps_of_their_own(tmp_path: Path) -> None:
    """Else a watch grows with each image: a heap that a thread has left is kept, and used by nobody."""
    subprocess.run((sys.executable, "-c", HEAPS, tmp_path / "heaps.xml"), check=True)
    assert (tmp_path / "heaps.xml").read_text().count("<heap nr=") == 1
