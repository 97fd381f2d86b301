"""The server: who may write, what is refused, and that nothing but the log can be reached."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.unit import synthetic_log

from blobpipe import cli, pages, serve, store
from blobpipe.errors import ServeError

TOKEN = "a-token-that-nobody-guesses"
SITE = "http://127.0.0.1:8000"


class Browser:
    """Asks the application as a browser would: with its cookies and, for forms, the origin."""

    def __init__(self, path: Path) -> None:
        self.application = serve.make_application(path, TOKEN, ("127.0.0.1",))
        self.cookies = httpx.Cookies()

    def ask(self, method: str, url: str, **more: Any) -> httpx.Response:
        return asyncio.run(self._ask(method, url, **more))

    async def _ask(self, method: str, url: str, **more: Any) -> httpx.Response:
        transport = httpx.ASGITransport(self.application, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url=SITE, cookies=self.cookies) as client:
            answer = await client.request(method, url, **more)
            self.cookies = client.cookies
            return answer

    def get(self, url: str, **more: Any) -> httpx.Response:
        return self.ask("GET", url, **more)

    def post(self, url: str, form: dict[str, str], **headers: str) -> httpx.Response:
        return self.ask("POST", url, data=form, headers={"Origin": SITE, **headers})

    def sign_in(self) -> Browser:
        assert self.get(f"/?token={TOKEN}").status_code == 303
        return self


@pytest.fixture(scope="module")
def shared_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("log") / "log.sqlite"
    synthetic_log.make_log(path, 120).close()
    return path


@pytest.fixture
def browser(shared_path: Path) -> Browser:
    return Browser(shared_path)


@pytest.fixture
def form(shared_path: Path) -> dict[str, str]:
    desk = serve.Desk(shared_path, TOKEN)
    return {"form_token": desk.form_token, "candidate": "1", "decision": "confirmed", "reviewer": "Ada"}


def reviews(path: Path) -> list[sqlite3.Row]:
    return store.connect(path).execute("SELECT * FROM reviews ORDER BY id").fetchall()


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


@pytest.mark.parametrize("query", ["page=-1", "page=x", "page=99999999999999999999", "name=%00", "name=" + "a" * 5000])
def test_odd_queries_do_no_harm(browser: Browser, query: str) -> None:
    assert browser.get(f"/images?{query}").status_code == 200


def test_a_fault_of_ours_tells_the_client_nothing(browser: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
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
        serve.Desk(shared_path, TOKEN).reading() as connection,
        pytest.raises(sqlite3.OperationalError, match="readonly"),
    ):
        connection.execute("DELETE FROM reviews")


# ------------------------------------------------------------------------------------------------------- writing


def test_a_signed_in_reviewer_writes_a_review(tmp_path: Path, form: dict[str, str]) -> None:
    path = tmp_path / "log.sqlite"
    synthetic_log.make_log(path, 60).close()
    browser = Browser(path).sign_in()
    form |= {"reason": "as round\nas one", "then": "queue-all-1", "following": "2"}
    answer = browser.post("/review", form)
    assert answer.status_code == 303
    assert answer.headers["location"] == "/queue?show=all&page=1&candidate=1&decision=confirmed#candidate-2"
    [row] = reviews(path)
    assert tuple(row)[1:5] == (1, "confirmed", "Ada", "as round as one")
    page = browser.get(answer.headers["location"].split("#")[0]).text
    assert "Candidate 1: confirmed." in page
    assert 'name="reviewer" value="Ada"' in page


def test_the_cookie_is_for_this_site_alone(browser: Browser) -> None:
    answer = browser.get(f"/?token={TOKEN}")
    cookie = answer.headers["set-cookie"].lower()
    assert answer.headers["location"] == "/"
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert TOKEN not in browser.get("/queue").text


def test_signing_in_takes_the_token(browser: Browser) -> None:
    assert browser.get("/?token=guess").status_code == 403
    assert browser.post("/sign-in", {"token": "guess"}).status_code == 403
    assert 'name="form_token"' not in browser.get("/queue").text
    assert browser.post("/sign-in", {"token": TOKEN}).status_code == 303
    assert 'name="form_token"' in browser.get("/queue").text


def test_a_write_without_the_token_is_refused(browser: Browser, shared_path: Path, form: dict[str, str]) -> None:
    before = len(reviews(shared_path))
    assert browser.post("/review", form).status_code == 403  # the form's token alone
    browser.cookies.set(serve.SIGNED_IN, "guess", domain="127.0.0.1")
    assert browser.post("/review", form).status_code == 403
    browser.cookies.clear()
    browser.sign_in()
    assert browser.post("/review", form | {"form_token": "guess"}).status_code == 403
    assert browser.post("/review", {k: v for k, v in form.items() if k != "form_token"}).status_code == 403
    assert len(reviews(shared_path)) == before


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "", "http://127.0.0.1:9", "http://127.0.0.1:8000.evil.example"]
)
def test_a_form_of_another_site_is_refused(
    browser: Browser, shared_path: Path, form: dict[str, str], origin: str
) -> None:
    before = len(reviews(shared_path))
    assert browser.sign_in().post("/review", form, Origin=origin).status_code == 403
    assert browser.ask("POST", "/review", data=form).status_code == 403  # none at all
    assert len(reviews(shared_path)) == before


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:8000", "", "[::1", "192.168.0.1"])
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
    ],
)
def test_a_form_that_says_nonsense_is_refused(
    browser: Browser, shared_path: Path, form: dict[str, str], wrong: dict[str, str], status: int
) -> None:
    before = len(reviews(shared_path))
    answer = browser.sign_in().post("/review", form | wrong)
    assert (answer.status_code, len(reviews(shared_path))) == (status, before)


def test_only_forms_are_read(browser: Browser, form: dict[str, str]) -> None:
    headers = {"Origin": SITE, "Content-Type": "text/plain"}
    assert browser.sign_in().ask("POST", "/review", content=b"a=b", headers=headers).status_code == 415
    assert browser.ask("PUT", "/review").status_code == 405


def test_the_next_page_is_always_one_of_ours(form: dict[str, str]) -> None:
    row: dict[str, str | int] = {"candidate": 3, "decision": "unsure"}
    for then in ("//evil.example", "queue-all-//evil", "queue-x-1", "queue-all-1-2", ""):
        assert serve._next_page(form | {"then": then}, row) == "/candidate/3?candidate=3&decision=unsure#candidate-3"
    odd = form | {"then": "queue-unsure-2", "following": "javascript:alert(1)"}
    assert serve._next_page(odd, row) == "/queue?show=unsure&page=2&candidate=3&decision=unsure"


def test_a_picture_is_sent_once(browser: Browser) -> None:
    answer = browser.get("/picture/1")
    assert answer.headers["content-type"] == "image/png"
    again = browser.get("/picture/1", headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


# ------------------------------------------------------------------------------------------------------- starting


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the server would be started with."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr("uvicorn.run", lambda application, **settings: calls.append(settings))
    monkeypatch.delenv(serve.TOKEN_VARIABLE, raising=False)
    return calls


def test_a_token_is_made_up_on_the_loopback_address(
    shared_path: Path, started: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    serve.serve(shared_path)
    assert started[0]["host"] == "127.0.0.1"
    assert started[0]["access_log"] is False  # it would hold the token
    [address] = [message for message in caplog.messages if "http://127.0.0.1:8000/?token=" in message]
    assert len(address.split("token=")[1]) >= 32


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.2", "::", "blobs.example.org"])
def test_others_can_reach_it_only_with_a_token(
    shared_path: Path, started: list[dict[str, Any]], host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ServeError, match="BLOBPIPE_TOKEN: found a token of 0 characters, expected 16 or more"):
        serve.serve(shared_path, host=host)
    token_file = tmp_path / "token"
    token_file.write_text("short\n")
    with pytest.raises(ServeError, match="token: found a token of 5 characters"):
        serve.serve(shared_path, host=host, token_file=token_file)
    assert not started
    monkeypatch.setenv(serve.TOKEN_VARIABLE, TOKEN)
    serve.serve(shared_path, host=host)
    assert started[0]["host"] == host


def test_a_token_that_was_given_is_not_told(
    shared_path: Path, started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setenv(serve.TOKEN_VARIABLE, TOKEN)
    assert cli.main(["serve", "--log", str(shared_path), "--port", "8123"]) == 0
    assert started[0]["port"] == 8123
    assert TOKEN not in caplog.text


def test_a_page_is_written_from_the_command_line(shared_path: Path, tmp_path: Path) -> None:
    for which in ([], ["--all"], ["--date", "2009-08-29"]):
        out = tmp_path / f"page{len(which)}{which[:1]}.html"
        assert cli.main(["page", "--log", str(shared_path), "--out", str(out), *which]) == 0
        assert out.read_text().startswith("<!doctype html>")


def test_a_missing_extra_is_named(
    shared_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "blobpipe.serve", None)
    assert cli.main(["serve", "--log", str(shared_path)]) == 1
    assert "pip install 'blobpipe[serve]'" in capsys.readouterr().err
