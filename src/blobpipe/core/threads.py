"""Threads that live on: the memory of new ones would be new, too, and fetching it can take longer than their work."""

from __future__ import annotations

import functools
import os
from concurrent.futures import ThreadPoolExecutor


@functools.cache
def pool(name: str, threads: int) -> ThreadPoolExecutor:
    """So many threads under a name, always the same ones; what they run must not wait for others of this name.

    Parameters
    ----------
    name : str
        Of the work.
    threads : int
        One or more.
    """
    return ThreadPoolExecutor(threads, name)


os.register_at_fork(after_in_child=pool.cache_clear)  # threads do not survive a fork
