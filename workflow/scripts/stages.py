"""The pipeline as dvc.yaml declares it: the one place that says what each stage reads, uses and makes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from blobpipe.errors import ParamsError
from blobpipe.params import parse_yaml, text_of

# Folder whose files describe the detectors: one dependency, since DVC cannot remove stages whose paths hold a setting
DETECTORS = "src/blobpipe/detectors"


@dataclass(frozen=True)
class Stage:
    """One entry of dvc.yaml.

    Attributes
    ----------
    entry : str
        The entry itself, as JSON: whatever else it says.
    rules : tuple of str
        The Snakemake rules that make its files.
    deps, outs, metrics : tuple of str
        Paths; metrics, and outs with ``cache: false``, are kept in git, the other outs in DVC's cache.
    settings : tuple of str
        Sections of params.yaml, or single keys (``section.key``).
    timed : bool
        Its metrics hold times of day or rates, on which no two runs agree.
    """

    name: str
    entry: str
    rules: tuple[str, ...]
    deps: tuple[str, ...]
    outs: tuple[str, ...]
    metrics: tuple[str, ...]
    settings: tuple[str, ...]
    timed: bool

    @property
    def code(self) -> list[str]:
        """The modules it imports, and the files of the detectors."""
        return [path for path in self.sources if not path.endswith(".smk")]

    @property
    def sources(self) -> list[str]:
        """The same, and the file of its rules."""
        files = [path for path in self.deps if path.endswith((".py", ".smk"))]
        detectors = Path(DETECTORS).glob("*.yaml") if DETECTORS in self.deps else ()
        return files + sorted(map(str, detectors))

    @property
    def upstream(self) -> list[str]:
        """The stages that make what it reads."""
        return [other.name for other in stages().values() if set(other.made) & set(self.deps)]

    @property
    def made(self) -> list[str]:
        """All paths that it makes."""
        return [*self.outs, *self.metrics]


def entries_of(text: str, path: str) -> dict[str, dict[str, Any]]:
    """The stages that the text of dvc.yaml, or of dvc.lock, lists.

    Raises
    ------
    ParamsError
        One line, if it is no such text.
    """
    content = parsed(text, path)
    found = content.get("stages") if isinstance(content, dict) else content
    if not isinstance(found, dict) or not all(isinstance(entry, dict) for entry in found.values()):
        raise ParamsError(
            f"{path}: found no stages, expected a section 'stages'; take the file back from git"
        )
    return found


@cache
def parsed(text: str, path: str) -> Any:
    """What a file's text in YAML says, not to be changed: every rule asks for the same few, and YAML is slow to parse."""
    return parse_yaml(text, path)


@cache
def stages(path: str = "dvc.yaml") -> dict[str, Stage]:
    """All stages, in the order of dvc.yaml."""
    entries = entries_of(text_of(path), path)
    return {name: _stage(name, entry) for name, entry in entries.items()}


def _stage(name: str, entry: dict[str, Any]) -> Stage:
    return Stage(
        name=name,
        entry=json.dumps(entry, sort_keys=True),
        rules=tuple(rule for rule in _allowed_rules(entry["cmd"]) if not rule.startswith("stage_")),
        deps=_paths(entry, "deps"),
        outs=_paths(entry, "outs", cached=True),
        metrics=_paths(entry, "outs", cached=False) + _paths(entry, "metrics"),
        settings=tuple(entry.get("params", ())),
        timed=bool(entry.get("meta", {}).get("timed")),
    )


def _allowed_rules(cmd: str) -> list[str]:
    return cmd.partition("--allowed-rules")[2].partition(" -- ")[0].split()


def _paths(entry: dict[str, Any], kind: str, *, cached: bool | None = None) -> tuple[str, ...]:
    paths = [{path: {}} if isinstance(path, str) else path for path in entry.get(kind, ())]
    wanted = [
        path for path in paths if cached in (None, next(iter(path.values())).get("cache", True))
    ]
    return tuple(next(iter(path)) for path in wanted)


def settings(name: str, params: str = "params.yaml") -> str:
    """The values, as JSON, of the settings that a stage uses."""
    return settings_of(*stages()[name].settings, params=params)


def settings_of(*keys: str, params: str = "params.yaml") -> str:
    """The values, as JSON, of some sections or keys; the same whatever their order in the file."""
    values = parsed(text_of(params), params)
    return json.dumps({key: _pick(values, key) for key in keys}, sort_keys=True)


def _pick(values: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values
