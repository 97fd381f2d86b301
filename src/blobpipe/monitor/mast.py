"""Find the exposures of the monitor in MAST by date, download them resumably, and verify them."""

from __future__ import annotations

import logging
import os
import re
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import quote

from blobpipe.core import files, tables
from blobpipe.core.detector import DEFAULT, MJD_ZERO, Archive, Detector
from blobpipe.errors import ArchiveError

if TYPE_CHECKING:
    from requests import Response

log = logging.getLogger(__name__)

DOWNLOAD = "/api/v0.1/Download/file"  # path on MAST's server
OBSERVATIONS = 200  # observations in one query for their files
WAITS_S = (1.0, 4.0, 16.0, 60.0)  # pause (s) before each further attempt
TIMEOUT_S = 60.0  # longest time (s) without a byte
CHUNK = 1 << 16  # bytes written at a time, and lost when a download is cut
PASSING = (408, 429)  # HTTP codes from 400 to 499 that are worth another attempt
MANIFEST = "manifest.csv"
COLUMNS = ("file", "uri", "size_bytes", "sha256")

Answer = TypeVar("Answer")


class Exposure(NamedTuple):
    """Describe a calibrated exposure in MAST: file name, MAST's address of it, and its length in bytes."""

    file: str
    uri: str
    size_bytes: int


# --------------------------------------------------------------------------------------------------------- search


def find_exposures(start: date, end: date, detector: Detector = DEFAULT) -> list[Exposure]:
    """Find the calibrated exposures of a detector's monitor that began on given days.

    Parameters
    ----------
    start, end : date
        First and last day (UTC), both included.
    detector : Detector, optional
        Says which exposures of MAST are those of its monitor.

    Returns
    -------
    list of Exposure
        By file name.

    Raises
    ------
    ArchiveError
        If the detector names no archive, the days are in the wrong order, astroquery is not installed, or MAST does not answer or answers with an
        error.
    """
    archive = detector.archive
    if archive is None:
        raise ArchiveError(
            f"{detector.title}: its file names no archive, expected the criteria of MAST; fill in its section archive"
        )
    if end < start:
        raise ArchiveError(
            f"found --start {start} after --end {end}, expected the earlier day first; swap them"
        )
    try:
        from astroquery.mast import Observations
    except ImportError as error:
        raise ArchiveError(
            f"{error}, expected astroquery for access to the archive; pip install 'blobpipe[mast]'"
        ) from error

    # the whole of the last day counts
    first_mjd = (start - MJD_ZERO.date()).days
    last_mjd = (end - MJD_ZERO.date()).days + 1

    def observations() -> list[str]:
        rows = Observations.query_criteria(**archive.criteria, t_min=[first_mjd, last_mjd])
        return [str(row["obsid"]) for row in rows]

    def products(ids: list[str]) -> list[Exposure]:
        return list(_exposures(Observations.get_product_list(ids), archive))

    # a few observations at a time, as their numbers go into the query; a file listed twice is one
    ids = _ask(observations)
    exposures: dict[str, Exposure] = {}
    for place in range(0, len(ids), OBSERVATIONS):
        found = _ask(partial(products, ids[place : place + OBSERVATIONS]))
        exposures |= {exposure.file: exposure for exposure in found}
    return [exposures[file] for file in sorted(exposures)]


def _ask(query: Callable[[], Answer]) -> Answer:
    """Query MAST's portal and read its answer; an empty answer is no error."""
    from astroquery.exceptions import InvalidQueryError, NoResultsWarning, RemoteServiceError

    # what astroquery raises for answers that it does not understand
    misunderstood = (
        InvalidQueryError,
        RemoteServiceError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NoResultsWarning)
            return _patiently(query, "the list of exposures", offline=False)
    except misunderstood as error:
        raise ArchiveError(
            f"MAST answered with an error ({_one_line(error)}), expected a list of exposures; try again later"
        ) from error


def _exposures(products: Any, archive: Archive) -> Iterator[Exposure]:
    """Pick the calibrated exposures from MAST's table of products."""
    for row in products:
        file = str(row["productFilename"])
        is_calibrated = str(row["productSubGroupDescription"]) == archive.product
        if not is_calibrated or not re.fullmatch(archive.file_name, file):
            continue

        # MAST may list a file whose address or size it does not know
        uri = str(row["dataURI"])
        size = str(row["size"])
        known = {"dataURI": uri.startswith("mast:"), "size": size.isdecimal()}
        for name, is_known in known.items():
            if not is_known:
                raise ArchiveError(
                    f"{file}: MAST lists it without its {name}, expected all of its name, address and size; "
                    "try again later"
                )
        yield Exposure(file, uri, int(size))


# ------------------------------------------------------------------------------------------------------- download


def fetch(exposures: Sequence[Exposure], out_dir: str | Path) -> list[str]:
    """Download exposures, and write ``manifest.csv``: file, uri, size_bytes, sha256.

    A file is not downloaded again if it has the length that MAST gives and the checksum that the manifest has from its
    download. A partial download is kept as ``{file}.part``; the next call continues it.

    Parameters
    ----------
    exposures : sequence of Exposure
    out_dir : path
        Made if it does not exist.

    Returns
    -------
    list of str
        One line for each exposure that could not be downloaded.
    """
    import pandas as pd

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
                size_mb = exposure.size_bytes / 1e6
                log.info("%s: %.1f MB, %d of %d", path, size_mb, number, len(exposures))
        except ArchiveError as error:
            failed.append(str(error))
            continue
        # written after each file, so that a killed run downloads none of them twice
        manifest[exposure.file] = [*exposure, digest]
        rows = [manifest[file] for file in sorted(manifest)]
        tables.write_table(out_dir / MANIFEST, pd.DataFrame(rows, columns=COLUMNS))
    return failed


def _read_manifest(out_dir: Path) -> dict[str, list[Any]]:
    """Read the rows of a manifest by file name; none if there is no manifest."""
    path = out_dir / MANIFEST
    if not path.exists():
        return {}
    rows = tables.read_table(path, COLUMNS)[list(COLUMNS)].values.tolist()
    for row in rows:
        files.require_name(str(row[0]), f"{path}: file")
    return {str(row[0]): row for row in rows}


def _digest_if_whole(path: Path, exposure: Exposure, known: list[Any] | None) -> str:
    """Return the SHA-256 of a file that is complete and unchanged; empty if it must be downloaded."""
    if not path.exists():
        return ""
    digest = files.sha256(path)
    is_complete = path.stat().st_size == exposure.size_bytes
    is_unchanged = known is None or known[-1] == digest
    if is_complete and is_unchanged:
        return digest
    log.warning(
        "%s: not the bytes that were downloaded, or MAST has a new version; downloaded again", path
    )
    return ""


def _download(exposure: Exposure, path: Path) -> None:
    """Try once to download a file; what arrived before a cut stays for the next attempt."""
    import requests

    part = path.with_name(f"{path.name}.part")
    tag = path.with_name(f"{path.name}.part.etag")
    if not part.exists() or part.stat().st_size < exposure.size_bytes:
        _transfer(exposure, part, tag)
    found = part.stat().st_size
    if found != exposure.size_bytes:
        # the server took this for all of it: continuing from here would make another file
        part.unlink()
        raise requests.RequestException(
            f"received {found} bytes, expected {exposure.size_bytes} bytes"
        )
    os.replace(part, path)
    tag.unlink(missing_ok=True)


def _transfer(exposure: Exposure, part: Path, tag: Path) -> None:
    """Request what is missing of a file and append it to what is there."""
    import requests
    from astroquery.mast import conf

    # uncompressed, so that bytes can be counted; and from where the last attempt ended
    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        # a file that has changed since is sent from its beginning
        if tag.exists():
            headers["If-Range"] = tag.read_text()

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
    """Return the byte an answer begins with: ``have``, or 0 from a server that does not support ranges.

    Raises
    ------
    ArchiveError
        If it begins elsewhere, or the length of the whole is not that of MAST's list.
    """
    start = 0
    total = answer.headers.get("Content-Length", "")

    # 206: a part of the file, whose place and total length are in a header of their own
    if answer.status_code == 206:
        content_range = answer.headers.get("Content-Range", "")
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", content_range)
        start = int(found[1]) if found else -1
        total = found[2].strip("*") if found else ""

    is_other_length = bool(total) and int(total) != exposure.size_bytes
    if start not in (0, have) or is_other_length:
        raise ArchiveError(
            f"{exposure.file}: the server offers {total or '?'} bytes from byte {start}, expected "
            f"{exposure.size_bytes} bytes as in MAST's list from byte {have} or 0; try again later"
        )
    return start


# -------------------------------------------------------------------------------------------------------- retries


def _patiently(work: Callable[[], Answer], what: str, *, offline: bool = True) -> Answer:
    """Do something that needs the network, and repeat it with growing pauses after a failure that may pass.

    Parameters
    ----------
    work : callable
    what : str
        For messages.
    offline : bool
        Also wait for a network that is not there, as in the middle of a long download.

    Raises
    ------
    ArchiveError
        If the last attempt fails too, or the server's answer makes another pointless.
    """
    import requests

    # no pause follows the last attempt
    for wait_s in (*WAITS_S, None):
        try:
            return work()
        except (requests.RequestException, TimeoutError) as error:
            name_failure = _name_failure(error)
            if name_failure and not offline:
                raise ArchiveError(
                    f"{what}: {name_failure}, expected an answer of MAST; check the network, then try again"
                ) from error
            if wait_s is None or _is_final(error):
                raise ArchiveError(
                    f"{what}: {_one_line(error)}, expected an answer of MAST; try again later"
                ) from error
            log.warning("%s: %s; again in %g s", what, _one_line(error), wait_s)
            time.sleep(wait_s)
    raise AssertionError


def _name_failure(error: BaseException | None) -> str:
    """Say why the server's name could not be resolved; empty if that was not the reason of an error."""
    while error is not None:
        if isinstance(error, socket.gaierror):
            return error.strerror or str(error)
        error = error.__cause__ or error.__context__
    return ""


def _is_final(error: Exception) -> bool:
    """Tell whether the server has refused a request in a way that will not change."""
    answer = getattr(error, "response", None)
    if answer is None:
        return False
    return 400 <= answer.status_code < 500 and answer.status_code not in PASSING


def _one_line(error: Exception) -> str:
    """Return the first 200 characters of an error's message on one line."""
    return " ".join(str(error).split())[:200]
