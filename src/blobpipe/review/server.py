"""Serve the pages of the log to browsers, with the one form that writes to it.

Anybody who reaches the server may read. Writing takes the token once, in an address or the sign-in form, and then a
session, whose cookie is hidden from scripts and other sites and does not contain the token. Pictures are requested by
their number in the log: no path of a request reaches the file system.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import hmac
import ipaddress
import logging
import math
import os
import re
import secrets
import socket
import sqlite3
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from http import HTTPStatus
from pathlib import Path
from typing import TypeVar, cast
from urllib.parse import parse_qsl, quote, unquote, urlencode

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers, ImmutableMultiDict, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from blobpipe.errors import LogError, ServeError
from blobpipe.monitor import logbook
from blobpipe.params import is_host_name
from blobpipe.review import decisions, pages, planes, queries
from blobpipe.review.pages import Reader

log = logging.getLogger(__name__)

Found = TypeVar("Found")
Form = ImmutableMultiDict[str, str]

TOKEN_VARIABLE = "BLOBPIPE_TOKEN"
FEWEST_CHARACTERS = 16  # shortest token
LONGEST_TOKEN_FILE = 4096  # bytes read of a token file
LONGEST_BODY = 16_384  # largest form (bytes)
REQUEST_S = 20.0  # time (s) within which a whole request must arrive
WRITERS = 40  # threads in which reviews wait for the log, apart from those that answer readers
LONGEST = {"reviewer": 80, "reason": 500}  # characters of the fields of a review
SIGNED_IN = "blobpipe_session"  # cookie of the session
REVIEWER = "blobpipe_reviewer"  # cookie of the reviewer's name
SESSION_S = 30 * 86_400  # length of a session (s)
# host and port, as in the headers Host and Origin
PLACE = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\s/?#@:\[\]\\]+)(:[0-9]{0,5})?")
CHOSEN = tuple(
    field.name for field in fields(queries.CandidateChoice)
)  # of the table of candidates
OTHER_LOG = "The log was replaced after this page was opened: nothing was kept. Open the page again and decide on what it shows."
MOST_DIGITS = 18  # digits of a number that SQLite can hold

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; img-src 'self' data:; style-src 'self'; script-src 'self'; connect-src 'self'; "
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
    port : int
    token_file : path, optional
        File whose only line is the token for writing; without it, the environment variable ``BLOBPIPE_TOKEN``; without
        that, on a loopback address, a new token, which is logged with the address to open.
    names : tuple of str
        Names under which browsers reach the server, besides ``host``.

    Raises
    ------
    ServeError
        If the token is too short or cannot be typed, there is none for an address that others can reach, the host,
        the port or a name is not valid, or another program uses the port.
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

    # a log that cannot be opened is reported now and not at the first request
    logbook.connect(path).close()
    pages.load_templates()
    token, is_new = _token(host, token_file)
    application = make_application(path, token, (host, *names))
    listening = _listen(host, port)

    shown_host = f"[{host}]" if ":" in host else host
    query = f"?token={token}" if is_new else ""
    log.info("the log %s: http://%s:%d/%s", path, shown_host, port, query)

    # no log of requests: their addresses may hold the token
    config = uvicorn.Config(
        application,
        http=Patient,
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
    )
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=listening)


def _listen(host: str, port: int) -> list[socket.socket]:
    """Listen on a port of all addresses of a host."""
    listening: list[socket.socket] = []
    try:
        # The file of hosts may name an address twice
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        for family, address in dict.fromkeys((family, address) for family, *_, address in found):
            listening.append(socket.create_server(address, family=family))
            # Headers and body are sent one after the other: without this, the body of each page waits about
            # 40 ms for the browser to acknowledge the headers. Connections inherit it; asyncio leaves out
            # sockets that do not name their protocol.
            listening[-1].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError as error:
        for each in listening:
            each.close()
        if error.errno == errno.EADDRINUSE:
            raise ServeError(
                f"port {port} is in use by another program, expected a free one; name another with --port"
            ) from error
        if error.errno == errno.EACCES:
            raise ServeError(
                f"port {port} is reserved for the system, expected one from 1024; name another with --port"
            ) from error
        raise ServeError(
            f"--host: found {host} ({error.strerror}), expected an address of this machine; correct it"
        ) from error
    return listening


def _token(host: str, token_file: Path | None) -> tuple[str, bool]:
    """Return the token for writing, and whether it is a new one."""
    token = _read_token(token_file) if token_file else os.environ.get(TOKEN_VARIABLE, "").strip()
    if not token and not token_file and _is_loopback(host):
        return secrets.token_urlsafe(24), True

    # the messages show nothing of the token
    where = token_file or TOKEN_VARIABLE
    if len(token) < FEWEST_CHARACTERS:
        raise ServeError(
            f"{where}: found a token of {len(token)} characters, expected {FEWEST_CHARACTERS} or more to serve on {host}; "
            "write a long random one there, or stay on 127.0.0.1"
        )
    if not token.isprintable():
        raise ServeError(
            f"{where}: found a token with characters that cannot be typed or are not UTF-8, "
            "expected letters, digits and signs; write another one there"
        )
    return token, False


def _read_token(path: Path) -> str:
    """Return the one line of a file; no message shows anything of it."""
    # no chain of errors: it could hold the bytes of the token
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

    # editors add blank lines
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) > 1:
        raise ServeError(
            f"{path}: found {len(lines)} lines, expected one, the token; remove the others"
        )
    return lines[0] if lines else ""


def _is_loopback(host: str) -> bool:
    """Tell whether an address is reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


# --------------------------------------------------------------------------------------------------- application


@dataclass(frozen=True)
class Desk:
    """Hold what requests share.

    Attributes
    ----------
    path : path
        The log.
    token : str
        Token for writing.
    names : frozenset of str
        Names of the server, besides those of the loopback address.
    sessions : dict
        Random names of the sessions, and when they end (s of the monotonic clock). They end with the server, too.
    writers : ThreadPoolExecutor
    """

    path: Path
    token: str
    names: frozenset[str] = frozenset()
    sessions: dict[str, float] = field(default_factory=dict)
    writers: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(WRITERS))

    def sign_in(self) -> str:
        """Begin a session and return its name; sessions that are over are forgotten."""
        now = time.monotonic()
        for session, until in list(self.sessions.items()):
            if until < now:
                self.sessions.pop(session, None)
        session = secrets.token_urlsafe(32)
        self.sessions[session] = now + SESSION_S
        return session

    def form_token(self, session: str) -> str:
        """Return the token of a session's forms, which does not reveal the session; empty without a session."""
        if self.sessions.get(session, -1.0) < time.monotonic():
            return ""
        return hmac.new(session.encode(), b"form", hashlib.sha256).hexdigest()

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Open the log for reading only."""
        with self._connected(
            "The log cannot be read at the moment. Try again later."
        ) as connection:
            connection.execute("PRAGMA query_only = ON")
            yield connection

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """Open the log for a transaction, which is kept unless the request is answered with an error."""
        refusal = (
            "The log cannot be written at the moment: nothing was kept. Go back and try again."
        )
        with self._connected(refusal) as connection, logbook.writing(connection):
            yield connection

    @contextmanager
    def _connected(self, refusal: str) -> Iterator[sqlite3.Connection]:
        """Open the log; if that fails, log why and answer with a refusal that shows no path."""
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
    """Close a connection on which no request arrives in time; a request that never ends would keep it open."""

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
        """Close the connection later, unless a new request has arrived by then."""
        self.loop.call_later(REQUEST_S, self._close_unless_another, request)

    def _close_unless_another(self, request: object) -> None:
        if self.cycle is request:
            self.transport.abort()


def make_application(path: Path, token: str, names: tuple[str, ...]) -> ASGIApp:
    """Make the server as an ASGI application.

    Parameters
    ----------
    path : path
        The log.
    token : str
        Token for writing.
    names : tuple of str
        Host names it answers to, besides those of the loopback address.
    """
    routes = [
        Route("/", _today),
        Route("/queue", _queue),
        Route("/candidate/{number}", _candidate),
        Route("/image/{number}", _image),
        Route("/image/{number}/regions", _regions),
        Route("/pixels/{number}/{plane}", _pixels),
        Route("/images", _images),
        Route("/map", _map),
        Route("/timeline", _timeline),
        Route("/picture/{number}", _picture),
        Route("/subframe/{image}/{row}/{col}", _subframe),
        Route("/style.css", _style),
        Route("/review.js", _script),
        Route("/viewer.js", _viewer),
        Route("/review", _review, methods=["POST"]),
        # An address that is guessed from the name of the page
        Route("/review", _to_queue),
        Route("/undo", _undo, methods=["POST"]),
        Route("/missed", _missed, methods=["POST"]),
        Route("/sign-in", _sign_in, methods=["POST"]),
        Route("/sign-out", _sign_out, methods=["POST"]),
    ]
    application = Starlette(
        routes=routes, exception_handlers={HTTPException: _refused, Exception: _failed}
    )

    # names in the form in which browsers send them
    own = frozenset(name.encode("idna").decode("ascii").lower().rstrip(".") for name in names)
    public = frozenset(name for name in own if not _is_loopback(name))
    application.state.desk = Desk(path, token, public)
    return Guard(application, own | {"127.0.0.1", "localhost", "::1"})


class Guard:
    """Answer under the server's own names only, and put the security headers on every answer.

    A page of another site whose name was made to lead here (DNS rebinding) still sends that site's name.
    """

    def __init__(self, application: ASGIApp, names: frozenset[str]) -> None:
        self.application = application
        self.names = names

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
            return
        # websockets get no answer
        if scope["type"] != "http":
            return
        if _host(Headers(scope=scope).get("host", "")) in self.names:
            await self.application(scope, receive, send_guarded)
            return
        text = (
            "This server does not answer to that name. Its owner can add it with --name, "
            "or let the proxy in front of it pass on the Host of the browser."
        )
        await _message(Reader(), 421, text)(scope, receive, send_guarded)


def _host(header: str) -> str:
    """Return the name in a Host header without the port; empty if there is none."""
    place = PLACE.fullmatch(header)
    return place[1].strip("[]").lower().rstrip(".") if place else ""


# ------------------------------------------------------------------------------------------------------- reading


def _desk(request: Request) -> Desk:
    return cast(Desk, request.app.state.desk)


def _reader(request: Request, connection: sqlite3.Connection | None = None) -> Reader:
    """Return who looks at a page: what they may do, their name, and what they have just done."""
    form_token = _desk(request).form_token(request.cookies.get(SIGNED_IN, ""))
    if not form_token:
        return Reader()
    name = _line(unquote(request.cookies.get(REVIEWER, "")), LONGEST["reviewer"])

    if connection is None:
        return Reader(form_token, name)

    # what the form before this page did is in the log; an address only says where
    reader = Reader(form_token, name, log=_log_name(connection))
    done = request.query_params.get("done", "")
    numbers = _range(done)
    if numbers is None:
        return reader
    said, said_of = pages.said(connection, *numbers)
    return replace(reader, said=said, said_of=said_of, done=done)


def _log_name(connection: sqlite3.Connection) -> str:
    """Return which log a page shows; a copy that was put in its place counts as another one."""
    identity = connection.execute("SELECT id FROM identity").fetchone()["id"]
    file = connection.file if isinstance(connection, logbook.Log) else None
    place = (file.st_dev, file.st_ino) if file else ()
    return hashlib.sha256(repr((identity, *place)).encode()).hexdigest()[:32]


def _range(text: str) -> tuple[int, int] | None:
    """Return the first and the last of some numbers that are written as 12-15; None if they are not."""
    first, _, last = text.partition("-")
    return (int(first), int(last)) if _is_number(first) and _is_number(last) else None


def _same(found: str, expected: str) -> bool:
    """Compare two secrets in a time that reveals neither."""
    return hmac.compare_digest(found.encode(), expected.encode())


def _is_number(text: str) -> bool:
    """Tell whether a text is a number that SQLite can hold."""
    return text.isascii() and text.isdigit() and len(text) <= MOST_DIGITS


def _shown(request: Request, make: Callable[[sqlite3.Connection, Reader], str]) -> Response:
    """Answer with a page."""
    with _desk(request).reading() as connection:
        reader = _reader(request, connection)
        return HTMLResponse(_found(lambda: make(connection, reader)))


def _found(make: Callable[[], Found]) -> Found:
    """Return something of the log, or answer 404 if the log does not hold it."""
    try:
        return make()
    except decisions.ConflictError:
        raise
    except LogError as error:
        raise HTTPException(404, _sentence(error)) from error


def _sentence(error: Exception) -> str:
    """Return the text of an error as a sentence."""
    text = str(error)
    return f"{text[:1].upper()}{text[1:]}."


def _page(request: Request) -> int:
    """Return which page of a list is requested."""
    text = request.query_params.get("page", "1")
    return int(text) if _is_number(text) else 1


def _number(request: Request, name: str) -> int:
    """Return a number of the path."""
    text = str(request.path_params[name])
    if not _is_number(text):
        raise HTTPException(404)
    return int(text)


def _today(request: Request) -> Response:
    if "token" in request.query_params:
        return _signed_in(request, request.query_params["token"])
    return _shown(request, pages.today)


def _queue(request: Request) -> Response:
    show = cast(queries.Show | None, request.query_params.get("show"))
    order = request.query_params.get("order", "date")
    for found, words in ((show, queries.SHOWS), (order, queries.ORDERS)):
        if found is not None and found not in words:
            raise HTTPException(404, f"Found {found!r}, expected one of {', '.join(words)}.")
    page = _page(request)
    return _shown(
        request, lambda log, reader: pages.queue(log, reader, show=show, order=order, page=page)
    )


def _candidate(request: Request) -> Response:
    return _shown(
        request, lambda log, reader: pages.candidate(log, reader, _number(request, "number"))
    )


def _image(request: Request) -> Response:
    return _shown(request, lambda log, reader: pages.image(log, reader, _number(request, "number")))


def _regions(request: Request) -> Response:
    """Answer with the regions of an image, as a file of its own."""
    number = _number(request, "number")
    flt = request.query_params.get("flt", "") == "1"
    with _desk(request).reading() as connection:
        text = _found(lambda: pages.regions(connection, number, flt=flt))
    name = f"image-{number}{'-flt' if flt else ''}.reg"
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    return Response(text, media_type="text/plain", headers=headers)


def _pixels(request: Request) -> Response:
    """Answer with a plane of an image, as it lies packed beside the log or made from the file of the image."""
    plane = str(request.path_params["plane"])
    if plane not in planes.PLANES:
        raise HTTPException(404)
    number = _number(request, "number")
    with _desk(request).reading() as connection:
        row = _found(lambda: queries.image_row(connection, number))

        # what is subtracted from the same image differs from log to log
        about = (row["sha256"], row["logged"], row["stack_sha256"], plane)
        tag = f'"{hashlib.sha256(repr(about).encode()).hexdigest()[:32]}"'
        headers = {"ETag": tag, "Cache-Control": "private, no-cache", "Vary": "Accept-Encoding"}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        content = _found(lambda: planes.packed(connection, row, plane))
    if "deflate" in request.headers.get("accept-encoding", ""):
        headers["Content-Encoding"] = "deflate"
    else:
        content = zlib.decompress(content)
    return Response(content, media_type="application/octet-stream", headers=headers)


def _images(request: Request) -> Response:
    choice = queries.Choice(**_typed(request, (each.name for each in fields(queries.Choice))))
    return _shown(request, lambda log, reader: pages.images(log, reader, choice, _page(request)))


def _map(request: Request) -> Response:
    choice = queries.CandidateChoice(**_typed(request, CHOSEN))
    return _shown(request, lambda log, reader: pages.blob_map(log, reader, choice, _page(request)))


def _typed(request: Request, fields: Iterable[str]) -> dict[str, str]:
    """Return what an address says of some fields, as lines of printable characters."""
    return {
        name: _line(request.query_params[name], 100)
        for name in fields
        if name in request.query_params
    }


def _timeline(request: Request) -> Response:
    return _shown(request, pages.timeline)


def _picture(request: Request) -> Response:
    with _desk(request).reading() as connection:
        number = _number(request, "number")
        return _content(request, _found(lambda: queries.picture(connection, number)))


def _subframe(request: Request) -> Response:
    numbers = [_number(request, name) for name in ("image", "row", "col")]
    with _desk(request).reading() as connection:
        return _content(request, _found(lambda: queries.subframe(connection, *numbers)))


def _content(request: Request, picture: queries.Picture) -> Response:
    """Answer with a picture, unless the browser has it already.

    The browser asks each time: another log may have another picture under the same number.
    """
    digest = hashlib.sha256(picture.content).hexdigest()
    tag = f'"{digest[:32]}"'
    headers = {"ETag": tag, "Cache-Control": "private, no-cache"}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(picture.content, media_type=picture.type, headers=headers)


def _style(request: Request) -> Response:
    return Response(pages.asset("style.css"), media_type="text/css")


def _script(request: Request) -> Response:
    return Response(pages.asset("review.js"), media_type="text/javascript")


def _viewer(request: Request) -> Response:
    return Response(pages.asset("viewer.js"), media_type="text/javascript")


# ------------------------------------------------------------------------------------------------------- writing


async def _sign_in(request: Request) -> Response:
    form = await _form(request)
    return _signed_in(request, form.get("token", ""))


def _signed_in(request: Request, token: str) -> Response:
    """Begin a session for the right token, and lead to the first page."""
    desk = _desk(request)
    if not _same(token, desk.token):
        raise HTTPException(
            403, "That is not the token of this server. It was printed when the server was started."
        )
    response = RedirectResponse("/", 303)
    _set_cookie(request, response, SIGNED_IN, desk.sign_in())
    return response


def _set_cookie(request: Request, response: Response, name: str, value: str) -> None:
    """Set a cookie that scripts and other sites cannot use."""
    # a proxy need not say that the browser reaches it by TLS, but the browser does
    origin = request.headers.get("origin", "")
    secure = request.url.scheme == "https" or origin.startswith("https://")
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


async def _to_queue(request: Request) -> Response:
    """Lead a browser that asks for the address of the form to the queue."""
    return RedirectResponse("/queue", 303)


async def _review(request: Request) -> Response:
    """Write a decision on one or several candidates to the log, and lead to the next."""
    form = await _signed_form(request)
    candidates = form.getlist("candidate")
    decision = form.get("decision", "")
    if not candidates and form.get("several"):
        raise HTTPException(400, "Found no candidate selected. Go back and select some.")
    is_listed = 0 < len(candidates) <= decisions.MOST and all(map(_is_number, candidates))
    if not is_listed or decision not in queries.DECISIONS:
        raise HTTPException(
            400,
            f"Expected numbers of 1 to {decisions.MOST} candidates and one of {', '.join(queries.DECISIONS)}.",
        )
    numbers = list(dict.fromkeys(map(int, candidates)))
    reviewer = _reviewer(form)
    reason = _line(form.get("reason", ""), LONGEST["reason"])
    done = await _write(
        request, form, lambda log: decisions.review(log, numbers, decision, reviewer, reason)
    )
    return _led(request, _next_page(form, numbers[0], done), reviewer)


async def _undo(request: Request) -> Response:
    """Restore what was decided before some reviews, and lead to their candidate or to the queue."""
    form = await _signed_form(request)
    numbers = _range(form.get("done", ""))
    if numbers is None:
        raise HTTPException(400, "Expected the numbers of reviews, as in 12-15.")
    reviewer = _reviewer(form)
    done = await _write(request, form, lambda log: decisions.undo(log, *numbers, reviewer))
    candidate = form.get("candidate", "")
    known = int(candidate) if _is_number(candidate) else 0
    path = f"/candidate/{known}?{done}#candidate-{known}" if known else f"/queue?{done}"
    return _led(request, path, reviewer)


async def _missed(request: Request) -> Response:
    """Add a blob that the search has missed, and lead to it."""
    form = await _signed_form(request)
    number = form.get("image", "")
    places = [_coordinate(form.get(name, "")) for name in ("x_px", "y_px")]
    if not _is_number(number) or None in places:
        raise HTTPException(400, "Expected an image's number, and x and y in pixels.")
    x, y = (place for place in places if place is not None)
    reviewer = _reviewer(form)
    reason = _line(form.get("reason", ""), LONGEST["reason"])

    def add(log: sqlite3.Connection) -> tuple[int, int]:
        image = queries.image_row(log, int(number))
        if image["outcome"] != "searched":
            raise LogError(f"image {number} was not searched, so nothing can have been missed")
        return decisions.add_missed(log, image, x, y, reviewer, reason)

    done = await _write(request, form, add)
    return _led(request, f"/image/{int(number)}?{done}", reviewer)


def _coordinate(text: str) -> float | None:
    """Return a position that was typed (px); None if it is none."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


async def _write(
    request: Request, form: Form, work: Callable[[sqlite3.Connection], tuple[int, int]]
) -> str:
    """Write reviews to the log in one transaction; return their numbers for an address."""
    desk = _desk(request)

    def run() -> tuple[int, int]:
        with desk.writing() as connection:
            # the same numbers are of other candidates there
            if form.get("log") != _log_name(connection):
                raise HTTPException(409, OTHER_LOG)
            try:
                return _found(lambda: work(connection))
            except decisions.ConflictError as error:
                raise HTTPException(409, _sentence(error)) from error

    # in a thread of its own, as the log may be locked for a while
    first, last = await asyncio.get_running_loop().run_in_executor(desk.writers, run)
    return f"done={first}-{last}"


def _led(request: Request, path: str, reviewer: str) -> Response:
    """Lead to a page, and remember the reviewer's name."""
    response = RedirectResponse(path, 303)
    _set_cookie(request, response, REVIEWER, quote(reviewer))
    return response


async def _signed_form(request: Request) -> Form:
    """Return the fields of a form that belongs to a session."""
    form = await _form(request)
    expected = _reader(request).form_token
    if not expected or not _same(form.get("form_token", ""), expected):
        raise HTTPException(
            403, "Not signed in. Open the address that the server printed when it was started."
        )
    return form


async def _form(request: Request) -> Form:
    """Return the fields of a form of this server's own pages."""
    if not _is_own(request):
        raise HTTPException(
            403,
            "This request did not come from a page of this server. "
            "If there is a proxy in front of it, its owner can give the name in the browser's address with --name.",
        )
    content_type = request.headers.get("content-type", "").split(";")[0]
    if content_type != "application/x-www-form-urlencoded":
        raise HTTPException(415, "This request is not a form of this server's pages.")

    # neither a long form nor a slow one may tie up the server
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
        text = f"The form did not arrive within {REQUEST_S:g} s."
        raise HTTPException(408, text, {"Connection": "close"}) from error
    except ClientDisconnect as error:
        raise HTTPException(400, "Only a part of the form arrived.") from error
    return ImmutableMultiDict(parse_qsl(body.decode("utf-8", "replace"), keep_blank_values=True))


def _is_own(request: Request) -> bool:
    """Tell whether a form comes from a page of this server; browsers always send its origin.

    A proxy may pass on another name or port than the browser's, so any port of a name given with --name will do.
    """
    scheme, _, place = request.headers.get("origin", "").lower().partition("://")
    if scheme not in ("http", "https") or not _host(place):
        return False
    usual_port = {"http": ":80", "https": ":443"}[scheme]
    asked = request.headers["host"].lower().removesuffix(usual_port)
    return place.removesuffix(usual_port) == asked or _host(place) in _desk(request).names


def _reviewer(form: Form) -> str:
    """Return the name of who decides."""
    reviewer = _line(form.get("reviewer", ""), LONGEST["reviewer"])
    if not reviewer:
        raise HTTPException(400, "Found no name, expected the reviewer's. Go back and fill it in.")
    return reviewer


def _line(text: str, longest: int) -> str:
    """Return a text as one line of printable characters."""
    one_line = " ".join(text.split())
    return "".join(c for c in one_line if c.isprintable())[:longest]


def _next_page(form: Form, candidate: int, done: str) -> str:
    """Return the path of the page that a form was on; only numbers and known words of it are used."""
    following = form.get("following", "")
    place = f"#candidate-{following}" if _is_number(following) else ""
    match form.get("then", "").split("-"):
        case ["queue", show, order, page] if (
            show in queries.SHOWS and order in queries.ORDERS and _is_number(page)
        ):
            return f"/queue?show={show}&order={order}&page={page}&{done}{place}"
        case ["map", page] if _is_number(page):
            # the choice of a table is typed by people: it is written anew as an address
            chosen = {name: _line(form.get(f"with_{name}", ""), 100) for name in CHOSEN}
            query = urlencode({name: text for name, text in chosen.items() if text})
            return f"/map?{query}{'&' if query else ''}page={page}&{done}"
        case _:
            return f"/candidate/{candidate}?{done}#candidate-{candidate}"


# --------------------------------------------------------------------------------------------------------- errors


def _refused(request: Request, error: Exception) -> Response:
    """Answer a request that was refused with a page that says why."""
    assert isinstance(error, HTTPException)
    text = error.detail
    # without a reason of its own, an error has the standard's phrase
    if text == HTTPStatus(error.status_code).phrase:
        text = "There is no such page."
    response = _message(_reader(request), error.status_code, text)
    response.headers.update(error.headers or {})
    return response


def _failed(request: Request, error: Exception) -> Response:
    """Answer after an internal error without details, which are in the server's own messages."""
    text = "Something went wrong here. The messages of the server give the cause."
    return _message(Reader(), 500, text)


def _message(reader: Reader, status: int, text: str) -> Response:
    """Answer with a page of one sentence."""
    return HTMLResponse(pages.message(reader, HTTPStatus(status).phrase, text), status)
