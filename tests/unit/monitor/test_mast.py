"""Access to the archive, against a server of our own that speaks the protocols of MAST and fails on purpose.

Its answers are written after the documented Mashup protocol and astroquery's reading of it; beside them stand those
that astroquery has recorded from MAST for its own tests, where it is installed with them.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
import pytest
import requests

from blobpipe import cli
from blobpipe.core.detector import DEFAULT
from blobpipe.errors import ArchiveError
from blobpipe.monitor import mast as client
from blobpipe.monitor.mast import Exposure

pytest.importorskip(
    "astroquery", reason="astroquery is not installed: pip install 'blobpipe[mast]'"
)

MJD = 56_197  # 2012-09-27
DAY = date(2012, 9, 27)
assert DEFAULT.archive is not None
CRITERIA = DEFAULT.archive.criteria
COLUMNS_CONFIG = {name: {"vot.datatype": "char", "separator": ";"} for name in CRITERIA} | {
    "t_min": {"vot.datatype": "double"}
}
FIELDS = {
    "Mast.Caom.Filtered": [
        *({"name": name, "type": "string"} for name in ("obsid", *CRITERIA)),
        {"name": "t_min", "type": "float"},
    ],
    "Mast.Caom.Products": [
        *({"name": name, "type": "string"} for name in ("obsID", "productFilename", "dataURI")),
        {"name": "productSubGroupDescription", "type": "string"},
        {"name": "size", "type": "int"},
    ],
}


def content(name: str, n_bytes: int = 300_000) -> bytes:
    return np.random.default_rng([*name.encode()]).bytes(n_bytes)


def file_name(number: int) -> str:
    return f"ibxy{number:02d}z8q_flt.fits"


FILES = {file_name(number): content(file_name(number)) for number in range(3)}


@dataclass
class Request:
    """What came in: path with its query, headers, and of questions to the portal the service and its parameters."""

    path: str
    headers: dict[str, str]
    service: str = ""
    params: dict[str, object] = field(default_factory=dict)


class Mast(ThreadingHTTPServer):
    """A night of MAST: three monitor exposures on three days, and others that nobody asked for.

    ``faults`` are played first, one to a request for a file; ``answers`` likewise, one to a question.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.requests: list[Request] = []
        self.faults: list[Callable[[Handler, bytes], None]] = []
        self.answers: list[Callable[[Handler], None]] = []
        self.files = dict(FILES)
        self.columns: object = COLUMNS_CONFIG
        self.etag = '"first"'
        wanted = [dict(CRITERIA, obsid=str(1000 + i), t_min=MJD + i + 0.3) for i in range(3)]
        others = [
            {"filters": "F140W"},
            {"target_name": "GJ-1214"},
            {"instrument_name": "WFC3/UVIS"},
        ]
        self.observations = wanted + [wanted[0] | other | {"obsid": "9"} for other in others]

    def products(self, ids: list[str]) -> list[dict[str, object]]:
        rows = [row for number in ids for row in self._products_of(int(number) - 1000)]
        return [*rows, *rows[:1]]  # one exposure belongs to an association too

    def _products_of(self, number: int) -> list[dict[str, object]]:
        name = file_name(number)
        again = f"hst_13068_0{number}_wfc3_ir_f153m_{name}"
        rows = [
            (name, "FLT"),
            (again, "FLT"),
            (name.replace("_flt", "_ima"), "IMA"),
            ("../../etc_flt.fits", "FLT"),
        ]
        size = len(FILES[name])
        return [
            {
                "obsID": str(1000 + number),
                "productFilename": file,
                "dataURI": f"mast:HST/product/{file}",
            }
            | {"productSubGroupDescription": kind, "size": size}
            for file, kind in [*rows, ("preview.jpg", None)]
        ]

    def asked_for_files(self) -> list[Request]:
        return [request for request in self.requests if client.DOWNLOAD in request.path]


class Handler(BaseHTTPRequestHandler):
    server: Mast

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if self.path.endswith("/columnsconfig"):
            return self.say(json.dumps(self.server.columns))
        asked = json.loads(unquote(body.removeprefix("request=")))
        self.server.requests.append(
            Request(self.path, dict(self.headers), asked["service"], asked["params"])
        )
        if self.server.answers:
            return self.server.answers.pop(0)(self)
        return self.say_table(asked["service"], self.rows(asked["service"], asked["params"]))

    def rows(self, service: str, params: dict[str, object]) -> list[dict[str, object]]:
        if service == "Mast.Caom.Products":
            return self.server.products(str(params["obsid"]).split(","))
        rows = self.server.observations
        for each in params["filters"]:  # type: ignore[attr-defined]
            name = each["paramName"]
            (first, *_) = each["values"]
            if isinstance(first, dict):
                rows = [row for row in rows if first["min"] <= row[name] <= first["max"]]
            else:
                rows = [row for row in rows if row[name] in each["values"]]
        return rows

    def do_GET(self) -> None:
        self.server.requests.append(Request(self.path, dict(self.headers)))
        [uri] = parse_qs(urlsplit(self.path).query)["uri"]
        data = self.server.files.get(uri.removeprefix("mast:HST/product/"))
        if self.server.faults:
            self.server.faults.pop(0)(self, data or b"")
        elif data is None:
            self.send_error(404)
        else:
            self.send_file(data)

    def send_file(
        self,
        data: bytes,
        *,
        whole: bool = False,
        until: int | None = None,
        length: int | None = None,
    ) -> None:
        """A file or the rest of it; not more than ``until`` bytes of it if the connection is to be cut."""
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        changed = self.headers.get("If-Range", self.server.etag) != self.server.etag
        start = 0 if whole or changed else start
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        if length != 0:
            self.send_header("Content-Length", str(length or len(data) - start))
        self.send_header("ETag", self.server.etag)
        self.end_headers()
        self.wfile.write(data[start:until])

    def say(self, text: str, status: int = 200) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def say_table(self, service: str, rows: list[dict[str, object]]) -> None:
        paging = {"page": 1, "pageSize": 50000, "pagesFiltered": 1, "rows": len(rows)}
        self.say(
            json.dumps(
                {
                    "status": "COMPLETE",
                    "msg": "",
                    "data": rows,
                    "fields": FIELDS[service],
                    "paging": paging,
                }
            )
        )


def cut(n_bytes: int) -> Callable[[Handler, bytes], None]:
    return lambda handler, data: handler.send_file(data, until=n_bytes)


def refuse(status: int) -> Callable[[Handler, bytes], None]:
    return lambda handler, _: handler.send_error(status)


def ignore_range(handler: Handler, data: bytes) -> None:
    handler.send_file(data, whole=True)


@pytest.fixture
def mast(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mast]:
    """The server, running, in the place of MAST; no pause between attempts."""
    from astroquery.mast import conf
    from astroquery.mast.discovery_portal import PortalAPI

    server = Mast()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setattr(PortalAPI, "MAST_REQUEST_URL", f"{server.url}/api/v0/invoke")
    monkeypatch.setattr(
        PortalAPI, "COLUMNS_CONFIG_URL", f"{server.url}/portal/Mashup/Mashup.asmx/columnsconfig"
    )
    monkeypatch.setattr(PortalAPI, "_column_configs", {})
    monkeypatch.setattr(client, "WAITS_S", (0.0, 0.0, 0.0, 0.0))
    with conf.set_temp("server", server.url):
        yield server
    server.shutdown()
    server.server_close()
    thread.join()


def exposure(number: int) -> Exposure:
    name = file_name(number)
    return Exposure(name, f"mast:HST/product/{name}", len(FILES[name]))


EXPOSURES = [exposure(number) for number in range(3)]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_all_there(folder: Path, files: dict[str, bytes] = FILES) -> None:
    assert names(folder) == [*sorted(files), client.MANIFEST]
    for name, data in files.items():
        assert (folder / name).read_bytes() == data


# The list


def test_exposures_are_found_by_date(mast: Mast) -> None:
    assert client.find_exposures(DAY, date(2012, 9, 29)) == EXPOSURES
    assert client.find_exposures(DAY, DAY) == EXPOSURES[:1]
    assert client.find_exposures(date(2012, 9, 28), date(2012, 9, 29)) == EXPOSURES[1:]
    filters = mast.requests[0].params["filters"]
    asked = {each["paramName"]: each["values"] for each in filters}  # type: ignore[attr-defined]
    assert asked == {name: [value] for name, value in CRITERIA.items()} | {
        "t_min": [{"min": MJD, "max": MJD + 3}]
    }


def test_nothing_found_is_no_fault(mast: Mast) -> None:
    assert client.find_exposures(date(2001, 1, 1), date(2001, 1, 2)) == []
    mast.answers = [
        lambda handler: handler.say_table("Mast.Caom.Filtered", mast.observations[:1]),
        lambda handler: handler.say_table("Mast.Caom.Products", []),
    ]
    assert client.find_exposures(DAY, DAY) == []


def test_many_observations_are_asked_for_in_parts(
    mast: Mast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "OBSERVATIONS", 2)
    assert client.find_exposures(DAY, date(2012, 9, 29)) == EXPOSURES
    asked = [
        request.params["obsid"]
        for request in mast.requests
        if request.service == "Mast.Caom.Products"
    ]
    assert asked == ["1000,1001", "1002"]


def test_a_question_may_take_its_time_and_fail_once(mast: Mast) -> None:
    mast.answers = [
        lambda handler: handler.say(json.dumps({"status": "EXECUTING"})),
        lambda handler: handler.send_error(503),
        lambda handler: handler.say("<html>not JSON</html>"),
    ]
    assert client.find_exposures(DAY, DAY) == EXPOSURES[:1]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"status": "ERROR", "msg": "Unable to log\nonto server"}, "Unable to log onto server"),
        ({"status": "COMPLETE", "msg": ""}, "Missing required key"),
    ],
)
def test_an_answer_with_an_error_is_told(mast: Mast, answer: dict[str, str], words: str) -> None:
    mast.answers = [lambda handler: handler.say(json.dumps(answer))]
    with pytest.raises(ArchiveError, match=rf"MAST answered with an error \(.*{words}.*\)"):
        client.find_exposures(DAY, DAY)


def test_a_server_that_stays_away_is_told(mast: Mast) -> None:
    mast.answers = [lambda handler: handler.send_error(503)] * 9
    with pytest.raises(ArchiveError, match=r"the list of exposures: 503 .*try again later"):
        client.find_exposures(DAY, DAY)
    assert len(mast.requests) == 5


def test_days_the_wrong_way_round() -> None:
    with pytest.raises(ArchiveError, match="--start 2012-09-28 after --end 2012-09-27"):
        client.find_exposures(date(2012, 9, 28), DAY)


def test_without_astroquery_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "astroquery.mast", None)
    with pytest.raises(ArchiveError, match=r"pip install 'blobpipe\[mast\]'"):
        client.find_exposures(DAY, DAY)


# The list, in MAST's own words


@pytest.fixture
def recorded(mast: Mast) -> Callable[[str], dict[str, Any]]:
    """Answers of MAST that astroquery has recorded; its columns are those of the server."""
    import astroquery.mast

    folder = Path(astroquery.mast.__file__).parent / "tests" / "data"
    if not (folder / "caom.json").exists():
        pytest.skip(
            "astroquery is installed without the answers of MAST that it has recorded for its tests"
        )

    def answer(name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((folder / name).read_text())
        return found

    mast.columns = answer("columnsconfig.json")
    return answer


def play(mast: Mast, *answers: dict[str, Any]) -> None:
    mast.answers = [partial(Handler.say, text=json.dumps(answer)) for answer in answers]


@pytest.mark.parametrize("observations", ["caom.json", "advSearch.json"])
def test_recorded_answers_of_mast_are_read(
    mast: Mast, recorded: Callable[[str], dict[str, Any]], observations: str
) -> None:
    found = recorded(observations)
    play(mast, found, recorded("products.json"))
    assert client.find_exposures(DAY, DAY) == []  # WFPC2's: c0m, c1m and the like
    first, second = mast.requests
    asked = {each["paramName"]: each["values"] for each in first.params["filters"]}  # type: ignore[attr-defined]
    assert asked == {name: [value] for name, value in CRITERIA.items()} | {
        "t_min": [{"min": MJD, "max": MJD + 1}]
    }
    assert second.params["obsid"] == ",".join(str(row["obsid"]) for row in found["data"])


def test_exposures_are_found_among_recorded_products(
    mast: Mast, recorded: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    """The recorded table, with two of its rows made those of exposures, and gaps where MAST leaves some."""
    products = recorded("products.json")
    rows = products["data"]
    for row, wanted in zip(rows[3:5], EXPOSURES, strict=False):
        row |= {"productSubGroupDescription": "FLT", "productFilename": wanted.file}
        row |= {"dataURI": wanted.uri, "size": wanted.size_bytes}
    rows[7] |= {"productSubGroupDescription": "FLT", "productFilename": None}
    rows[8] |= {"productSubGroupDescription": None, "size": None, "dataURI": None}
    play(mast, recorded("caom.json"), products)
    found = client.find_exposures(DAY, DAY)
    assert found == EXPOSURES[:2]
    assert client.fetch(found, tmp_path) == []
    assert_all_there(tmp_path, {wanted.file: FILES[wanted.file] for wanted in found})


@pytest.mark.parametrize("gap", ["size", "dataURI"])
def test_an_exposure_that_mast_lists_by_halves_is_told(
    mast: Mast, recorded: Callable[[str], dict[str, Any]], gap: str
) -> None:
    products = recorded("products.json")
    wanted = EXPOSURES[0]
    products["data"][3] |= {
        "productSubGroupDescription": "FLT",
        "productFilename": wanted.file,
        "dataURI": wanted.uri,
    }
    products["data"][3][gap] = None
    play(mast, recorded("caom.json"), products)
    with pytest.raises(
        ArchiveError, match=rf"{wanted.file}: MAST lists it without its {gap}, expected all of "
    ):
        client.find_exposures(DAY, DAY)


def test_an_empty_recorded_answer_is_no_fault(
    mast: Mast, recorded: Callable[[str], dict[str, Any]]
) -> None:
    play(mast, recorded("caom.json") | {"data": []})
    assert client.find_exposures(DAY, DAY) == []


@pytest.mark.parametrize(
    "answer",
    [
        {},
        [],
        None,
        {"status": "COMPLETE", "msg": "", "data": None, "fields": None, "paging": None},
        {"status": "COMPLETE", "msg": "", "data": [{}], "fields": [], "paging": {}},
        {
            "status": "COMPLETE",
            "msg": "",
            "data": [{"obsid": 1}],
            "fields": [{"name": "other", "type": "int"}],
        },
    ],
)
def test_an_answer_of_another_shape_is_one_line(mast: Mast, answer: Any) -> None:
    mast.answers = [lambda handler: handler.say(json.dumps(answer))] * 9
    with pytest.raises(
        ArchiveError, match=r"MAST answered with an error|expected an answer of MAST"
    ):
        client.find_exposures(DAY, DAY)


# The files


def test_files_and_manifest_and_nothing_twice(mast: Mast, tmp_path: Path) -> None:
    assert client.fetch(EXPOSURES, tmp_path) == []
    assert_all_there(tmp_path)
    lines = (tmp_path / client.MANIFEST).read_text().splitlines()
    assert lines == ["file,uri,size_bytes,sha256"] + [
        f"{name},mast:HST/product/{name},{len(data)},{hashlib.sha256(data).hexdigest()}"
        for name, data in FILES.items()
    ]
    before = (tmp_path / client.MANIFEST).read_bytes()
    assert client.fetch(EXPOSURES, tmp_path) == []
    assert (tmp_path / client.MANIFEST).read_bytes() == before
    assert len(mast.asked_for_files()) == 3


def test_a_cut_download_goes_on_where_it_was_cut(mast: Mast, tmp_path: Path) -> None:
    mast.faults = [cut(200_000)]
    assert client.fetch(EXPOSURES[:1], tmp_path) == []
    assert_all_there(tmp_path, {file_name(0): FILES[file_name(0)]})
    first, second = mast.asked_for_files()
    assert "Range" not in first.headers
    have = int(second.headers["Range"].removeprefix("bytes=").removesuffix("-"))
    assert 200_000 - client.CHUNK < have <= 200_000
    assert second.headers["If-Range"] == mast.etag


def test_the_next_run_goes_on_too(mast: Mast, tmp_path: Path) -> None:
    mast.faults = [cut(150_000), *[refuse(503)] * 4]
    [line] = client.fetch(EXPOSURES[:1], tmp_path)
    assert f"{tmp_path / file_name(0)}: 503" in line
    assert names(tmp_path) == [f"{file_name(0)}.part", f"{file_name(0)}.part.etag"]
    assert client.fetch(EXPOSURES[:1], tmp_path) == []
    assert int(mast.asked_for_files()[-1].headers["Range"][6:-1]) > 0
    assert_all_there(tmp_path, {file_name(0): FILES[file_name(0)]})


def test_a_server_may_ignore_ranges(mast: Mast, tmp_path: Path) -> None:
    mast.faults = [cut(200_000), ignore_range]
    assert client.fetch(EXPOSURES[:1], tmp_path) == []
    assert_all_there(tmp_path, {file_name(0): FILES[file_name(0)]})


def test_a_file_that_changed_meanwhile_is_not_patched_together(mast: Mast, tmp_path: Path) -> None:
    name = file_name(0)
    new = content("calibrated anew")

    def cut_and_calibrate_anew(handler: Handler, data: bytes) -> None:
        handler.send_file(data, until=200_000)
        mast.files[name], mast.etag = new, '"second"'

    mast.faults = [cut_and_calibrate_anew]
    assert client.fetch(EXPOSURES[:1], tmp_path) == []
    assert (tmp_path / name).read_bytes() == new


def test_what_had_come_whole_before_a_crash_is_not_asked_for(mast: Mast, tmp_path: Path) -> None:
    (tmp_path / f"{file_name(0)}.part").write_bytes(FILES[file_name(0)])
    # renamed, but not yet in the manifest
    (tmp_path / file_name(1)).write_bytes(FILES[file_name(1)])
    assert client.fetch(EXPOSURES[:2], tmp_path) == []
    assert mast.asked_for_files() == []
    assert_all_there(tmp_path, {file_name(number): FILES[file_name(number)] for number in range(2)})


@pytest.mark.parametrize("length", [299_000, 301_000])
def test_a_file_of_another_length_than_listed_is_refused(
    mast: Mast, tmp_path: Path, length: int
) -> None:
    mast.files[file_name(0)] = content("other", length)
    [line] = client.fetch(EXPOSURES, tmp_path)
    assert f"{file_name(0)}: the server offers {length} bytes from byte 0, expected 300000" in line
    assert names(tmp_path) == [file_name(1), file_name(2), client.MANIFEST]


@pytest.mark.parametrize("length", [1_000, 301_000])
def test_an_answer_that_names_no_length_is_measured(
    mast: Mast, tmp_path: Path, length: int
) -> None:
    """An error page with status 200, say: it must not become the beginning of a file."""
    mast.faults = [lambda handler, _: handler.send_file(content("page", length), length=0)]
    assert client.fetch(EXPOSURES[:1], tmp_path) == []
    assert_all_there(tmp_path, {file_name(0): FILES[file_name(0)]})
    assert "Range" not in mast.asked_for_files()[-1].headers


def test_an_answer_that_goes_on_elsewhere_is_refused(mast: Mast, tmp_path: Path) -> None:
    def elsewhere(handler: Handler, data: bytes) -> None:
        handler.send_response(206)
        handler.send_header("Content-Range", f"bytes 7-{len(data) - 1}/{len(data)}")
        handler.end_headers()

    mast.faults = [cut(200_000), elsewhere]
    [line] = client.fetch(EXPOSURES[:1], tmp_path)
    assert "300000 bytes from byte 7, expected 300000" in line
    assert not (tmp_path / file_name(0)).exists()


@pytest.mark.parametrize("status", [503, 500, 429])
def test_an_unavailable_server_is_asked_again(mast: Mast, tmp_path: Path, status: int) -> None:
    mast.faults = [refuse(status)] * 4
    assert client.fetch(EXPOSURES[:1], tmp_path) == []
    assert len(mast.asked_for_files()) == 5


def test_pauses_grow(mast: Mast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the real pauses
    assert list(client.WAITS_S) == sorted(set(client.WAITS_S))
    slept: list[float] = []
    monkeypatch.setattr(client.time, "sleep", slept.append)

    def fail() -> None:
        raise requests.ConnectionError("nobody there")

    with pytest.raises(
        ArchiveError, match="a file: nobody there, expected an answer of MAST; try again later"
    ):
        client._patiently(fail, "a file")
    assert slept == list(client.WAITS_S)


def without_a_network(*_: object, **__: object) -> None:
    raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")


def test_without_a_network_the_list_is_not_waited_for(
    mast: Mast, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(client.time, "sleep", slept.append)
    monkeypatch.setattr(socket, "getaddrinfo", without_a_network)
    with pytest.raises(ArchiveError) as caught:
        client.find_exposures(DAY, DAY)
    assert str(caught.value) == (
        "the list of exposures: Temporary failure in name resolution, expected an answer of MAST; check the network, "
        "then try again"
    )
    assert slept == []


def test_a_network_that_fails_during_a_download_is_waited_for(
    mast: Mast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def back(_: float) -> None:
        monkeypatch.undo()

    monkeypatch.setattr(client.time, "sleep", back)
    monkeypatch.setattr(socket, "getaddrinfo", without_a_network)
    assert client.fetch(EXPOSURES[:1], tmp_path) == []


def test_what_is_missing_is_listed_and_the_rest_goes_on(mast: Mast, tmp_path: Path) -> None:
    del mast.files[file_name(1)]
    [line] = client.fetch(EXPOSURES, tmp_path)
    assert file_name(1) in line
    assert "404" in line
    assert len(mast.asked_for_files()) == 3  # there is no use in asking again
    assert names(tmp_path) == [file_name(0), file_name(2), client.MANIFEST]


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda data: data[:-1]]
)
def test_a_damaged_file_is_fetched_again(
    mast: Mast, tmp_path: Path, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    client.fetch(EXPOSURES, tmp_path)
    (tmp_path / file_name(1)).write_bytes(damage(FILES[file_name(1)]))
    assert client.fetch(EXPOSURES, tmp_path) == []
    assert f"{file_name(1)}: not the bytes that were downloaded" in caplog.text
    assert_all_there(tmp_path)
    assert len(mast.asked_for_files()) == 4


# The command


def fetch_command(folder: Path, *more: str) -> list[str]:
    return ["fetch", "--start", "2012-09-27", "--end", "2012-09-29", "--out", str(folder), *more]


def test_the_command_lists_or_fetches(
    mast: Mast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "flt"
    assert cli.main(fetch_command(folder, "--dry-run")) == 0
    assert capsys.readouterr().out.splitlines() == [f"{name} 0.3 MB" for name in FILES]
    assert not folder.exists()
    assert mast.asked_for_files() == []
    assert cli.main(fetch_command(folder)) == 0
    assert capsys.readouterr().out == f"3 of 3 exposures are in {folder}\n"
    assert_all_there(folder)


def test_the_command_fails_if_a_file_fails(
    mast: Mast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del mast.files[file_name(2)]
    assert cli.main(fetch_command(tmp_path)) == 1
    out, err = capsys.readouterr()
    assert out == f"2 of 3 exposures are in {tmp_path}\n"
    [line] = err.splitlines()
    assert line.startswith(f"blobpipe: {tmp_path / file_name(2)}: 404")


def test_a_day_that_is_none_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["fetch", "--start", "2012-02-30", "--end", "2012-03-01", "--out", "x"])
    assert "2012-02-30 is no day, expected YYYY-MM-DD" in capsys.readouterr().err


def test_another_server_may_be_named_in_astroquerys_own_settings(
    mast: Mast, tmp_path: Path
) -> None:
    """The command as users run it, in a process of its own: no warning, no other address."""
    settings = tmp_path / "settings" / "astropy"
    settings.mkdir(parents=True)
    (settings / "astroquery.cfg").write_text(f"[mast]\nserver = {mast.url}\n")
    environment = os.environ | {
        "XDG_CONFIG_HOME": str(settings.parent),
        "XDG_CACHE_HOME": str(tmp_path),
    }
    command = [sys.executable, "-W", "error", "-m", "blobpipe", *fetch_command(tmp_path / "flt")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"3 of 3 exposures are in {tmp_path / 'flt'}\n"
    assert_all_there(tmp_path / "flt")
