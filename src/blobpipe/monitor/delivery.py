"""How a notice leaves the house: to a mail server, or to a webhook. Nothing here knows the log.

Logins and the webhook's address are secrets: they come from the environment, go to their server over an encrypted
connection only, and stand in no error.
"""

from __future__ import annotations

import base64
import hmac
import html
import http.client
import json
import re
import smtplib
import socket
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import datetime
from email.message import EmailMessage
from email.policy import SMTP
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from blobpipe import __version__
from blobpipe.errors import NoticeError
from blobpipe.params import Notices, is_host_name

USER = "BLOBPIPE_SMTP_USER"
PASSWORD = "BLOBPIPE_SMTP_PASSWORD"
WEBHOOK = "BLOBPIPE_WEBHOOK_URL"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
# HTTP: the address, or the moment
NOT_THE_LETTERS_FAULT = (401, 403, 404, 407, 408, 409, 410, 425, 429)
LOGIN_WANTED = (530, 534, 535, 538)  # SMTP: the settings
# greylisting is over by then; one full mailbox must not keep the others waiting
PATIENT_ATTEMPTS = 4
# characters that Slack's blocks hold
TITLE_LENGTH = 150
TEXT_LENGTH = 3000
# timeouts that a whole letter may take, from the name of the server to its last answer; ours
TIMES_PATIENCE = 3
MOST_ANSWERED = 1 << 20  # bytes of a mail server's answers to one letter; usual are 2000; ours
# bytes that a login may add to its command in base64: a command has 512 characters, RFC 5321
LONGEST_FIRST = 360
TELLING = 4  # characters in a row of a password that tell something of it; ours


@dataclass(frozen=True)
class Letter:
    """A notice as it is sent.

    Attributes
    ----------
    id : str
        The same at every attempt: receivers know by it what they have had.
    subject, text : str
    created : str
        ISO 8601.
    link : str
        Address of a page about it, or empty.
    pictures : tuple of (file name, bytes)
    attempt : int
        From 1.
    """

    id: str
    subject: str
    text: str
    created: str
    link: str = ""
    pictures: tuple[tuple[str, bytes], ...] = ()
    attempt: int = 1


class DeliveryError(Exception):
    """A letter was not accepted: what the outbox keeps account of, no fault of the user's.

    Attributes
    ----------
    lasting : bool
        Another attempt would meet the same answer.
    wait_s : float
        How long the server asks to be left alone.
    """

    def __init__(self, reason: str, *, lasting: bool = False, wait_s: float = 0.0) -> None:
        super().__init__(" ".join(reason.split())[:300])
        self.lasting, self.wait_s = lasting, wait_s


class _Deadline:
    """Cut the connection of a letter that takes too long: a server that drips meets every timeout.

    Attributes
    ----------
    over : bool
        Whether it has been cut.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s, self.over = limit_s, False
        self._held: list[socket.socket] = []
        self._timer = threading.Timer(limit_s, self._cut)
        self._timer.daemon = True
        self._timer.start()

    def connect(
        self, address: Any, timeout: Any = None, source_address: Any = None
    ) -> socket.socket:
        """Connect as `socket.create_connection` does, so that the time limit holds for what is said."""
        connection = socket.create_connection(address, timeout, source_address)
        # still this connection when TLS has taken the other one
        self._held.append(connection.dup())
        if self.over:  # the addresses of the server's name have taken all the time
            self._cut()
        return connection

    def _cut(self) -> None:
        self.over = True
        for connection in self._held:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def end(self) -> None:
        """Let the connection be."""
        self._timer.cancel()
        for connection in self._held:
            connection.close()


# --- mail ------------------------------------------------------------------------------------------------------------


def by_mail(
    letter: Letter, params: Notices, environ: Mapping[str, str], afterwards: ExitStack
) -> str:
    """Have the mail server accept a letter for all recipients at once.

    Parameters
    ----------
    environ : mapping
        BLOBPIPE_SMTP_USER and BLOBPIPE_SMTP_PASSWORD, if the server wants a login.
    afterwards : ExitStack
        Takes the farewell to the server: there is something more urgent once it has accepted.

    Returns
    -------
    str
        Which recipients the server refused, if it accepted the letter for the others; else empty.

    Raises
    ------
    DeliveryError
        If the server cannot be reached safely, or does not accept the letter.
    NoticeError
        If the login is half there.
    """
    login = smtp_login(environ)
    deadline = _Deadline(TIMES_PATIENCE * params.timeout_s)
    afterwards.callback(deadline.end)
    try:
        server = _connect(params, login, deadline, afterwards)
        return _hand_over(server, letter, params, login)
    except (
        Exception
    ) as error:  # whatever a server makes of us: the letter waits, the search goes on
        reason = f"{params.smtp_host}: {_overdue(deadline)}"
        failure = DeliveryError(reason) if deadline.over else _mail_failure(error, params, login)
        raise failure from None  # the chain of errors could hold the login


def smtp_login(environ: Mapping[str, str]) -> tuple[str, str] | None:
    """User and password, or None.

    Raises
    ------
    NoticeError
        If only one of them is set, or one is not UTF-8.
    """
    user = environ.get(USER, "")
    password = environ.get(PASSWORD, "")
    if bool(user) != bool(password):
        raise NoticeError(
            f"only one of {USER} and {PASSWORD} is set; set both, or none, where blobpipe is started"
        )
    for name, value in ((USER, user), (PASSWORD, password)):
        if not _is_utf8(value):
            raise NoticeError(
                f"{name}: found bytes that are not UTF-8, expected UTF-8; set it anew in that encoding"
            )
    return (user, password) if user else None


def _is_utf8(text: str) -> bool:
    """Whether text of the environment was UTF-8: Python keeps other bytes as lone surrogates."""
    return not re.search("[\ud800-\udfff]", text)


class _Answers:
    """What a mail server says, unless it does not stop."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.left = stream, MOST_ANSWERED

    def readline(self, size: int) -> bytes:
        """Read a line, or ``size`` bytes of it."""
        line = self.stream.readline(size)
        self.left -= len(line)
        if self.left < 0:
            raise DeliveryError(
                f"the mail server answered more than {MOST_ANSWERED} bytes to one letter"
            )
        return line

    def close(self) -> None:
        """Close it."""
        self.stream.close()


class _MailServer(smtplib.SMTP):
    """A connection that a deadline can cut, encrypted from the first byte if the settings say ``tls``."""

    def __init__(self, params: Notices, deadline: _Deadline) -> None:
        self.encrypted, self.deadline = params.security == "tls", deadline
        try:
            super().__init__(params.smtp_host, params.smtp_port, timeout=params.timeout_s)
        except BaseException:
            self.close()
            raise

    def _get_socket(self, host: str, port: int, timeout: float) -> socket.socket:
        connection = self.deadline.connect((host, port), timeout)
        return (
            ssl.create_default_context().wrap_socket(connection, server_hostname=host)
            if self.encrypted
            else connection
        )

    def getreply(self) -> tuple[int, bytes]:
        """Read the answer to a command."""
        if self.file is None and self.sock is not None:
            self.file = _Answers(self.sock.makefile("rb"))
        return super().getreply()


def _connect(
    params: Notices, login: tuple[str, str] | None, deadline: _Deadline, afterwards: ExitStack
) -> smtplib.SMTP:
    server = _MailServer(params, deadline)
    afterwards.callback(_part, server)
    if params.security == "starttls":
        # fails where the server offers no encryption
        server.starttls(context=ssl.create_default_context())
    if login and params.security != "none":
        _log_in(server, *login)
    return server


def _log_in(server: smtplib.SMTP, user: str, password: str) -> None:
    """Log in by the first way that server and we know (RFC 4954), in UTF-8: smtplib's own ways take ASCII only.

    The connection is encrypted, so that the plain way, which hides nothing, comes first (RFC 4616).
    """
    server.ehlo_or_helo_if_needed()
    ways = {
        "PLAIN": [f"\0{user}\0{password}".encode()],
        "LOGIN": [b"", user.encode(), password.encode()],
        "CRAM-MD5": [b""],
    }
    offered = server.esmtp_features.get("auth", "").upper().split()
    way = next((name for name in ways if name in offered), "")
    if not way:
        raise smtplib.SMTPNotSupportedError(
            "the server offers no login that blobpipe knows (PLAIN, LOGIN, CRAM-MD5)"
        )
    first, *others = ways[way]
    if len(first) > LONGEST_FIRST:
        first, others = b"", [first]
    code, challenge = server.docmd("AUTH", f"{way} {_base64(first)}".rstrip())
    if way == "CRAM-MD5" and code == 334:
        digest = hmac.new(password.encode(), base64.b64decode(challenge), "md5").hexdigest()
        others = [f"{user} {digest}".encode()]
    for part in others:
        if code == 334:  # the server waits for more
            code, _ = server.docmd(_base64(part))
    if code not in (235, 503):  # accepted; logged in already
        raise smtplib.SMTPAuthenticationError(code, b"")


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def _part(server: smtplib.SMTP) -> None:
    with suppress(Exception):  # the letter has been accepted, or not: a farewell changes nothing
        server.quit()
    server.close()


def _hand_over(
    server: smtplib.SMTP, letter: Letter, params: Notices, login: tuple[str, str] | None
) -> str:
    server.ehlo_or_helo_if_needed()
    _insist(*server.mail(params.mail_from))
    answers = {to: server.rcpt(to) for to in params.mail_to}
    refused = {to: answer for to, answer in answers.items() if not _is_yes(answer[0])}
    later = [answer for answer in refused.values() if not _is_lasting(answer[0])]
    if refused and (len(refused) == len(answers) or (later and letter.attempt < PATIENT_ATTEMPTS)):
        _insist(*(later or list(refused.values()))[0])
    _insist(*server.data(_message(letter, params).as_bytes()))
    return "; ".join(
        f"refused for {to}: {_answer(*answer, login)}" for to, answer in refused.items()
    )


def _insist(code: int, text: bytes) -> None:
    if not _is_yes(code):  # nonsense is no yes either
        raise smtplib.SMTPResponseException(code, text)


def _is_yes(code: int) -> bool:
    return 200 <= code < 300


def _is_lasting(code: int) -> bool:
    return 500 <= code < 600 and code not in LOGIN_WANTED


def _answer(code: int, text: bytes | str, login: tuple[str, str] | None) -> str:
    """What a server answered, nothing of the login in it, however the server repeats it."""
    content = text.encode() if isinstance(text, str) else text
    try:
        words = content.decode()
    except UnicodeDecodeError:
        words = content.decode("latin-1")
    return f"{code} {_without(' '.join(words.split()), login)[:150]}"


def _without(words: str, login: tuple[str, str] | None) -> str:
    """Blank a login in a server's words; leave them out if they repeat it in part or in another form."""
    if login is None:
        return words
    user, password = login
    for secret in (password, user):
        words = re.sub(re.escape(" ".join(secret.split())), "***", words, flags=re.IGNORECASE)
    sent = [
        password,
        *(_base64(part.encode()) for part in (password, user, f"\0{user}\0{password}")),
    ]
    said = "".join(words.split()).casefold()
    telling = (
        secret[at : at + TELLING]
        for secret in sent
        for at in range(max(1, len(secret) - TELLING + 1))
    )
    return (
        "(words that repeat the login)"
        if any(part.casefold() in said for part in telling)
        else words
    )


def _message(letter: Letter, params: Notices) -> EmailMessage:
    message = EmailMessage(policy=SMTP)
    message["From"] = params.mail_from
    message["To"] = ", ".join(params.mail_to)
    message["Subject"] = letter.subject
    message["Date"] = datetime.fromisoformat(letter.created)
    message["Message-ID"] = f"<{letter.id}@{params.mail_from.partition('@')[2]}>"
    message["Auto-Submitted"] = "auto-generated"  # no answer from the absent
    message.set_content(
        "\n".join([letter.text, *(["", letter.link] if letter.link else [])]),
        cte="quoted-printable",
    )
    for name, content in letter.pictures:
        message.add_attachment(content, "image", name.rpartition(".")[2], filename=name)
    return message


def _mail_failure(
    error: Exception, params: Notices, login: tuple[str, str] | None
) -> DeliveryError:
    match error:
        case DeliveryError():
            return error
        case smtplib.SMTPAuthenticationError():
            return DeliveryError(
                f"{params.smtp_host} refused the login ({error.smtp_code})"
            )  # its words could repeat it
        case smtplib.SMTPResponseException():
            reason = (
                f"{params.smtp_host} answered {_answer(error.smtp_code, error.smtp_error, login)}"
            )
            return DeliveryError(reason, lasting=_is_lasting(error.smtp_code))
        case smtplib.SMTPServerDisconnected() if not isinstance(error.__context__, TimeoutError):
            return DeliveryError(f"{params.smtp_host} closed the connection")
        # so smtplib calls it when an answer does not come in time
        case smtplib.SMTPServerDisconnected():
            return DeliveryError(f"{params.smtp_host}: {_trouble(TimeoutError(), params)}")
        case smtplib.SMTPException():
            return DeliveryError(f"{params.smtp_host}: {_without(str(error), login)}")
    return DeliveryError(f"{params.smtp_host}: {_trouble(error, params)}")


# --- webhook ---------------------------------------------------------------------------------------------------------


class _Connections(urllib.request.HTTPSHandler, urllib.request.HTTPHandler):
    """Make connections that a deadline can cut."""

    def __init__(self, deadline: _Deadline) -> None:
        super().__init__()
        self.deadline = deadline

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        """Ask a server on this machine."""
        return self.do_open(self._connection(http.client.HTTPConnection), request)

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        """Ask a server whose certificate is good."""
        kind = self._connection(http.client.HTTPSConnection)
        return self.do_open(kind, request, context=ssl.create_default_context())

    def _connection(
        self, kind: type[http.client.HTTPConnection]
    ) -> Callable[..., http.client.HTTPConnection]:
        def make(host: str, **settings: Any) -> http.client.HTTPConnection:
            connection = kind(host, **settings)
            # no other way in
            connection._create_connection = self.deadline.connect  # type: ignore[attr-defined]
            return connection

        return make


def by_webhook(
    letter: Letter, params: Notices, environ: Mapping[str, str], afterwards: ExitStack
) -> str:
    """Have a webhook accept a letter, as Slack and those like it take them: JSON with ``text`` and ``blocks``.

    Parameters
    ----------
    environ : mapping
        BLOBPIPE_WEBHOOK_URL.
    afterwards : ExitStack
        Takes the farewell to the server.

    Returns
    -------
    str
        Empty.

    Raises
    ------
    DeliveryError
        If the server cannot be reached safely, or does not accept the letter.
    NoticeError
        If there is no address, or none that is safe.
    """
    url = webhook_url(environ)
    request = urllib.request.Request(
        url,
        json.dumps(_payload(letter)).encode(),
        {
            "Content-Type": "application/json",
            "Idempotency-Key": letter.id,
            "User-Agent": f"blobpipe/{__version__}",
        },
    )
    deadline = _Deadline(TIMES_PATIENCE * params.timeout_s)
    afterwards.callback(deadline.end)
    # that follows no redirect: a letter goes where its address says
    opener = urllib.request.OpenerDirector()
    for handler in (
        # to this machine without: a proxy would get the secret unencrypted
        urllib.request.ProxyHandler({} if urlsplit(url).scheme == "http" else None),
        _Connections(deadline),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
    ):
        opener.add_handler(handler)
    try:
        afterwards.enter_context(opener.open(request, timeout=params.timeout_s))
    except urllib.error.HTTPError as error:
        afterwards.callback(error.close)
        raise _refusal(error) from None
    except Exception as error:  # as with mail
        reason = _overdue(deadline) if deadline.over else _trouble(error, params)
        raise DeliveryError(f"the webhook: {reason}") from None
    return ""


def webhook_url(environ: Mapping[str, str]) -> str:
    """The webhook's address.

    Raises
    ------
    NoticeError
        If it is not set, is no address, or would send the letter and the secret in it unencrypted. The address is not
        in the message.
    """
    url = environ.get(WEBHOOK, "")
    if not url:
        raise NoticeError(
            f"notices.webhook is true, but {WEBHOOK} is not set; set it where blobpipe is started"
        )
    try:
        parts = urlsplit(url)
        safe = parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in LOOPBACK)
        whole = re.fullmatch("[!-~]+", url) and "@" not in parts.netloc and parts.port != 0
        good = safe and whole and is_host_name(parts.hostname or "")
    except ValueError:
        good = False
    if not good:
        raise NoticeError(
            f"{WEBHOOK}: expected an address that begins with https:// and the name of a server, "
            "without a login, blanks or letters beyond ASCII; correct it"
        )
    return url


def _payload(letter: Letter) -> dict[str, Any]:
    whole = "\n".join([letter.subject, letter.text, *([letter.link] if letter.link else [])])
    blocks: list[dict[str, Any]] = [
        {
            "type": "header",
            "text": {"type": "plain_text", "text": _short(letter.subject, TITLE_LENGTH)},
        },
        {
            "type": "section",
            "text": {"type": "plain_text", "text": _short(letter.text, TEXT_LENGTH)},
        },
    ]
    if letter.link:
        blocks.append(
            {
                "type": "section",
                "text": {"type": "mrkdwn", "text": f"<{html.escape(letter.link)}|Look at it>"},
            }
        )
    # & < > have a meaning in Slack's text
    return {"text": html.escape(whole, quote=False), "blocks": blocks}


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 4]} ..."


def _refusal(error: urllib.error.HTTPError) -> DeliveryError:
    # the server's own words could repeat the address
    phrase = http.client.responses.get(error.code, "")
    wait = error.headers.get("Retry-After", "")
    lasting = 400 <= error.code < 500 and error.code not in NOT_THE_LETTERS_FAULT
    return DeliveryError(
        f"the webhook answered {error.code} {phrase}",
        lasting=lasting,
        wait_s=float(wait) if wait.isdecimal() else 0.0,
    )


# --- both ------------------------------------------------------------------------------------------------------------

BY: dict[str, Callable[[Letter, Notices, Mapping[str, str], ExitStack], str]] = {
    "mail": by_mail,
    "webhook": by_webhook,
}


def _trouble(error: BaseException, params: Notices) -> str:
    """A fault of the connection in our words: the library's could repeat the address."""
    match error:
        case urllib.error.URLError() if isinstance(error.reason, BaseException):
            return _trouble(error.reason, params)
        case ssl.SSLCertVerificationError():
            return f"its certificate is not trusted: {error.verify_message}"
        case TimeoutError():
            return f"no answer within {params.timeout_s:g} s"
        case http.client.RemoteDisconnected():
            return "the server closed the connection"
        case OSError() if error.strerror:
            return error.strerror
    return type(error).__name__


def _overdue(deadline: _Deadline) -> str:
    return f"the letter was not over within {deadline.limit_s:g} s"
