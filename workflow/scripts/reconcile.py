"""Before a Snakemake run: brings its records to what dvc.lock says, where someone else was at work.

dvc.lock is the truth about what was made from what, by content. Snakemake's records under .snakemake/ are this folder's
memory of it. A stage whose entry in dvc.lock is not the one that Snakemake knows was made by someone else (dvc repro,
checkout, pull, exp apply, git):

- `dvc status` is clean: adopted, by `snakemake --touch`, which records settings, code and inputs and runs nothing;
- it is not: files that Snakemake has made here are left to its own records; the others are aged and Snakemake's memory of
  them dropped, so that they are made anew.

A stage whose files were replaced since its last commit is looked at again, by content: as committed, it is adopted too.

A job on a cluster that ends after its run was killed leaves files, but no record of their settings, and Snakemake alone would
keep them whatever the settings are by then. They are adopted if nothing that a person changes (settings, code, the user's images)
has changed since that run began. What nobody vouches for is made anew.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from records import (
    HOME,
    NOTES,
    cached,
    dvc,
    existing,
    is_unfinished,
    known,
    listed_images,
    look,
    made_here,
    note,
    refuse_damaged,
    snakemake,
    stamp,
    versions,
)
from run_lock import cut_off
from stages import stages

Files = dict[str, list[str]]

NO_RECORD = "no record of what some files were made from, they will be made anew"


def refresh(sources: Iterable[str]) -> None:
    """Make Snakemake compare the contents of sources that were replaced by files of older date (cp -p, dvc checkout)."""
    seen = NOTES / "sources"
    since = seen.stat().st_mtime if seen.exists() else 0.0
    for path in existing(sources):
        state = Path(path).stat()
        if state.st_ctime > since and state.st_mtime < state.st_ctime:
            os.utime(path, follow_symlinks=False)
    seen.parent.mkdir(parents=True, exist_ok=True)
    seen.touch()


def begun_unchanged(sources: Iterable[str]) -> float:
    """Return when the last run here began, if it was killed and its jobs went on without it; else infinity.

    So it is if one of some files has changed since: a job would make something else now. Ask before this run writes itself down.
    """
    begun = cut_off()
    # no tool can set the time of a file's last change of any kind
    changed = max(Path(path).stat().st_ctime for path in existing(sources))
    return begun if changed < begun else math.inf


def reconcile(files: Files, begun: float = math.inf) -> None:
    """Adopt what others made, age what agrees with nothing, look again at what was touched.

    Parameters
    ----------
    files : dict
        The files that the rules of each stage declare.
    begun : float
        From `begun_unchanged`: files that jobs have finished later are what they would make now.

    Raises
    ------
    BridgeError
        If what is to be adopted was damaged in DVC's cache, which DVC does not notice. A plan does not look: that takes
        minutes for ten thousand images.
    """
    _keep_unseen(files, begun)
    recorded = versions()
    there = [name for name in files if existing(set(files[name]) - set(stages()[name].metrics))]
    committed = [name for name in there if name in recorded]
    foreign = [name for name in committed if known(name).get("version") != recorded[name]]
    touched = [
        name
        for name in committed
        if name not in foreign and known(name)["files"] != look(stages()[name].made)
    ]
    _make_anew({name: _strange(files[name]) for name in there if name not in recorded})
    if not foreign and not touched:
        return
    faults = json.loads(dvc("status", "--json"))
    if Path.cwd() == HOME:
        refuse_damaged([name for name in foreign if name not in faults])
    for name in touched:
        if name in faults:
            _look_again(name, files[name], faults[name])
    _remake({name: faults[name] for name in foreign if name in faults}, files)
    # Of files that an experiment has made alike, Snakemake's records still tell the experiment's settings
    _adopt([name for name in (*foreign, *touched) if name not in faults], recorded)


def _keep_unseen(files: Files, begun: float) -> None:
    """Let Snakemake take over what jobs of the last run have finished unseen."""
    if begun == math.inf:
        return
    unseen = {
        name: [path for path in _strange(files[name]) if _is_of_a_job(path, begun)]
        for name in files
    }
    names = [name for name, paths in unseen.items() if paths]
    if not names:
        return
    print(f"finished by jobs of the run that was killed, kept: {', '.join(names)}", file=sys.stderr)
    paths = [path for name in names for path in unseen[name]]
    rules = [rule for name in names for rule in stages()[name].rules]
    snakemake("--touch", "--force", "--cores", "1", "--allowed-rules", *rules, "--", *paths)


def _is_of_a_job(path: str, begun: float) -> bool:
    """Return whether a job that was not cut off has made a file since a time, and not `dvc checkout`."""
    if Path(path).stat().st_mtime < begun or is_unfinished(path):
        return False
    digest = hashlib.md5(Path(path).read_bytes()).hexdigest()
    return not cached(digest).exists()


def check_inputs() -> None:
    """Inside a stage of DVC: refuse what was damaged in its cache.

    Raises
    ------
    BridgeError
        One line that names the file and its object.
    """
    stage = stages().get(os.environ.get("DVC_STAGE", ""))
    if stage:
        refuse_damaged(stage.upstream)


def _look_again(name: str, paths: list[str], fault: list[Any]) -> None:
    """Let the commit of a stage judge what is not as committed, and do no more than is needed."""
    Path(stamp(name)).unlink(missing_ok=True)
    _drop_incomplete(name)
    changes = [
        change["changed deps"]
        for change in fault
        if isinstance(change, dict) and "changed deps" in change
    ]
    if any(not path.endswith(".smk") for deps in changes for path in deps):
        # `dvc checkout` after a change that was run, but not committed; or jobs that ended after their run
        _make_anew({name: _strange(paths)})


def _strange(paths: list[str]) -> list[str]:
    """Those of some files that Snakemake's records are not about."""
    return [path for path in existing(paths) if not made_here(path)]


def _drop_incomplete(name: str) -> None:
    """Remove the tables of batches of which an image is gone, so that these batches are made anew."""
    for folder in map(Path, stages()[name].outs):
        for table in folder.glob("frames-*.csv"):
            if not all((folder / f"{frame}.fits.fz").exists() for frame in listed_images(table)):
                table.unlink()


def _remake(faults: dict[str, list[Any]], files: Files) -> None:
    """Let Snakemake make anew what it did not make here; its finished batches stay, whatever dvc.lock says of their stage."""
    strange = {f"{name}{_lost(faults[name])}": _strange(files[name]) for name in faults}
    for name in faults:
        Path(stamp(name)).unlink(missing_ok=True)
        _drop_incomplete(name)
    _make_anew(strange, "not as in dvc.lock, will be made anew (or first 'dvc checkout')")


def _make_anew(strange: dict[str, list[str]], why: str = NO_RECORD) -> None:
    """Say of which stages some files will be made anew, and let Snakemake do so."""
    names = [name for name, paths in strange.items() if paths]
    if names:
        print(f"{why}: {', '.join(names)}", file=sys.stderr)
        _drop_memory(existing(path for name in names for path in strange[name]))


def _lost(fault: list[Any]) -> str:
    """The outs that DVC's cache has lost, or has found damaged and thrown away."""
    outs = [
        change["changed outs"]
        for change in fault
        if isinstance(change, dict) and "changed outs" in change
    ]
    lost = [path for states in outs for path, state in states.items() if state == "not in cache"]
    return (
        f" ({', '.join(lost)} missing or damaged in DVC's cache: 'dvc pull' first, if there is a remote)"
        if lost
        else ""
    )


def _drop_memory(paths: list[str]) -> None:
    """Let Snakemake make files anew, whatever it remembers of them."""
    if paths:
        snakemake("--cleanup-metadata", *paths)
    for path in map(Path, paths):
        if path.is_symlink():  # whose date is that of what it leads to
            content = path.read_bytes()
            path.unlink()
            path.write_bytes(content)
        os.utime(path, (1, 1))


def _adopt(names: list[str], recorded: dict[str, str]) -> None:
    """Let Snakemake take over what DVC vouches for."""
    if not names:
        return
    print(f"taken over from DVC: {', '.join(names)}", file=sys.stderr)
    for name in names:
        Path(stamp(name)).touch()
    targets = [f"dvc_{name}" for name in names]
    rules = [rule for name in names for rule in stages()[name].rules]
    done = snakemake(
        "--touch", "--forceall", "--cores", "1", "--allowed-rules", *rules, *targets, "--", *targets
    )
    if done.returncode:
        print(f"could not adopt them, going on without:\n{done.stdout[-2000:]}", file=sys.stderr)
        return
    for name in names:
        note(name, recorded[name], stages()[name].made)


def drop_surplus_batches(files: Files) -> None:
    """Remove the tables of batches beyond the last, from a longer list of images: later stages read all there are."""
    wanted = {path for paths in files.values() for path in paths}
    for stage in stages().values():
        for out in stage.outs:
            pattern = "*.csv" if Path(out).name == "batches" else "frames-*.csv"
            for table in Path(out).glob(pattern):
                if str(table) not in wanted:
                    table.unlink()
