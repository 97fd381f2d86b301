"""What was measured, as JSON, as a table and as a figure."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.measure import TIMES, Figure, Part

QUIET_FRAC = 0.05  # of the cores' time that other programs may take


def to_json(parts: dict[str, Part], machine: dict[str, Any], *, quick: bool) -> dict[str, Any]:
    """Everything, ready for `json`; figures without a target have none."""
    return {
        "machine": machine,
        "quick": quick,
        "seconds": round(sum(part.seconds for part in parts.values()), 1),
        "parts": {name: _part(part) for name, part in parts.items()},
    }


def _part(part: Part) -> dict[str, Any]:
    figures = {
        name: {
            key: value
            for key, value in (asdict(figure) | {"reached": figure.reached}).items()
            if value is not None
        }
        for name, figure in part.figures.items()
    }
    return asdict(part) | {"figures": figures}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write it, rounded as it is."""
    from blobpipe.core import tables

    tables.write_json(path, json.loads(json.dumps(content)))


def table(name: str, part: Part) -> str:
    """One part as lines of text."""
    lines = [
        f"  {figure.what:<58} {_number(figure):>22}  {_spread(figure):<24} {_target(figure)}".rstrip()
        for figure in part.figures.values()
    ]
    lines += [f"  {remark}" for remark in part.remarks]
    if part.others_frac is not None and part.others_frac > QUIET_FRAC:
        lines.append(
            f"  Not a quiet machine: others took {part.others_frac:.0%} of the cores' time meanwhile."
        )
    return "\n".join([f"{name}: {part.title}", *lines, f"  ({part.seconds:.0f} s)", ""])


def _number(figure: Figure) -> str:
    return (
        f"{figure.median:,.4g} {figure.unit}"
        if figure.median < 1e4
        else f"{figure.median:,.0f} {figure.unit}"
    )


def _spread(figure: Figure) -> str:
    return f"[{figure.low:.4g}, {figure.high:.4g}] n={figure.n}" if figure.n > 1 else ""


def _target(figure: Figure) -> str:
    if figure.reached is None:
        return ""
    target = (
        f"at least {figure.at_least:g}"
        if figure.at_least is not None
        else f"at most {figure.at_most:g}"
    )
    return f"{target}: {'reached' if figure.reached else 'NOT reached'}"


def draw(path: Path, parts: dict[str, Part]) -> None:
    """All ratios of ours to another way as bars, with quartiles and targets."""
    import matplotlib.pyplot as plt

    from blobpipe.core.plotting import BLUE, GREY, ORANGE, save

    bars = ratios(parts)
    if not bars:
        return
    figure, axis = plt.subplots(figsize=(9.5, 0.8 + 0.42 * len(bars)))
    for y, (_, ratio) in enumerate(reversed(bars)):
        axis.barh(y, ratio.median, color=BLUE, height=0.62)
        axis.plot([ratio.low, ratio.high], [y, y], color="black", lw=1.5)
        axis.text(1.04 * max(ratio.high, ratio.median), y, f"{ratio.median:.3g}", va="center")
        if ratio.at_least is not None:
            axis.plot([ratio.at_least] * 2, [y - 0.42, y + 0.42], color=ORANGE, lw=3)
    axis.set_yticks(range(len(bars)), [label for label, _ in reversed(bars)])
    axis.axvline(1, color=GREY, lw=1)
    axis.set(
        xscale="log",
        xlim=(0.8, 2 * max(ratio.high for _, ratio in bars)),
        ylim=(-0.6, len(bars) - 0.4),
    )
    axis.set_xlabel(
        "how many times as fast (ratio of rates of one run); black: quartiles, orange: target"
    )
    axis.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def ratios(parts: dict[str, Part]) -> list[tuple[str, Figure]]:
    """The ratios of rates of blobpipe to another way."""
    return [
        (f"{name}: {figure.what}", figure)
        for name, part in parts.items()
        for key, figure in part.figures.items()
        if figure.unit == TIMES and key.startswith(("ours_over_", "fused_over_"))
    ]
