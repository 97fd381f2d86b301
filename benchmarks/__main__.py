"""``python -m benchmarks``: measure, print a table, write ``benchmarks/results.json`` and ``docs/img/speed.png``."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

from benchmarks.measure import ROOT, Part, Watch, progress
from blobpipe.cli.run import rest_idle_threads

# In the order in which they run. The functions are found when they are called: `--help` imports nothing heavy.
PARTS = {
    "startup": ("startup", "startup"),
    "scan": ("scanning", "scan"),
    "train": ("network", "train"),
    "infer": ("network", "infer"),
    "render": ("images", "rendering"),
    "clip": ("images", "clipping"),
    "median": ("images", "median"),
    "roofline": ("network", "roofline"),
    "recipe": ("network", "recipe"),
    "gpu": ("network", "gpu"),
}


def main(argv: list[str] | None = None) -> int:
    """Exit status 1 if a part failed; that a target was missed is a result, not a failure."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING)
    warnings.simplefilter("ignore")
    rest_idle_threads()  # plain PyTorch is as fast with it
    from benchmarks import machine, material, report

    size = material.QUICK if args.quick else material.FULL
    parts = {}
    for i, name in enumerate(args.only or PARTS):
        progress(f"{name} ({i + 1} of {len(args.only or PARTS)}) ...")
        parts[name] = _measured(name, size)
        progress("")
        print(report.table(name, parts[name]), flush=True)
    content = report.to_json(parts, machine.describe(), quick=args.quick)
    print(
        f"{content['seconds']:.0f} s on {content['machine']['cpu']}, {content['machine']['cores']} cores"
    )
    if args.out:
        _write(parts, content, args.out / "results.json", args.out / "speed.png")
    elif not (args.quick or args.only):
        _write(
            parts,
            content,
            ROOT / "benchmarks" / "results.json",
            ROOT / "docs" / "img" / "speed.png",
        )
    else:
        print("Not the whole: nothing written (--out says where to).")
    return int(any(part.title == FAILED for part in parts.values()))


FAILED = "failed"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=(__doc__ or "").split(": ", 1)[1]
    )
    parser.add_argument(
        "--quick", action="store_true", help="as little as shows that everything works"
    )
    parser.add_argument(
        "--only", nargs="+", choices=list(PARTS), metavar="NAME", help=f"of {', '.join(PARTS)}"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for results.json and speed.png"
    )
    return parser


def _measured(name: str, size: object) -> Part:
    """A part, or what went wrong with it: the others go on."""
    from importlib import import_module

    module, function = PARTS[name]
    watch = Watch()
    try:
        work: Callable[[object], Part] = getattr(import_module(f"benchmarks.{module}"), function)
        part = work(size)
    except Exception as error:
        traceback.print_exc()
        part = Part(FAILED, remarks=[" ".join(f"{type(error).__name__}: {error}".split())[:200]])
    watch.stop(part)
    return part


def _write(parts: dict[str, Part], content: dict[str, object], results: Path, figure: Path) -> None:
    from benchmarks import report

    report.write_json(results, content)
    report.draw(figure, parts)
    print(f"written: {os.path.relpath(results)}, {os.path.relpath(figure)}")


if __name__ == "__main__":
    sys.exit(main())
