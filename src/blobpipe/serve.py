"""The review in the browser: the pages of the log, and the one form that writes to it.

Anybody who reaches the server may read. To write takes the token: once in an address or the sign-in form, from then on
in a cookie that scripts and other sites cannot use. Pictures are asked for by their number in the log: no path of a
request reaches the file system.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import os
import secrets
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import TypeVar, cast
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from blobpipe import pages, store
from blobpipe.errors import LogError, ServeError

log = logging.getLogger(__name__)

Found = TypeVar("Found")

TOKEN_VARIABLE = "BLOBPIPE_TOKEN"
FEWEST_CHARACTERS = 16  # of a token
LONGEST_BODY = 16_384  # bytes of a form
LONGEST = {"reviewer": 80, "reason": 500}  # characters
SIGNED_IN, REVIEWER = "blobpipe_token", "blobpipe_reviewer"  # cookies
COOKIE_S = 30 * 86_400
MOST_DIGITS = 18  # of a number that SQLite takes

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; img-src 'self' data:; style-src 'self'; script-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}


def serve(
    path: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token_file: Path | None = None,
    names: tuple[str, ...] = (),
) -> None:
    """Serve the pages of a log until interrupted.

    Parameters
    ----------
    path : path
        The log.
    host : str
        Address to listen on.
    token_file : path, optional
        Its first line is the token for writes; else that of the environment variable ``BLOBPIPE_TOKEN``; else, on a
        loopback address, a new one, which is told with the address to open.
    names : tuple of str
        Names under which browsers reach the server, besides ``host``.

    Raises
    ------
    ServeError
        If the token is too short, or there is none for an address that others can reach.
    LogError
        If the log cannot be opened.
    """
    import uvicorn

    store.connect(path).close()
    token, new = _token(host, token_file)
    application = make_application(path, token, (host, *names))
    shown = f"[{host}]" if ":" in host else host
    log.info("the log %s: http://%s:%d/%s", path, shown, port, f"?token={token}" if new else "")
    # no list of requests: their addresses may hold the token
    uvicorn.run(application, host=host, port=port, log_level="warning", access_log=False, server_header=False)


def _token(host: str, token_file: Path | None) -> tuple[str, bool]:
    """The token for writes, and whether it has been made up just now."""
    text = token_file.read_text(encoding="utf-8") if token_file else os.environ.get(TOKEN_VARIABLE, "")
    token = text.strip()
    if not token and not token_file and _is_loopback(host):
        return secrets.token_urlsafe(24), True
    if len(token) < FEWEST_CHARACTERS:
        where = token_file or TOKEN_VARIABLE
        raise ServeError(
            f"{where}: found a token of {len(token)} characters, expected {FEWEST_CHARACTERS} or more to serve on {host}; "
            "write a long random one there, or stay on 127.0.0.1"
        )
    return token, False


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


# --------------------------------------------------------------------------------------------------- application


@dataclass(frozen=True)
class Desk:
    """What the answers need: the log and the token for writes."""

    path: Path
    token: str

    @property
    def form_token(self) -> str:
        """Goes with every form to those who are signed in; it does not tell the token."""
        return hmac.new(self.token.encode(), b"form", hashlib.sha256).hexdigest()

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A connection that cannot write."""
        with self.writing() as connection:
            connection.execute("PRAGMA query_only = ON")
            yield connection

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A connection that can."""
        try:
            connection = store.connect(self.path)
        except LogError as error:
            log.error("%s", error)
            raise HTTPException(503, "The log cannot be read at the moment. Try again later.") from error
        try:
            yield connection
        finally:
            connection.close()


def make_application(path: Path, token: str, names: tuple[str, ...]) -> ASGIApp:
    """The server as an ASGI application.

    Parameters
    ----------
    path : path
        The log.
    token : str
        For writes.
    names : tuple of str
        Host names it answers to, besides those of the loopback address.
    """
    routes = [
        Route("/", _today),
        Route("/queue", _queue),
        Route("/candidate/{number}", _candidate),
        Route("/image/{number}", _image),
        Route("/images", _images),
        Route("/map", _map),
        Route("/timeline", _timeline),
        Route("/picture/{number}", _picture),
        Route("/subframe/{image}/{row}/{col}", _subframe),
        Route("/style.css", _style),
        Route("/review.js", _script),
        Route("/review", _review, methods=["POST"]),
        Route("/sign-in", _sign_in, methods=["POST"]),
    ]
    application = Starlette(routes=routes, exception_handlers={HTTPException: _refused, Exception: _failed})
    application.state.desk = Desk(path, token)
    return Guard(application, frozenset(name.lower() for name in (*names, "127.0.0.1", "localhost", "::1")))


class Guard:
    """Answers only under the server's own names, and puts the security headers on every answer.

    A page of another site whose name has been made to lead here (DNS rebinding) still says that site's name.
    """

    def __init__(self, application: ASGIApp, names: frozenset[str]) -> None:
        self.application, self.names = application, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or refuse it."""

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.setdefault("Cache-Control", "no-store")
                headers.update(HEADERS)
            await send(message)

        if scope["type"] == "lifespan":
            await self.application(scope, receive, send)
        elif scope["type"] == "http" and _host(Headers(scope=scope).get("host", "")) in self.names:
            await self.application(scope, receive, send_guarded)
        elif scope["type"] == "http":
            text = "This server does not answer to that name. Its owner can add it with --name."
            await _says(pages.Reader(), 421, text)(scope, receive, send_guarded)


def _host(header: str) -> str:
    """Name in a Host header, without the port."""
    try:
        return (urlsplit(f"//{header}").hostname or "").lower()
    except ValueError:
        return ""


# ------------------------------------------------------------------------------------------------------- reading


def _desk(request: Request) -> Desk:
    return cast(Desk, request.app.state.desk)


def _reader(request: Request) -> pages.Reader:
    desk = _desk(request)
    if not _same(request.cookies.get(SIGNED_IN, ""), desk.token):
        return pages.Reader()
    name = _line(unquote(request.cookies.get(REVIEWER, "")), LONGEST["reviewer"])
    return pages.Reader(desk.form_token, name, *_said(request))


def _same(found: str, expected: str) -> bool:
    return hmac.compare_digest(found.encode(), expected.encode())


def _said(request: Request) -> tuple[str, int]:
    """What the review before this page did, and to which candidate; whatever the address says, no other words."""
    number, decision = request.query_params.get("candidate", ""), request.query_params.get("decision", "")
    if not _is_number(number) or decision not in pages.DECISIONS:
        return "", 0
    return f"Candidate {int(number)}: {decision}.", int(number)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= MOST_DIGITS


def _shown(request: Request, make: Callable[[sqlite3.Connection, pages.Reader], str]) -> Response:
    with _desk(request).reading() as connection:
        return HTMLResponse(_found(lambda: make(connection, _reader(request))))


def _found(make: Callable[[], Found]) -> Found:
    """What the log holds; a page that says so if it does not."""
    try:
        return make()
    except LogError as error:
        raise HTTPException(404, f"{str(error).capitalize()}.") from error


def _page(request: Request) -> int:
    text = request.query_params.get("page", "1")
    return int(text) if _is_number(text) else 1


def _today(request: Request) -> Response:
    if "token" in request.query_params:
        return _signed_in(request, request.query_params["token"])
    return _shown(request, pages.today)


def _queue(request: Request) -> Response:
    show = request.query_params.get("show", "all")
    if show not in pages.SHOWS:
        raise HTTPException(404, f"Found {show!r}, expected one of {', '.join(pages.SHOWS)}.")
    return _shown(request, lambda log, reader: pages.queue(log, reader, show=show, page=_page(request)))


def _candidate(request: Request) -> Response:
    return _shown(request, lambda log, reader: pages.candidate(log, reader, _number(request, "number")))


def _image(request: Request) -> Response:
    return _shown(request, lambda log, reader: pages.image(log, reader, _number(request, "number")))


def _images(request: Request) -> Response:
    asked = {name: _line(request.query_params.get(name, ""), 100) for name in ("name", "first", "last", "outcome")}
    return _shown(request, lambda log, reader: pages.images(log, reader, pages.Choice(**asked), _page(request)))


def _map(request: Request) -> Response:
    return _shown(request, lambda log, reader: pages.blob_map(log, reader, _page(request)))


def _timeline(request: Request) -> Response:
    return _shown(request, pages.timeline)


def _number(request: Request, name: str) -> int:
    text = str(request.path_params[name])
    if not _is_number(text):
        raise HTTPException(404)
    return int(text)


def _picture(request: Request) -> Response:
    with _desk(request).reading() as connection:
        return _content(request, _found(lambda: pages.picture(connection, _number(request, "number"))))


def _subframe(request: Request) -> Response:
    numbers = [_number(request, name) for name in ("image", "row", "col")]
    with _desk(request).reading() as connection:
        return _content(request, _found(lambda: pages.subframe(connection, *numbers)))


def _content(request: Request, picture: pages.Picture) -> Response:
    """A picture, unless the browser has it already: another log may have another one under the same number."""
    tag = f'"{hashlib.sha256(picture.content).hexdigest()[:32]}"'
    headers = {"ETag": tag, "Cache-Control": "private, no-cache"}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(picture.content, media_type=picture.type, headers=headers)


def _style(request: Request) -> Response:
    return Response(pages.asset("style.css"), media_type="text/css")


def _script(request: Request) -> Response:
    return Response(pages.asset("review.js"), media_type="text/javascript")


# ------------------------------------------------------------------------------------------------------- writing


async def _sign_in(request: Request) -> Response:
    return _signed_in(request, (await _form(request)).get("token", ""))


def _signed_in(request: Request, token: str) -> Response:
    if not _same(token, _desk(request).token):
        raise HTTPException(403, "That is not the token of this server. It was printed when the server was started.")
    response = RedirectResponse("/", 303)
    _remember(request, response, SIGNED_IN, token)
    return response


def _remember(request: Request, response: Response, name: str, value: str) -> None:
    secure = request.url.scheme == "https"
    response.set_cookie(name, value, max_age=COOKIE_S, httponly=True, samesite="strict", secure=secure)


async def _review(request: Request) -> Response:
    """Note a decision, and go on with the next candidate."""
    form = await _form(request)
    desk = _desk(request)
    if not _reader(request).form_token or not _same(form.get("form_token", ""), desk.form_token):
        raise HTTPException(403, "Not signed in. Open the address that the server printed when it was started.")
    row = _decision(form)
    await run_in_threadpool(_note, desk, row)
    response = RedirectResponse(_next_page(form, row), 303)
    _remember(request, response, REVIEWER, quote(str(row["reviewer"])))
    return response


async def _form(request: Request) -> dict[str, str]:
    """The fields of a form of this server's own pages: browsers always say where a form comes from."""
    if urlsplit(request.headers.get("origin", "")).netloc != request.headers["host"]:
        raise HTTPException(403, "This request did not come from a page of this server.")
    if request.headers.get("content-type", "").split(";")[0] != "application/x-www-form-urlencoded":
        raise HTTPException(415, "This request is no form of this server's pages.")
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > LONGEST_BODY:
            raise HTTPException(413, f"Found more than {LONGEST_BODY} bytes, expected a review.")
    return dict(parse_qsl(body.decode("utf-8", "replace"), keep_blank_values=True, max_num_fields=20))


def _decision(form: dict[str, str]) -> dict[str, str | int]:
    """The columns of ``reviews`` that a form says."""
    candidate, decision = form.get("candidate", ""), form.get("decision", "")
    reviewer, reason = (_line(form.get(name, ""), length) for name, length in LONGEST.items())
    if not _is_number(candidate) or decision not in pages.DECISIONS:
        raise HTTPException(400, f"Expected a candidate's number and one of {', '.join(pages.DECISIONS)}.")
    if not reviewer:
        raise HTTPException(400, "Found no name, expected the reviewer's. Go back and fill it in.")
    return {"candidate": int(candidate), "decision": decision, "reviewer": reviewer, "reason": reason}


def _line(text: str, longest: int) -> str:
    """One line of printable text."""
    return "".join(c for c in " ".join(text.split()) if c.isprintable())[:longest]


def _note(desk: Desk, row: dict[str, str | int]) -> None:
    with desk.writing() as connection, store.writing(connection):
        if not connection.execute("SELECT 1 FROM candidates WHERE id = ?", (row["candidate"],)).fetchone():
            raise HTTPException(404, f"No candidate {row['candidate']} in the log.")
        store.insert(connection, "reviews", row | {"at": store.now()})


def _next_page(form: dict[str, str], row: dict[str, str | int]) -> str:
    """Where the form was; only numbers and known words of it are used."""
    done, following = f"candidate={row['candidate']}&decision={row['decision']}", form.get("following", "")
    match form.get("then", "").split("-"):
        case ["queue", show, page] if show in pages.SHOWS and _is_number(page):
            place = f"#candidate-{following}" if _is_number(following) else ""
            return f"/queue?show={show}&page={page}&{done}{place}"
        case _:
            return f"/candidate/{row['candidate']}?{done}#candidate-{row['candidate']}"


# -------------------------------------------------------------------------------------------------------- faults


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = "There is no such page." if error.detail == HTTPStatus(error.status_code).phrase else error.detail
    response = _says(_reader(request), error.status_code, text)
    response.headers.update(error.headers or {})
    return response


def _failed(request: Request, error: Exception) -> Response:
    """Tell the client nothing; the server's own messages hold the traceback."""
    return _says(pages.Reader(), 500, "Something went wrong here. What it was stands in the messages of the server.")


def _says(reader: pages.Reader, status: int, text: str) -> Response:
    return HTMLResponse(pages.message(reader, HTTPStatus(status).phrase, text), status)
