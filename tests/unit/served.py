"""``blobpipe serve`` as a process of its own, on a free port."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from blobpipe.review.server import TOKEN_VARIABLE

TOKEN = "a-token-that-nobody-guesses"
SECONDS = 120.0  # that it may take to start


@contextmanager
def served(log: Path) -> Iterator[str]:
    """The address of a server of a log, which ends with the block."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    command = (sys.executable, "-m", "blobpipe", "serve", "--log", str(log), "--port", str(port))
    environment = os.environ | {TOKEN_VARIABLE: TOKEN}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as server:
        try:
            _await_answer(f"http://127.0.0.1:{port}/style.css")
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def _await_answer(url: str) -> None:
    end = time.monotonic() + SECONDS
    while True:
        try:
            urllib.request.urlopen(url).close()
            return
        except urllib.error.URLError:
            assert time.monotonic() < end, "the server did not start"
            time.sleep(0.1)
