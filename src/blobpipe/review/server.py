"""The review in the browser: the pages of the log, and the one form that writes to it.

Anybody who reaches the server may read. To write takes the token: once in an address or the sign-in form, from then on
a session, whose cookie scripts and other sites cannot use and does not tell the token. Pictures are asked for by their number in the log: no path of a
request reaches the file system.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import os
import re
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import TypeVar, cast
from urllib.parse import parse_qsl, quote, unquote

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from blobpipe.errors import LogError, ServeError
from blobpipe.monitor import logbook
from blobpipe.params import is_host_name
from blobpipe.review import pages

log = logging.getLogger(__name__)

Found = TypeVar("Found")

TOKEN_VARIABLE = "BLOBPIPE_TOKEN"
FEWEST_CHARACTERS = 16  # of a token
LONGEST_TOKEN_FILE = 4096  # bytes
LONGEST_BODY = 16_384  # bytes of a form
REQUEST_S = 20.0  # for a whole request to arrive; ours
WRITERS = 40  # threads in which reviews wait for the log, so that those who read have their own
LONGEST = {"reviewer": 80, "reason": 500}  # characters
# cookies
SIGNED_IN = "blobpipe_session"
REVIEWER = "blobpipe_reviewer"
SESSION_S = 30 * 86_400
# host and port, as in Host and Origin
PLACE = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\s/?#@:\[\]\\]+)(:[0-9]{0,5})?")
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
        Its only line is the token for writes; else that of the environment variable ``BLOBPIPE_TOKEN``; else, on a
        loopback address, a new one, which is told with the address to open.
    names : tuple of str
        Names under which browsers reach the server, besides ``host``.

    Raises
    ------
    ServeError
        If the token is too short or none that can be typed, there is none for an address that others can reach, or the
        host, the port or a name is none.
    LogError
        If the log cannot be opened.
    """
    if not 0 < port < 65_536:
        raise ServeError(
            f"--port: found {port}, expected a number from 1 to 65535, such as 8000; correct it"
        )
    for option, name in (("--host", host), *(("--name", name) for name in names)):
        if not is_host_name(name):
            raise ServeError(
                f"{option}: found {name[:100]!r}, expected the name of a host alone, such as blobs.example.org; correct it"
            )
    logbook.connect(path).close()
    token, new = _token(host, token_file)
    application = make_application(path, token, (host, *names))
    shown = f"[{host}]" if ":" in host else host
    log.info("the log %s: http://%s:%d/%s", path, shown, port, f"?token={token}" if new else "")
    # no list of requests: their addresses may hold the token
    uvicorn.run(
        application,
        host=host,
        port=port,
        http=Patient,
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
    )


def _token(host: str, token_file: Path | None) -> tuple[str, bool]:
    """The token for writes, and whether it has been made up just now."""
    token = _read_token(token_file) if token_file else os.environ.get(TOKEN_VARIABLE, "").strip()
    if not token and not token_file and _is_loopback(host):
        return secrets.token_urlsafe(24), True
    if len(token) < FEWEST_CHARACTERS:
        where = token_file or TOKEN_VARIABLE
        raise ServeError(
            f"{where}: found a token of {len(token)} characters, expected {FEWEST_CHARACTERS} or more to serve on {host}; "
            "write a long random one there, or stay on 127.0.0.1"
        )
    if not token.isprintable():
        raise ServeError(
            f"{token_file or TOKEN_VARIABLE}: found a token with characters that cannot be typed or are not UTF-8, "
            "expected letters, digits and signs; write another one there"
        )
    return token, False


def _read_token(path: Path) -> str:
    """The one line of a file; no message shows anything of it."""
    try:
        with path.open("rb") as file:
            text = file.read(LONGEST_TOKEN_FILE).decode("utf-8-sig")
    except OSError as error:
        raise ServeError(
            f"{path}: {error.strerror}, expected a file with the token; correct --token-file"
        ) from None
    except UnicodeDecodeError:
        raise ServeError(
            f"{path}: found bytes that are not UTF-8, expected the token; save the file as UTF-8"
        ) from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) > 1:
        raise ServeError(
            f"{path}: found {len(lines)} lines, expected one, the token; leave that one alone there"
        )
    return lines[0] if lines else ""


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


# --------------------------------------------------------------------------------------------------- application


@dataclass(frozen=True)
class Desk:
    """What the answers need.

    Attributes
    ----------
    path : path
        The log.
    token : str
        For writes.
    names : frozenset of str
        Names of the server, besides those of the loopback address.
    sessions : dict
        Who is signed in: random names, and until when (s of the monotonic clock). A new start of the server has none.
    writers : ThreadPoolExecutor
    """

    path: Path
    token: str
    names: frozenset[str] = frozenset()
    sessions: dict[str, float] = field(default_factory=dict)
    writers: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(WRITERS))

    def sign_in(self) -> str:
        """Begin a session; those that are over are forgotten."""
        now = time.monotonic()
        for session, until in list(self.sessions.items()):
            if until < now:
                self.sessions.pop(session, None)
        session = secrets.token_urlsafe(32)
        self.sessions[session] = now + SESSION_S
        return session

    def form_token(self, session: str) -> str:
        """What goes with every form of a session and does not tell it; empty if there is no such session."""
        if self.sessions.get(session, -1.0) < time.monotonic():
            return ""
        return hmac.new(session.encode(), b"form", hashlib.sha256).hexdigest()

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A connection that cannot write."""
        with self._connected(
            "The log cannot be read at the moment. Try again later."
        ) as connection:
            connection.execute("PRAGMA query_only = ON")
            yield connection

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction: what is not answered with an error has been kept."""
        refusal = (
            "The log cannot be written at the moment: nothing was kept. Go back and try again."
        )
        with self._connected(refusal) as connection, logbook.writing(connection):
            yield connection

    @contextmanager
    def _connected(self, refusal: str) -> Iterator[sqlite3.Connection]:
        try:
            connection = logbook.connect(self.path)
            try:
                yield connection
            finally:
                connection.close()
        except (LogError, sqlite3.DatabaseError) as error:
            log.error("%s", error)
            raise HTTPException(503, refusal) from error


class Patient(H11Protocol):
    """Close a connection on which no request arrives in time: one that is sent by halves would stay for ever."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request."""
        super().connection_made(transport)
        self._wait_for_another(self.cycle)

    def on_response_complete(self) -> None:
        """Wait for the next request, which may be there already."""
        answered = self.cycle
        super().on_response_complete()
        self._wait_for_another(answered)

    def _wait_for_another(self, request: object) -> None:
        self.loop.call_later(REQUEST_S, self._close_unless_another, request)

    def _close_unless_another(self, request: object) -> None:
        if self.cycle is request:
            self.transport.abort()


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
        Route("/sign-out", _sign_out, methods=["POST"]),
    ]
    application = Starlette(
        routes=routes, exception_handlers={HTTPException: _refused, Exception: _failed}
    )
    own = frozenset(name.encode("idna").decode("ascii").lower().rstrip(".") for name in names)
    application.state.desk = Desk(
        path, token, frozenset(name for name in own if not _is_loopback(name))
    )
    return Guard(application, own | {"127.0.0.1", "localhost", "::1"})


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
            text = (
                "This server does not answer to that name. Its owner can add it with --name, "
                "or have the proxy before it pass on the Host of the browser."
            )
            await _says(pages.Reader(), 421, text)(scope, receive, send_guarded)


def _host(header: str) -> str:
    """Name in a Host header, without the port; empty if there is none."""
    place = PLACE.fullmatch(header)
    return place[1].strip("[]").lower().rstrip(".") if place else ""


# ------------------------------------------------------------------------------------------------------- reading


def _desk(request: Request) -> Desk:
    return cast(Desk, request.app.state.desk)


def _reader(request: Request) -> pages.Reader:
    form_token = _desk(request).form_token(request.cookies.get(SIGNED_IN, ""))
    if not form_token:
        return pages.Reader()
    name = _line(unquote(request.cookies.get(REVIEWER, "")), LONGEST["reviewer"])
    return pages.Reader(form_token, name, *_said(request))


def _same(found: str, expected: str) -> bool:
    return hmac.compare_digest(found.encode(), expected.encode())


def _said(request: Request) -> tuple[str, int]:
    """What the review before this page did, and to which candidate; whatever the address says, no other words."""
    number = request.query_params.get("candidate", "")
    decision = request.query_params.get("decision", "")
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
        text = str(error)
        raise HTTPException(404, f"{text[:1].upper()}{text[1:]}.") from error


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
    return _shown(
        request, lambda log, reader: pages.queue(log, reader, show=show, page=_page(request))
    )


def _candidate(request: Request) -> Response:
    return _shown(
        request, lambda log, reader: pages.candidate(log, reader, _number(request, "number"))
    )


def _image(request: Request) -> Response:
    return _shown(request, lambda log, reader: pages.image(log, reader, _number(request, "number")))


def _images(request: Request) -> Response:
    asked = {
        name: _line(request.query_params.get(name, ""), 100)
        for name in ("name", "first", "last", "outcome")
    }
    return _shown(
        request,
        lambda log, reader: pages.images(log, reader, pages.Choice(**asked), _page(request)),
    )


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
        return _content(
            request, _found(lambda: pages.picture(connection, _number(request, "number")))
        )


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
        raise HTTPException(
            403, "That is not the token of this server. It was printed when the server was started."
        )
    response = RedirectResponse("/", 303)
    _remember(request, response, SIGNED_IN, _desk(request).sign_in())
    return response


def _remember(request: Request, response: Response, name: str, value: str) -> None:
    # a proxy need not say that the browser reaches it by TLS; the browser does
    secure = request.url.scheme == "https" or request.headers.get("origin", "").startswith(
        "https://"
    )
    response.set_cookie(
        name, value, max_age=SESSION_S, httponly=True, samesite="strict", secure=secure
    )


async def _sign_out(request: Request) -> Response:
    """End a session, here and in the browser."""
    await _signed_form(request)
    _desk(request).sessions.pop(request.cookies[SIGNED_IN], None)
    response = RedirectResponse("/", 303)
    response.delete_cookie(SIGNED_IN, httponly=True, samesite="strict")
    return response


async def _review(request: Request) -> Response:
    """Note a decision, and go on with the next candidate."""
    form = await _signed_form(request)
    desk = _desk(request)
    row = _decision(form)
    await asyncio.get_running_loop().run_in_executor(desk.writers, _note, desk, row)
    response = RedirectResponse(_next_page(form, row), 303)
    _remember(request, response, REVIEWER, quote(str(row["reviewer"])))
    return response


async def _signed_form(request: Request) -> dict[str, str]:
    """The fields of a form, if its session lasts."""
    form = await _form(request)
    expected = _reader(request).form_token
    if not expected or not _same(form.get("form_token", ""), expected):
        raise HTTPException(
            403, "Not signed in. Open the address that the server printed when it was started."
        )
    return form


async def _form(request: Request) -> dict[str, str]:
    """The fields of a form of this server's own pages."""
    if not _is_own(request):
        raise HTTPException(
            403,
            "This request did not come from a page of this server. "
            "If a proxy stands before it, its owner can give the name in the browser's address with --name.",
        )
    if request.headers.get("content-type", "").split(";")[0] != "application/x-www-form-urlencoded":
        raise HTTPException(415, "This request is no form of this server's pages.")
    body = bytearray()
    try:
        async with asyncio.timeout(REQUEST_S):
            async for piece in request.stream():
                body += piece
                if len(body) > LONGEST_BODY:
                    raise HTTPException(
                        413, f"Found more than {LONGEST_BODY} bytes, expected a review."
                    )
    except TimeoutError as error:
        said = f"The form did not arrive within {REQUEST_S:g} s."
        raise HTTPException(408, said, {"Connection": "close"}) from error
    except ClientDisconnect as error:
        raise HTTPException(400, "The form did not arrive as a whole.") from error
    return dict(parse_qsl(body.decode("utf-8", "replace"), keep_blank_values=True))


def _is_own(request: Request) -> bool:
    """Whether a request comes from a page of this server: browsers always say from where a form comes.

    A proxy may pass on another name or port than the browser's, so that any port of a name given with --name is right.
    """
    scheme, _, place = request.headers.get("origin", "").lower().partition("://")
    if scheme not in ("http", "https") or not _host(place):
        return False
    usual = {"http": ":80", "https": ":443"}[scheme]
    return (
        place.removesuffix(usual) == request.headers["host"].lower().removesuffix(usual)
        or _host(place) in _desk(request).names
    )


def _decision(form: dict[str, str]) -> dict[str, str | int]:
    """The columns of ``reviews`` that a form says."""
    candidate = form.get("candidate", "")
    decision = form.get("decision", "")
    reviewer, reason = (_line(form.get(name, ""), length) for name, length in LONGEST.items())
    if not _is_number(candidate) or decision not in pages.DECISIONS:
        raise HTTPException(
            400, f"Expected a candidate's number and one of {', '.join(pages.DECISIONS)}."
        )
    if not reviewer:
        raise HTTPException(400, "Found no name, expected the reviewer's. Go back and fill it in.")
    return {
        "candidate": int(candidate),
        "decision": decision,
        "reviewer": reviewer,
        "reason": reason,
    }


def _line(text: str, longest: int) -> str:
    """One line of printable text."""
    return "".join(c for c in " ".join(text.split()) if c.isprintable())[:longest]


def _note(desk: Desk, row: dict[str, str | int]) -> None:
    with desk.writing() as connection:
        if not connection.execute(
            "SELECT 1 FROM candidates WHERE id = ?", (row["candidate"],)
        ).fetchone():
            raise HTTPException(404, f"No candidate {row['candidate']} in the log.")
        logbook.insert(connection, "reviews", row | {"at": logbook.now()})


def _next_page(form: dict[str, str], row: dict[str, str | int]) -> str:
    """Where the form was; only numbers and known words of it are used."""
    done = f"candidate={row['candidate']}&decision={row['decision']}"
    following = form.get("following", "")
    match form.get("then", "").split("-"):
        case ["queue", show, page] if show in pages.SHOWS and _is_number(page):
            place = f"#candidate-{following}" if _is_number(following) else ""
            return f"/queue?show={show}&page={page}&{done}{place}"
        case _:
            return f"/candidate/{row['candidate']}?{done}#candidate-{row['candidate']}"


# -------------------------------------------------------------------------------------------------------- faults


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = (
        "There is no such page."
        if error.detail == HTTPStatus(error.status_code).phrase
        else error.detail
    )
    response = _says(_reader(request), error.status_code, text)
    response.headers.update(error.headers or {})
    return response


def _failed(request: Request, error: Exception) -> Response:
    """Tell the client nothing; the server's own messages hold the traceback."""
    return _says(
        pages.Reader(),
        500,
        "Something went wrong here. What it was stands in the messages of the server.",
    )


def _says(reader: pages.Reader, status: int, text: str) -> Response:
    return HTMLResponse(pages.message(reader, HTTPStatus(status).phrase, text), status)
