"""Tests of threads: warnings are hidden from one thread at a time, and come back."""

from __future__ import annotations

import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from blobpipe.core.threads import unwarned
from blobpipe.images.flatten import background

N_THREADS = 8


@pytest.fixture
def hasty() -> Iterator[None]:
    """Let threads take turns a thousand times more often than usual."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(usual / 1000)
    yield
    sys.setswitchinterval(usual)


@pytest.mark.usefixtures("hasty")
def test_backgrounds_with_bad_pixels_measured_in_threads_do_not_warn_and_keep_the_filters() -> None:
    rng = np.random.default_rng(1)
    image = rng.normal(1, 0.01, (64, 64)).astype(np.float32)
    masked = rng.random(image.shape) < 0.1

    def measure(_: int) -> bytes:
        return background(image, masked, box_px=16).tobytes()

    alone = measure(0)  # Imports what it needs, which adds filters
    before = list(warnings.filters)
    with ThreadPoolExecutor(N_THREADS) as pool:
        found = set(pool.map(measure, range(200)))
    assert found == {alone}
    assert warnings.filters == before


@pytest.mark.usefixtures("hasty")
def test_every_thread_is_silent_in_its_turn_and_warns_afterwards() -> None:
    inside = []

    def work(_: int) -> None:
        with unwarned():
            inside.append(threading.get_ident())
            time.sleep(1e-4)
            warnings.warn("not to be seen", UserWarning, stacklevel=1)
            with unwarned():  # also within itself
                warnings.warn("nor this", UserWarning, stacklevel=1)
            assert inside.pop() == threading.get_ident()
            assert not inside

    with ThreadPoolExecutor(N_THREADS) as pool:
        list(pool.map(work, range(100)))
    with pytest.warns(UserWarning, match="to be seen"):
        warnings.warn("to be seen", UserWarning, stacklevel=1)


@pytest.mark.filterwarnings("ignore:.*fork")  # of Python 3.12 on
def test_a_child_is_not_kept_waiting_by_a_thread_that_it_does_not_have() -> None:
    entered, done = threading.Event(), threading.Event()

    def hold() -> None:
        with unwarned():
            entered.set()
            done.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    entered.wait()
    child = os.fork()
    if child == 0:
        with unwarned():
            os._exit(0)
    try:
        deadline = time.monotonic() + 30
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert ended == (child, 0)
    finally:
        done.set()
        holder.join()
