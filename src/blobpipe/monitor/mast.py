"""CSM-monitor exposures from MAST: found by date, downloaded so that a cut download goes on, and checked."""

from __future__ import annotations

import logging
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import quote

from blobpipe.core import files, tables
from blobpipe.core.detector import MJD_ZERO
from blobpipe.errors import ArchiveError

if TYPE_CHECKING:
    from requests import Response

log = logging.getLogger(__name__)

CRITERIA = {
    "obs_collection": "HST",
    "instrument_name": "WFC3/IR",
    "filters": "F153M",
    "target_name": "DARK-EARTH-CALIB",
}
PRODUCT = "FLT"
# not hst_..._flt.fits, which are the same pixels once more
FILE_NAME = re.compile(r"i[a-z0-9]{8}_flt\.fits")
DOWNLOAD = "/api/v0.1/Download/file"
OBSERVATIONS = 200  # to a question for their files
WAITS_S = (1.0, 4.0, 16.0, 60.0)  # before each further attempt
TIMEOUT_S = 60.0  # without a byte
CHUNK = 1 << 16  # bytes: so much is lost when a download is cut
# of the answers that say that the request is at fault, these are worth another attempt
PASSING = (408, 429)
MANIFEST = "manifest.csv"
COLUMNS = ("file", "uri", "size_bytes", "sha256")

Answer = TypeVar("Answer")


class Exposure(NamedTuple):
    """A calibrated exposure that MAST has: file name, MAST's name for it, and its length."""

    file: str
    uri: str
    size_bytes: int


def find_exposures(start: date, end: date) -> list[Exposure]:
    """The calibrated monitor exposures (FLT, F153M, dark Earth) that began on given days, by file name.

    Parameters
    ----------
    start, end : date
        First and last day (UTC), both included.

    Raises
    ------
    ArchiveError
        If the days are the wrong way round, astroquery is not installed, or MAST does not answer or answers with an error.
    """
    if end < start:
        raise ArchiveError(
            f"found --start {start} after --end {end}, expected the earlier day first; swap them"
        )
    first, last = ((day - MJD_ZERO.date()).days for day in (start, end))
    portal = _portal()
    ids = _ask(
        lambda: [
            str(row["obsid"]) for row in portal.query_criteria(**CRITERIA, t_min=[first, last + 1])
        ]
    )
    exposures: dict[str, Exposure] = {}
    for place in range(0, len(ids), OBSERVATIONS):
        some = ids[place : place + OBSERVATIONS]
        found = _ask(lambda some=some: list(_exposures(portal.get_product_list(some))))  # type: ignore[misc]
        exposures |= {exposure.file: exposure for exposure in found}
    return [exposures[file] for file in sorted(exposures)]


def _portal() -> Any:
    try:
        from astroquery.mast import Observations
    except ImportError as error:
        raise ArchiveError(
            f"{error}, expected astroquery for access to the archive; pip install 'blobpipe[mast]'"
        ) from error
    return Observations


def _ask(question: Callable[[], Answer]) -> Answer:
    """Ask MAST's portal, and read what it answers; that nothing is found is an answer, too."""
    from astroquery.exceptions import InvalidQueryError, NoResultsWarning, RemoteServiceError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NoResultsWarning)
            return _patiently(question, "the list of exposures")
    except (
        InvalidQueryError,
        RemoteServiceError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
    ) as error:
        raise ArchiveError(
            f"MAST answered with an error ({_one_line(error)}), expected a list of exposures; try again later"
        ) from error


def _exposures(products: Any) -> Iterator[Exposure]:
    for row in products:
        file = str(row["productFilename"])
        if str(row["productSubGroupDescription"]) == PRODUCT and FILE_NAME.fullmatch(file):
            uri = str(row["dataURI"])
            size = str(row["size"])
            for name, there in (("dataURI", uri.startswith("mast:")), ("size", size.isdecimal())):
                if not there:
                    raise ArchiveError(
                        f"{file}: MAST lists it without its {name}, expected all of its name, address and size; "
                        "try again later"
                    )
            yield Exposure(file, uri, int(size))


def fetch(exposures: Sequence[Exposure], out_dir: str | Path) -> list[str]:
    """Download exposures that are not there yet, and write ``manifest.csv``: file, uri, size_bytes, sha256.

    A file counts as there if it has the length that MAST gives, and the checksum that the manifest has from its download.
    What has come of a file is kept as ``{file}.part`` until it is whole; a further call goes on from there.

    Parameters
    ----------
    exposures : sequence of Exposure
    out_dir : path

    Returns
    -------
    list of str
        A line for each exposure that could not be had.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    manifest = _read_manifest(out_dir)
    failed = []
    for number, exposure in enumerate(exposures, start=1):
        path = out_dir / exposure.file
        digest = _digest_if_whole(path, exposure, manifest.get(exposure.file))
        try:
            if not digest:
                _patiently(partial(_download, exposure, path), str(path))
                digest = files.sha256(path)
                log.info(
                    "%s: %.1f MB, %d of %d", path, exposure.size_bytes / 1e6, number, len(exposures)
                )
        except ArchiveError as error:
            failed.append(str(error))
            continue
        manifest[exposure.file] = [*exposure, digest]
        _write_manifest(out_dir, manifest)
    return failed


def _read_manifest(out_dir: Path) -> dict[str, list[Any]]:
    path = out_dir / MANIFEST
    if not path.exists():
        return {}
    rows = tables.read_table(path, COLUMNS)[list(COLUMNS)].values.tolist()
    for row in rows:
        files.require_name(str(row[0]), f"{path}: file")
    return {str(row[0]): row for row in rows}


def _write_manifest(out_dir: Path, manifest: dict[str, list[Any]]) -> None:
    import pandas as pd

    tables.write_table(
        out_dir / MANIFEST,
        pd.DataFrame([manifest[file] for file in sorted(manifest)], columns=COLUMNS),
    )


def _digest_if_whole(path: Path, exposure: Exposure, known: list[Any] | None) -> str:
    """SHA-256 of a file that is as MAST has it and as it came; empty if it must be fetched."""
    if not path.exists():
        return ""
    digest = files.sha256(path)
    if path.stat().st_size == exposure.size_bytes and (known is None or known[-1] == digest):
        return digest
    log.warning("%s: not the bytes that were fetched, or MAST has others now; fetched again", path)
    return ""


def _download(exposure: Exposure, path: Path) -> None:
    """One attempt at a file; what came before the connection was cut stays, for the next one."""
    import requests

    part, tag = (path.with_name(path.name + suffix) for suffix in (".part", ".part.etag"))
    if not part.exists() or part.stat().st_size < exposure.size_bytes:
        _transfer(exposure, part, tag)
    found = part.stat().st_size
    if found != exposure.size_bytes:
        # the server thinks that this was all: going on from it would make another file
        part.unlink()
        raise requests.RequestException(f"{found} bytes came, {exposure.size_bytes} expected")
    os.replace(part, path)
    tag.unlink(missing_ok=True)


def _transfer(exposure: Exposure, part: Path, tag: Path) -> None:
    import requests
    from astroquery.mast import conf

    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    if have and tag.exists():
        headers["If-Range"] = tag.read_text()  # if the file has changed since, all of it comes
    url = f"{conf.server}{DOWNLOAD}?uri={quote(exposure.uri, safe=':/')}"
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_S) as answer:
        answer.raise_for_status()
        start = _first_byte(answer, exposure, have)
        if "ETag" in answer.headers:
            tag.write_text(answer.headers["ETag"])
        with part.open("ab" if start else "wb") as file:
            for chunk in answer.iter_content(CHUNK):
                file.write(chunk)


def _first_byte(answer: Response, exposure: Exposure, have: int) -> int:
    """Where an answer goes on: at ``have``, or at 0 from a server that does not know of ranges.

    Raises
    ------
    ArchiveError
        If it goes on elsewhere, or the whole has another length than MAST's list says.
    """
    start = 0
    total = answer.headers.get("Content-Length", "")
    if answer.status_code == 206:
        said = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))
        start, total = (int(said[1]), said[2].strip("*")) if said else (-1, "")
    if start not in (0, have) or (total and int(total) != exposure.size_bytes):
        raise ArchiveError(
            f"{exposure.file}: the server offers {total or '?'} bytes from byte {start}, expected "
            f"{exposure.size_bytes} as in MAST's list from byte {have} or 0; try again later"
        )
    return start


def _patiently(work: Callable[[], Answer], what: str) -> Answer:
    """Do what needs the network; after a failure that may pass, again, with growing pauses.

    Raises
    ------
    ArchiveError
        If the last attempt fails too, or the server says that there is no use in another.
    """
    import requests

    for wait_s in (*WAITS_S, None):
        try:
            return work()
        except (requests.RequestException, TimeoutError) as error:
            if wait_s is None or _is_final(error):
                raise ArchiveError(
                    f"{what}: {_one_line(error)}, expected an answer of MAST; try again later"
                ) from error
            log.warning("%s: %s; again in %g s", what, _one_line(error), wait_s)
            time.sleep(wait_s)
    raise AssertionError


def _is_final(error: Exception) -> bool:
    answer = getattr(error, "response", None)
    return (
        answer is not None and 400 <= answer.status_code < 500 and answer.status_code not in PASSING
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
