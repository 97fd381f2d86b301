"""The parser of the whole command line, with help and completion."""

from __future__ import annotations

import argparse
import difflib
import textwrap
from pathlib import Path
from typing import Any

from blobpipe import __version__
from blobpipe.cli import daily, images, results, stages
from blobpipe.cli.options import Commands, shared_options
from blobpipe.cli.stages import STAGES

# Commands as --help lists them
GROUPS = {
    "every day": (
        *("quicklook", "serve", "log", "page", "catalogue", "export", "notify", "doctor"),
        *("fetch", "flatten", "detector"),
    ),
    "images": ("check", "scan", "calibrate", "history"),
    "settings and results of the pipeline": ("params", "gate", "report"),
}

# Columns of the help, whose stages are listed by name alone: the whole of it fits one screen
WIDTH = 80

# A command line of each, for its help; a stage is called without options
EXAMPLES = {
    "quicklook": "blobpipe quicklook inbox --catalogue known/blobs.csv",
    "serve": "BLOBPIPE_TOKEN=... blobpipe serve --port 8000",
    "log": "blobpipe log candidate_list --out candidates.csv",
    "page": "blobpipe page --date 2024-05-01 --out day.html",
    "catalogue": "blobpipe catalogue update --catalogue known/blobs.csv",
    "export": "blobpipe export known/blobs.csv --bpixtab old_bpx.fits --out handover",
    "notify": "blobpipe notify --dry-run",
    "doctor": "blobpipe doctor --catalogue known/blobs.csv",
    "fetch": "blobpipe fetch --start 2024-05-01 --end 2024-05-31 --out exposures",
    "flatten": "blobpipe flatten exposures/*_flt.fits --out inbox",
    "detector": "blobpipe detector new flat.fits --out my_detector.yaml",
    "check": "blobpipe check inbox/*.fits",
    "scan": "blobpipe scan image.fits --reference stack.fits --out scan",
    "calibrate": "blobpipe calibrate quiet --budget 5 --out operating_point.yaml",
    "history": "blobpipe history archive --catalogue positions.csv --out dated",
    "params": "blobpipe params > params.yaml",
    "gate": "blobpipe gate --against HEAD",
    "report": "blobpipe report --against HEAD~1",
}

# What is no failure, though a reader may expect one
SUCCESSES = {
    "quicklook": "also if images were rejected",
}

# What a status of 1 means besides an error, which one line on stderr describes
FAILURES = {
    "check": "or a file cannot be searched",
    "scan": "or an image was rejected",
    "history": "or an image was rejected",
    "gate": "or the regression test did not pass",
    "doctor": "or a check failed",
    "fetch": "or an exposure could not be downloaded",
    "flatten": "or an exposure could not be used",
}


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the whole command line."""
    parser = _Parser(
        prog="blobpipe",
        description="Find blobs in WFC3/IR monitor images.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument(
        "--completion",
        action=_Completion,
        choices=("bash", "zsh", "tcsh"),
        metavar="SHELL",
        help="print the completion script for bash, zsh or tcsh",
    )
    # Commands without this option take the detector of the settings
    parser.set_defaults(detector=None)
    parser_class: type[argparse.ArgumentParser] = _Command
    commands = parser.add_subparsers(
        dest="command",
        required=True,
        metavar="COMMAND",
        help=argparse.SUPPRESS,
        parser_class=parser_class,
    )
    shared = shared_options()
    for group in (stages, images, daily, results):
        group.add_commands(commands, shared)
    _describe_commands(parser, commands)
    return parser


def _describe_commands(parser: argparse.ArgumentParser, commands: Commands) -> None:
    """Add the list of commands to the help, and an example and the exit statuses to that of each."""
    lines = []
    for group, names in GROUPS.items():
        lines.append(f"{group}:")
        lines += [f"  {name:12} {commands.choices[name].description}" for name in names]
        lines.append("")
    lines.append("stages of the pipeline, which Snakemake and DVC run:")
    lines += textwrap.wrap(", ".join(STAGES), WIDTH, initial_indent="  ", subsequent_indent="  ")
    lines += ["", "'blobpipe COMMAND --help' describes a command or a stage, with an example."]
    parser.epilog = "\n".join(lines)
    # argparse itself would leave out what has no help
    parser.usage = "%(prog)s [-h] [--version] [--completion SHELL] COMMAND ..."
    for name, command in commands.choices.items():
        one = f"an error{' ' * (name in FAILURES)}{FAILURES.get(name, '')}"
        done = ", ".join(["done", *([SUCCESSES[name]] if name in SUCCESSES else [])])
        command.formatter_class = argparse.RawDescriptionHelpFormatter
        command.epilog = (
            f"example: {EXAMPLES.get(name, f'blobpipe {name}')}\n"
            f"exit status: 0 {done}; 1 {one}; 2 a wrong command line"
        )


class _Parser(argparse.ArgumentParser):
    """A parser that names the nearest command to a mistyped one, where argparse lists all."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuse a command that does not exist."""
        if action.dest == "command" and value not in (action.choices or ()):
            near = difflib.get_close_matches(str(value), list(action.choices or ()), n=1)
            advice = f"did you mean {near[0]}? " if near else ""
            raise argparse.ArgumentError(
                None, f"no command {value!r}; {advice}'blobpipe --help' lists them"
            )
        super()._check_value(action, value)


class _Command(argparse.ArgumentParser):
    """The parser of a command, which shows its own usage where argparse shows that of the whole command line."""

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        """Parse what follows the name of the command; refuse options that it does not have."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            near = difflib.get_close_matches(unknown[0], self._option_string_actions, n=1)
            advice = f"; did you mean {near[0]}?" if near else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{advice}")
        return found, unknown


class _Completion(argparse.Action):
    """Print the completion of a shell, and end."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        import shtab

        _complete_arguments(parser, shtab.FILE)
        print(shtab.complete(parser, values))
        parser.exit()


def _complete_arguments(parser: argparse.ArgumentParser, kind: dict[str, Any]) -> None:
    """Let every argument that is a path be completed as one, of a command and of its parts; and the tables of the log."""
    from blobpipe.monitor.logbook import TABLES

    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                action.help = None
                # shtab completes the commands that the help lists by itself, which ours does not
                listed = action._ChoicesPseudoAction(name, [], command.description or name)
                action._choices_actions.append(listed)
                _complete_arguments(command, kind)
        elif action.dest == "table":
            action.choices = TABLES
        elif action.type is Path or action.dest == "params":
            action.complete = kind  # type: ignore[attr-defined]
