"""What the two tools know: the entries of dvc.lock, and the notes that the bridge keeps of them for Snakemake."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
from base64 import urlsafe_b64encode
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from stages import entries_of

from blobpipe.params import text_of

NOTES = Path(".snakemake/blobpipe")
LOCK = Path("dvc.lock")
CHECKED = NOTES / "checked.json"  # versions of stages whose objects in DVC's cache are whole
HOME = Path.cwd()  # the project; a plan is made elsewhere (see stand_in.py)
INNER = {"BLOBPIPE_BRIDGE": "inner"}  # marks the Snakemake runs that the bridge starts itself


class BridgeError(Exception):
    """One line that says why the two tools cannot agree, and what to do."""


def enabled() -> bool:
    """Whether this Snakemake run commits to DVC."""
    wanted = os.environ.get("BLOBPIPE_DVC") != "0" and "DVC_STAGE" not in os.environ
    return wanted and Path(".dvc").is_dir() and shutil.which("dvc") is not None


def is_inner() -> bool:
    """Whether the bridge started this Snakemake run itself."""
    return os.environ.get("BLOBPIPE_BRIDGE") == INNER["BLOBPIPE_BRIDGE"]


@cache
def cache_folder() -> Path:
    """Where DVC keeps its objects."""
    return Path(HOME, dvc("cache", "dir").strip(), "files", "md5")


def dvc(*words: str) -> str:
    """Run DVC; what it printed.

    Raises
    ------
    BridgeError
        What it complained about.
    """
    reader = [sys.executable, str(Path(__file__).with_name("dvc_reader.py"))]
    command = ["dvc", "--wait-for-lock"] if Path.cwd() == HOME else reader
    done = subprocess.run([*command, *words], cwd=HOME, check=False, capture_output=True, text=True)
    if done.returncode:
        raise BridgeError(f"dvc {' '.join(words)}: {' '.join(done.stderr.split())}")
    return done.stdout


def snakemake(*words: str) -> subprocess.CompletedProcess[str]:
    """Run Snakemake without the bridge; its output is kept for messages."""
    command = [sys.executable, "-m", "snakemake", "--quiet", "host", "progress", "rules", *words]
    env = {**os.environ, **INNER}
    return subprocess.run(
        command, env=env, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


# ---------------------------------------------------------------- dvc.lock


def entries(lock: str | None = None) -> dict[str, dict[str, Any]]:
    """What dvc.lock, or its text of another time, says of each stage."""
    if lock is None:
        lock = text_of(LOCK) if LOCK.exists() else ""
    return entries_of(lock, str(LOCK)) if lock.strip() else {}


def versions() -> dict[str, str]:
    """Digest of each stage's entry in dvc.lock."""
    return {
        name: hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()
        for name, entry in entries().items()
    }


def refuse_damaged(names: Iterable[str]) -> None:
    """Compare what stages made, in DVC's cache, with its checksums: once for each version.

    DVC trusts what it has once stored. A fault of the disk would reach the stage that reads the file, which may fail, or take
    half a table for a whole one.

    Raises
    ------
    BridgeError
        One line that names the file, its object in the cache, and the ways out.
    """
    seen: dict[str, str] = (
        json.loads(CHECKED.read_text(encoding="utf-8")) if CHECKED.exists() else {}
    )
    now = {
        name: version
        for name, version in versions().items()
        if name in names and seen.get(name) != version
    }
    found = [
        fault for name in now for out in entries()[name].get("outs", ()) for fault in _damaged(out)
    ]
    if found:
        path, copy = found[0]
        raise BridgeError(
            f"{path}: DVC's cache holds a damaged copy of it, {copy} ({len(found)} such); 'rm -f {copy} {path}', then "
            "'dvc pull' to fetch it again, or the same command as now to make it anew"
        )
    if now:
        replace(CHECKED, json.dumps(seen | now))


def cached(digest: str) -> Path:
    """Where DVC's cache has an object, or would have it."""
    return cache_folder() / digest[:2] / digest[2:]


def _damaged(out: dict[str, Any]) -> Iterator[tuple[str, Path]]:
    copy = cached(out["md5"])
    if not copy.exists():
        return  # DVC says so itself
    content = copy.read_bytes()
    if hashlib.md5(content).hexdigest() != out["md5"].removesuffix(".dir"):
        yield out["path"], copy
    elif out["md5"].endswith(".dir"):
        for item in json.loads(content):
            yield from _damaged({"path": f"{out['path']}/{item['relpath']}", "md5": item["md5"]})


# ---------------------------------------------------------------- notes for Snakemake


def stamp(target: str) -> str:
    """What the commit of a stage, or of a pointer file, leaves for Snakemake: that it was done."""
    return str(NOTES / f"{Path(target).name}.committed")


def known(name: str) -> dict[str, Any]:
    """What Snakemake knows of a stage: its ``version``, and ``files`` as they were; outlives a commit that failed."""
    path = NOTES / f"{name}.json"
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return content


def note(name: str, version: str, made: Iterable[str]) -> None:
    """Note the version of a stage, and its files, as known."""
    content = {"version": version, "files": look(made)}
    replace(NOTES / f"{name}.json", json.dumps(content))


def look(made: Iterable[str]) -> str:
    """Digest of the names, sizes and dates of all files of a stage."""
    states = sorted(
        (str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in all_files(made)
    )
    return hashlib.sha256(json.dumps(states).encode()).hexdigest()


def made_here(path: str) -> bool:
    """Whether a file is the one that Snakemake's own record in this folder is about: it was made by a job that ended here."""
    try:
        ended = json.loads(_record("metadata", path).read_text(encoding="utf-8"))["endtime"]
    except (OSError, ValueError, KeyError, TypeError):
        return False  # no record, or none that can be read: made anew, which is safe
    return bool(
        ended == Path(path).lstat().st_mtime
    )  # of a link (in a plan) its own, as Snakemake has it


def is_unfinished(path: str) -> bool:
    """Return whether a job that makes a file was begun and has not ended."""
    return _record("incomplete", path).exists()


def _record(kind: str, path: str) -> Path:
    """Return where Snakemake keeps a record of a file."""
    return Path(".snakemake", kind, urlsafe_b64encode(path.encode()).decode())


# ---------------------------------------------------------------- files


def existing(paths: Iterable[str]) -> list[str]:
    """Those of some paths that are there."""
    return [path for path in paths if Path(path).exists()]


def all_files(outs: Iterable[str]) -> Iterator[Path]:
    """Every file of some files and folders."""
    for out in map(Path, outs):
        yield from (path for path in (out.rglob("*") if out.is_dir() else [out]) if path.is_file())


def replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def listed_images(table: Path) -> Iterator[str]:
    """The frames of which a table has an image: in the stages' tables those with a checksum."""
    with open(table, encoding="utf-8", newline="") as file:
        yield from (row["frame"] for row in csv.DictReader(file) if row.get("sha256", "listed"))
