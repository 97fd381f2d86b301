"""The server: who may write, what is refused, and that nothing but the log can be reached."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import resource
import signal
import socket
import sqlite3
import threading
import time
import urllib.request
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from starlette.datastructures import ImmutableMultiDict
from tests.unit import synthetic_log

from blobpipe import cli
from blobpipe.errors import ServeError
from blobpipe.monitor import logbook, thumbnails
from blobpipe.review import pages, server
from blobpipe.review.server import (
    SESSION_S,
    SIGNED_IN,
    TOKEN_VARIABLE,
    Desk,
    Patient,
    _listen,
    _next_page,
    _token,
    make_application,
    serve,
)

TOKEN = "a-token-that-nobody-guesses"
SITE = "http://127.0.0.1:8000"


class Browser:
    """Asks the application as a browser would: with its cookies and, for forms, the origin."""

    def __init__(self, path: Path, names: tuple[str, ...] = ("127.0.0.1",)) -> None:
        self.application = make_application(path, TOKEN, names)
        self.cookies = httpx.Cookies()

    def ask(self, method: str, url: str, **more: Any) -> httpx.Response:
        return asyncio.run(self._ask(method, url, **more))

    async def _ask(self, method: str, url: str, **more: Any) -> httpx.Response:
        transport = httpx.ASGITransport(self.application, raise_app_exceptions=False)
        async with httpx.AsyncClient(
            transport=transport, base_url=SITE, cookies=self.cookies
        ) as client:
            answer = await client.request(method, url, **more)
            self.cookies = client.cookies
            return answer

    def get(self, url: str, **more: Any) -> httpx.Response:
        return self.ask("GET", url, **more)

    def post(self, url: str, form: dict[str, Any], **headers: str) -> httpx.Response:
        return self.ask("POST", url, data=form, headers={"Origin": SITE, **headers})

    def sign_in(self) -> Browser:
        assert self.get(f"/?token={TOKEN}").status_code == 303
        return self

    def form(self, **more: str) -> dict[str, str]:
        """A review as the form of a page sends it; signed in or not, with what the page holds."""
        html = self.get("/queue").text
        token, log = (
            (set(re.findall(f'name="{name}" value="([^"]+)"', html)) or {""}).pop()
            for name in ("form_token", "log")
        )
        return {
            "form_token": token,
            "log": log,
            "candidate": "1",
            "decision": "confirmed",
            "reviewer": "Ada",
            **more,
        }


@pytest.fixture(scope="module")
def shared_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("log") / "log.sqlite"
    synthetic_log.make_log(path, 120).close()
    return path


@pytest.fixture
def browser(shared_path: Path) -> Browser:
    return Browser(shared_path)


@pytest.fixture
def form(browser: Browser) -> dict[str, str]:
    """A review as the browser sends it, which is signed in by that."""
    return browser.sign_in().form()


def reviews(path: Path) -> list[sqlite3.Row]:
    return logbook.connect(path).execute("SELECT * FROM reviews ORDER BY id").fetchall()


@pytest.mark.parametrize(
    "url",
    [
        "/",
        "/queue",
        "/queue?show=rejected&page=7",
        "/candidate/1",
        "/image/3",
        "/image/120",
        "/images?name=1",
        "/map",
        "/timeline",
        "/picture/1",
        "/subframe/120/0/3",
        "/style.css",
        "/review.js",
        "/viewer.js",
        "/image/120/regions",
        "/queue?order=probability",
        "/map?sort=snr&decision=undecided&snr=3&first=2009-01-01",
        "/images?sort=-noise",
        "/images?sort=nothing",
    ],
)
def test_every_page_answers_with_the_security_headers(browser: Browser, url: str) -> None:
    answer = browser.get(url)
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "cache-control" in answer.headers


@pytest.mark.parametrize(
    "url",
    [
        "/nothing",
        "/candidate/999",
        "/candidate/x",
        "/image/9" * 2,
        f"/picture/{'9' * 30}",
        "/picture/-1",
        "/queue?show=x",
        "/picture/..%2f..%2fetc%2fpasswd",
        "/../etc/passwd",
        "/style.css/../store.sql",
        "/subframe/1/9/9",
        "/images?first=x",
        "/queue?order=x",
        "/map?snr=x",
        "/map?last=x",
        f"/candidate/{'9' * 5000}",
        "/store.sql",
        "/templates/base.html",
    ],
)
def test_what_is_not_there_is_a_plain_page(browser: Browser, url: str) -> None:
    answer = browser.get(url)
    assert answer.status_code == 404
    assert "<h1>Not Found</h1>" in answer.text
    assert "Traceback" not in answer.text


@pytest.mark.parametrize(
    ("day", "status"),
    [
        *(("0001-01-01", 200), ("9999-12-31", 200), ("2012-07-25", 200), ("", 200), ("%20", 200)),
        *(
            (day, 404)
            for day in (
                "2012-13-45",
                "2012-02-30",
                "0000-01-01",
                "-1",
                "10000-01-01",
                "NaN",
                "1e9",
                "2012-07",
            )
        ),
        *(
            (day, 404)
            for day in ("2012-07-25T00:00", "%00", "%FF", "2012-07-25%00x", "x" * 200)[:3]
        ),
    ],
)
def test_wrong_dates_are_told_and_do_no_harm(browser: Browser, day: str, status: int) -> None:
    expected = 200 if day == "%00" else status  # what cannot be printed is left out
    assert browser.get(f"/images?first={day}").status_code == expected
    answer = browser.get(f"/images?last={day}")
    assert answer.status_code == expected
    if expected == 404:
        assert "expected YYYY-MM-DD, as in 2021-08-31" in answer.text


@pytest.mark.parametrize(
    "query", ["page=-1", "page=x", "page=99999999999999999999", "name=%00", "name=" + "a" * 5000]
)
def test_odd_queries_do_no_harm(browser: Browser, query: str) -> None:
    assert browser.get(f"/images?{query}").status_code == 200


def test_a_fault_of_ours_tells_the_client_nothing(
    browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> str:
        raise RuntimeError("a secret path")

    monkeypatch.setattr(pages, "timeline", broken)
    answer = browser.get("/timeline")
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert "content-security-policy" in answer.headers


def test_a_log_that_is_gone_is_told_plainly(tmp_path: Path) -> None:
    answer = Browser(tmp_path / "none.sqlite").get("/")
    assert answer.status_code == 503
    assert str(tmp_path) not in answer.text


def test_pages_cannot_write(shared_path: Path) -> None:
    with (
        Desk(shared_path, TOKEN).reading() as connection,
        pytest.raises(sqlite3.OperationalError, match="readonly"),
    ):
        connection.execute("DELETE FROM reviews")


# ------------------------------------------------------------------------------------------------------- writing


def test_a_signed_in_reviewer_writes_a_review(tmp_path: Path) -> None:
    path = tmp_path / "log.sqlite"
    synthetic_log.make_log(path, 60).close()
    browser = Browser(path).sign_in()
    form = browser.form(reason="as round\nas one", then="queue-all-date-1", following="2")
    answer = browser.post("/review", form)
    assert answer.status_code == 303
    assert answer.headers["location"] == "/queue?show=all&order=date&page=1&done=1-1#candidate-2"
    [row] = reviews(path)
    assert tuple(row)[1:5] == (1, "confirmed", "Ada", "as round as one")
    page = browser.get(answer.headers["location"].split("#")[0]).text
    assert "Candidate 1: confirmed." in page
    assert 'name="reviewer" value="Ada"' in page


def decisions_of(path: Path) -> dict[int, str]:
    rows = logbook.connect(path).execute("SELECT id, decision FROM candidate_list")
    return {row["id"]: row["decision"] for row in rows}


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A log for writing; the pixels of its newest image are kept."""
    path = tmp_path / "log.sqlite"
    connection = synthetic_log.make_log(path, 120)
    synthetic_log.keep_pixels(connection, 120)
    connection.close()
    return path


def test_several_candidates_are_decided_at_once_and_undone(own: Path) -> None:
    browser = Browser(own).sign_in()
    before = decisions_of(own)
    form = browser.form(several="1", then="map-1", with_status="seen_again", decision="rejected")
    assert browser.post("/review", form | {"candidate": []}).status_code == 400
    answer = browser.post("/review", form | {"candidate": ["1", "3", "3"]})
    assert answer.headers["location"] == "/map?status=seen_again&page=1&done=1-2"
    assert decisions_of(own) == before | {1: "rejected", 3: "rejected"}
    page = browser.get(answer.headers["location"]).text
    assert "2 candidates (1, 3): rejected." in page

    undo = browser.form(done="1-2", candidate="")
    assert browser.post("/undo", undo).headers["location"] == "/queue?done=3-4"
    assert decisions_of(own) == before
    assert "2 candidates (1, 3): undecided again." in browser.get("/queue?done=3-4").text
    assert [row["reason"] for row in reviews(own)] == ["", "", "undone", "undone"]

    # what was decided on again since is left alone, and so is all that the form names beside it
    again = browser.post("/undo", undo)
    assert again.status_code == 409
    assert "Candidate 1 has been decided on again since" in again.text
    assert len(reviews(own)) == 4


@pytest.mark.parametrize("other", ["new", "copy"])
@pytest.mark.parametrize("url", ["/review", "/undo", "/missed"])
def test_a_page_of_a_log_that_was_replaced_decides_nothing_in_the_new_one(
    own: Path, tmp_path: Path, url: str, other: str
) -> None:
    browser = Browser(own).sign_in()
    form = browser.form(done="1-1", image="120", x_px="612", y_px="344")
    other_path = tmp_path / "other.sqlite"
    if other == "new":
        synthetic_log.make_log(other_path, 120, seed=2).close()
    else:
        with contextlib.closing(sqlite3.connect(other_path)) as copy:
            logbook.connect(own).backup(copy)
    os.replace(other_path, own)
    before = len(reviews(own))
    answer = browser.post(url, form)
    assert (answer.status_code, len(reviews(own))) == (409, before)
    assert "The log was replaced after this page was opened" in answer.text
    assert browser.post("/review", browser.form()).status_code == 303


def test_undoing_restores_the_decision_before(own: Path) -> None:
    browser = Browser(own).sign_in()
    for decision in ("unsure", "confirmed"):
        answer = browser.post("/review", browser.form(candidate="2", decision=decision))
    assert answer.headers["location"] == "/candidate/2?done=2-2#candidate-2"
    answer = browser.post("/undo", browser.form(done="2-2", candidate="2", reviewer="Grace"))
    assert answer.headers["location"] == "/candidate/2?done=3-3#candidate-2"
    assert (decisions_of(own)[2], reviews(own)[-1]["reviewer"]) == ("unsure", "Grace")
    assert "Candidate 2: unsure." in browser.get("/candidate/2?done=3-3").text


@pytest.mark.parametrize(
    ("done", "status"), [("", 400), ("1", 400), ("x-2", 400), ("1-", 400), ("900-999", 404)]
)
def test_undoing_nothing_is_told(own: Path, done: str, status: int) -> None:
    browser = Browser(own).sign_in()
    assert browser.post("/undo", browser.form(done=done)).status_code == status
    assert browser.get(f"/queue?done={done}").status_code == 200
    assert reviews(own) == []


def test_only_the_signed_in_undo_and_add(own: Path) -> None:
    browser = Browser(own)
    for path in ("/undo", "/missed"):
        assert browser.post(path, browser.form(done="1-1", image="120")).status_code == 403
    assert "No buttons: this browser is not signed in" in browser.get("/queue").text
    assert 'action="/missed"' not in browser.get("/image/120").text


def test_a_missed_blob_is_measured_confirmed_and_shown(own: Path) -> None:
    browser = Browser(own).sign_in()
    x, y = synthetic_log.MISSED
    form = browser.form(image="120", x_px=f"{x + 0.8:.1f}", y_px=f"{y - 0.7:.1f}", reason="faint")
    answer = browser.post("/missed", form)
    assert (answer.status_code, answer.headers["location"]) == (303, "/image/120?done=1-1")
    connection = logbook.connect(own)
    row = connection.execute("SELECT * FROM candidate_list ORDER BY id DESC LIMIT 1").fetchone()
    image = connection.execute("SELECT * FROM images WHERE id = 120").fetchone()
    assert row["x_px"] + image["shift_x_px"] == pytest.approx(x, abs=0.5)
    assert row["y_px"] + image["shift_y_px"] == pytest.approx(y, abs=0.5)
    assert row["depth_frac"] == pytest.approx(synthetic_log.DEPTH, rel=0.3)
    assert (row["decision"], row["reviewer"], row["added_by"]) == ("confirmed", "Ada", "Ada")
    assert 0 <= row["probability"] <= 1
    page = browser.get(f"/candidate/{row['id']}").text
    assert "missed by the search, added by Ada" in page
    assert len(re.findall(r'src="/picture/\d+"', page)) == 2

    # once only, and on the image only
    assert browser.post("/missed", form).status_code == 409
    for wrong, status in (
        ({"x_px": "1024"}, 409),
        ({"y_px": "nan"}, 400),
        ({"x_px": ""}, 400),
        ({"image": "x"}, 400),
        ({"image": "999"}, 404),
        ({"image": "1"}, 404),  # not searched
        ({"image": "100", "x_px": "500", "y_px": "500"}, 404),  # its pixels are not kept
        ({"reviewer": ""}, 400),
    ):
        assert browser.post("/missed", form | wrong).status_code == status, wrong
    assert len(reviews(own)) == 1


@pytest.mark.parametrize("plane", ["difference", "template", "image", "map"])
def test_pixels_are_sent_packed_and_once(own: Path, plane: str) -> None:
    browser = Browser(own)
    answer = browser.get(f"/pixels/120/{plane}", headers={"Accept-Encoding": "deflate"})
    assert answer.headers["content-encoding"] == "deflate"
    nx, ny, _ = thumbnails.HEADER.unpack_from(answer.content)
    side = 256 if plane == "map" else 1024
    assert (nx, ny) == (side, side)
    assert len(answer.content) == thumbnails.HEADER.size + 2 * side**2
    plain = browser.get(f"/pixels/120/{plane}", headers={"Accept-Encoding": "identity"})
    assert "content-encoding" not in plain.headers
    assert plain.content == answer.content
    tag = {"If-None-Match": answer.headers["etag"]}
    assert browser.get(f"/pixels/120/{plane}", headers=tag).status_code == 304

    # the same image that is searched anew has other pixels
    with logbook.connect(own) as log:
        log.execute("UPDATE images SET logged = '2024-06-01T00:00:00.000Z' WHERE id = 120")
    assert browser.get(f"/pixels/120/{plane}", headers=tag).status_code == 200


def test_the_template_is_the_image_less_the_difference(own: Path) -> None:
    def values(plane: str) -> Any:
        found = Browser(own).get(f"/pixels/120/{plane}").content
        return thumbnails.unpack(zlib.compress(found))

    image, step = values("image")
    difference, _ = values("difference")
    template, _ = values("template")
    assert np.isfinite(template).any()
    assert np.nanmax(np.abs(image - difference - template)) <= 2 * step


def test_pixels_that_are_gone_or_changed_are_told(own: Path) -> None:
    browser = Browser(own)
    for url in ("/pixels/119/difference", "/pixels/119/image", "/pixels/120/x", "/pixels/999/map"):
        assert browser.get(url).status_code == 404, url
    path = own.with_name("i0000120q_blob.fits")
    path.write_bytes(path.read_bytes() + b" ")
    answer = browser.get("/pixels/120/image")
    assert "The file of image 120 has changed since it was logged." in answer.text
    path.unlink()
    assert "No file of image 120 where the log saw it." in browser.get("/pixels/120/image").text
    assert str(own.parent) not in browser.get("/pixels/120/image").text
    assert browser.get("/pixels/120/difference").status_code == 200
    own.with_name("pixels").joinpath(f"{image_sha256(own)}.difference").write_bytes(b"torn")
    assert browser.get("/pixels/120/template").status_code == 404
    assert browser.get("/image/120").status_code == 200


def image_sha256(path: Path) -> str:
    row = logbook.connect(path).execute("SELECT sha256 FROM images WHERE id = 120").fetchone()
    return str(row["sha256"])


def test_regions_of_an_image_count_from_1(own: Path) -> None:
    browser = Browser(own)
    answer = browser.get("/image/120/regions")
    assert answer.headers["content-disposition"] == 'attachment; filename="image-120.reg"'
    connection = logbook.connect(own)
    found = connection.execute(
        "SELECT * FROM detections WHERE image = 120 AND candidate IS NOT NULL"
    ).fetchone()
    assert f"circle({found['x_px'] + 1:.4f},{found['y_px'] + 1:.4f}," in answer.text
    flt = browser.get("/image/120/regions?flt=1").text
    assert f"circle({found['x_px'] - 4:.4f},{found['y_px'] - 4:.4f}," in flt
    assert "tag={known}" in answer.text
    with logbook.writing(connection):
        connection.execute("UPDATE images SET nx_px = 800, ny_px = 600 WHERE id = 120")
    assert browser.get("/image/120/regions?flt=1").status_code == 404


def test_the_cookie_is_for_this_site_alone(browser: Browser) -> None:
    answer = browser.get(f"/?token={TOKEN}")
    cookie = answer.headers["set-cookie"].lower()
    assert answer.headers["location"] == "/"
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert TOKEN not in browser.get("/queue").text


def test_the_cookie_does_not_tell_the_token_and_ends(
    browser: Browser, shared_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = browser.sign_in().form()
    first = browser.cookies[SIGNED_IN]
    assert TOKEN not in str(browser.cookies.jar)
    # random: nothing to work the token out from
    assert browser.sign_in().cookies[SIGNED_IN] != first
    browser.cookies.set(SIGNED_IN, first, domain="127.0.0.1", path="/")
    other = Browser(shared_path)
    other.cookies.set(SIGNED_IN, first, domain="127.0.0.1")
    assert other.form()["form_token"] == ""  # another server, or this one started anew
    real = time.monotonic
    monkeypatch.setattr("time.monotonic", lambda: real() + SESSION_S + 1)
    assert browser.post("/review", form).status_code == 403
    desk = Desk(shared_path, TOKEN, sessions={"over": real()})
    desk.sign_in()
    assert "over" not in desk.sessions


def test_signing_out_ends_the_session_everywhere(browser: Browser, form: dict[str, str]) -> None:
    stolen = browser.cookies[SIGNED_IN]
    assert browser.post("/sign-out", {"form_token": "guess"}).status_code == 403
    assert browser.post("/sign-out", form, Origin="http://evil.example").status_code == 403
    answer = browser.post("/sign-out", form)
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    assert SIGNED_IN not in browser.cookies
    browser.cookies.set(SIGNED_IN, stolen, domain="127.0.0.1")
    assert browser.form()["form_token"] == ""
    assert browser.post("/review", form).status_code == 403
    assert browser.post("/sign-out", form).status_code == 403


def test_a_cookie_of_a_page_behind_tls_goes_over_tls_alone(browser: Browser) -> None:
    answer = Browser(Path("none"), ("blobs.example.org",)).post(
        "/sign-in", {"token": TOKEN}, Origin="https://blobs.example.org"
    )
    assert (answer.status_code, "Secure" in answer.headers["set-cookie"]) == (303, True)
    assert "Secure" not in browser.post("/sign-in", {"token": TOKEN}).headers["set-cookie"]


def test_signing_in_takes_the_token(browser: Browser) -> None:
    assert browser.get("/?token=guess").status_code == 403
    assert browser.post("/sign-in", {"token": "guess"}).status_code == 403
    assert 'name="form_token"' not in browser.get("/queue").text
    assert browser.post("/sign-in", {"token": TOKEN}).status_code == 303
    assert 'name="form_token"' in browser.get("/queue").text


def test_a_write_without_the_token_is_refused(
    browser: Browser, shared_path: Path, form: dict[str, str]
) -> None:
    before = len(reviews(shared_path))
    browser.cookies.clear()
    assert browser.post("/review", form).status_code == 403  # the form's token alone
    for guess in ("guess", "", TOKEN):
        browser.cookies.set(SIGNED_IN, guess, domain="127.0.0.1")
        assert browser.post("/review", form).status_code == 403
        assert browser.post("/review", form | {"form_token": ""}).status_code == 403
    browser.cookies.clear()
    browser.sign_in()
    assert browser.post("/review", form).status_code == 403  # of another session
    form = browser.form()
    assert browser.post("/review", form | {"form_token": "guess"}).status_code == 403
    assert (
        browser.post("/review", {k: v for k, v in form.items() if k != "form_token"}).status_code
        == 403
    )
    assert len(reviews(shared_path)) == before


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "null",
        "",
        "http://127.0.0.1:9",
        "http://127.0.0.1:8000.evil.example",
        "http://127.0.0.1:8000@evil.example",
        "http://evil.example#127.0.0.1:8000",
        "http://evil.example\\@127.0.0.1:8000",
        "http://[::1",
        "http://[::1]:x",
        "http://",
        "://127.0.0.1:8000",
        "ftp://127.0.0.1:8000",
        "127.0.0.1:8000",
        "http://127.0.0.1:8000/",
    ],
)
def test_a_form_of_another_site_is_refused(
    browser: Browser, shared_path: Path, form: dict[str, str], origin: str
) -> None:
    before = len(reviews(shared_path))
    assert browser.post("/review", form, Origin=origin).status_code == 403
    assert browser.ask("POST", "/review", data=form).status_code == 403  # none at all
    assert len(reviews(shared_path)) == before


# Host and Origin as the server sees them when the browser is at https://blobs.example.org...
PROXIES = {
    "host and port passed on": ("blobs.example.org:8443", "https://blobs.example.org:8443"),
    "host without its port": ("blobs.example.org", "https://blobs.example.org:8443"),
    "nginx as it comes": ("127.0.0.1:8000", "https://blobs.example.org"),
    "nginx as it comes, port 80": ("127.0.0.1", "http://blobs.example.org:80"),
    "port written out in Host": ("blobs.example.org:443", "https://blobs.example.org"),
    "port written out in Origin": ("blobs.example.org", "https://blobs.example.org:443"),
    "upper case": ("Blobs.Example.ORG", "https://blobs.example.org"),
    "upper case in both": ("BLOBS.example.org:8443", "https://Blobs.Example.org:8443"),
    "the root's dot": ("blobs.example.org.", "https://blobs.example.org."),
    "its Unicode name": ("xn--blb-tna.example", "https://xn--blb-tna.example:444"),
    "a tunnel": ("localhost:9000", "http://localhost:9000"),
    "a proxy on the same machine": ("127.0.0.1:80", "http://127.0.0.1"),
}


@pytest.mark.parametrize("how", PROXIES)
def test_it_works_behind_a_proxy_for_the_names_given(shared_path: Path, how: str) -> None:
    host, origin = PROXIES[how]
    browser = Browser(shared_path, ("127.0.0.1", "Blobs.example.org", "blöb.example"))
    assert browser.get("/", headers={"Host": host}).status_code == 200
    answer = browser.post("/sign-in", {"token": TOKEN}, Host=host, Origin=origin)
    assert (answer.status_code, answer.headers["location"]) == (303, "/")


def test_what_a_proxy_must_pass_on_is_said(browser: Browser) -> None:
    answer = browser.post("/sign-in", {"token": TOKEN}, Origin="https://blobs.example.org")
    assert answer.status_code == 403
    assert "its owner can give the name in the browser&#39;s address with --name" in answer.text
    answer = browser.get("/", headers={"Host": "backend"})
    assert "or let the proxy in front of it pass on the Host of the browser" in answer.text


@pytest.mark.parametrize(
    "host",
    [
        *(
            "evil.example",
            "127.0.0.1.evil.example:8000",
            "",
            "[::1",
            "192.168.0.1",
            "localhost/evil",
            "evil@localhost",
        ),
        *(
            "localhost:x",
            "localhost:123456",
            "localhost#",
            "localhost?",
            "localhost localhost",
            "localhost\\",
            ":80",
        ),
    ],
)
def test_another_name_of_the_server_is_refused(browser: Browser, host: str) -> None:
    answer = browser.get("/queue", headers={"Host": host})
    assert answer.status_code == 421
    assert "content-security-policy" in answer.headers


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1", "[::1]:8000", "LOCALHOST"])
def test_its_own_names_are_not(browser: Browser, host: str) -> None:
    assert browser.get("/", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    ("wrong", "status"),
    [
        ({"decision": "deleted"}, 400),
        ({"candidate": "1; DROP TABLE reviews"}, 400),
        ({"candidate": "99999"}, 404),
        ({"reviewer": "  "}, 400),
        ({"reason": "x" * 20_000}, 413),
        ({"candidate": "9" * 18}, 404),
        ({"candidate": "\N{SUPERSCRIPT TWO}"}, 400),
        ({f"field{number}": "x" for number in range(30)} | {"decision": "deleted"}, 400),
    ],
)
def test_a_form_that_says_nonsense_is_refused(
    browser: Browser, shared_path: Path, form: dict[str, str], wrong: dict[str, str], status: int
) -> None:
    before = len(reviews(shared_path))
    answer = browser.post("/review", form | wrong)
    assert (answer.status_code, len(reviews(shared_path))) == (status, before)


@pytest.mark.parametrize("number", [21, 5000])
def test_more_fields_than_ours_do_no_harm(browser: Browser, number: int) -> None:
    more = {f"f{each}": "" for each in range(number)}
    assert browser.post("/sign-in", {"token": TOKEN, **more}).status_code == (
        303 if number < 5000 else 413
    )
    assert browser.post("/sign-in", more).status_code == (403 if number < 5000 else 413)


def test_only_forms_are_read(browser: Browser, form: dict[str, str]) -> None:
    headers = {"Origin": SITE, "Content-Type": "text/plain"}
    assert browser.ask("POST", "/review", content=b"a=b", headers=headers).status_code == 415
    assert browser.ask("PUT", "/review").status_code == 405


def test_the_next_page_is_always_one_of_ours(form: dict[str, str]) -> None:
    def led(**more: str) -> str:
        return _next_page(ImmutableMultiDict(form | more), 3, "done=7-7")

    for then in (
        *("//evil.example", "queue-all-date-//evil", "queue-x-date-1", "queue-all-x-1"),
        *("queue-all-date-1-2", "queue-all-1", "map-//evil", "map", ""),
    ):
        assert led(then=then) == "/candidate/3?done=7-7#candidate-3"
    odd = led(then="queue-unsure-snr-2", following="javascript:alert(1)")
    assert odd == "/queue?show=unsure&order=snr&page=2&done=7-7"
    typed = led(then="map-2", with_decision="unsure", with_snr="5&page=9#x", with_sort="//evil")
    assert typed == "/map?decision=unsure&snr=5%26page%3D9%23x&sort=%2F%2Fevil&page=2&done=7-7"


def test_a_picture_is_sent_once(browser: Browser) -> None:
    answer = browser.get("/picture/1")
    assert answer.headers["content-type"] == "image/png"
    again = browser.get("/picture/1", headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


# ------------------------------------------------------------------------------------- a log that is held or broken


@contextlib.contextmanager
def running(path: Path) -> Iterator[int]:
    """The port of the real server in a thread."""
    application = make_application(path, TOKEN, ())
    config = uvicorn.Config(
        application, port=0, http=Patient, ws="none", log_config=None, access_log=False
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)


@pytest.fixture
def own_path(tmp_path: Path) -> Path:
    synthetic_log.make_log(tmp_path / "log.sqlite", 60).close()
    return tmp_path / "log.sqlite"


N_POSTS = 45  # more than the threads of the server's pool


@contextlib.contextmanager
def posting(port: int) -> Iterator[list[Any]]:
    """Reviews on their way, each by a connection of its own; after the block, their answers."""
    site = f"http://127.0.0.1:{port}"
    with httpx.Client(base_url=site) as client, ThreadPoolExecutor(N_POSTS) as people:
        client.get("/", params={"token": TOKEN})
        html = client.get("/queue").text
        token, log = (
            re.findall(f'name="{name}" value="([^"]+)"', html)[0] for name in ("form_token", "log")
        )
        cookie = f"{SIGNED_IN}={client.cookies[SIGNED_IN]}"
        form = {"form_token": token, "log": log, "candidate": "1", "decision": "unsure"}
        form["reviewer"] = "Ada"

        def post(number: int) -> httpx.Response:
            headers = {"Origin": site, "Cookie": cookie}
            return httpx.post(
                f"{site}/review", data=form | {"reason": str(number)}, headers=headers, timeout=30
            )

        answers = [people.submit(post, number) for number in range(N_POSTS)]
        yield answers


def test_reading_stays_fast_while_many_reviews_wait_for_the_log(
    own_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logbook, "PATIENCE_S", 20.0)
    with running(own_path) as port, contextlib.ExitStack() as held:
        held.enter_context(logbook.writing(logbook.connect(own_path)))
        with posting(port) as answers:
            time.sleep(1.0)  # until all of them wait
            for page in ("/", "/queue", "/picture/1", "/style.css"):
                start = time.monotonic()
                urllib.request.urlopen(f"http://127.0.0.1:{port}{page}", timeout=30).read()
                assert time.monotonic() - start < 10.0
            assert [answer.result() for answer in answers if answer.done()] == []
            held.close()
        assert {answer.result().status_code for answer in answers} == {303}
    assert sorted(int(row["reason"]) for row in reviews(own_path)) == list(range(N_POSTS))


def test_a_review_that_the_log_does_not_take_is_refused_plainly(
    own_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logbook, "PATIENCE_S", 0.2)
    held = logbook.connect(own_path)
    with running(own_path) as port, logbook.writing(held), posting(port) as answers:
        for answer in answers:
            assert answer.result().status_code == 503
            assert "nothing was kept. Go back and try again." in answer.result().text
            assert "log.sqlite" not in answer.result().text
    assert reviews(own_path) == []


def test_a_disk_that_gives_up_is_no_fault_of_ours(
    own_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    browser = Browser(own_path).sign_in()
    form = browser.form()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        answers = [browser.post("/review", form), browser.post("/review", form)]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert [answer.status_code for answer in answers] == [503, 503]
    assert "log.sqlite: " in caplog.text
    assert reviews(own_path) == []
    assert browser.post("/review", form).status_code == 303
    assert len(reviews(own_path)) == 1


def test_a_log_that_breaks_while_it_is_served_is_told_plainly(own_path: Path) -> None:
    browser = Browser(own_path)
    content = own_path.read_bytes()
    own_path.write_bytes(content[:8192] + b"\xff" * (len(content) - 8192))
    for page in ("/", "/queue", "/image/3", "/timeline", "/map"):
        assert browser.get(page).status_code == 503


# ------------------------------------------------------------------------------------------------- half a request

POST = (
    b"POST /sign-in HTTP/1.1\r\nHost: localhost\r\nOrigin: http://localhost\r\n"
    b"Content-Type: application/x-www-form-urlencoded\r\nContent-Length: 1000\r\n\r\ntoken="
)
HALVES = {
    "nothing": (b"", b""),
    "half a line": (b"GET / HT", b""),
    "a dripping line": (b"GET /", b"x"),
    "half of the headers": (b"GET / HTTP/1.1\r\nHost: local", b""),
    "dripping headers": (b"GET / HTTP/1.1\r\n", b"X: y\r\n"),
    "half a form": (POST, b""),
    "a dripping form": (POST, b"x"),
    "a page with half a body": (
        b"GET /style.css HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nx",
        b"x",
    ),
    "a second request": (b"GET /style.css HTTP/1.1\r\nHost: localhost\r\n\r\nGET / HT", b"T"),
}


@pytest.mark.parametrize("half", HALVES)
def test_a_request_that_is_sent_by_halves_is_closed(
    own_path: Path, monkeypatch: pytest.MonkeyPatch, half: str
) -> None:
    monkeypatch.setattr(server, "REQUEST_S", 1.0)
    first, drop = HALVES[half]
    with running(own_path) as port, socket.create_connection(("127.0.0.1", port)) as connection:
        start = time.monotonic()
        connection.settimeout(0.05)
        connection.sendall(first)
        heard = b""
        open_ = True
        while open_ and time.monotonic() - start < 20:
            try:
                connection.sendall(drop)
                said = connection.recv(65536)
                heard = heard + said
                open_ = bool(said)
            except TimeoutError:
                pass
            except OSError:
                open_ = False
        assert not open_
        assert (b" 408 " in heard) == ("form" in half)
        assert (b" 200 " in heard) == (half in ("a page with half a body", "a second request"))


def test_whole_requests_are_not_closed(own_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*_: object) -> str:
        time.sleep(1.5)
        return "at last"

    monkeypatch.setattr(server, "REQUEST_S", 1.0)
    monkeypatch.setattr(pages, "timeline", slow)
    with running(own_path) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        assert client.get("/timeline").text == "at last"
        for _ in range(3):
            time.sleep(0.5)
            assert client.get("/style.css").status_code == 200


# ------------------------------------------------------------------------------------------------------- starting


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the server would be started with."""
    calls: list[dict[str, Any]] = []

    def start(server: uvicorn.Server, sockets: list[Any]) -> None:
        calls.append({"place": sockets, "access_log": server.config.access_log})

    monkeypatch.setattr("uvicorn.Server.run", start)
    monkeypatch.setattr("blobpipe.review.server._listen", lambda *place: place)
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    return calls


def test_a_token_is_made_up_on_the_loopback_address(
    shared_path: Path, started: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    serve(shared_path)
    assert started[0]["place"] == ("127.0.0.1", 8000)
    assert started[0]["access_log"] is False  # it would hold the token
    [address] = [
        message for message in caplog.messages if "http://127.0.0.1:8000/?token=" in message
    ]
    assert len(address.split("token=")[1]) >= 32


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.2", "::", "blobs.example.org"])
def test_others_can_reach_it_only_with_a_token(
    shared_path: Path,
    started: list[dict[str, Any]],
    host: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(
        ServeError, match="BLOBPIPE_TOKEN: found a token of 0 characters, expected 16 or more"
    ):
        serve(shared_path, host=host)
    token_file = tmp_path / "token"
    token_file.write_text("short\n")
    with pytest.raises(ServeError, match="token: found a token of 5 characters"):
        serve(shared_path, host=host, token_file=token_file)
    assert not started
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    serve(shared_path, host=host)
    assert started[0]["place"] == (host, 8000)


FILES = {
    "two lines": (b"%s\nanother-token-1234\n", "found 2 lines, expected one, the token"),
    "UTF-16": ("%s".encode("utf-16"), "found bytes that are not UTF-8"),
    "Latin-1": (b"%s\xfc", "found bytes that are not UTF-8"),
    "NUL": (b"%s\0x", "characters that cannot be typed"),
    "blank": (b" \n\t\n", "found a token of 0 characters, expected 16 or more"),
    "empty": (b"", "found a token of 0 characters, expected 16 or more"),
    "short": (b"\xef\xbb\xbfshort", "found a token of 5 characters"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_token_file_that_holds_none_has_its_reason_and_shows_nothing(
    shared_path: Path,
    started: list[dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    content, reason = FILES[kind]
    path = tmp_path / "token"
    path.write_bytes(
        content.replace(b"%s", TOKEN.encode()).replace(
            "%s".encode("utf-16-le"), TOKEN.encode("utf-16-le")
        )
    )
    assert cli.main(["serve", "--log", str(shared_path), "--token-file", str(path)]) == 1
    err = capsys.readouterr().err
    assert f"{path}: {reason}" in err or (str(path) in err and reason in err)
    assert err.count("\n") == 1
    assert TOKEN[:6] not in err
    assert "0x" not in err
    assert not started


@pytest.mark.parametrize("kind", ["missing", "a folder", "unreadable"])
def test_a_token_file_that_cannot_be_read_has_its_reason(
    shared_path: Path,
    started: list[dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    path = tmp_path / ("x" * 300 if kind == "unreadable" else "token")
    if kind == "a folder":
        path.mkdir()
    assert cli.main(["serve", "--log", str(shared_path), "--token-file", str(path)]) == 1
    expected = {
        "missing": "No such file",
        "a folder": "Is a directory",
        "unreadable": "File name too long",
    }[kind]
    err = capsys.readouterr().err
    assert f"{path}: {expected}" in err
    assert err.count("\n") == 1
    assert not started


@pytest.mark.parametrize("content", ["\ufeff{}", "{}\r\n", "  {}  ", "\n{}\n\n"])
def test_a_token_file_may_have_a_mark_and_blank_lines(tmp_path: Path, content: str) -> None:
    path = tmp_path / "token"
    path.write_bytes(content.format(TOKEN).encode())
    assert _token("0.0.0.0", path) == (TOKEN, False)


def test_a_token_of_the_environment_that_is_not_utf_8_is_refused(
    shared_path: Path, started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", os.environ | {TOKEN_VARIABLE: f"{TOKEN}\udcfc"})
    with pytest.raises(
        ServeError, match=r"BLOBPIPE_TOKEN: found a token with characters that cannot be typed"
    ):
        serve(shared_path)


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        *(
            ("--port", port, f"--port: found {port}, expected a number from 1 to 65535")
            for port in ("99999", "-1", "0")
        ),
        *(("--host", host, "--host: found") for host in ("x" * 300, "a..b", "a b", "http://a", "")),
        *(
            ("--name", name, "--name: found")
            for name in ("x" * 300, "https://a.example", "a.example:8443", "")
        ),
    ],
)
def test_what_cannot_be_served_has_its_reason(
    shared_path: Path,
    started: list[dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    option: str,
    value: str,
    reason: str,
) -> None:
    assert cli.main(["serve", "--log", str(shared_path), f"{option}={value}"]) == 1
    err = capsys.readouterr().err
    assert reason in err
    assert err.count("\n") == 1
    assert not started


def test_connections_send_the_body_of_a_page_at_once() -> None:
    """Nagle's algorithm would hold it back for 40 ms, until the browser acknowledges the headers."""
    [listening] = _listen("127.0.0.1", 0)
    with listening, socket.create_connection(listening.getsockname()):
        connection, _ = listening.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_port_in_use_is_one_line(
    shared_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert cli.main(["serve", "--log", str(shared_path), "--port", str(port)]) == 1
    said = (
        f"port {port} is in use by another program, expected a free one; name another with --port"
    )
    assert capsys.readouterr().err == f"blobpipe: {said}\n"
    assert "http://" not in caplog.text


def test_a_host_that_is_not_of_this_machine_is_refused() -> None:
    # Of the addresses that are kept for documentation; RFC 5737
    with pytest.raises(ServeError, match=r"--host: found 192\.0\.2\.1 \(.+\), expected an address"):
        _listen("192.0.2.1", 8000)


def test_the_address_of_the_form_leads_to_the_queue(browser: Browser) -> None:
    answer = browser.get("/review")
    assert (answer.status_code, answer.headers["location"]) == (303, "/queue")


def test_a_token_that_was_given_is_not_told(
    shared_path: Path,
    started: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    assert cli.main(["serve", "--log", str(shared_path), "--port", "8123"]) == 0
    assert started[0]["place"] == ("127.0.0.1", 8123)
    assert TOKEN not in caplog.text


def test_a_page_is_written_from_the_command_line(shared_path: Path, tmp_path: Path) -> None:
    for which in ([], ["--all"], ["--date", "2009-08-29"]):
        out = tmp_path / f"page{len(which)}{which[:1]}.html"
        assert cli.main(["page", "--log", str(shared_path), "--out", str(out), *which]) == 0
        assert out.read_text().startswith("<!doctype html>")


def test_a_missing_extra_is_named(
    shared_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "blobpipe.review.server", None)
    assert cli.main(["serve", "--log", str(shared_path)]) == 1
    assert "pip install 'blobpipe[serve]'" in capsys.readouterr().err
