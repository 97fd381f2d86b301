"""Laws of the promise: it tightens with more images, its threshold falls with the budget and rises with the confidence."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from blobpipe.detection.promise import most_alarms, promise_threshold, upper_limit

budgets = st.floats(0.005, 2)
confidences = st.floats(0.5, 0.99)
counts = st.integers(1, 500)
dispersions = st.floats(1, 10)


@given(budgets, counts, confidences, dispersions)
def test_one_more_alarm_would_break_the_budget(
    budget: float, n: int, confidence: float, dispersion: float
) -> None:
    k = most_alarms(budget, n, confidence, dispersion)
    assert k == -1 or upper_limit(k, n, confidence, dispersion) <= budget
    assert upper_limit(k + 1, n, confidence, dispersion) > budget


@given(st.integers(0, 50), counts, confidences, dispersions)
def test_more_images_never_promise_less(
    k: int, n: int, confidence: float, dispersion: float
) -> None:
    assert upper_limit(k, n + 1, confidence, dispersion) < upper_limit(k, n, confidence, dispersion)
    # Of the same budget, too, more images allow no fewer alarms
    assert most_alarms(0.2, n + 1, confidence) >= most_alarms(0.2, n, confidence)


images = st.lists(
    st.lists(st.floats(0.01, 0.999), max_size=6).map(np.array), min_size=1, max_size=40
)


@given(images, budgets, budgets, confidences, confidences)
def test_the_threshold_falls_with_the_budget_and_rises_with_the_confidence(
    scores: list[np.ndarray], budget: float, other: float, confidence: float, surer: float
) -> None:
    low, high = sorted((budget, other))
    sure, surest = sorted((confidence, surer))
    at = promise_threshold(scores, low, sure)
    assert promise_threshold(scores, high, sure).threshold <= at.threshold
    assert promise_threshold(scores, low, surest).threshold >= at.threshold
    # The promise says how many lie above, and is within the budget if any number of alarms is
    n_above = sum(np.count_nonzero(each >= at.threshold) for each in scores)
    assert n_above <= at.n_alarms
    if most_alarms(low, len(scores), sure, at.dispersion) >= 0:
        assert at.per_image <= low
    else:
        assert n_above == at.n_alarms == 0
        assert at.per_image > low


@given(images)
def test_a_quiet_image_more_never_raises_the_threshold(scores: list[np.ndarray]) -> None:
    alike = [np.concatenate([np.zeros(0), *scores])[:1]] * 30  # without groups
    before = promise_threshold(alike, 0.2, 0.9)
    after = promise_threshold([*alike, np.zeros(0)], 0.2, 0.9)
    assert after.threshold <= before.threshold
    assert after.per_image <= max(before.per_image, 0.2)
