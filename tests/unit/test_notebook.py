"""The names that `import blobpipe` offers, and the notebook of the documentation."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from astropy.io import fits

import blobpipe
from blobpipe.core.blob_shapes import blob_profile

PAGE = Path(__file__).parents[2] / "docs" / "notebook.md"
KNOWN = ((90, 80), (200, 190), (60, 200))
NEW = (160, 70)


def image(seed: int, *blobs: tuple[int, int]) -> np.ndarray:
    data = np.random.default_rng(seed).normal(0, 0.0076, (256, 256)).astype(np.float32)
    for x, y in blobs:
        data[y - 20 : y + 21, x - 20 : x + 21] += 0.1 * blob_profile("disc", 6.0)
    return data


@pytest.mark.parametrize("name", blobpipe.__all__)
def test_each_name_is_there_and_documented(name: str) -> None:
    found = getattr(blobpipe, name)
    assert name == "__version__" or (found.__doc__ or "").strip()
    assert name in dir(blobpipe)


def test_the_interface_begins_with_these_names() -> None:
    text = (PAGE.parent / "api.md").read_text()
    assert set(blobpipe.__all__) - {"__version__"} == set(
        re.findall(r"^\| `blobpipe\.(\w+)`", text.partition("## blobpipe.errors")[0], re.MULTILINE)
    )
    assert len(blobpipe.__all__) == 17


def test_another_name_is_none() -> None:
    with pytest.raises(AttributeError, match="no attribute 'find_blob'"):
        blobpipe.find_blob  # noqa: B018


def test_importing_it_loads_nothing() -> None:
    script = "import sys, blobpipe; print(sorted({'numpy', 'torch', 'pandas'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_notebook_finds_the_new_blob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [code] = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) < 15
    monkeypatch.chdir(tmp_path)
    stack = np.median([image(seed, *KNOWN) for seed in range(9)], axis=0)
    fits.PrimaryHDU(image(99, *KNOWN, NEW)).writeto("image.fits")
    fits.PrimaryHDU(stack.astype(np.float32)).writeto("template.fits")
    names: dict[str, object] = {}
    exec(compile(ast.parse(code), str(PAGE), "exec"), names)
    plt.close("all")
    new = names["new"]
    assert isinstance(new, pd.DataFrame)
    assert new[["x_px", "y_px"]].to_numpy() == pytest.approx(np.array([NEW]), abs=1)
    assert (tmp_path / "blobs.reg").read_text().count("circle(") == 1
