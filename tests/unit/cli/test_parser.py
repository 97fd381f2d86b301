"""The parser: help, examples, completion, and what is said of a wrong command line."""

from __future__ import annotations

import argparse
import shlex
import subprocess

import pytest

from blobpipe import __version__, cli
from blobpipe.cli.parser import EXAMPLES, GROUPS, build_parser
from blobpipe.cli.stages import STAGES
from blobpipe.monitor import logbook

SCREEN = 40  # lines that a help may have


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
    assert sorted([*listed, *STAGES]) == sorted(commands.choices)  # type: ignore[arg-type]
    assert all(f"\n  {command}" in out for command in listed)
    stages = out.partition("stages of the pipeline")[2].partition(":")[2].partition("'")[0]
    assert stages.replace(",", " ").split() == list(STAGES)
    # what is used every day comes first, and all of it fits on a screen
    assert out.index("quicklook") < out.index("campaign")
    assert len(out.splitlines()) <= SCREEN
    assert max(map(len, out.splitlines())) <= 100


def test_the_help_of_a_command_has_purpose_example_and_statuses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    [commands] = [action for action in build_parser()._actions if action.dest == "command"]
    choices: dict[str, argparse.ArgumentParser] = commands.choices  # type: ignore[assignment]
    for name, command in choices.items():
        text = command.format_help()
        assert command.description, name
        assert f"example: {'BLOBPIPE_TOKEN=... ' * (name == 'serve')}blobpipe {name}" in text
        done = "done, also if images were rejected" if name == "quicklook" else "done"
        assert f"exit status: 0 {done}; 1 an error" in text
        assert len(text.splitlines()) <= SCREEN, name


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


def test_the_completion_of_bash_knows_the_tables_of_the_log(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--completion", "bash"])
    words = capsys.readouterr().out + (
        "\nCOMP_WORDS=(blobpipe log im); COMP_CWORD=2; _shtab_blobpipe; echo ${COMPREPLY[@]}\n"
    )
    done = subprocess.run(["bash"], input=words, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["images"]


def test_a_mistyped_command_is_told_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    for word, advice in (("chek", "did you mean check? "), ("xyzzy", "")):
        with pytest.raises(SystemExit) as ended:
            cli.main([word, "a.fits"])
        assert ended.value.code == 2
        assert capsys.readouterr().err.endswith(
            f"blobpipe: error: no command '{word}'; {advice}'blobpipe --help' lists them\n"
        )


@pytest.mark.parametrize(
    ("argv", "usage", "error"),
    [
        (
            ["quicklook", "inbox", "--stack"],
            "usage: blobpipe quicklook ",
            "blobpipe quicklook: error: unrecognized arguments: --stack",
        ),
        (
            ["scan", "a.fits", "--out", "o", "--dfference"],
            "usage: blobpipe scan ",
            "blobpipe scan: error: unrecognized arguments: --dfference; did you mean --difference?",
        ),
        (
            ["catalogue", "update", "--catalogue", "c.csv", "--refiews", "r.csv"],
            "usage: blobpipe catalogue update ",
            "blobpipe catalogue update: error: unrecognized arguments: --refiews r.csv; did you mean --reviews?",
        ),
    ],
)
def test_an_unknown_option_is_answered_with_the_usage_of_its_command(
    argv: list[str], usage: str, error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(argv)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(usage)
    assert said.splitlines()[-1] == error


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
