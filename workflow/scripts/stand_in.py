"""What runs nothing changes nothing: a dry run, and its like, plans in a stand-in for the project's folder.

To say what a run would do, Snakemake's records must first be brought to what dvc.lock says (`reconcile`), and that changes
records and times. So these modes go to a scratch folder: links to everything here, and a copy of Snakemake's records.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

PLANS = (  # modes of Snakemake that print what a run would do, or what it knows
    "dryrun",
    "summary",
    "detailed_summary",
    "dag",
    "rulegraph",
    "filegraph",
    "d3dag",
    "list_changes",
    "list_input_changes",
    "list_params_changes",
    "list_conda_envs",
    "containerize",
)
ERRANDS = (  # modes that do one thing of their own, or look at the rules alone
    "lint",
    "list_rules",
    "list_target_rules",
    "print_compilation",
    "list_untracked",
    "report",
    "reporter",
    "generate_unit_tests",
    "archive",
    "unlock",
    "cleanup_metadata",
    "cleanup_shadow",
    "conda_cleanup_envs",
    "conda_create_envs_only",
    "container_cleanup_images",
    "delete_all_output",
    "delete_temp_output",
)
RECORDS = ("metadata", "incomplete", "blobpipe")  # the folders of .snakemake that a plan depends on


def mode(*, dry: bool) -> str:
    """What Snakemake was started for: ``plan``, ``errand`` or ``run``.

    Parameters
    ----------
    dry : bool
        A dry run for sure, for instance because a profile says so.
    """
    from snakemake.cli import get_argument_parser

    options, _ = get_argument_parser().parse_known_args(sys.argv[1:])
    if dry or any(getattr(options, name, None) not in (None, False) for name in PLANS):
        return "plan"
    if options.report_after_run:
        return "run"
    return (
        "errand"
        if any(getattr(options, name, None) not in (None, False) for name in ERRANDS)
        else "run"
    )


def go_to_stand_in() -> None:
    """Work from now on in a stand-in for this folder, which is removed in the end.

    Every file has a link of its own, because it may get another date, or be removed, except in hidden folders.
    """
    home = Path.cwd()
    there = Path(tempfile.mkdtemp(prefix="blobpipe-plan-"))
    atexit.register(shutil.rmtree, there, ignore_errors=True)
    for entry in home.iterdir():
        if entry.name == ".snakemake":
            for name in RECORDS:
                if (entry / name).is_dir():
                    shutil.copytree(entry / name, there / entry.name / name)
        elif entry.is_dir() and not entry.name.startswith("."):
            shutil.copytree(
                entry, there / entry.name, copy_function=_link, ignore_dangling_symlinks=True
            )
        else:
            _link(entry, there / entry.name)
    os.chdir(there)


def _link(source: str | Path, target: str | Path) -> None:
    """A link of the same date, which may be changed without changing the file's."""
    Path(target).symlink_to(Path(source).absolute())
    state = Path(source).lstat()
    os.utime(target, ns=(state.st_atime_ns, state.st_mtime_ns), follow_symlinks=False)


def leave_no_log(logs: Iterable[str]) -> None:
    """Remove the logs that Snakemake has just begun, and their folders where nothing else is in them."""
    for path in map(Path, logs):
        path.unlink()
        for folder in (path.parent, path.parent.parent):
            if not any(folder.iterdir()):
                folder.rmdir()
