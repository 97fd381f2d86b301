"""What was measured: numbers of ``results/*/metrics.json``, as the documentation shows them.

Those of the packaged model (stage ``model``) are in a file beside it, whatever has been run since.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
UNKNOWN = "not measured yet"


def metrics_file(stage: str) -> Path:
    """Where a stage leaves its numbers, and the packaged model its own."""
    if stage == "model":
        return ROOT / "src" / "blobpipe" / "model.json"
    return ROOT / "results" / stage / "metrics.json"


def measured(stage: str, key: str) -> str:
    """One number, with its interval if it has one; ``key`` may lead into a section, as in ``matched_filter.tpr``.

    Numbers without a file, or that the file lacks, are "not measured yet"; a share of nothing is "none".
    """
    if not metrics_file(stage).exists():
        return UNKNOWN
    metrics = json.loads(metrics_file(stage).read_text(encoding="utf-8"))
    try:
        value = _pick(metrics, key)
    except KeyError:
        return UNKNOWN
    try:
        low, high = metrics.get(f"{key}_interval") or _pick(metrics.get("interval", {}), key)
        return f"{_text(value)} ({_text(low)} to {_text(high)})"
    except (KeyError, TypeError, ValueError):
        return _text(value)


def _pick(content: dict[str, Any], key: str) -> Any:
    """Follow the dots of a key; keys such as ``tpr_at_fpr_0.01`` hold one themselves."""
    if key in content:
        return content[key]
    head, dot, rest = key.partition(".")
    if not dot or not isinstance(content.get(head), dict):
        raise KeyError(key)
    return _pick(content[head], rest)


def _text(value: Any) -> str:
    match value:
        case None:
            return "none"
        case bool():
            return "yes" if value else "no"
        case float() if abs(value) < 10:
            return f"{value:.3f}"
        case float():
            return f"{value:.0f}"
        case _:
            return str(value)


def fill_in(readme: Path) -> None:
    """Put the numbers into a Markdown file: ``<!-- evaluate tpr -->anything<!-- -->`` names one and its place."""
    text = readme.read_text(encoding="utf-8")
    pattern = r"(<!-- (\w+) (\S+) -->).*?(<!-- -->)"
    text = re.sub(
        pattern, lambda found: f"{found[1]}{measured(found[2], found[3])}{found[4]}", text
    )
    readme.write_text(text, encoding="utf-8")
