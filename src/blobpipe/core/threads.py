"""Pools of threads that are kept for the life of the process.

New threads would allocate new memory, and fetching that from the system can take longer than their work.
"""

from __future__ import annotations

import functools
import os
from concurrent.futures import ThreadPoolExecutor


@functools.cache
def pool(name: str, threads: int) -> ThreadPoolExecutor:
    """Return a pool of threads, the same one for the same name and number.

    Its jobs must not wait for other jobs of the same pool.

    Parameters
    ----------
    name : str
        Name of the work.
    threads : int
        Number of threads, one or more.
    """
    return ThreadPoolExecutor(threads, name)


os.register_at_fork(after_in_child=pool.cache_clear)  # threads do not survive a fork
