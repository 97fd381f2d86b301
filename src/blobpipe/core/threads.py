"""Share a process between threads: pools that are kept for its life, and warnings that one thread must not see.

New threads would allocate new memory, and fetching that from the system can take longer than their work.
"""

from __future__ import annotations

import functools
import os
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

_silence = threading.RLock()  # its holder alone may change which warnings are shown


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


@contextmanager
def unwarned() -> Iterator[None]:
    """Show no warnings meanwhile; other threads wait to enter, since filters of warnings belong to the whole process.

    Two threads that leave ``warnings.catch_warnings`` in the order in which they entered it would bring each other's
    filters back: one would warn after all, the other never again. What libraries do inside counts as well.
    """
    with _silence, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _renew() -> None:
    """Forget the threads, which do not survive a fork, and what they held."""
    global _silence
    pool.cache_clear()
    _silence = threading.RLock()


os.register_at_fork(after_in_child=_renew)
