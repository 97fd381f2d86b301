"""Commands for the settings and results of the pipeline: params, gate, report."""

from __future__ import annotations

import argparse
from pathlib import Path

from blobpipe.cli.options import Commands, SharedOptions
from blobpipe.cli.paths import LOCK, PIPELINE, REGRESSION, REGRESSION_METRICS, STAGES_PAGE
from blobpipe.cli.settings import params_of
from blobpipe.params import Params, load_params, to_yaml


def add_commands(commands: Commands, shared: SharedOptions) -> None:
    """Add the commands for settings and results."""
    _add_params(commands, shared)
    _add_gate(commands, shared)
    _add_report(commands, shared)


def _add_params(commands: Commands, shared: SharedOptions) -> None:
    """Add the command ``params``."""
    params = commands.add_parser(
        "params",
        parents=[shared.common],
        description="print all settings with their defaults, or those of a file in the same layout",
    )
    params.add_argument("--params", metavar="FILE", help="parameter file whose settings to print")
    params.set_defaults(work=_print_params)


def _print_params(args: argparse.Namespace) -> None:
    print(to_yaml(load_params(args.params) if args.params else Params()), end="")


def _add_gate(commands: Commands, shared: SharedOptions) -> None:
    """Add the command ``gate``."""
    gate = commands.add_parser(
        "gate",
        parents=[shared.settings, shared.common],
        description="exit with status 1 unless the regression test passed, with the settings in force",
    )
    gate.add_argument(
        "--against",
        metavar="REV",
        help="also list the cases that each network won and lost since a git revision",
    )
    gate.set_defaults(work=_gate)


def _gate(args: argparse.Namespace) -> int:
    from blobpipe.validation import gate

    params = params_of(args)
    failed = gate.check_gate(REGRESSION_METRICS, params.regression)
    if failed:
        failed.insert(0, "did not pass:")
    failed = gate.unlike_record(LOCK, REGRESSION_METRICS, params) or failed
    for line in gate.against(f"{REGRESSION}/cases.csv", args.against) if args.against else []:
        print(line)
    print("\n".join(failed) or "passed")
    return 1 if failed else 0


def _add_report(commands: Commands, shared: SharedOptions) -> None:
    """Add the command ``report``."""
    report = commands.add_parser(
        "report",
        parents=[shared.settings, shared.common],
        description="write the first page of the report: verdict, numbers, figures, what changed",
    )
    report.add_argument(
        "--against",
        default="HEAD",
        metavar="REV",
        help="git revision to compare with (default: %(default)s)",
    )
    report.add_argument(
        "--out",
        type=Path,
        default=Path("results/report.html"),
        metavar="FILE",
        help="HTML file to write (default: %(default)s)",
    )
    report.set_defaults(work=_report)


def _report(args: argparse.Namespace) -> None:
    from blobpipe.validation.report_page import write_report

    write_report(
        Path("results"),
        args.out,
        params_of(args),
        pipeline=Path(PIPELINE),
        stages=STAGES_PAGE,
        revision=args.against,
    )
    print(args.out)
