"""Deliver notices by SMTP or webhook; nothing here knows the log.

Logins and the webhook's address are secrets. They come from the environment, go to their server over an encrypted
connection only, and appear in no error message.
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

Login = tuple[str, str]  # user, password
Reply = tuple[int, bytes]  # code and text of an answer of a mail server

USER = "BLOBPIPE_SMTP_USER"
PASSWORD = "BLOBPIPE_SMTP_PASSWORD"
WEBHOOK = "BLOBPIPE_WEBHOOK_URL"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
# HTTP codes from 400 to 499 that blame the address or the moment and not the letter: worth another attempt
PASSING_CODES = (401, 403, 404, 407, 408, 409, 410, 425, 429)
LOGIN_CODES = (530, 534, 535, 538)  # SMTP codes that blame the login: worth another attempt
# attempts for which all recipients wait for one that is refused for the moment: greylisting is over
# by then, and one full mailbox must not hold up the others for ever
PATIENT_ATTEMPTS = 4
TITLE_LENGTH = 150  # characters of a header block, limit of Slack
TEXT_LENGTH = 3000  # characters of a text block, limit of Slack
# time for a whole letter, from looking up the server to its last answer, in timeouts of one answer
TIMES_PATIENCE = 3
MOST_ANSWERED = 1 << 20  # bytes of a mail server's answers to one letter; 2000 are usual
# characters of base64 that a login may add to its command, of the 512 that a command holds (RFC 5321)
LONGEST_FIRST = 360
TELLING = 4  # characters in a row of a password that reveal something of it


@dataclass(frozen=True)
class Letter:
    """Hold a notice as it is sent.

    Attributes
    ----------
    id : str
        The same at every attempt, so that receivers can recognise a repetition.
    subject, text : str
    created : str
        Time (ISO 8601).
    link : str
        Address of a page about it, or empty.
    pictures : tuple of (file name, bytes)
    attempt : int
        Number of the attempt, from 1.
    """

    id: str
    subject: str
    text: str
    created: str
    link: str = ""
    pictures: tuple[tuple[str, bytes], ...] = ()
    attempt: int = 1


class DeliveryError(Exception):
    """Report that a letter was not accepted: recorded in the outbox, no error of the user's.

    Attributes
    ----------
    lasting : bool
        Another attempt would meet the same answer.
    wait_s : float
        Time that the server asks to be left alone (s).
    """

    def __init__(self, reason: str, *, lasting: bool = False, wait_s: float = 0.0) -> None:
        super().__init__(" ".join(reason.split())[:300])
        self.lasting = lasting
        self.wait_s = wait_s


class _Deadline:
    """Cut the connection of a letter that takes too long.

    A server that sends a byte now and then meets every timeout of an answer.

    Attributes
    ----------
    over : bool
        Whether the time is up.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self.over = False
        self._connections: list[socket.socket] = []
        self._timer = threading.Timer(limit_s, self._cut)
        self._timer.daemon = True
        self._timer.start()

    def connect(
        self, address: Any, timeout: Any = None, source_address: Any = None
    ) -> socket.socket:
        """Connect like `socket.create_connection`, under the time limit."""
        connection = socket.create_connection(address, timeout, source_address)
        # a duplicate, as TLS takes over the original
        self._connections.append(connection.dup())
        # trying the addresses of the server's name may have used up the time
        if self.over:
            self._cut()
        return connection

    def _cut(self) -> None:
        self.over = True
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def end(self) -> None:
        """Stop the clock and let go of the connections."""
        self._timer.cancel()
        for connection in self._connections:
            connection.close()

    def reason(self) -> str:
        """Say that the time was up."""
        return f"the message was not delivered within {self.limit_s:g} s"


# ----------------------------------------------------------------------------------------------------------- mail


def by_mail(
    letter: Letter, params: Notices, environ: Mapping[str, str], afterwards: ExitStack
) -> str:
    """Have the mail server accept a letter for all recipients at once.

    Parameters
    ----------
    environ : mapping
        BLOBPIPE_SMTP_USER and BLOBPIPE_SMTP_PASSWORD, if the server wants a login.
    afterwards : ExitStack
        Takes the closing of the connection, so that the caller can first record that the letter was accepted.

    Returns
    -------
    str
        Recipients that the server refused, if it accepted the letter for the others; else empty.

    Raises
    ------
    DeliveryError
        If the server cannot be reached safely, or does not accept the letter.
    NoticeError
        If the login is incomplete.
    """
    login = smtp_login(environ)
    deadline = _Deadline(TIMES_PATIENCE * params.timeout_s)
    afterwards.callback(deadline.end)
    try:
        server = _connect(params, login, deadline, afterwards)
        return _transfer(server, letter, params, login)
    except Exception as error:
        # whatever a server makes us raise, the letter waits and the search goes on
        if deadline.over:
            failure = DeliveryError(f"{params.smtp_host}: {deadline.reason()}")
        else:
            failure = _mail_failure(error, params, login)
        # no chain of errors: it could hold the login
        raise failure from None


def smtp_login(environ: Mapping[str, str]) -> Login | None:
    """Return user and password, or None if neither is set.

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
        # Python keeps other bytes of the environment as lone surrogates
        if re.search("[\ud800-\udfff]", value):
            raise NoticeError(
                f"{name}: found bytes that are not UTF-8, expected UTF-8; set it again in that encoding"
            )
    return (user, password) if user else None


class _LimitedReader:
    """Read a mail server's answers, up to a limit."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.left = MOST_ANSWERED

    def readline(self, size: int) -> bytes:
        """Read a line, or ``size`` bytes of it."""
        line = self.stream.readline(size)
        self.left -= len(line)
        if self.left < 0:
            raise DeliveryError(
                f"the mail server answered more than {MOST_ANSWERED} bytes to one message"
            )
        return line

    def close(self) -> None:
        """Close the stream."""
        self.stream.close()


class _MailServer(smtplib.SMTP):
    """Connect to a mail server under a deadline, encrypted from the first byte if the settings say ``tls``."""

    def __init__(self, params: Notices, deadline: _Deadline) -> None:
        self.encrypted = params.security == "tls"
        self.deadline = deadline
        try:
            super().__init__(params.smtp_host, params.smtp_port, timeout=params.timeout_s)
        except BaseException:
            self.close()
            raise

    def _get_socket(self, host: str, port: int, timeout: float) -> socket.socket:
        connection = self.deadline.connect((host, port), timeout)
        if not self.encrypted:
            return connection
        return ssl.create_default_context().wrap_socket(connection, server_hostname=host)

    def getreply(self) -> Reply:
        """Read the answer to a command."""
        if self.file is None and self.sock is not None:
            self.file = _LimitedReader(self.sock.makefile("rb"))
        return super().getreply()


def _connect(
    params: Notices, login: Login | None, deadline: _Deadline, afterwards: ExitStack
) -> smtplib.SMTP:
    """Connect to the mail server, encrypted and logged in as the settings say."""
    server = _MailServer(params, deadline)
    afterwards.callback(_quit, server)
    if params.security == "starttls":
        # raises where the server offers no encryption
        server.starttls(context=ssl.create_default_context())
    if login and params.security != "none":
        _log_in(server, *login)
    return server


def _log_in(server: smtplib.SMTP, user: str, password: str) -> None:
    """Log in by the first mechanism that the server offers (RFC 4954), in UTF-8: smtplib takes ASCII only.

    The connection is encrypted, so the simplest mechanism, which hides nothing, comes first (RFC 4616).
    """
    server.ehlo_or_helo_if_needed()

    # for each mechanism what is sent with the command, then what is sent when the server asks for more
    mechanisms = {
        "PLAIN": [f"\0{user}\0{password}".encode()],
        "LOGIN": [b"", user.encode(), password.encode()],
        "CRAM-MD5": [b""],
    }
    offered = server.esmtp_features.get("auth", "").upper().split()
    mechanism = next((name for name in mechanisms if name in offered), "")
    if not mechanism:
        raise smtplib.SMTPNotSupportedError(
            "the server offers no login that blobpipe knows (PLAIN, LOGIN, CRAM-MD5)"
        )

    # a long login is sent on a line of its own
    first, *others = mechanisms[mechanism]
    if len(first) > LONGEST_FIRST:
        others = [first]
        first = b""
    command = f"{mechanism} {_base64(first)}".rstrip()
    code, challenge = server.docmd("AUTH", command)

    # the answer to a challenge proves the password without sending it
    if mechanism == "CRAM-MD5" and code == 334:
        digest = hmac.new(password.encode(), base64.b64decode(challenge), "md5").hexdigest()
        others = [f"{user} {digest}".encode()]

    for part in others:
        # 334: the server waits for more
        if code == 334:
            code, _ = server.docmd(_base64(part))

    # 235: accepted; 503: logged in already
    if code not in (235, 503):
        raise smtplib.SMTPAuthenticationError(code, b"")


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def _quit(server: smtplib.SMTP) -> None:
    """Say goodbye to a mail server and close the connection."""
    # the letter was accepted or not: what the server answers now changes nothing
    with suppress(Exception):
        server.quit()
    server.close()


def _transfer(server: smtplib.SMTP, letter: Letter, params: Notices, login: Login | None) -> str:
    """Send a letter to all recipients, and return which of them the server refused."""
    server.ehlo_or_helo_if_needed()
    _require_yes(*server.mail(params.mail_from))

    # recipients that are refused for good do not keep the letter from the others; one that is
    # refused for the moment does so for the first attempts
    answers = {to: server.rcpt(to) for to in params.mail_to}
    refused = {to: answer for to, answer in answers.items() if not _is_yes(answer[0])}
    for_now = [answer for answer in refused.values() if not _is_lasting(answer[0])]
    nobody_left = len(refused) == len(answers)
    worth_waiting = bool(for_now) and letter.attempt < PATIENT_ATTEMPTS
    if refused and (nobody_left or worth_waiting):
        decisive = for_now or list(refused.values())
        _require_yes(*decisive[0])

    _require_yes(*server.data(_message(letter, params).as_bytes()))
    return "; ".join(
        f"refused for {to}: {_answer(*answer, login)}" for to, answer in refused.items()
    )


def _require_yes(code: int, text: bytes) -> None:
    """Raise what a mail server answered unless it is a yes; nonsense is no yes."""
    if not _is_yes(code):
        raise smtplib.SMTPResponseException(code, text)


def _is_yes(code: int) -> bool:
    return 200 <= code < 300


def _is_lasting(code: int) -> bool:
    return 500 <= code < 600 and code not in LOGIN_CODES


def _answer(code: int, text: bytes | str, login: Login | None) -> str:
    """Return a server's answer without anything of the login, however the server repeats it."""
    content = text.encode() if isinstance(text, str) else text
    try:
        words = content.decode()
    except UnicodeDecodeError:
        words = content.decode("latin-1")
    one_line = " ".join(words.split())
    return f"{code} {_without(one_line, login)[:150]}"


def _without(words: str, login: Login | None) -> str:
    """Blank a login in a server's words; drop the words if they repeat it in part or in another form."""
    if login is None:
        return words

    # user and password as they are, in upper or lower case
    user, password = login
    for secret in (password, user):
        literal = re.escape(" ".join(secret.split()))
        words = re.sub(literal, "***", words, flags=re.IGNORECASE)

    # a few characters in a row of the password, or of what was sent in base64, reveal too much
    plain = f"\0{user}\0{password}"
    encoded = [_base64(part.encode()) for part in (password, user, plain)]
    said = "".join(words.split()).casefold()
    for secret in [password, *encoded]:
        n_parts = max(1, len(secret) - TELLING + 1)
        parts = (secret[at : at + TELLING] for at in range(n_parts))
        if any(part.casefold() in said for part in parts):
            return "(answer not shown: it repeats the login)"
    return words


def _message(letter: Letter, params: Notices) -> EmailMessage:
    """Write a letter as a mail with its pictures attached."""
    message = EmailMessage(policy=SMTP)
    message["From"] = params.mail_from
    message["To"] = ", ".join(params.mail_to)
    message["Subject"] = letter.subject
    message["Date"] = datetime.fromisoformat(letter.created)
    domain = params.mail_from.partition("@")[2]
    message["Message-ID"] = f"<{letter.id}@{domain}>"
    # asks for no out-of-office replies
    message["Auto-Submitted"] = "auto-generated"
    body = f"{letter.text}\n\n{letter.link}" if letter.link else letter.text
    message.set_content(body, cte="quoted-printable")
    for name, content in letter.pictures:
        subtype = name.rpartition(".")[2]
        message.add_attachment(content, "image", subtype, filename=name)
    return message


def _mail_failure(error: Exception, params: Notices, login: Login | None) -> DeliveryError:
    """Describe why a letter was not accepted, without anything of the login."""
    host = params.smtp_host
    match error:
        case DeliveryError():
            return error
        case smtplib.SMTPAuthenticationError():
            # the code alone: the server's words could repeat the login
            return DeliveryError(f"{host} refused the login ({error.smtp_code})")
        case smtplib.SMTPResponseException():
            answer = _answer(error.smtp_code, error.smtp_error, login)
            return DeliveryError(f"{host} answered {answer}", lasting=_is_lasting(error.smtp_code))
        case smtplib.SMTPServerDisconnected() if isinstance(error.__context__, TimeoutError):
            # smtplib's word for an answer that does not come in time
            return DeliveryError(f"{host}: {_trouble(TimeoutError(), params)}")
        case smtplib.SMTPServerDisconnected():
            return DeliveryError(f"{host} closed the connection")
        case smtplib.SMTPException():
            return DeliveryError(f"{host}: {_without(str(error), login)}")
    return DeliveryError(f"{host}: {_trouble(error, params)}")


# -------------------------------------------------------------------------------------------------------- webhook


class _Answer(http.client.HTTPResponse):
    """An answer whose first line counts: a server that has accepted a letter may say nonsense, or nothing, afterwards."""

    def begin(self) -> None:
        """Read the first line and the headers."""
        try:
            super().begin()
        except (OSError, http.client.HTTPException):
            if not (isinstance(self.status, int) and 200 <= self.status < 300):
                raise
            self.headers = self.msg = http.client.HTTPMessage()
            self.chunked = False
            self.length = 0
            self.will_close = True


class _Connections(urllib.request.HTTPSHandler, urllib.request.HTTPHandler):
    """Make HTTP connections that a deadline can cut."""

    def __init__(self, deadline: _Deadline) -> None:
        super().__init__()
        self.deadline = deadline

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        """Send a request to a server on this machine."""
        return self.do_open(self._connection(http.client.HTTPConnection), request)

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        """Send a request to a server with a trusted certificate."""
        kind = self._connection(http.client.HTTPSConnection)
        return self.do_open(kind, request, context=ssl.create_default_context())

    def _connection(
        self, kind: type[http.client.HTTPConnection]
    ) -> Callable[..., http.client.HTTPConnection]:
        """Return a maker of connections of a kind."""

        def make(host: str, **settings: Any) -> http.client.HTTPConnection:
            connection = kind(host, **settings)
            connection.response_class = _Answer
            # http.client offers no public way to replace this
            connection._create_connection = self.deadline.connect  # type: ignore[attr-defined]
            return connection

        return make


def by_webhook(
    letter: Letter, params: Notices, environ: Mapping[str, str], afterwards: ExitStack
) -> str:
    """Have a webhook accept a letter as JSON with ``text`` and ``blocks``, the form of Slack and its like.

    Parameters
    ----------
    environ : mapping
        BLOBPIPE_WEBHOOK_URL.
    afterwards : ExitStack
        Takes the closing of the connection.

    Returns
    -------
    str
        Empty.

    Raises
    ------
    DeliveryError
        If the server cannot be reached safely, or does not accept the letter.
    NoticeError
        If the address is missing or not safe.
    """
    url = webhook_url(environ)
    headers = {
        "Content-Type": "application/json",
        "Idempotency-Key": letter.id,
        "User-Agent": f"blobpipe/{__version__}",
    }
    request = urllib.request.Request(url, json.dumps(_payload(letter)).encode(), headers)
    deadline = _Deadline(TIMES_PATIENCE * params.timeout_s)
    afterwards.callback(deadline.end)

    # no redirects: a letter goes where its address says; and no proxy for a server on this machine,
    # as it would see the secret unencrypted
    is_local = urlsplit(url).scheme == "http"
    opener = urllib.request.OpenerDirector()
    opener.add_handler(urllib.request.ProxyHandler({} if is_local else None))
    opener.add_handler(_Connections(deadline))
    opener.add_handler(urllib.request.HTTPErrorProcessor())
    opener.add_handler(urllib.request.HTTPDefaultErrorHandler())

    # no chain of errors in what is raised: it could hold the address
    try:
        afterwards.enter_context(opener.open(request, timeout=params.timeout_s))
    except urllib.error.HTTPError as error:
        afterwards.callback(error.close)
        raise _refusal(error) from None
    except Exception as error:
        reason = deadline.reason() if deadline.over else _trouble(error, params)
        raise DeliveryError(f"the webhook: {reason}") from None
    return ""


def webhook_url(environ: Mapping[str, str]) -> str:
    """Return the webhook's address.

    Raises
    ------
    NoticeError
        If it is not set, is not an address, or would send the letter and its own secret unencrypted. The message does
        not contain the address.
    """
    url = environ.get(WEBHOOK, "")
    if not url:
        raise NoticeError(
            f"notices.webhook is true, but {WEBHOOK} is not set; set it where blobpipe is started"
        )
    if not _is_safe_url(url):
        raise NoticeError(
            f"{WEBHOOK}: expected an address that begins with https:// and the name of a server, "
            "without a login, blanks or letters beyond ASCII; correct it"
        )
    return url


def _is_safe_url(url: str) -> bool:
    """Tell whether an address is complete and keeps what is sent to it secret."""
    try:
        parts = urlsplit(url)
        is_local = parts.scheme == "http" and parts.hostname in LOOPBACK
        is_encrypted = parts.scheme == "https" or is_local
        is_printable = re.fullmatch("[!-~]+", url) is not None
        has_login = "@" in parts.netloc
        # a number beyond 65535 raises; 0 is a port that nothing listens on
        has_port = parts.port != 0
        return (
            is_encrypted
            and is_printable
            and not has_login
            and has_port
            and is_host_name(parts.hostname or "")
        )
    except ValueError:
        return False


def _payload(letter: Letter) -> dict[str, Any]:
    """Return a letter in the form of Slack's messages."""
    title = _short(letter.subject, TITLE_LENGTH)
    text = _short(letter.text, TEXT_LENGTH)
    blocks: list[dict[str, Any]] = [
        {"type": "header", "text": {"type": "plain_text", "text": title}},
        {"type": "section", "text": {"type": "plain_text", "text": text}},
    ]
    lines = [letter.subject, letter.text]
    if letter.link:
        link = f"<{html.escape(letter.link)}|Look at it>"
        blocks.append({"type": "section", "text": {"type": "mrkdwn", "text": link}})
        lines.append(letter.link)
    # & < > have a meaning in Slack's text
    return {"text": html.escape("\n".join(lines), quote=False), "blocks": blocks}


def _short(text: str, length: int) -> str:
    """Cut a text to a length, with dots at its end."""
    return text if len(text) <= length else f"{text[: length - 4]} ..."


def _refusal(error: urllib.error.HTTPError) -> DeliveryError:
    """Describe a webhook's answer by its code: the server's own words could repeat the address."""
    phrase = http.client.responses.get(error.code, "")
    wait = error.headers.get("Retry-After", "")
    wait_s = float(wait) if wait.isdecimal() else 0.0
    lasting = 400 <= error.code < 500 and error.code not in PASSING_CODES
    reason = f"the webhook answered {error.code} {phrase}"
    return DeliveryError(reason, lasting=lasting, wait_s=wait_s)


# ----------------------------------------------------------------------------------------------------------- both

Send = Callable[[Letter, Notices, Mapping[str, str], ExitStack], str]
BY: dict[str, Send] = {"mail": by_mail, "webhook": by_webhook}  # by the name of the channel


def _trouble(error: BaseException, params: Notices) -> str:
    """Describe a fault of the connection in our words: the library's could repeat the address."""
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
