"""Write the first page of a run's report: the verdict, its numbers beside the report's, six figures, what has changed."""

from __future__ import annotations

import json
import math
import re
import subprocess
from base64 import b64encode
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import yaml

from blobpipe import __version__
from blobpipe.core import files
from blobpipe.core.metrics import wilson_interval
from blobpipe.errors import BlobpipeError
from blobpipe.params import Params, read_yaml
from blobpipe.validation import gate

# Stages that write a metrics.json, in order
MEASURED = ("train", "dense", "detect", "evaluate", "regression", "completeness")

# Metrics that are times, which differ between any two runs
TIMES = ("seconds", "samples_per_s")


class Number(NamedTuple):
    """Name a row of the table, and where its value, its interval and the report's value are found.

    Attributes
    ----------
    text : str
        ``{budget}`` stands for the dense network's budget of false alarms on 100 images.
    isr : str
        The report's value, empty if it gives none.
    values : tuple of str
        For the report's network, the dense network and the matched filter, ``stage metric``; empty for none. The
        interval is ``metric_interval`` beside it or ``interval.metric``.
    """

    text: str
    isr: str
    values: tuple[str, str, str]


NUMBERS = (
    Number(
        "True-positive rate, subframes with superimposed blobs",
        "0.94",
        ("evaluate tpr", "evaluate dense.tpr", "evaluate matched_filter.tpr"),
    ),
    Number(
        "True-negative rate",
        "0.88",
        ("evaluate tnr", "evaluate dense.tnr", "evaluate matched_filter.tnr"),
    ),
    Number(
        "Recall of new blobs on whole images, S/N above 7, each network at its own threshold",
        "",
        ("regression recall_snr_gt_7", "regression dense_recall_snr_gt_7", ""),
    ),
    Number(
        "The same, all at the dense network's budget of false alarms",
        "",
        (
            "regression report_recall_snr_gt_7",
            "regression dense_recall_snr_gt_7",
            "regression matched_filter_recall_snr_gt_7",
        ),
    ),
    Number(
        "False alarms per 100 images, measured; the budget is {budget:g}",
        "",
        (
            "regression report_false_alarms_per_100_frames",
            "regression dense_false_alarms_per_100_frames",
            "regression matched_filter_false_alarms_per_100_frames",
        ),
    ),
    Number(
        "False alarms per image at the report's threshold",
        "about 2",
        ("regression false_alarms_per_frame", "", ""),
    ),
    Number("Training (s)", "14,400", ("train seconds", "dense seconds", "")),
)

# Shares whose interval follows from how many they are of
COUNTS = {"regression recall_snr_gt_7": "n_blobs_snr_gt_7"}

# Figures, and what each shows
FIGURES = {
    "regression/detectors.png": "Share of the new blobs found on whole images, by signal-to-noise ratio, with every "
    "detector at a threshold set on other images; the legend gives its false alarms on these.",
    "regression/dense_cases.png": "New blobs that the dense network finds and misses, by strength, depth and size.",
    "completeness/completeness.png": "Share of injected blobs found, by radius and depth.",
    "evaluate/roc.png": "Subframes with superimposed blobs: true-positive against false-positive rate over all thresholds.",
    "evaluate/saliency.png": "Pixels that decided for “blob” in the report's network, for right and wrong cases.",
    "detect/reliability.png": "Share of the candidates that are new blobs, by the probability that was given for them.",
}

# Size of a stage in the drawing of the stages, and the distance to the next (px)
BOX = (118, 34)
STEP = (146, 58)
GAP = STEP[0] - BOX[0]

STYLE = """
:root { color-scheme: light dark; --page: #fafaf8; --field: #fff; --text: #1c1f23; --quiet: #565d66; --line: #d9dcdf;
  --accent: #0b5a9d; --good: #00674a; --bad: #b34700; --edge: #1c1f2366; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --field: #1c2024; --text: #e4e6e8; --quiet: #a3abb4;
  --line: #363c43; --accent: #82bdf2; --good: #5fd0a8; --bad: #ff9d57; --edge: #e4e6e866; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 0 1.25rem 2rem; background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, "Segoe UI", "Noto Sans", "DejaVu Sans", sans-serif; }
a { color: var(--accent); }
h1 { margin: 1.4rem 0 0.5rem; font-size: 1.5rem; font-weight: 600; }
h2 { margin: 2rem 0 0.5rem; font-size: 1.15rem; font-weight: 600; }
h3 { margin: 1rem 0 0.25rem; font-size: 1rem; font-weight: 600; }
td { white-space: nowrap; }
p { max-width: 44rem; }
.verdict { max-width: none; padding: 0.6rem 0.9rem; border-left: 4px solid var(--good); background: var(--field); font-size: 1.1rem; }
.verdict.failed { border-color: var(--bad); }
/* The shade at an edge says that the table goes on there; what scrolls with the table covers it at the end. */
.wide { width: fit-content; max-width: 100%; overflow-x: auto;
  background:
    linear-gradient(to right, var(--field) 40%, transparent) left / 3rem 100% no-repeat local,
    linear-gradient(to left, var(--field) 40%, transparent) right / 3rem 100% no-repeat local,
    linear-gradient(to right, var(--edge), transparent) left / 1rem 100% no-repeat scroll,
    linear-gradient(to left, var(--edge), transparent) right / 1rem 100% no-repeat scroll,
    var(--field); }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.35rem 0.7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
thead th { color: var(--quiet); font-weight: 500; white-space: nowrap; }
tbody th { font-weight: 500; min-width: 10rem; }
.quiet, figcaption { color: var(--quiet); font-size: 0.875rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(30rem, 100%), 1fr)); gap: 1.5rem 2rem; }
figure { margin: 0; }
figcaption { margin-top: 0.4rem; }
img { display: block; width: 100%; height: auto; border-radius: 3px; background: #fff; }
svg { min-width: 72rem; max-width: 100%; height: auto; }
@media (max-width: 40rem) { td, thead th { white-space: normal; } .interval { display: block; white-space: nowrap; } }
svg rect { fill: var(--field); stroke: var(--quiet); }
svg text { fill: var(--text); font-size: 13px; text-anchor: middle; }
svg path { fill: none; stroke: var(--quiet); }
svg marker path { fill: var(--quiet); stroke: none; }
"""


def write_report(
    results: Path, out: Path, params: Params, *, pipeline: Path, stages: str, revision: str = "HEAD"
) -> list[str]:
    """Write the first page of the report as one HTML file.

    Parameters
    ----------
    results : path
        Folder of the stages' results.
    out : path
        HTML file to write.
    params : Params
        Settings in force, with the thresholds of the gate.
    pipeline : path
        ``dvc.yaml``, whose stages are drawn; if it does not exist, they are not. ``dvc.lock`` beside it tells whether
        the results were made with the settings in force.
    stages : str
        Name of Snakemake's own report in the folder of ``out``.
    revision : str
        Commit with which the run is compared.

    Returns
    -------
    list of str
        Thresholds of the gate that are not met; or why the results are not of these settings.

    Raises
    ------
    BlobpipeError
        If there is no regression run, or its metrics, ``dvc.yaml`` or ``dvc.lock`` cannot be read.
    """
    path = results / "regression" / "metrics.json"
    failed = gate.check_gate(path, params.regression)
    others = gate.unlike_record(pipeline.with_suffix(".lock"), path, params)
    metrics = {stage: _read_metrics(results / stage / "metrics.json") for stage in MEASURED}
    parts = [
        _other_settings(others) if others else _verdict(failed, metrics["regression"]),
        "<h2>Beside the report</h2>",
        _numbers(metrics, params.detect.false_alarms_per_100_frames),
        "<h2>Figures</h2>",
        _figures(results),
        f"<h2>Changed since {escape(revision)}</h2>",
        *_changes(results, metrics, revision),
        "<h2>Stages</h2>",
        _drawn_stages(pipeline),
        _links(out.parent, stages),
    ]
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>Report · blobpipe</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        "<h1>What this run finds</h1>\n"
        + "\n".join(parts)
        + f'\n</main>\n<footer><p class="quiet">blobpipe {__version__}</p></footer>\n</body>\n</html>\n'
    )
    with files.atomic(out) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return others or failed


def _read_metrics(path: Path) -> dict[str, Any]:
    """Read the metrics of a stage; an empty table if it has not run."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise BlobpipeError(f"{path}: cannot be read as JSON; run its stage again") from error
    return found if isinstance(found, dict) else {}


# ------------------------------------------------------------------------------------------------------- the verdict


def _verdict(failed: list[str], metrics: dict[str, Any]) -> str:
    """Say whether the regression test passed, and on what."""
    n_cases, n_blobs = (_short(metrics.get(name, 0)) for name in ("n_cases", "n_blobs"))
    cases = f"{n_cases} images that were the first to show {n_blobs} new blobs"
    if not failed:
        return f'<p class="verdict"><strong>Passed</strong> the regression test, on {cases}.</p>'
    lines = "".join(f"<li>{escape(line)}</li>" for line in failed)
    return f'<div class="verdict failed"><strong>Did not pass</strong> the regression test, on {cases}:<ul>{lines}</ul></div>'


def _other_settings(others: list[str]) -> str:
    """Say that the results were made with other settings than those in force, and with which."""
    lines = "".join(f"<li>{escape(line)}</li>" for line in others[1:])
    return (
        '<div class="verdict failed"><strong>No verdict</strong>: the numbers and figures below are not of a run with the '
        f"settings in force. Run the pipeline.<ul>{lines}</ul></div>"
    )


def _numbers(metrics: dict[str, dict[str, Any]], budget: float) -> str:
    """Make the table of the run's rates beside the report's."""
    rows = []
    for number in NUMBERS:
        text = number.text.format(budget=budget)
        cells = "".join(f"<td>{_value(metrics, where)}</td>" for where in number.values)
        rows.append(
            f'<tr><th scope="row">{text}</th><td>{number.isr or gate.NO_VALUE}</td>{cells}</tr>'
        )
    return (
        '<div class="wide"><table><thead><tr><th scope="col"></th><th scope="col">ISR 2021&#8209;08</th>'
        '<th scope="col">Report\'s network</th><th scope="col">Dense network</th>'
        f'<th scope="col">Matched filter</th></tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        '<p class="quiet">In brackets, intervals of 95 %. The report used real images and these are simulated unless '
        "you put in your own, so equal rates do not mean equally hard tests.</p>"
    )


def _value(metrics: dict[str, dict[str, Any]], where: str) -> str:
    """Write a metric with its interval; a dash for none."""
    if not where:
        return gate.NO_VALUE
    stage, name = where.split()
    value = _at(metrics[stage], name)
    if not _is_number(value):
        return gate.NO_VALUE
    interval = _at(metrics[stage], f"{name}_interval") or _at(metrics[stage], f"interval.{name}")
    n = metrics[stage].get(COUNTS.get(where, ""))
    if interval is None and _is_number(n) and n > 0 and 0 <= value <= 1:
        interval = [float(end) for end in wilson_interval(np.array(round(value * n)), np.array(n))]
    if isinstance(interval, list) and len(interval) == 2 and all(map(_is_number, interval)):
        low, high = interval
        return f'{value:.3f} <span class="interval">({low:.3f} to {high:.3f})</span>'
    return f"{value:.3f}" if value < 10 else f"{value:,.0f}"


def _is_number(value: Any) -> TypeGuard[float]:
    """Return whether a metric is a finite number; files that people have edited may hold anything."""
    return isinstance(value, int | float) and math.isfinite(value)


def _at(metrics: Any, name: str) -> Any:
    """Return a metric by its whole name; None if there is none."""
    for key in name.split("."):
        metrics = metrics.get(key) if isinstance(metrics, dict) else None
    return metrics


def _figures(results: Path) -> str:
    """Put the figures that there are into the page, with their captions."""
    shown = []
    for name, caption in FIGURES.items():
        path = results / name
        if path.exists():
            picture = b64encode(path.read_bytes()).decode()
            shown.append(
                f'<figure><img src="data:image/png;base64,{picture}" alt="{escape(caption)}">'
                f"<figcaption>{escape(caption)}</figcaption></figure>"
            )
    return f'<div class="figures">{"".join(shown)}</div>' if shown else "<p>No figure yet.</p>"


# ------------------------------------------------------------------------------------------------------ what changed


def _changes(results: Path, metrics: dict[str, dict[str, Any]], revision: str) -> Iterator[str]:
    """Yield which settings, metrics and cases differ from those of a commit."""
    root = results.parent
    before = {
        stage: _parsed(_at_revision(results / stage / "metrics.json", revision))
        for stage in MEASURED
    }
    if not any(before.values()):
        yield f"<p>Git has no results at {escape(revision)} to compare with.</p>"
        return

    # Settings as they are written
    settings = dict(gate.leaves(_parsed(_at_revision(root / "params.yaml", revision))))
    now = dict(gate.leaves(_parsed(_read_text(root / "params.yaml"))))
    yield _table("Settings", gate.differing(settings, now))

    old = dict(gate.leaves(before))
    new = dict(gate.leaves(metrics))
    times = {name for name in old | new if name.rpartition(".")[2] in TIMES}
    found = [row for row in gate.differing(old, new) if row[0] not in times]
    yield _table("Numbers, without times", found)

    try:
        lines = gate.against(results / "regression" / "cases.csv", revision)
    except BlobpipeError as error:
        lines = [str(error)]
    # an arrow of two characters could be cut at the end of a line
    listed = "".join(f"<li>{escape(line.replace('->', '→'))}</li>" for line in lines)
    yield f"<h3>New blobs won and lost by each network</h3><ul>{listed}</ul>"


def _at_revision(path: Path, revision: str) -> str:
    """Return a file of a commit; empty if git has none."""
    command = ["git", "show", f"{revision}:./{path.name}"]
    try:
        return subprocess.run(
            command, cwd=path.parent, capture_output=True, check=True, text=True
        ).stdout
    except (OSError, subprocess.CalledProcessError, UnicodeDecodeError):
        return ""


def _read_text(path: Path) -> str:
    """Return a file; empty if there is none."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _parsed(text: str) -> Any:
    """Read YAML or JSON; an empty table for anything else."""
    try:
        return yaml.safe_load(text) or {}
    except yaml.YAMLError:
        return {}


def _table(title: str, rows: list[tuple[str, Any, Any]]) -> str:
    """Make a table of what differs."""
    if not rows:
        return f"<h3>{title}</h3><p>None has changed.</p>"
    lines = "".join(
        f'<tr><th scope="row"><code>{_breakable(name)}</code></th><td>{_short(old)}</td><td>{_short(new)}</td></tr>'
        for name, old, new in rows
    )
    head = '<thead><tr><th scope="col"></th><th scope="col">Before</th><th scope="col">Now</th></tr></thead>'
    return f'<h3>{title}</h3><div class="wide"><table>{head}<tbody>{lines}</tbody></table></div>'


def _breakable(name: str) -> str:
    """Write a name so that a narrow page may break it after a dot or an underscore."""
    return re.sub(r"([._])", r"\1<wbr>", escape(name))


def _short(value: Any) -> str:
    """Write a value, of a checksum the first digits."""
    text = str(value)
    return text[:12] if re.fullmatch("[0-9a-f]{64}", text) else escape(text)


# ------------------------------------------------------------------------------------------------------- the stages


def _drawn_stages(pipeline: Path) -> str:
    """Draw which stage uses whose outputs, as SVG; the rules that bring in what DVC has cached are folded into them."""
    if not pipeline.exists():
        return ""
    try:
        return _drawn(read_yaml(pipeline)["stages"])
    except (KeyError, TypeError, AttributeError, StopIteration, RecursionError) as error:
        raise BlobpipeError(
            f"{pipeline}: not a list of stages as DVC reads it; restore it: git checkout {pipeline}"
        ) from error


def _drawn(stages: dict[str, Any]) -> str:
    """Draw stages as SVG; nothing for none."""
    if not stages:
        return ""
    makers = {out: name for name, stage in stages.items() for out in _paths(stage, "outs")}
    needs = {
        name: {makers[path] for path in _paths(stage, "deps") if path in makers} - {name}
        for name, stage in stages.items()
    }

    # A stage stands one column to the right of the last that it needs
    columns: dict[str, int] = {}
    for name in needs:
        columns[name] = _column(name, needs, columns)
    rows: dict[str, int] = {}
    for name, column in columns.items():
        rows[name] = sum(columns[other] == column for other in rows)
    return _svg(needs, columns, rows)


def _paths(stage: dict[str, Any], key: str) -> list[str]:
    """Return the paths of a stage's deps or outs, which may have options."""
    return [next(iter(entry)) if isinstance(entry, dict) else entry for entry in stage.get(key, [])]


def _column(name: str, needs: dict[str, set[str]], columns: dict[str, int]) -> int:
    """Return the longest way from the first stage to this one."""
    if name not in columns:
        columns[name] = 1 + max((_column(each, needs, columns) for each in needs[name]), default=-1)
    return columns[name]


def _svg(needs: dict[str, set[str]], columns: dict[str, int], rows: dict[str, int]) -> str:
    """Draw the stages as boxes, with an arrow from each that another needs, unless a way around says so already."""
    width = STEP[0] * (max(columns.values()) + 1)
    height = STEP[1] * (max(rows.values()) + 1)
    drawn = []
    for name, needed in needs.items():
        x = STEP[0] * columns[name]
        y = STEP[1] * rows[name] + BOX[1] / 2 + 4
        for other in sorted(needed):
            if any(other in _all_needs(between, needs) for between in needed - {other}):
                continue
            x0 = STEP[0] * columns[other] + BOX[0]
            y0 = STEP[1] * rows[other] + BOX[1] / 2 + 4
            way = f"M{x0} {y0}"

            # Past the boxes of other columns, in the gap below the upper row
            if columns[name] - columns[other] > 1:
                lane = STEP[1] * min(rows[name], rows[other]) + 4 + (BOX[1] + STEP[1]) / 2
                x0 += GAP
                way += f"C{x0 - 10} {y0} {x0 - 18} {lane} {x0} {lane}H{x - GAP}"
                x0, y0 = x - GAP, lane
            drawn.append(
                f'<path d="{way}C{x0 + 20} {y0} {x - 20} {y} {x - 4} {y}" marker-end="url(#end)"/>'
            )
    for name in needs:
        x = STEP[0] * columns[name]
        y = STEP[1] * rows[name] + 4
        drawn.append(
            f'<rect x="{x + 0.5}" y="{y}" width="{BOX[0]}" height="{BOX[1]}" rx="4"/>'
            f'<text x="{x + BOX[0] / 2}" y="{y + 22}">{escape(name)}</text>'
        )
    marker = '<defs><marker id="end" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z"/></marker></defs>'
    words = "; ".join(
        f"{name} after {', '.join(sorted(needed))}" for name, needed in needs.items() if needed
    )
    return (
        f'<div class="wide"><svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="Stages: {escape(words)}">{marker}{"".join(drawn)}</svg></div>'
    )


def _all_needs(name: str, needs: dict[str, set[str]]) -> set[str]:
    """Return every stage that one needs, directly or not."""
    found = set(needs[name])
    for other in needs[name]:
        found |= _all_needs(other, needs)
    return found


def _links(folder: Path, stages: str) -> str:
    """Link to what else there is to read."""
    others = {
        stages: "Every figure, table, setting and run time of every stage (Snakemake's report)",
        "regression/cases.html": "Every new blob and every false alarm with its pixels, and why",
    }
    lines = [
        f'<li><a href="{escape(name)}">{text}</a></li>'
        for name, text in others.items()
        if (folder / name).exists()
    ]
    return f"<h2>More</h2><ul>{''.join(lines)}</ul>" if lines else ""
