"""The order in which an image meets the modules: no import points back, and no light module pulls in a heavy one."""

from __future__ import annotations

import ast
import graphlib
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from blobpipe.params import Params

SOURCE = Path(__file__).parents[2] / "src" / "blobpipe"
ROOT = SOURCE.parents[1]
ROOMS = {  # and of which an import may come
    "core": (),
    "noise": ("core",),
    "images": ("core", "noise"),
    "simulation": ("core", "images"),
    "networks": ("core", "images", "simulation"),
    "detection": ("core", "noise", "images", "simulation", "networks"),
    "history": ("core", "noise", "images", "simulation", "networks", "detection"),
    "validation": ("core", "noise", "images", "simulation", "networks", "detection", "history"),
    "monitor": (
        *("core", "noise", "images", "simulation", "networks", "detection", "history"),
        "validation",
    ),
    "quicklook": ("core", "noise", "images", "networks", "detection", "history", "monitor"),
    "review": ("core", "images", "networks", "detection", "monitor"),
    "cli": (
        *("core", "images", "simulation", "networks", "detection", "history", "validation"),
        *("monitor", "quicklook", "review"),
    ),
}
STAGES = {*Params.model_fields, "scan"}  # and the searches of every day
HALL = ("errors", "params", "__init__", "__main__")
MODULES = sorted(
    path.relative_to(SOURCE).with_suffix("").as_posix()
    for path in SOURCE.rglob("*.py")
    if path.stem != "__init__"
)
HEAVY = (
    "torch",
    "pandas",
    "astropy",
    "matplotlib",
    "numba",
    "scipy",
    "skimage",
    "photutils",
    "ginga",
    "numpy",
)


def room_of(module: str) -> str:
    return module.partition("/")[0] if "/" in module else ""


def in_rooms(*rooms: str) -> list[str]:
    return [module for module in MODULES if room_of(module) in rooms]


def imported(module: str) -> set[str]:
    """Everything that a module imports, anywhere in it; of blobpipe, ``blobpipe.room.name``."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((SOURCE / f"{module}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own(module: str) -> set[str]:
    """The modules of blobpipe that a module imports."""
    return {name.removeprefix("blobpipe.").replace(".", "/") for name in imported(module)} & set(
        MODULES
    )


def test_each_folder_is_a_room_and_each_file_beside_them_of_the_hall() -> None:
    assert {path.parent.name for path in SOURCE.glob("*/*.py")} == set(ROOMS)
    assert {path.stem for path in SOURCE.glob("*.py")} == set(HALL)
    assert not list(SOURCE.glob("*/*/*.py"))


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_holds_at_most_fourteen_modules_and_says_what_it_is_for(room: str) -> None:
    assert 1 <= len(in_rooms(room)) <= 14
    docstring = ast.get_docstring(ast.parse((SOURCE / room / "__init__.py").read_text())) or ""
    purpose, blank, imports, stages = docstring.splitlines()
    assert purpose
    assert not blank
    assert imports.startswith("Imports ")
    assert stages.startswith("Stages: ")
    assert purpose in (ROOT / "CONTRIBUTING.md").read_text()


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_from_room_to_room(module: str) -> None:
    room = room_of(module)
    if room:
        assert {room_of(other) for other in own(module)} <= {room, *ROOMS[room], ""}
        assert "__main__" not in own(module)
    elif module in ("errors", "params"):
        assert own(module) <= {"errors"}


def test_no_module_imports_itself_by_way_of_others() -> None:
    imports = {module: own(module) for module in MODULES}
    assert len([*graphlib.TopologicalSorter(imports).static_order()]) == len(MODULES)


def test_the_documents_name_the_rooms_in_one_order() -> None:
    for name in ("CONTRIBUTING.md", "docs/api.md"):
        text = (ROOT / name).read_text()
        named = re.findall(r"^(?:## blobpipe\.|\| `)(\w+)/?`?(?: \||$)", text, re.MULTILINE)
        assert [room for room in named if room in ROOMS] == list(ROOMS), name


def test_contributors_are_told_every_module() -> None:
    rows = re.findall(
        r"^\| `(\w+)/` \| (.*) \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE
    )
    told = {f"{room}/{name}" for room, names in rows for name in re.findall(r"`(\w+)`", names)}
    assert told == set(in_rooms(*ROOMS))


def defined(module: str) -> set[str]:
    """The names of the functions and classes of a module, those of its body alone."""
    tree = ast.parse((SOURCE / f"{module}.py").read_text(encoding="utf-8"))
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    return {node.name for node in tree.body if isinstance(node, kinds)}


def test_no_module_holds_a_function_of_its_name_unless_it_is_a_stage() -> None:
    """With two things of one name, ``from room import name`` gives now the one and now the other."""
    shared = {module for module in MODULES if module.rpartition("/")[2] in defined(module)}
    of_stages = {module for module in shared if module.rpartition("/")[2] in STAGES}
    assert not shared - of_stages


def test_tests_mirror_the_rooms() -> None:
    assert {path.parent.name for path in (ROOT / "tests/unit").glob("*/test_*.py")} == set(ROOMS)
    tested = {
        f"{path.parent.name}/{path.stem.removeprefix('test_')}"
        for path in (ROOT / "tests/unit").glob("*/test_*.py")
    }
    assert tested <= set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_the_library_knows_no_workflow_tool(module: str) -> None:
    assert not {name.split(".")[0] for name in imported(module)} & {"snakemake", "dvc"}


@pytest.mark.parametrize("module", in_rooms("core", "images"))
def test_modules_of_plain_arrays_use_no_network(module: str) -> None:
    assert not {name.split(".")[0] for name in imported(module)} & {"torch", "safetensors"}


@pytest.mark.parametrize("module", in_rooms("networks", "detection", "validation"))
def test_network_modules_read_no_fits(module: str) -> None:
    assert not {name.split(".")[0] for name in imported(module)} & {"astropy", "ginga"}


@pytest.mark.parametrize("module", MODULES)
def test_only_the_command_line_prints(module: str) -> None:
    calls = [
        node.func
        for node in ast.walk(ast.parse((SOURCE / f"{module}.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    ]
    prints = any(isinstance(call, ast.Name) and call.id == "print" for call in calls)
    assert not prints or room_of(module) == "cli"


def loaded_after(statement: str) -> set[str]:
    script = f"import sys; {statement}; print(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split()) & set(HEAVY)


def test_help_imports_nothing_heavy() -> None:
    script = "import contextlib\nfrom blobpipe import cli\nwith contextlib.suppress(SystemExit): cli.main(['--help'])"
    assert not loaded_after(f"exec({script!r})")


def test_light_modules_import_nothing_heavy() -> None:
    assert not loaded_after("import blobpipe.errors, blobpipe.params, blobpipe.cli")
    assert loaded_after("import blobpipe.core.fits_images, blobpipe.images.check") <= {"numpy"}


def test_arrays_do_without_torch_and_networks_without_astropy() -> None:
    arrays = ", ".join(
        f"blobpipe.{module.replace('/', '.')}" for module in in_rooms("core", "images")
    )
    assert "torch" not in loaded_after(f"import {arrays}")
    assert "astropy" not in loaded_after("import blobpipe.networks.train")


def test_help_answers_at_once() -> None:
    """In 0.6 s of processor time, the best of three: other work on the machine is not ours to measure."""
    command = [sys.executable, "-m", "blobpipe", "--help"]
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert min(times) < 0.6
