"""What is declared, in dvc.yaml, the rules, the settings and git, says the same thing everywhere."""

from __future__ import annotations

import ast
import csv
import io
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from blobpipe.cli import stages as commands
from blobpipe.params import Params, json_schema, load_params, to_yaml

from .conftest import HERE, Project, environment

sys.path.insert(0, str(HERE / "workflow/scripts"))
from stages import Stage, stages

STAGES: dict[str, Stage] = stages(str(HERE / "dvc.yaml"))
DETECTORS = [str(path.relative_to(HERE)) for path in (HERE / "src/blobpipe/detectors").iterdir()]
OPTIONAL = ["deep", "explore", "search"]  # no stages of DVC, and only on request of Snakemake
NO_DEPS = {"__init__", "errors", "params"}  # settings are compared by value, errors make no output


def test_a_stage_has_one_name_everywhere() -> None:
    names = list(STAGES)
    sections = [
        name
        for name in Params.model_fields
        if name not in ("detector", "bad_pixels", "vetting", "quicklook", "notices", "health")
    ]
    assert [*names, *OPTIONAL] == sections  # the others are of the daily routine
    assert [*names, *OPTIONAL] == list(commands.STAGES)
    for name, stage in STAGES.items():
        assert name in stage.settings
        assert name in stage.rules
        assert f"workflow/rules/{name}.smk" in stage.deps
        assert all(Path(path).parts[1] in (name, "raw") for path in stage.made)


@pytest.mark.parametrize("name", STAGES)
def test_code_deps_are_what_a_stage_imports(name: str) -> None:
    stage = STAGES[name]
    uses_detector = "detector" in stage.settings
    assert sorted(stage.code) == sorted([*_code_of(name), *DETECTORS * uses_detector])


@pytest.mark.parametrize("name", OPTIONAL)
def test_optional_rules_name_the_code_that_they_import(name: str) -> None:
    rule = (HERE / f"workflow/rules/{name}.smk").read_text()
    listed = rule.partition("module=[")[2].partition("]")[0]
    assert [
        f"src/blobpipe/{module}.py" for module in re.findall(r'"([\w/]+)"', listed)
    ] == _code_of(name)


def _code_of(name: str) -> list[str]:
    """The modules that a command imports, by way of others too."""
    tree = ast.parse((HERE / "src/blobpipe/cli/stages.py").read_text())
    command = next(
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == f"_{name}"
    )
    found: set[str] = set()
    todo = set(_imports(command))
    while todo:
        found |= todo
        todo = {other for module in todo for other in _imports(_module(module))} - found
    return sorted(f"src/blobpipe/{module}.py" for module in found - NO_DEPS)


def _module(name: str) -> ast.Module:
    return ast.parse((HERE / f"src/blobpipe/{name}.py").read_text())


def _imports(tree: ast.AST) -> Iterator[str]:
    """The modules of blobpipe that some code imports, at the top or later."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("blobpipe"):
            continue
        path = "/".join((node.module or "").split(".")[1:])
        if path and (HERE / f"src/blobpipe/{path}.py").exists():
            yield path
        names = (f"{path}/{alias.name}".lstrip("/") for alias in node.names)
        yield from (name for name in names if (HERE / f"src/blobpipe/{name}.py").exists())


def test_library_knows_neither_tool() -> None:
    for path in (HERE / "src").rglob("*.py"):
        assert not re.search(
            r"^\s*(from|import) (snakemake|dvc)\b", path.read_text(), re.MULTILINE
        ), path


def test_rules_agree_with_dvc_yaml(finished: Project) -> None:
    for job in _jobs(finished):
        stage = next(stage for stage in STAGES.values() if job["rule"] in stage.rules)
        assert _inside(job["output_file"], stage.made), (
            f"{stage.name}: {job['output_file']} is in none of its outs"
        )
        for path in filter(None, job["input-file(s)"].split(",")):
            # what its batches have found is made by the stage itself
            places = (*stage.deps, *stage.made)
            assert _inside(path, places), f"{stage.name}: {path} is in none of its deps"


def test_dvc_yaml_agrees_with_rules(finished: Project) -> None:
    jobs = _jobs(finished)
    for stage in STAGES.values():
        mine = [job for job in jobs if job["rule"] in stage.rules]
        made = {job["output_file"] for job in mine}
        read = {path for job in mine for path in job["input-file(s)"].split(",")}
        assert [out for out in stage.made if not any(_inside(path, [out]) for path in made)] == []
        deps = [dep for dep in stage.deps if not dep.endswith(".smk")]
        assert [dep for dep in deps if not any(_inside(path, [dep]) for path in read)] == []


def _jobs(project: Project) -> list[dict[str, str]]:
    command = ["snakemake", "--detailed-summary", "--quiet", "host"]
    process = subprocess.run(
        command, cwd=project.root, check=True, capture_output=True, text=True, env=environment()
    )
    rows = csv.DictReader(io.StringIO(process.stdout), delimiter="\t")
    return [row for row in rows if row["rule"] != "-" and not row["rule"].startswith("dvc_")]


def _inside(path: str, places: tuple[str, ...] | list[str]) -> bool:
    return any(path == place or path.startswith(f"{place}/") for place in places)


def test_inputs_are_plain_paths() -> None:
    """An input written as rules.X.output lets Snakemake run rule X, whatever --allowed-rules says."""
    for path in (HERE / "workflow/rules").glob("*.smk"):
        lines = [
            line for line in path.read_text().splitlines() if re.search(r"rules\.\w+\.output", line)
        ]
        assert all(
            re.match(r"STAGE_FILES\[| {4}\*map", line) and "map(str, rules." in line
            for line in lines
        ), path


def test_snakemake_lint_finds_nothing(pristine: Project) -> None:
    assert "Congratulations" in pristine.run("snakemake", "--lint")


def test_git_ignores_the_outs_and_keeps_the_metrics(pristine: Project) -> None:
    for stage in STAGES.values():
        for out in stage.outs:
            pristine.run("git", "check-ignore", f"{out}/x" if "." not in Path(out).name else out)
        for metrics in stage.metrics:
            pristine.fails("git", "check-ignore", metrics)


def test_default_settings_stand_in_params_yaml() -> None:
    assert (HERE / "params.yaml").read_text() == to_yaml(Params())


def test_schema_is_in_step() -> None:
    assert (HERE / "workflow/schemas/params.schema.json").read_text() == json_schema()


@pytest.mark.parametrize(
    "path", sorted((HERE / "experiments").glob("*.yaml")), ids=lambda path: path.stem
)
def test_experiments_are_whole_files(path: Path) -> None:
    assert path.read_text() == to_yaml(load_params(path))


def test_constraints_name_no_place() -> None:
    lines = [
        line
        for line in (HERE / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    ]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in lines), lines


def _requirements(names: list[str]) -> set[str]:
    """The distributions that some extras ask for, those of other extras in them too."""
    extras = tomllib.loads((HERE / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    found: set[str] = set()
    for name in names:
        for requirement in extras[name]:
            inner = re.fullmatch(r"blobpipe\[(.*)\]", requirement)
            found |= _requirements(inner[1].split(",")) if inner else {requirement}
    return found


def test_constraints_know_what_every_extra_asks_for() -> None:
    extras = tomllib.loads((HERE / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    pinned = {
        line.partition("==")[0].lower().replace("_", "-")
        for line in (HERE / "constraints.txt").read_text().splitlines()
    }
    asked = {re.sub(r"\[.*\]", "", name) for name in _requirements(list(extras))}
    wanted = {name.lower().replace("_", "-") for name in asked}
    assert wanted - pinned == set()


def test_the_environment_of_conda_has_what_the_jobs_import() -> None:
    """Each rule runs commands of the package and scripts of the workflow in it."""
    extras = _extras_of_conda()
    installed = {name.replace("-", "_").lower() for name in _requirements(extras.split(","))}
    imported = set()
    for path in (HERE / "workflow/scripts").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").partition(".")[0])
    own = {path.stem for path in (HERE / "workflow/scripts").glob("*.py")} | {"blobpipe"}
    with_package = {"yaml", "numpy", "pandas"}  # come with the package itself
    foreign = imported - own - with_package - set(sys.stdlib_module_names)
    assert "psutil" in foreign
    assert foreign - installed == set()
    assert {"explore", "search"} <= set(extras.split(","))


@pytest.mark.slow
def test_the_environment_of_conda_resolves() -> None:
    """With the pinned versions, which are those of this environment, there is nothing but the package to install."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--quiet"]
    package = f"{HERE}[{_extras_of_conda()}]"
    constraints = ["--no-build-isolation", "-c", str(HERE / "constraints.txt")]
    done = subprocess.run(
        [*command, *constraints, "--report", "-", package],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    installed = json.loads(done.stdout)["install"]
    assert [item["metadata"]["name"] for item in installed] == ["blobpipe"]


def _extras_of_conda() -> str:
    """The extras of the package that the jobs' environment is made with."""
    lines = (HERE / "workflow/envs/blobpipe.yaml").read_text()
    assert "- -c ../../constraints.txt" in lines
    [extras] = re.findall(r"-e \.\./\.\.\[([\w,]+)\]", lines)
    return extras


def test_table_of_contents_is_short() -> None:
    assert len((HERE / "Snakefile").read_text().splitlines()) <= 50


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        ({"clip": {"factor": "much"}}, "clip.factor"),
        ({"clip": {"facto": 0.5}}, "unknown key clip.facto"),
        ({"clip": {"factor": -1}}, "clip.factor"),
    ],
)
def test_faulty_settings_stop_snakemake_with_one_line(
    edit: dict[str, dict[str, object]], expected: str, pristine: Project, copy_of: object
) -> None:
    project = copy_of(pristine)  # type: ignore[operator]
    params = yaml.safe_load((project.root / "params.yaml").read_text())
    for section, values in edit.items():
        params[section] |= values
    (project.root / "params.yaml").write_text(yaml.safe_dump(params))
    printed = project.fails("snakemake", "-n")
    assert "Traceback" not in printed
    assert sum(expected in line for line in printed.splitlines()) == 1


def test_masks_of_bad_pixels_are_inputs_if_they_are_set(pristine: Project, copy_of: object) -> None:
    project = copy_of(pristine)  # type: ignore[operator]
    project.set("bad_pixels", "files", ["calibration/mask.fits"])
    assert "calibration/mask.fits" in project.fails("snakemake", "-n", "reference")
    (project.root / "calibration").mkdir()
    (project.root / "calibration/mask.fits").touch()
    assert "reference" in project.planned_stages()


def test_settings_come_from_the_file_alone(pristine: Project) -> None:
    printed = pristine.fails("snakemake", "-n", "--config", "train={'seed': 2}")
    assert "settings come from params.yaml alone" in printed
    pristine.run("snakemake", "-n", "--quiet", "all")


@pytest.mark.parametrize(
    ("rule", "section", "key"), [("train", "train", "epochs"), ("dense", "dense", "epochs")]
)
def test_time_limits_follow_from_the_work(
    rule: str, section: str, key: str, pristine: Project, copy_of: object
) -> None:
    project = copy_of(pristine)  # type: ignore[operator]

    def limit_min() -> int:
        printed = project.run("snakemake", "-n", "--quiet", "host", "--", f"stage_{rule}")
        block = printed[printed.index(f"rule {rule}:") :]
        return int(re.findall(r"runtime=(\d+)", block)[0])

    before = limit_min()
    project.set(section, key, 40_000)
    assert before < 60
    assert limit_min() > 20 * before
