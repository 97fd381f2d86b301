"""The order in which an image meets the modules: no import points back, and no light module pulls in a heavy one."""

from __future__ import annotations

import ast
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "blobpipe"
ORDER = (
    "__init__",
    "errors",
    "threads",
    "params",
    "hdus",
    "unpack",
    "frames",
    "figures",
    "check",
    "statistics",
    "profiles",
    "campaign",
    "archive",
    "flatten",
    "difference",
    "measure",
    "normalize",
    "clutter",
    "render",
    "tiles",
    "stamps",
    "cutout",
    "augment",
    "render_gpu",
    "fused",
    "fused_gpu",
    "networks",
    "training",
    "saliency",
    "baselines",
    "verdict",
    "dense",
    "detect",
    "evaluation",
    "regression",
    "casebook",
    "completeness",
    "autoencoder",
    "explore_figures",
    "explore",
    "scan",
    "store",
    "health",
    "deliver",
    "notify",
    "inbox",
    "stacks",
    "pictures",
    "quicklook",
    "catalogue",
    "doctor",
    "handover",
    "graphs",
    "pages",
    "serve",
    "cli",
    "__main__",
)
NETWORK_MODULES = (
    "render_gpu",
    "fused",
    "fused_gpu",
    "networks",
    "training",
    "saliency",
    "dense",
    "detect",
    "evaluation",
    "regression",
    "casebook",
    "completeness",
    "autoencoder",
    "explore",
    "scan",
    "quicklook",
)
ARRAY_MODULES = [name for name in ORDER[: ORDER.index("render_gpu")] if name not in ("check", "figures")] + [
    "baselines"
]
HEAVY = ("torch", "pandas", "astropy", "matplotlib", "numba", "scipy", "skimage", "photutils", "ginga", "numpy")


def imported(module: str) -> set[str]:
    """Everything that a module imports, anywhere in it; of blobpipe, ``blobpipe.name``."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((SOURCE / f"{module}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_the_list_holds_every_module() -> None:
    assert {path.stem for path in SOURCE.glob("*.py")} == set(ORDER)


def test_contributors_are_told_the_same_order() -> None:
    text = (SOURCE.parents[1] / "CONTRIBUTING.md").read_text()
    listed = text.partition("in the order in which an image meets them")[2].partition("Imports")[0]
    named = re.sub(r"\([^)]*\)", "", listed).split("`")[1::2]
    assert named == [name for name in ORDER if not name.startswith("__")]


@pytest.mark.parametrize("module", ORDER)
def test_no_import_points_back(module: str) -> None:
    mine = {name.split(".")[1] for name in imported(module) if name.startswith("blobpipe.")} & set(ORDER)
    later = set(ORDER[ORDER.index(module) :])
    assert not mine & later


@pytest.mark.parametrize("module", ORDER)
def test_the_library_knows_no_workflow_tool(module: str) -> None:
    assert not {name.split(".")[0] for name in imported(module)} & {"snakemake", "dvc"}


@pytest.mark.parametrize("module", ARRAY_MODULES)
def test_modules_of_plain_arrays_use_no_network(module: str) -> None:
    assert not {name.split(".")[0] for name in imported(module)} & {"torch", "safetensors"}


@pytest.mark.parametrize("module", NETWORK_MODULES)
def test_network_modules_read_no_fits(module: str) -> None:
    assert not {name.split(".")[0] for name in imported(module)} & {"astropy", "ginga"}


@pytest.mark.parametrize("module", ORDER)
def test_only_the_command_line_prints(module: str) -> None:
    calls = [
        node.func for node in ast.walk(ast.parse((SOURCE / f"{module}.py").read_text())) if isinstance(node, ast.Call)
    ]
    prints = any(isinstance(call, ast.Name) and call.id == "print" for call in calls)
    assert not prints or module == "cli"


def loaded_after(statement: str) -> set[str]:
    script = f"import sys; {statement}; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split()) & set(HEAVY)


def test_help_imports_nothing_heavy() -> None:
    script = "import contextlib\nfrom blobpipe import cli\nwith contextlib.suppress(SystemExit): cli.main(['--help'])"
    assert not loaded_after(f"exec({script!r})")


def test_light_modules_import_nothing_heavy() -> None:
    assert not loaded_after("import blobpipe.errors, blobpipe.params, blobpipe.cli")
    assert loaded_after("import blobpipe.frames, blobpipe.check") <= {"numpy"}


def test_arrays_do_without_torch_and_networks_without_astropy() -> None:
    arrays = ", ".join(f"blobpipe.{name}" for name in ARRAY_MODULES if name != "__init__")
    assert "torch" not in loaded_after(f"import {arrays}")
    assert "astropy" not in loaded_after("import blobpipe.training")


def test_help_answers_at_once() -> None:
    """In 0.6 s of processor time, the best of three: other work on the machine is not ours to measure."""
    command, times = [sys.executable, "-m", "blobpipe", "--help"], []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert min(times) < 0.6
