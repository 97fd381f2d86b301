"""A folder with settings, in which commands run."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.unit.cli.calls import PARAMS

from blobpipe.params import to_yaml


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text(to_yaml(PARAMS))
    return tmp_path
