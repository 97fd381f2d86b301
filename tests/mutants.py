"""Change the code at random places and ask the tests whether they notice: ``make mutants MUTANTS=200 SEED=1``.

The mutations are cosmic-ray's. A site is a place of the source where one of `OPERATORS` applies; sites are drawn evenly over
the modules, and for each one of its mutations. The tests of the module itself are run, the quickest first, up to the first
that fails. Each mutant runs in a fork of this process, in which the large libraries are loaded already; the mutated source
never touches the disk. Numba's cache is used only where it cannot hide the mutation. Processes that tests start import the
module unchanged: the count of what is noticed is a lower bound.
"""

from __future__ import annotations

import argparse
import ast
import importlib.machinery
import importlib.util
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cosmic_ray.plugins
import pytest
from cosmic_ray.ast import Visitor, get_ast
from cosmic_ray.mutating import mutate_code

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "blobpipe"
MODULES = (
    *("detection.fit", "detection.vet", "detection.detect", "detection.search", "detection.score"),
    "detection.operating_point",
    *("images.difference", "images.stack", "images.pattern", "images.register"),
    "simulation.render",
    *("quicklook.search", "quicklook.processing", "quicklook.findings", "quicklook.candidates"),
    *("quicklook.versions", "quicklook.running_stack"),
    *("monitor.catalogue", "monitor.export", "monitor.bad_pixel_table", "monitor.delivery"),
)
TESTS = {  # beside those that bear the module's name
    "detection.vet": ("unit/detection/test_fit.py",),
    "images.stack": ("unit/images/test_difference.py",),
    "images.pattern": ("unit/images/test_difference.py",),
    "images.register": ("unit/images/test_difference.py",),
    "detection.search": ("unit/detection/test_detect.py",),
    "detection.operating_point": ("unit/detection/test_detect.py",),
    "quicklook.search": ("unit/quicklook/test_candidates.py",),
    "quicklook.findings": ("unit/quicklook/test_candidates.py",),
    "quicklook.processing": ("unit/quicklook/test_arrivals.py",),
    "quicklook.running_stack": ("unit/quicklook/test_search.py",),
    "monitor.export": ("unit/monitor/test_bad_pixel_table.py",),
    "monitor.bad_pixel_table": ("unit/monitor/test_export.py",),
}
WARM = (
    *("astropy.io.fits", "bottleneck", "matplotlib.pyplot", "numba", "pandas"),
    *(
        "photutils.detection",
        "pydantic",
        "scipy.ndimage",
        "scipy.optimize",
        "skimage.registration",
        "torch",
    ),
)
LONGER = 3.0  # times the time of all tests, and
SPARE_S = 60.0  # more, before a mutant counts as noticed for not ending
MEMORY = 12 << 30  # bytes; more than any test takes

# For each operator those that compute another value of the same type: of `+` and `<<` any test would notice the error.
BINARY = (
    *("Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "FloorDiv_Mul", "Mod_Add", "Pow_Mul"),
    *("BitAnd_BitOr", "BitOr_BitAnd", "BitXor_BitAnd", "RShift_LShift", "LShift_RShift"),
)
COMPARISON = (
    *("Eq_NotEq", "NotEq_Eq", "Lt_Gt", "Lt_GtE", "Lt_LtE", "LtE_GtE", "LtE_Gt", "LtE_Lt"),
    *("Gt_Lt", "Gt_LtE", "Gt_GtE", "GtE_LtE", "GtE_Lt", "GtE_Gt", "Is_IsNot", "IsNot_Is"),
)
OPERATORS = (
    *(f"core/ReplaceBinaryOperator_{name}" for name in BINARY),
    *(f"core/ReplaceComparisonOperator_{name}" for name in COMPARISON),
    *("core/ReplaceUnaryOperator_USub_UAdd", "core/ReplaceUnaryOperator_Delete_Not", "core/AddNot"),
    *(
        "core/ReplaceTrueWithFalse",
        "core/ReplaceFalseWithTrue",
        "core/ReplaceAndWithOr",
        "core/ReplaceOrWithAnd",
    ),
    *("core/ReplaceBreakWithContinue", "core/ReplaceContinueWithBreak", "core/NumberReplacer"),
    *("core/ExceptionReplacer", "core/ZeroIterationForLoop"),
)


class Mutation(NamedTuple):
    """One change: the ``occurrence``-th place of the module at which ``operator`` applies."""

    module: str
    line: int
    column: int
    operator: str
    occurrence: int


def _path(module: str) -> Path:
    return SOURCE / f"{module.replace('.', '/')}.py"


class _Sites(Visitor):
    """Collects all mutations of a module in one walk."""

    def __init__(self, module: str) -> None:
        self.module, self.found, self.seen = module, list[Mutation](), Counter[str]()
        self.operators = {name: cosmic_ray.plugins.get_operator(name)() for name in OPERATORS}

    def visit(self, node: Any) -> Any:
        for name, operator in self.operators.items():
            for (line, column), _ in operator.mutation_positions(node):
                self.found.append(Mutation(self.module, line, column, name, self.seen[name]))
                self.seen[name] += 1
        return node


def sites(module: str) -> list[list[Mutation]]:
    """The mutations of a module, those of one place together."""
    source = _path(module).read_text()
    walk = _Sites(module)
    walk.walk(get_ast(source))
    spans = list(_dull(ast.parse(source)))
    at: dict[tuple[int, int], list[Mutation]] = {}
    for mutation in walk.found:
        place = (mutation.line, mutation.column)
        if not any(start <= place < end for start, end in spans):
            at.setdefault(place, []).append(mutation)
    return [at[place] for place in sorted(at)]


def _dull(tree: ast.AST) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Where a mutation changes no result: annotations, decorators (they make fast), log texts, progress bars, `strict`."""
    for node in ast.walk(tree):
        dull: list[ast.AST | None] = []
        if isinstance(node, ast.arg | ast.AnnAssign):
            dull = [node.annotation]
        elif isinstance(node, ast.FunctionDef):
            dull = [node.returns, *node.decorator_list]
        elif isinstance(node, ast.ClassDef):
            dull = list(node.decorator_list)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            dull = [node]
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            dull = [word.value for word in node.keywords if word.arg == "strict"]
            dull += [node] if called.startswith("log.") else []
            dull += (
                node.args[1:] + [word.value for word in node.keywords] if called == "tqdm" else []
            )
        for part in dull:
            if part is not None:
                yield (part.lineno, part.col_offset), (part.end_lineno, part.end_col_offset)  # type: ignore[attr-defined]


def draw(count: int, seed: int, modules: tuple[str, ...] = MODULES) -> list[Mutation]:
    """So many mutations, no two of one place, in order of modules and lines."""
    everywhere = [site for module in modules for site in sites(module)]
    rng = random.Random(seed)
    chosen = sorted(rng.sample(range(len(everywhere)), min(count, len(everywhere))))
    return [rng.choice(everywhere[k]) for k in chosen]


class _Mutated(importlib.machinery.SourceFileLoader):
    """Loads one module from a changed source, and finds it, before all others do."""

    def __init__(self, module: str, source: str) -> None:
        super().__init__(f"blobpipe.{module}", str(_path(module)))
        self.source = source

    def get_code(self, fullname: str) -> Any:
        return compile(self.source, self.path, "exec", dont_inherit=True)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return (
            importlib.util.spec_from_file_location(name, self.path, loader=self)
            if name == self.name
            else None
        )


class _Quickest:
    """Runs the quickest tests first, and notes how long each takes."""

    def __init__(self, took_s: dict[str, float]) -> None:
        self.took_s, self.now_s = took_s, Counter[str]()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: self.took_s.get(item.nodeid, 0.0))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.now_s[report.nodeid] += report.duration


def _tests(module: str) -> list[str]:
    room, name = module.split(".")
    named = (f"unit/{room}/test_{name}.py", f"property/test_{name}_laws.py", *TESTS.get(module, ()))
    return [f"tests/{name}" for name in named if (ROOT / "tests" / name).exists()]


def _compiled(tree: ast.Module, line: int) -> bool:
    """Whether a line may be part of compiled code: it lies in a compiled function, or outside all functions."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.lineno <= line <= (
            node.end_lineno or line
        ):
            return any("njit" in ast.unparse(decorator) for decorator in node.decorator_list)
    return True


def _test(
    module: str, source: str, fresh: bool, took_s: dict[str, float], folder: Path, shared: Path
) -> None:
    """Run the tests of a module, in a process of its own; its exit status is that of pytest."""
    output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.setpgid(0, 0)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.environ |= {"TMPDIR": str(folder), "HYPOTHESIS_PROFILE": "mutants"}
    tempfile.tempdir = None
    if fresh:
        import numba

        os.environ["NUMBA_CACHE_DIR"] = numba.config.CACHE_DIR = str(folder / "numba")
    # As one of several workers, for whom the simulated campaign is made but once; no module under test takes part in it.
    os.environ["PYTEST_XDIST_WORKER"] = "gw0"
    (folder / "shared").mkdir()
    if (shared / "campaign").exists():
        (folder / "shared" / "campaign").symlink_to(shared / "campaign")
    sys.meta_path.insert(0, _Mutated(module, source))
    order = _Quickest(took_s)
    options = ["-q", "-x", "-m", "not long", "-p", "no:cacheprovider", f"--basetemp={folder}/base"]
    status = pytest.main([*options, *_tests(module)], plugins=[order])
    (folder / "took.json").write_text(json.dumps(order.now_s))
    os._exit(status)


def _in_fork(*args: Any, limit_s: float) -> int:
    """Exit status of `_test`; -1 if it has not ended in time."""
    child = os.fork()
    if child == 0:
        try:
            _test(*args)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(99)
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -1


def _changed(before: str, after: str) -> Iterator[str]:
    for old, new in zip(before.splitlines(), after.splitlines(), strict=False):
        if old != new:
            yield from (f"    - {old.strip()}", f"    + {new.strip()}")
            return


def main() -> None:
    """Draw mutations, test each, print what the tests did not notice."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--count", type=int, default=200, help="mutations drawn (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--modules", nargs="+", default=MODULES, choices=MODULES, metavar="MODULE")
    parser.add_argument(
        "--numbers", nargs="+", type=int, metavar="N", help="only these of those drawn"
    )
    options = parser.parse_args()
    os.chdir(ROOT)
    for name in WARM:
        importlib.import_module(name)
    mutations = draw(options.count, options.seed, tuple(options.modules))
    drawn = Counter[str]()
    noticed = Counter[str]()
    took_s: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="mutants-") as work:
        for number, mutation in enumerate(mutations):
            if options.numbers and number not in options.numbers:
                continue
            module = mutation.module
            source = _path(module).read_text()
            if module not in took_s:
                took_s[module] = _unchanged(module, source, Path(work))
            mutated = mutate_code(
                source, cosmic_ray.plugins.get_operator(mutation.operator)(), mutation.occurrence
            )
            folder = Path(work) / str(number)
            folder.mkdir()
            fresh = _compiled(ast.parse(source), mutation.line)
            limit_s = LONGER * sum(took_s[module].values()) + SPARE_S
            status = _in_fork(
                module,
                mutated,
                fresh,
                took_s[module],
                folder,
                Path(work) / "shared",
                limit_s=limit_s,
            )
            shutil.rmtree(folder)
            drawn[module] += 1
            noticed[module] += status != 0
            said = "SURVIVED" if status == 0 else "too long" if status == -1 else "noticed"
            print(
                f"{number:4d} {said} {module}:{mutation.line} {mutation.operator.removeprefix('core/')}"
            )
            print(*_changed(source, mutated), sep="\n", flush=True)
    for module in drawn:
        print(f"{module:20s} {noticed[module]:3d} of {drawn[module]:3d} noticed")
    print(f"{'all':20s} {noticed.total():3d} of {drawn.total():3d} noticed, seed {options.seed}")


def _unchanged(module: str, source: str, work: Path) -> dict[str, float]:
    """Seconds that each test takes without a mutation; the campaign that they make is kept."""
    folder = work / module
    folder.mkdir()
    if _in_fork(module, source, False, {}, folder, work / "shared", limit_s=3600):
        sys.exit(
            f"{module}: its tests fail without a mutation\n{(folder / 'output.txt').read_text()[-3000:]}"
        )
    if (folder / "shared" / "campaign").exists() and not (work / "shared" / "campaign").exists():
        (work / "shared").mkdir(exist_ok=True)
        (folder / "shared" / "campaign").rename(work / "shared" / "campaign")
    return dict(json.loads((folder / "took.json").read_text()))


if __name__ == "__main__":
    main()
