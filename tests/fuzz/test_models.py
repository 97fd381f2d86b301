"""Mutated model files: a network whose answers are finite, or one line."""

from __future__ import annotations

import pytest

from tests.fuzz import runner


def test_mutated_models_are_networks_or_refused() -> None:
    assert "0 faults" in runner.check("tests.fuzz.models", seed=0, count=25)


@pytest.mark.long
def test_three_hundred_mutated_models() -> None:
    assert "0 faults" in runner.check("tests.fuzz.models", seed=1000, count=300)
