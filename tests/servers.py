"""A mail server and a webhook on this machine that take notices as real ones do, and fail when they are told to."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import email
import ipaddress
import json
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from email.message import EmailMessage
from email.policy import SMTP
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from aiosmtpd.controller import Controller

HOST = "localhost"

logging.getLogger("mail.log").setLevel(logging.ERROR)  # aiosmtpd's


def nothing() -> None:
    """What a server does besides, if nobody wants anything."""


@dataclass
class Mailbox:
    """What a mail server got, and what it is to say.

    Attributes
    ----------
    tried, taken : list
        Letters that came as a whole, and those of them that it keeps.
    answers : list of str
        To the next letters, one each; afterwards it takes them. Besides a line of SMTP: hang, close, and deaf, which
        takes a letter and closes the connection without a word.
    refused : dict
        Answers to a recipient; the last one stays.
    on_letter, on_quit : callable
        Called before a letter, or a farewell, is answered.
    """

    answers: list[str] = field(default_factory=list)
    refused: dict[str, list[str]] = field(default_factory=dict)
    on_letter: Callable[[], None] = nothing
    on_quit: Callable[[], None] = nothing
    login: tuple[str, str] | None = None
    login_answer: str = "535 no such login"
    tried: list[EmailMessage] = field(default_factory=list)
    taken: list[EmailMessage] = field(default_factory=list)
    recipients: list[list[str]] = field(default_factory=list)
    logins: list[tuple[str, str]] = field(default_factory=list)
    encrypted: list[bool] = field(default_factory=list)

    async def handle_RCPT(  # noqa: N802
        self, server: Any, session: Any, envelope: Any, address: str, options: Any
    ) -> str:
        """Answer to a recipient."""
        script = self.refused.get(address, [])
        answer = (script.pop(0) if len(script) > 1 else script[0]) if script else "250 ok"
        if answer.startswith("250"):
            envelope.rcpt_tos.append(address)
        return answer

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:  # noqa: N802
        """Take a letter, or not."""
        letter = email.message_from_bytes(envelope.content, policy=SMTP)
        self.tried.append(letter)
        self.encrypted.append(server.transport.get_extra_info("sslcontext") is not None)
        answer = self.answers.pop(0) if self.answers else "250 taken"
        if (
            answer[0] == "2" or answer == "deaf"
        ):  # from now on it is the server's, whether the sender hears of it or not
            self.taken.append(letter)
            self.recipients.append(list(envelope.rcpt_tos))
        await asyncio.get_running_loop().run_in_executor(None, self.on_letter)
        if answer == "hang":
            await asyncio.sleep(60)
        if answer in ("close", "deaf"):
            server.transport.abort()
        return answer

    async def handle_QUIT(self, server: Any, session: Any, envelope: Any) -> str:  # noqa: N802
        """Answer to a farewell."""
        await asyncio.get_running_loop().run_in_executor(None, self.on_quit)
        return "221 bye"

    def authenticate(
        self, server: Any, session: Any, envelope: Any, mechanism: str, data: Any
    ) -> Any:
        """Whether a login is right."""
        from aiosmtpd.smtp import AuthResult

        given = (data.login.decode(), data.password.decode())
        self.logins.append(given)
        good = given == self.login
        return AuthResult(success=good, handled=good, message=None if good else self.login_answer)


class MailServer(Controller):
    """An SMTP server in a thread, on a port that was free; ``with`` starts and ends it."""

    def __init__(self, box: Mailbox, **settings: Any) -> None:
        settings.setdefault("server_hostname", HOST)
        super().__init__(
            box, hostname="127.0.0.1", port=0, authenticator=box.authenticate, **settings
        )

    def _trigger_server(self) -> None:
        self.port = self.server.sockets[0].getsockname()[1]
        super()._trigger_server()

    def __enter__(self) -> MailServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


@dataclass
class Hook:
    """What a webhook got, and what it is to say: as `Mailbox`; an answer is a status, or one with headers, or a word.

    Besides hang, close and deaf, the word slow stands for an answer that comes in small pieces.
    """

    answers: list[Any] = field(default_factory=list)
    on_letter: Callable[[], None] = nothing
    tried: list[dict[str, Any]] = field(default_factory=list)
    taken: list[dict[str, Any]] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)


class HookServer(ThreadingHTTPServer):
    """An HTTP server in a thread, on a port that was free; ``with`` starts and ends it."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, hook: Hook) -> None:
        super().__init__(("127.0.0.1", 0), _Asked)
        self.hook = hook
        self.thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> HookServer:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.hook.over.set()
        self.shutdown()
        self.thread.join()
        self.server_close()

    @property
    def url(self) -> str:
        """Its address, with a secret as Slack's have one."""
        return f"http://127.0.0.1:{self.server_address[1]}/services/T0/{SECRET}"

    def handle_error(self, *_: object) -> None:
        """A client that was killed is no error of ours."""


SECRET = "s3cr3t-t0k3n"


class _Asked(BaseHTTPRequestHandler):
    server: HookServer

    def do_POST(self) -> None:
        hook = self.server.hook
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        letter = {
            "id": self.headers["Idempotency-Key"],
            "type": self.headers["Content-Type"],
            "path": self.path,
            **body,
        }
        answer = hook.answers.pop(0) if hook.answers else 200
        code, headers = answer if isinstance(answer, tuple) else (answer, {})
        hook.tried.append(letter)
        if code in (200, "deaf", "slow"):
            hook.taken.append(letter)
        hook.on_letter()
        match code:
            case "hang":
                hook.over.wait(60)
            case "close" | "deaf":
                pass
            case "slow":
                for part in (b"HTTP/1.1 ", b"200 OK\r\n", b"Content-", b"Length: 0\r\n", b"\r\n"):
                    self.wfile.write(part)
                    time.sleep(0.1)
            case int():
                # the secret, repeated
                self.send_response(code, f"refused {self.path}" if code >= 400 else None)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", "0")
                self.end_headers()

    do_GET = do_POST  # noqa: N815 - where a redirect would lead

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class RawServer:
    """A server in a thread that says to each connection what a function says; ``with`` starts and ends it."""

    def __init__(
        self,
        talk: Callable[[socket.socket, threading.Event], None],
        context: ssl.SSLContext | None = None,
    ):
        self.talk, self.context, self.over = talk, context, threading.Event()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.thread = threading.Thread(target=self._serve, daemon=True)

    def _serve(self) -> None:
        while not self.over.is_set():
            # the client may go at any moment
            with contextlib.suppress(OSError), self.listener.accept()[0] as plain:
                plain.settimeout(10)
                if self.context is None:
                    self.talk(plain, self.over)
                    continue
                with self.context.wrap_socket(plain, server_side=True) as encrypted:
                    self.talk(encrypted, self.over)

    def __enter__(self) -> RawServer:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port)).close()
        self.thread.join(10)
        self.listener.close()


def dripping(
    before: bytes, drop: bytes = b"x", pause_s: float = 0.02
) -> Callable[[socket.socket, threading.Event], None]:
    """Say something at once, and then one thing again and again, for ever."""

    def talk(connection: socket.socket, over: threading.Event) -> None:
        connection.sendall(before)
        while not over.wait(pause_s):
            connection.sendall(drop)

    return talk


def reading(
    answers: dict[bytes, bytes], until: bytes = b""
) -> Callable[[socket.socket, threading.Event], None]:
    """Speak SMTP by a list: the answer to the first word of a line; ``.`` ends a letter; 250 to all others."""

    def talk(connection: socket.socket, over: threading.Event) -> None:
        connection.sendall(b"220 here\r\n")
        in_letter = False
        for line in connection.makefile("rb"):
            word = line.split()[0].upper() if line.split() else b""
            if in_letter and word != b".":
                continue
            answer = answers.get(word, b"354 go\r\n" if word == b"DATA" else b"250 ok\r\n")
            in_letter = answer.startswith(b"354")
            connection.sendall(answer)
            if word == until:
                return

    return talk


def certificate(folder: Path, *names: str) -> tuple[Path, Path]:
    """A self-signed certificate for host names, and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, names[0])])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([_host(each) for each in names]), critical=False)
        .sign(key, hashes.SHA256())
    )
    folder.mkdir(exist_ok=True)
    paths = folder / "certificate.pem", folder / "key.pem"
    paths[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    form = serialization.PrivateFormat.PKCS8
    paths[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    )
    return paths


def _host(name: str) -> Any:
    from cryptography import x509

    return x509.IPAddress(ipaddress.ip_address(name)) if name[0].isdigit() else x509.DNSName(name)


def server_context(paths: tuple[Path, Path]) -> ssl.SSLContext:
    """What a server encrypts with."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*paths)
    return context
