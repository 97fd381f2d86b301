"""What the benchmarks measured: ``benchmarks/results.json`` and ``benchmarks/peers.csv`` as the documentation shows them.

``{timed} PART`` is the table of a part, the role of the same name (``part figure``) one of its numbers with its unit,
``{timed-machine}`` says which machine it was, and ``{timed-figure}`` shows ``img/speed.png`` if there is one. ``{peers}`` is
the table of recall of all detectors, with ``img/peers.png`` if there is one.
"""

from __future__ import annotations

import csv
import json
from typing import Any

from docutils import nodes
from measured import ROOT, UNKNOWN
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective, SphinxRole

RESULTS = ROOT / "benchmarks" / "results.json"
FIGURE = ROOT / "docs" / "img" / "speed.png"
PEERS = ROOT / "benchmarks" / "peers.csv"
PEERS_FIGURE = ROOT / "docs" / "img" / "peers.png"

# What the detectors of peers.csv are called
PEER_NAMES = {
    "sep": "SEP",
    "daofind": "DAOStarFinder",
    "segmentation": "image segmentation",
    "matched_filter": "matched filter",
    "whitened": "the same, whitened",
    "report": "report's network",
    "dense": "blobpipe",
}


def results() -> dict[str, Any]:
    """The whole file; without one, no parts."""
    if not RESULTS.exists():
        return {"parts": {}}
    content: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return content


def number(part: str, name: str) -> str:
    """Median and unit of a figure."""
    try:
        return _text(results()["parts"][part]["figures"][name])
    except KeyError:
        return UNKNOWN


def _text(figure: dict[str, Any]) -> str:
    unit = "" if figure["unit"] == "of 1" else f" {figure['unit']}"
    return f"{_short(figure['median'])}{unit}".rstrip()


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def table(part: str) -> str:
    """A part as a Markdown table, its remarks below."""
    found = results()["parts"].get(part)
    if not found:
        return f"*{UNKNOWN}*"
    rows = ["| | median | quartiles | repetitions | target |", "|---|---:|---:|---:|---|"]
    for figure in found["figures"].values():
        spread = f"{_short(figure['low'])} to {_short(figure['high'])}" if figure["n"] > 1 else ""
        rows.append(
            f"| {figure['what']} | {_text(figure)} | {spread} | {figure['n']} | {_target(figure)} |"
        )
    remarks = [*found["remarks"], *_noise(found.get("others_frac"))]
    return "\n".join(
        [*(rows if found["figures"] else []), "", *(f"{remark}\n" for remark in remarks)]
    )


def _target(figure: dict[str, Any]) -> str:
    if "reached" not in figure:
        return ""
    words, value = (
        ("at least", figure["at_least"]) if "at_least" in figure else ("at most", figure["at_most"])
    )
    return f"{words} {value:g}: {'reached' if figure['reached'] else '**not reached**'}"


def _noise(others_frac: float | None) -> list[str]:
    if others_frac is None or others_frac < 0.05:
        return []
    return [
        f"Other programs took {others_frac:.0%} of the cores' time meanwhile: not a quiet machine."
    ]


def machine() -> str:
    """Processor and versions, in words."""
    found = results().get("machine")
    if not found:
        return f"*{UNKNOWN}*"
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    gpu = f", {found['gpu']}" if found.get("gpu") else ""
    return (
        f"{found['cpu']}, {found['cores']} cores, {found['memory_gib']} GiB{gpu}, {found['system']}; "
        f"Python {found['python']}, {versions}."
    )


def peers() -> str:
    """Return recall by kind of frame and detector as a Markdown table, the times in its last row."""
    if not PEERS.exists():
        return f"*{UNKNOWN}*"
    with PEERS.open(encoding="utf-8", newline="") as file:
        found = {(row["kind"], row["detector"]): row for row in csv.DictReader(file)}
    kinds = list(dict.fromkeys(kind for kind, _ in found))
    names = list(dict.fromkeys(name for _, name in found))
    lines = [
        f"| | {' | '.join(PEER_NAMES[name] for name in names)} |",
        f"|---|{'---|' * len(names)}",
    ]
    for kind in kinds:
        cells = [_recalls(found[kind, name]) for name in names]
        lines.append(f"| `{kind}` | {' | '.join(cells)} |")
    times = [f"{float(found[kinds[-1], name]['ms_per_frame']):.0f}" for name in names]
    lines.append(f"| ms per frame | {' | '.join(times)} |")
    return "\n".join(lines)


def _recalls(row: dict[str, str]) -> str:
    recalls = (float(value) for key, value in row.items() if key.startswith("recall_at_"))
    return " ".join(f"{recall:.2f}" for recall in recalls)


class Timed(SphinxDirective):
    """The table of a part."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        self.env.note_dependency(str(RESULTS))
        return self.parse_text_to_nodes(table(self.arguments[0]))


class TimedMachine(SphinxDirective):
    """Which machine."""

    def run(self) -> list[nodes.Node]:
        self.env.note_dependency(str(RESULTS))
        return self.parse_text_to_nodes(machine())


class TimedFigure(SphinxDirective):
    """The figure of all ratios, where there is one."""

    def run(self) -> list[nodes.Node]:
        self.env.note_dependency(str(FIGURE))
        if not FIGURE.exists():
            return []
        return self.parse_text_to_nodes(
            "![How many times as fast as other ways, with targets](img/speed.png)"
        )


class Peers(SphinxDirective):
    """The table of recall of all detectors, and its figure."""

    def run(self) -> list[nodes.Node]:
        self.env.note_dependency(str(PEERS))
        self.env.note_dependency(str(PEERS_FIGURE))
        text = peers()
        if PEERS_FIGURE.exists():
            text += "\n\n![Recall of each detector on each kind of frame](img/peers.png)"
        return self.parse_text_to_nodes(text)


class TimedNumber(SphinxRole):
    """One number."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        self.env.note_dependency(str(RESULTS))
        text = number(*self.text.split())
        return [nodes.emphasis(text, text) if text == UNKNOWN else nodes.strong(text, text)], []


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directives and the role."""
    app.add_directive("timed", Timed)
    app.add_directive("timed-machine", TimedMachine)
    app.add_directive("timed-figure", TimedFigure)
    app.add_directive("peers", Peers)
    app.add_role("timed", TimedNumber())
    return {"parallel_read_safe": True, "parallel_write_safe": True}
