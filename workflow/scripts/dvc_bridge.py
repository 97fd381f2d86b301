"""After each stage of a Snakemake run: commits it to DVC, so that dvc.lock tells the same story as Snakemake's records.

`reconcile` is the way back, before a run. Nothing is certified that was not made so: a stage whose settings or code were
edited while it ran, or whose files changed although nothing that they are made from did, is refused.

Off inside a DVC stage, where there is no DVC repository, and with BLOBPIPE_DVC=0.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from records import (
    LOCK,
    BridgeError,
    all_files,
    cached,
    dvc,
    enabled,
    entries,
    listed_images,
    note,
    replace,
    stamp,
    versions,
)
from run_lock import only_one
from stages import Stage, settings, stages

from blobpipe.errors import BlobpipeError

COMMITTING = Path(".dvc/tmp/blobpipe.lock")


def pointers() -> list[str]:
    """The pointer files of images that the user added to DVC (`dvc add data/raw`)."""
    return sorted(map(str, Path("data").glob("*.dvc")))


def fingerprint(name: str) -> str:
    """Digest of all that decides a stage's files except data: its settings, its code, its entry in dvc.yaml."""
    stage = stages()[name]
    content = [
        stage.entry.encode(),
        settings(name).encode(),
        *(Path(path).read_bytes() for path in stage.sources),
    ]
    return hashlib.sha256(b"\0".join(content)).hexdigest()


def finish(name: str, made_from: str) -> None:
    """Check that a stage was made from what is there now, and remove images that it no longer makes.

    Raises
    ------
    BridgeError
        If its settings or code were edited while it ran: then nobody knows what its files were made from.
    """
    stage = stages()[name]
    if fingerprint(name) != made_from:
        _forget(stage)
        raise BridgeError(
            f"{name}: params.yaml, dvc.yaml or its code was edited while the pipeline ran; its files were removed; "
            "run the same command again"
        )
    for out in map(Path, stage.outs):
        if out.is_dir():
            _prune(name, out)


def commit(name: str) -> None:
    """Version a stage's files with DVC; one at a time, for dvc.lock is shared.

    Raises
    ------
    BridgeError
        If they differ from the recorded ones although nothing that they are made from does.
    """
    with only_one(COMMITTING):
        before = LOCK.read_text(encoding="utf-8") if LOCK.exists() else ""
        # a job may be reading what relinking would replace
        dvc("commit", "--quiet", "--force", "--no-relink", name)
        changed = _changed_alone(stages()[name], entries(before).get(name, {}), entries()[name])
        if changed and os.environ.get("BLOBPIPE_ACCEPT") != "1":
            replace(LOCK, before)
            raise BridgeError(_refusal(stages()[name], changed))
        note(name, versions()[name], stages()[name].made)
        Path(stamp(name)).touch()


def commit_pointer(path: str) -> None:
    """Version images of the user's own."""
    with only_one(COMMITTING):
        dvc("commit", "--quiet", "--force", "--no-relink", path)
        Path(stamp(path)).touch()


def add(folder: str) -> None:
    """Version what an optional stage has made: a pointer file beside its folder, since it is no stage of dvc.yaml."""
    if enabled():
        with only_one(COMMITTING):
            dvc("add", "--quiet", "--no-relink", folder)


def _forget(stage: Stage) -> None:
    """Remove what makes Snakemake and later stages believe in a stage's files: all but the images of its tables."""
    for path in all_files(stage.made):
        if path.suffix != ".fz" or path.name == "reference.fits.fz":
            path.unlink()


def _prune(name: str, folder: Path) -> None:
    """Remove images that no table of the folder lists."""
    wanted = {frame for table in folder.glob("frames*.csv") for frame in listed_images(table)} | {
        "reference"
    }
    surplus = [
        path for path in sorted(folder.glob("*.fits*")) if path.name.split(".fits")[0] not in wanted
    ]
    if name == "campaign" and surplus:
        _refuse_unknown(folder, surplus)
    for path in surplus:
        path.unlink()


def _refuse_unknown(folder: Path, surplus: list[Path]) -> None:
    """Never remove images that are not the simulation's: someone put them there."""
    recorded = {
        folder / entry["path"]
        for entry in json.loads(dvc("ls", "--dvc-only", "--json", ".", str(folder)))
    }
    unknown = [path for path in surplus if path not in recorded]
    if unknown:
        raise BridgeError(
            f"{unknown[0]}: not an image of the simulated campaign; move it away, or 'dvc remove campaign' to work on "
            f"images of your own ({len(unknown)} such files)"
        )


def _changed_alone(stage: Stage, before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The recorded outs that a commit replaced, where settings and deps are the same and the old ones at hand.

    On another machine, and without the cache, results may differ by rounding: no reason to refuse them.
    """
    if not before or any(before.get(key) != after.get(key) for key in ("cmd", "deps", "params")):
        return []
    compared = stage.outs if stage.timed else stage.made
    changed = [
        out["path"]
        for out in before["outs"]
        if out["path"] in compared and out not in after["outs"]
    ]
    at_hand = (
        all(cached(out["md5"]).exists() for out in before["outs"] if out["path"] in stage.outs)
        if changed
        else False
    )
    return changed if at_hand else []


def _refusal(stage: Stage, changed: list[str]) -> str:
    """Which files changed, and the ways out; called with the old dvc.lock in place."""
    state = json.loads(dvc("data", "status", "--granular", "--json")).get("uncommitted", {})
    files = sorted(
        path for kind in ("modified", "added", "deleted") for path in state.get(kind, [])
    )
    inside = [path for path in files if any(path.startswith(f"{out}/") for out in changed)]
    named = [path for path in (*changed, *inside) if not Path(path).is_dir()] or changed
    metrics = [path for path in changed if path in stage.metrics]
    undo = [f"dvc checkout --force {stage.name}"] * (metrics != changed) + [
        f"git checkout {path}" for path in metrics
    ]
    return (
        f"{stage.name}: {', '.join(named[:5])} differ from dvc.lock although nothing that they are made from does: edited "
        f"by hand, or not reproducible; '{' && '.join(undo)}' takes the recorded ones back, "
        "BLOBPIPE_ACCEPT=1 before the same command accepts the new ones"
    )


def main(action: str, target: str, made_from: str = "") -> None:
    """Do one of these: ``finish STAGE DIGEST`` in a DVC stage; ``commit STAGE DIGEST``, ``commit POINTER``, ``add FOLDER``
    in a Snakemake run."""
    if action == "add":
        return add(target)
    if target.endswith(".dvc"):
        return commit_pointer(target)
    finish(target, made_from)
    if action == "commit":
        commit(target)
    return None


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except (BridgeError, BlobpipeError) as error:
        sys.exit(str(error))
