"""The simulated month in small; ``python -m tests.month`` is the whole of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests import month


@pytest.mark.long
def test_a_month_under_kills_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    summary = month.month(tmp_path, kills=3, images=12, seed=1, limit_s=300.0)
    assert summary.faults == []
    assert summary.disturbed.phases.total() == 3
