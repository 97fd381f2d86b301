"""Real runs of the whole pipeline on the one-minute settings, in copies of the project outside it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.conftest import Once

HERE = Path(__file__).parents[2]
TIMINGS = {"seconds", "samples_per_s"}  # the only things on which two runs may differ


@dataclass(frozen=True)
class Project:
    """A copy of the project with a git history of its own."""

    root: Path

    def start(self, *words: str, **env: str) -> subprocess.Popen[str]:
        """Start a command in a process group of its own."""
        return subprocess.Popen(
            words,
            cwd=self.root,
            env={**environment(), **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *words: str, **env: str) -> str:
        """Run a command that must succeed; what it printed."""
        process = self.start(*words, **env)
        printed, _ = process.communicate()
        assert process.returncode == 0, f"{' '.join(words)}:\n{printed}"
        return printed

    def fails(self, *words: str, **env: str) -> str:
        """Run a command that must fail; what it printed."""
        process = self.start(*words, **env)
        printed, _ = process.communicate()
        assert process.returncode != 0, f"{' '.join(words)} succeeded:\n{printed}"
        return printed

    def planned(self) -> set[str]:
        """The rules that `snakemake` would run now; to ask changes nothing."""
        before = self.listing()
        printed = self.run("snakemake", "-n")
        assert self.listing() == before
        lines = printed.partition("Job stats:")[2].partition("total")[0].splitlines()
        return {
            line.split()[0]
            for line in lines
            if len(line.split()) == 2 and line.split()[1].isdigit()
        } - {"all"}

    def planned_stages(self) -> set[str]:
        """The same, without the commits to DVC; batches of a stage are its own."""
        rules = {rule for rule in self.planned() if not rule.startswith("dvc_")}
        return {rule.removesuffix("_batch") for rule in rules}

    def is_at_rest(self) -> bool:
        """Whether neither tool has anything to do."""
        return self.planned() == set() and "up to date" in self.run("dvc", "status")

    def listing(self) -> dict[str, tuple[int, int, int]]:
        """Every file, those of both tools too, with what changes when it is written or touched."""
        files = [
            path for path in self.root.rglob("*") if path.is_file() and ".git" not in path.parts
        ]
        states = {str(path.relative_to(self.root)): path.stat() for path in files}
        return {
            path: (state.st_ino, state.st_size, state.st_mtime_ns) for path, state in states.items()
        }

    def set(self, section: str, key: str, value: object) -> None:
        """Change a setting."""
        path = self.root / "params.yaml"
        params = yaml.safe_load(path.read_text())
        params[section][key] = value
        path.write_text(yaml.safe_dump(params))

    def commit(self, message: str) -> None:
        """Commit everything to git."""
        self.run("git", "add", "-A")
        self.run("git", "commit", "-q", "--allow-empty", "-m", message)

    def made(self) -> dict[str, str]:
        """Checksum of every file that the stages made, timings left out."""
        files = [
            path
            for top in ("data", "results")
            for path in sorted((self.root / top).rglob("*"))
            if path.is_file()
        ]
        return {
            str(path.relative_to(self.root)): _checksum(path)
            for path in files
            if path.name != ".gitignore"
        }

    def wait_for(self, pattern: str, process: subprocess.Popen[str], newer_than: float = 0) -> None:
        """Wait until a file of that name is there while a process is running."""
        while not any(path.stat().st_mtime > newer_than for path in self.root.glob(pattern)):
            assert process.poll() is None, f"ended before {pattern}:\n{process.communicate()[0]}"
            time.sleep(0.02)


def kill(process: subprocess.Popen[str]) -> None:
    """kill -9 for a process and all that it started."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def _checksum(path: Path) -> str:
    content = path.read_bytes()
    if path.name == "metrics.json":
        metrics = json.loads(content)
        content = json.dumps(
            {key: metrics[key] for key in sorted(metrics) if key not in TIMINGS}
        ).encode()
    return hashlib.sha256(content).hexdigest()


def environment() -> dict[str, str]:
    """The user's environment, this one's tools first, and nothing from an outer run."""
    outer = (
        "DVC_STAGE",
        "DVC_ROOT",
        "PYTHONPATH",
        "SNAKEMAKE_PROFILE",
        "BLOBPIPE_BRIDGE",
        "BLOBPIPE_DVC",
        "BLOBPIPE_ACCEPT",
    )
    env = {key: value for key, value in os.environ.items() if key not in outer}
    tools = str(Path(sys.executable).parent)
    if tools not in env["PATH"].split(os.pathsep):
        env["PATH"] = f"{tools}{os.pathsep}{env['PATH']}"
    author = {
        f"GIT_{who}_{what}": "tests@localhost"
        for who in ("AUTHOR", "COMMITTER")
        for what in ("NAME", "EMAIL")
    }
    return env | author


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole runs come first: they use one core most of the time, and other tests fill the other."""
    items.sort(
        key=lambda item: (
            not item.path.is_relative_to(Path(__file__).parent),
            "from_nothing" not in item.name,
        )
    )


@pytest.fixture(scope="session", autouse=True)
def _dvc_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what DVC remembers of the copies out of the machine's own memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path_factory.mktemp("dvc-site")))
        patch.setenv("DVC_NO_ANALYTICS", "1")
        yield


@pytest.fixture(scope="session")
def pristine(once: Once, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The project as it stands, with the one-minute settings, nothing made yet. Not to be changed."""
    # a copy for each worker: one Snakemake at a time works in a folder
    return _copy(Project(once("pristine", _make_pristine)), tmp_path_factory.mktemp("pristine"))


@pytest.fixture(scope="session")
def finished(pristine: Project, once: Once, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """After `snakemake --cores 2` and a git commit. Not to be changed."""

    def make(root: Path) -> None:
        project = Project(Path(shutil.copytree(pristine.root, root, symlinks=True)))
        project.run("snakemake", "--cores", "2")
        project.commit("made by snakemake")

    return _copy(Project(once("finished", make)), tmp_path_factory.mktemp("finished"))


def _make_pristine(root: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=HERE,
        check=True,
        capture_output=True,
    ).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if (
            (HERE / name).is_file()
            and not name.startswith(("results/", "tests/"))
            and name != "dvc.lock"
        ):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(HERE / name, root / name)
    # what numba has compiled of the very same files
    for compiled in (HERE / "src/blobpipe").rglob("__pycache__"):
        shutil.copytree(compiled, root / compiled.relative_to(HERE))
    shutil.copy(HERE / "experiments/quick.yaml", root / "params.yaml")
    project = Project(root)
    project.run("git", "init", "--quiet", "--initial-branch=main")
    project.commit("as it stands")


@pytest.fixture
def project(finished: Project, tmp_path: Path) -> Project:
    """A copy of the finished project, to be changed at will."""
    return _copy(finished, tmp_path)


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Project], Project]:
    """Makes a copy of a project, to be changed at will."""
    return lambda project: _copy(project, tmp_path)


def _copy(project: Project, folder: Path) -> Project:
    return Project(Path(shutil.copytree(project.root, folder / "blobpipe", symlinks=True)))
