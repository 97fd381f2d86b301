"""What is released: wheel and sdist are built, hold everything, and work without the packages of the workflow."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits

import blobpipe

ROOT = Path(__file__).parents[2]

# Of the extra workflow, and what they import by
OF_WORKFLOW = ("dvc", "psutil", "pygments", "snakemake")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wheel and sdist, built of the files that git knows."""
    folder = tmp_path_factory.mktemp("release")
    source = folder / "source"
    source.mkdir()
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file() and name.split("/")[0] in (
            *("src", "tests", "docs", "pyproject.toml", "README.md", "LICENSE"),
        ):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder / "dist")]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    return folder / "dist"


@pytest.fixture(scope="module")
def environment(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty environment with the wheel in it.

    The packages that the wheel requires are those of this environment, as installing them takes minutes and the network;
    those of the workflow are hidden.
    """
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = folder / "lib" / version / "site-packages"
    [wheel] = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (site / "hidden.py").write_text(
        "import sys\n"
        f"HIDDEN = {OF_WORKFLOW!r}\n"
        "class Hide:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in HIDDEN:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Hide())\n"
    )
    (site / "zz.pth").write_text(f"import hidden\n{sysconfig.get_paths()['purelib']}\n")
    return folder


def run(environment: Path, *words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run blobpipe in the environment."""
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [str(environment / "bin" / "python"), "-m", "blobpipe", *words]
    return subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True)


def test_the_wheel_holds_code_model_and_detectors(built: Path) -> None:
    [wheel] = built.glob("*.whl")
    assert wheel.name == f"blobpipe-{blobpipe.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        [metadata] = [name for name in names if name.endswith("/METADATA")]
        about = Parser().parsestr(archive.read(metadata).decode())
        [points] = [name for name in names if name.endswith("/entry_points.txt")]
        entry_points = archive.read(points).decode()
    assert {
        "blobpipe/model.safetensors",
        "blobpipe/model.json",
        "blobpipe/detectors/wfc3_ir.yaml",
        "blobpipe/detectors/roman_wfi.yaml",
        "blobpipe/monitor/store.sql",
        "blobpipe/review/templates/style.css",
    } <= names
    assert not any(name.startswith(("tests/", "docs/", "workflow/")) for name in names)
    assert about["Version"] == blobpipe.__version__
    assert "[ginga.rv.plugins]" in entry_points
    required = about.get_all("Requires-Dist") or []
    for name in OF_WORKFLOW:
        [line] = [
            each for each in required if each.split(";")[0].strip() == name and "workflow" in each
        ]
        assert "extra == 'workflow'" in line


def test_the_sdist_holds_the_sources(built: Path) -> None:
    [sdist] = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "LICENSE", "src/blobpipe/detectors/nircam_lw.yaml"} <= names


def test_help_and_scan_work_without_the_workflow(environment: Path, tmp_path: Path) -> None:
    said = run(environment, "--version", folder=tmp_path)
    assert said.stdout.strip() == f"blobpipe {blobpipe.__version__}"
    assert "every day" in run(environment, "--help", folder=tmp_path).stdout
    shown = run(environment, "detector", "show", "wfc3_ir", folder=tmp_path)
    assert "width_px: 1024" in shown.stdout

    image = np.random.default_rng(1).normal(0, 0.01, (512, 512)).astype(np.float32)
    y, x = np.mgrid[:512, :512]
    image[np.hypot(x - 300, y - 200) < 5] += 0.05
    header = fits.Header({"EXPSTART": 56000.0})
    fits.PrimaryHDU(image, header).writeto(tmp_path / "image.fits")
    done = run(environment, "scan", "image.fits", "--difference", "--out", "out", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 new" in done.stderr

    hidden = subprocess.run(
        [str(environment / "bin" / "python"), "-c", "import snakemake"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert "No module named 'snakemake'" in hidden.stderr
