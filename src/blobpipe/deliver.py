"""How a notice leaves the house: to a mail server, or to a webhook. Nothing here knows the log.

Logins and the webhook's address are secrets: they come from the environment, go to their server over an encrypted
connection only, and stand in no error.
"""

from __future__ import annotations

import html
import http.client
import json
import re
import smtplib
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import datetime
from email.message import EmailMessage
from email.policy import SMTP
from typing import Any
from urllib.parse import urlsplit

from blobpipe import __version__
from blobpipe.errors import NoticeError
from blobpipe.params import Notices

USER, PASSWORD, WEBHOOK = "BLOBPIPE_SMTP_USER", "BLOBPIPE_SMTP_PASSWORD", "BLOBPIPE_WEBHOOK_URL"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
NOT_THE_LETTERS_FAULT = (401, 403, 404, 407, 408, 409, 410, 425, 429)  # HTTP: the address, or the moment
LOGIN_WANTED = (530, 534, 535, 538)  # SMTP: the settings
PATIENT_ATTEMPTS = 4  # greylisting is over by then; one full mailbox must not keep the others waiting
TITLE_LENGTH, TEXT_LENGTH = 150, 3000  # characters that Slack's blocks hold


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


# --- mail ------------------------------------------------------------------------------------------------------------


def by_mail(letter: Letter, params: Notices, environ: Mapping[str, str], afterwards: ExitStack) -> str:
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
    try:
        server = _connect(params, login, afterwards)
        return _hand_over(server, letter, params)
    except (smtplib.SMTPException, OSError) as error:
        raise _mail_failure(error, params, login) from None  # the chain of errors could hold the login


def smtp_login(environ: Mapping[str, str]) -> tuple[str, str] | None:
    """User and password, or None.

    Raises
    ------
    NoticeError
        If only one of them is set.
    """
    user, password = environ.get(USER, ""), environ.get(PASSWORD, "")
    if bool(user) != bool(password):
        raise NoticeError(f"only one of {USER} and {PASSWORD} is set; set both, or none, where blobpipe is started")
    return (user, password) if user else None


def _connect(params: Notices, login: tuple[str, str] | None, afterwards: ExitStack) -> smtplib.SMTP:
    server = _server(params)
    afterwards.callback(_part, server)
    if params.security == "starttls":
        server.starttls(context=ssl.create_default_context())  # fails where the server offers no encryption
    if login and params.security != "none":
        server.login(*login)
    return server


def _server(params: Notices) -> smtplib.SMTP:
    host, port, timeout = params.smtp_host, params.smtp_port, params.timeout_s
    if params.security == "tls":
        return smtplib.SMTP_SSL(host, port, timeout=timeout, context=ssl.create_default_context())
    return smtplib.SMTP(host, port, timeout=timeout)


def _part(server: smtplib.SMTP) -> None:
    with suppress(smtplib.SMTPException, OSError):
        server.quit()
    server.close()


def _hand_over(server: smtplib.SMTP, letter: Letter, params: Notices) -> str:
    server.ehlo_or_helo_if_needed()
    _insist(*server.mail(params.mail_from))
    answers = {to: server.rcpt(to) for to in params.mail_to}
    refused = {to: answer for to, answer in answers.items() if answer[0] >= 400}
    later = [answer for answer in refused.values() if answer[0] < 500]
    if refused and (len(refused) == len(answers) or (later and letter.attempt < PATIENT_ATTEMPTS)):
        _insist(*(later or list(refused.values()))[0])
    _insist(*server.data(_message(letter, params).as_bytes()))
    return "; ".join(f"refused for {to}: {_answer(*answer)}" for to, answer in refused.items())


def _insist(code: int, text: bytes) -> None:
    if code >= 400:
        raise smtplib.SMTPResponseException(code, text)


def _answer(code: int, text: bytes | str) -> str:
    words = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
    return f"{code} {' '.join(words.split())[:150]}"


def _message(letter: Letter, params: Notices) -> EmailMessage:
    message = EmailMessage(policy=SMTP)
    message["From"] = params.mail_from
    message["To"] = ", ".join(params.mail_to)
    message["Subject"] = letter.subject
    message["Date"] = datetime.fromisoformat(letter.created)
    message["Message-ID"] = f"<{letter.id}@{params.mail_from.partition('@')[2]}>"
    message["Auto-Submitted"] = "auto-generated"  # no answer from the absent
    message.set_content("\n".join([letter.text, *(["", letter.link] if letter.link else [])]), cte="quoted-printable")
    for name, content in letter.pictures:
        message.add_attachment(content, "image", name.rpartition(".")[2], filename=name)
    return message


def _mail_failure(error: Exception, params: Notices, login: tuple[str, str] | None) -> DeliveryError:
    match error:
        case smtplib.SMTPAuthenticationError():
            return DeliveryError(
                f"{params.smtp_host} refused the login ({error.smtp_code})"
            )  # its words could repeat it
        case smtplib.SMTPResponseException():
            lasting = error.smtp_code >= 500 and error.smtp_code not in LOGIN_WANTED
            reason = f"{params.smtp_host} answered {_answer(error.smtp_code, error.smtp_error)}"
            return DeliveryError(_without(reason, login or ()), lasting=lasting)
        case smtplib.SMTPServerDisconnected() if not isinstance(error.__context__, TimeoutError):
            return DeliveryError(f"{params.smtp_host} closed the connection")
        case smtplib.SMTPServerDisconnected():  # so smtplib calls it when an answer does not come in time
            return DeliveryError(f"{params.smtp_host}: {_trouble(TimeoutError(), params)}")
        case OSError() if not isinstance(error, smtplib.SMTPException):
            return DeliveryError(f"{params.smtp_host}: {_trouble(error, params)}")
    return DeliveryError(_without(f"{params.smtp_host}: {error}", login or ()))


# --- webhook ---------------------------------------------------------------------------------------------------------


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        """A letter goes where its address says, or nowhere."""


def by_webhook(letter: Letter, params: Notices, environ: Mapping[str, str], afterwards: ExitStack) -> str:
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
        {"Content-Type": "application/json", "Idempotency-Key": letter.id, "User-Agent": f"blobpipe/{__version__}"},
    )
    handlers: list[urllib.request.BaseHandler] = [
        _NoRedirect(),
        urllib.request.HTTPSHandler(context=ssl.create_default_context()),
    ]
    if urlsplit(url).scheme == "http":  # to this machine: a proxy would get the secret unencrypted
        handlers.append(urllib.request.ProxyHandler({}))
    opener = urllib.request.build_opener(*handlers)
    try:
        afterwards.enter_context(opener.open(request, timeout=params.timeout_s))
    except urllib.error.HTTPError as error:
        afterwards.callback(error.close)
        raise _refusal(error) from None
    except (OSError, http.client.HTTPException) as error:
        raise DeliveryError(f"the webhook: {_trouble(error, params)}") from None
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
        raise NoticeError(f"notices.webhook is true, but {WEBHOOK} is not set; set it where blobpipe is started")
    try:
        parts = urlsplit(url)
        safe = parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in LOOPBACK)
        good = safe and bool(parts.hostname) and (parts.port or 1) > 0 and re.fullmatch("[!-~]+", url)
    except ValueError:
        good = False
    if not good:
        raise NoticeError(f"{WEBHOOK}: expected an address that begins with https:// and holds no blanks; correct it")
    return url


def _payload(letter: Letter) -> dict[str, Any]:
    whole = "\n".join([letter.subject, letter.text, *([letter.link] if letter.link else [])])
    blocks: list[dict[str, Any]] = [
        {"type": "header", "text": {"type": "plain_text", "text": _short(letter.subject, TITLE_LENGTH)}},
        {"type": "section", "text": {"type": "plain_text", "text": _short(letter.text, TEXT_LENGTH)}},
    ]
    if letter.link:
        blocks.append(
            {"type": "section", "text": {"type": "mrkdwn", "text": f"<{html.escape(letter.link)}|Look at it>"}}
        )
    return {"text": html.escape(whole, quote=False), "blocks": blocks}  # & < > have a meaning in Slack's text


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 4]} ..."


def _refusal(error: urllib.error.HTTPError) -> DeliveryError:
    phrase = http.client.responses.get(error.code, "")  # the server's own words could repeat the address
    wait = error.headers.get("Retry-After", "")
    lasting = 400 <= error.code < 500 and error.code not in NOT_THE_LETTERS_FAULT
    return DeliveryError(
        f"the webhook answered {error.code} {phrase}", lasting=lasting, wait_s=float(wait) if wait.isdecimal() else 0.0
    )


# --- both ------------------------------------------------------------------------------------------------------------

BY: dict[str, Callable[[Letter, Notices, Mapping[str, str], ExitStack], str]] = {"mail": by_mail, "webhook": by_webhook}


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


def _without(text: str, secrets: tuple[str, ...]) -> str:
    for secret in secrets:
        text = text.replace(secret, "***")
    return text
