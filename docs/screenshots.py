"""Photograph the review pages for the documentation: docs/img/review-*.png.

    python docs/screenshots.py            a short campaign, `blobpipe quicklook`, `blobpipe serve`, Chromium: three minutes
    python docs/screenshots.py --keep DIR the same, with images and log kept in DIR, and taken from there the next time

It takes Debian's package chromium. Only simulated pixels go into docs/img.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image
from playwright.sync_api import sync_playwright

from blobpipe.core import tables
from blobpipe.monitor import logbook
from blobpipe.networks import model_file
from blobpipe.params import Campaign, Params, Quicklook
from blobpipe.quicklook.options import Options
from blobpipe.quicklook.run import quicklook
from blobpipe.review.server import TOKEN_VARIABLE
from blobpipe.simulation import campaign

IMG = Path(__file__).resolve().parent / "img"
MODEL = model_file.PACKAGED
SHORT = Campaign(n_frames=44, n_cases=6)  # the newest image is the first to show a blob
MAX_BYTES = 250_000
COLOURS = (256, 128, 64, 32, 24)  # of a picture; noise compresses badly
SHRUNK = 0.75  # the picture of today, which is mostly noise
EXAMPLE_SNR = 150.0  # of the candidate on the picture: one that stands out on its surface too
FAINT_SNR = 7.0
TOKEN = "only-for-these-pictures"

log = logging.getLogger("screenshots")


def main() -> None:
    """Simulate, search, review, photograph."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep images and log there")
    kept = parser.parse_args().keep
    with tempfile.TemporaryDirectory() as temporary:
        root = kept or Path(temporary)
        if not (root / "log.sqlite").exists():
            make_log(root)
        with served(root / "log.sqlite") as address:
            photograph(address, example(root / "log.sqlite"))


def make_log(root: Path) -> None:
    """The daily routine over a short campaign, and what a reviewer said about all but two candidates."""
    inbox = root / "inbox"
    campaign.simulate(inbox, SHORT)
    known = tables.read_blobs(inbox)
    tables.write_table(root / "known.csv", known[known["first_frame"].fillna("") == ""])
    settings = Params().model_copy(update={"quicklook": Quicklook(settle_s=0.0)})
    quicklook(
        inbox,
        Options(root / "log.sqlite", MODEL, settings, catalogue=root / "known.csv"),
    )
    open_ones = [example(root / "log.sqlite"), newest(root / "log.sqlite")]
    with closing(logbook.connect(root / "log.sqlite")) as connection:
        rows = logbook.table(connection, "candidate_list")
        with logbook.writing(connection):
            for row in rows[~rows["id"].isin(open_ones)].itertuples():
                logbook.insert(connection, "reviews", review(row) | {"at": logbook.now()})


def review(row: Any) -> dict[str, Any]:
    """What somebody would say about a candidate."""
    faint = row.snr < FAINT_SNR
    decision, reason = (
        ("unsure", "faint")
        if faint
        else ("confirmed", f"seen on {row.sightings} image{'s' * (row.sightings > 1)}")
    )
    return {"candidate": row.id, "decision": decision, "reviewer": "Ada", "reason": reason}


def example(path: Path) -> int:
    """The candidate whose S/N is next to the example's."""
    table = candidates(path)
    return int(table.loc[(table["snr"] - EXAMPLE_SNR).abs().idxmin(), "id"])


def newest(path: Path) -> int:
    """The last candidate."""
    return int(candidates(path)["id"].max())


def candidates(path: Path) -> pd.DataFrame:
    """All of them."""
    with closing(logbook.connect(path)) as connection:
        return logbook.table(connection, "candidate_list")


@contextmanager
def served(path: Path) -> Iterator[str]:
    """Address of ``blobpipe serve``."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = str(listening.getsockname()[1])
    command = (sys.executable, "-m", "blobpipe", "serve", "--log", str(path), "--port", port)
    with subprocess.Popen(command, env=os.environ | {TOKEN_VARIABLE: TOKEN}) as server:
        try:
            while not _answers(f"http://127.0.0.1:{port}/style.css"):
                if server.poll() is not None:
                    raise SystemExit("the server did not start")
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url).close()
    except urllib.error.URLError:
        return False
    return True


def photograph(address: str, candidate: int) -> None:
    """Today and a candidate on a desk, the candidate on a phone at night."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        raise SystemExit("no Chromium at hand: install Debian's package chromium")
    args = ["--no-sandbox"] if os.geteuid() == 0 else []
    one = f"/candidate/{candidate}"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=args)
        for name, where, width, height, scheme in (
            ("review-today", "/", 1280, 900, "light"),
            ("review-candidate", one, 1280, 930, "light"),
            ("review-phone", one, 390, 844, "dark"),
        ):
            page = browser.new_page(
                viewport={"width": width, "height": height}, color_scheme=scheme
            )
            page.goto(f"{address}/?token={TOKEN}")
            page.goto(address + where, wait_until="networkidle")
            save(page.screenshot(), IMG / f"{name}.png", SHRUNK if where == "/" else 1.0)
        browser.close()


def save(content: bytes, path: Path, scale: float) -> None:
    """Write a picture of as many colours as keep it small."""
    picture = Image.open(io.BytesIO(content)).convert("RGB")
    picture = picture.resize(
        [round(scale * side) for side in picture.size], Image.Resampling.LANCZOS
    )
    for colours in COLOURS:
        # Two rounds of k-means keep the page's own white
        picture.quantize(
            colours, Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE
        ).save(path, optimize=True)
        if path.stat().st_size <= MAX_BYTES:
            break
    log.info("%s: %d kB, %d colours", path.name, path.stat().st_size // 1000, colours)


if __name__ == "__main__":
    main()
