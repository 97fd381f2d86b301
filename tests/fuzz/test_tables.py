"""Mutated tables: the values that stand there, or one line; never shifted, never fewer rows."""

from __future__ import annotations

import pytest

from tests.fuzz import runner


def test_mutated_tables_are_read_as_they_stand_or_refused() -> None:
    assert "0 faults" in runner.check("tests.fuzz.tables", seed=0, count=300)


@pytest.mark.long
def test_three_thousand_mutated_tables() -> None:
    assert "0 faults" in runner.check("tests.fuzz.tables", seed=1000, count=3000)
