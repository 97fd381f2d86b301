"""Letters to real servers on this machine: what they accept, how they fail, and what never leaves the house."""

from __future__ import annotations

import base64
import hmac
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from tests.servers import (
    HOST,
    SECRET,
    Hook,
    HookServer,
    Mailbox,
    MailServer,
    RawServer,
    certificate,
    dripping,
    reading,
    server_context,
)

from blobpipe.errors import NoticeError
from blobpipe.monitor import delivery
from blobpipe.monitor.delivery import DeliveryError, Letter
from blobpipe.params import Notices

PNG = b"\x89PNG\r\n\x1a\n not much of a picture"
TO = ("team@example.org", "lead@example.org")
PASSWORD = "pa55-w0rd"
LOGIN = {delivery.USER: "robot", delivery.PASSWORD: PASSWORD}
# Patience of these tests with an answer, of which a letter may take three times; what is said then; and the time in which
# a test must be over, on a busy machine
PATIENCE_S = 0.5
NO_ANSWER = "localhost: no answer within 0.5 s"
NOT_DELIVERED = "the message was not delivered within 1.5 s"
LIMIT_S = 10.0

TEXT = "place: x = 512.2, y = 300.0 px\nradius: 5.31 +- 0.21 px\nS/N: 14.20 & <more>"
LETTER = Letter(
    id="0123456789abcdef0123456789abcdef",
    subject="blobpipe: new blob at x 512, y 300",
    text=TEXT,
    created="2024-05-07T10:00:00.000Z",
    link="http://127.0.0.1:8000/candidate/1",
    pictures=(("candidate-1-difference.png", PNG), ("candidate-1-map.png", PNG + b"2")),
)


def settings(port: int = 25, security: str = "none", **more: object) -> Notices:
    common = {"mail_to": TO, "mail_from": "blobs@example.org", "smtp_host": HOST, "smtp_port": port}
    return Notices.model_validate({**common, "security": security, "timeout_s": 5.0, **more})


def mail(params: Notices, environ: dict[str, str] | None = None, letter: Letter = LETTER) -> str:
    with ExitStack() as afterwards:
        return delivery.by_mail(letter, params, environ or {}, afterwards)


def mail_fails(
    params: Notices, environ: dict[str, str] | None = None, letter: Letter = LETTER
) -> DeliveryError:
    with pytest.raises(DeliveryError) as caught:
        mail(params, environ, letter)
    assert caught.value.__cause__ is None
    assert PASSWORD not in str(caught.value)
    return caught.value


def post(url: str, timeout_s: float = 5.0, letter: Letter = LETTER) -> str:
    with ExitStack() as afterwards:
        return delivery.by_webhook(
            letter, Notices(webhook=True, timeout_s=timeout_s), {delivery.WEBHOOK: url}, afterwards
        )


def post_fails(url: str, timeout_s: float = 5.0) -> DeliveryError:
    with pytest.raises(DeliveryError) as caught:
        post(url, timeout_s)
    assert caught.value.__cause__ is None
    assert SECRET not in str(caught.value)
    return caught.value


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A certificate of localhost that this process trusts."""
    paths = certificate(tmp_path / "trusted", HOST)
    monkeypatch.setenv("SSL_CERT_FILE", str(paths[0]))
    return paths


@contextmanager
def silent_server(greeting: bytes = b"", after: str = "hang") -> Iterator[int]:
    """The port of a server that says one thing and then nothing, or closes."""
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)

        def serve() -> None:
            with listener.accept()[0] as connection:
                connection.sendall(greeting)
                if after == "hang":
                    over.wait(10)

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        over.set()
        thread.join()


# --- mail ------------------------------------------------------------------------------------------------------------


def test_a_mail_holds_the_numbers_and_the_pictures() -> None:
    box = Mailbox()
    with MailServer(box) as server:
        assert mail(settings(server.port)) == ""
    [letter] = box.taken
    assert letter["Message-ID"] == f"<{LETTER.id}@example.org>"
    assert (letter["From"], letter["To"], letter["Subject"]) == (
        "blobs@example.org",
        ", ".join(TO),
        LETTER.subject,
    )
    assert letter["Date"].datetime.isoformat() == "2024-05-07T10:00:00+00:00"
    assert letter["Auto-Submitted"] == "auto-generated"
    body = letter.get_body(("plain",))
    assert body is not None
    assert body.get_content().splitlines() == [*TEXT.splitlines(), "", LETTER.link]
    pictures = [
        (part.get_filename(), part.get_content_type(), part.get_content())
        for part in letter.iter_attachments()
    ]
    assert pictures == [(name, "image/png", content) for name, content in LETTER.pictures]
    assert box.recipients == [list(TO)]


def test_a_mail_of_other_letters_than_ascii_and_long_lines_arrives_whole() -> None:
    box = Mailbox()
    text = "Größe: 5 µm ± 1\n" + "x" * 2000 + "\n.\nafter a lonely dot"
    with MailServer(box) as server:
        mail(settings(server.port), letter=Letter("a", "für: " + "ü" * 100, text, LETTER.created))
    body = box.taken[0].get_body(("plain",))
    assert body is not None
    assert body.get_content().splitlines() == text.splitlines()
    assert box.taken[0]["Subject"] == "für: " + "ü" * 100


def test_starttls(trusted: tuple[Path, Path]) -> None:
    box = Mailbox()
    with MailServer(box, tls_context=server_context(trusted), require_starttls=True) as server:
        mail(settings(server.port, "starttls"))
    assert box.encrypted == [True]


def test_tls_from_the_first_byte(trusted: tuple[Path, Path]) -> None:
    box = Mailbox()
    with MailServer(box, ssl_context=server_context(trusted)) as server:
        mail(settings(server.port, "tls"))
    assert box.encrypted == [True]


@pytest.mark.parametrize("security", ["starttls", "tls"])
def test_a_certificate_that_nobody_vouches_for_is_refused(tmp_path: Path, security: str) -> None:
    box = Mailbox(login=("robot", PASSWORD))
    context = server_context(certificate(tmp_path / "unknown", HOST))
    with MailServer(
        box, **{"tls_context" if security == "starttls" else "ssl_context": context}
    ) as server:
        failure = mail_fails(settings(server.port, security), LOGIN)
    assert "localhost: its certificate is not trusted: self-signed certificate" in str(failure)
    assert not failure.lasting
    assert (box.tried, box.logins) == ([], [])


@pytest.mark.parametrize("security", ["starttls", "tls"])
def test_a_certificate_of_another_server_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, security: str
) -> None:
    paths = certificate(tmp_path / "other", "elsewhere.example.org")
    monkeypatch.setenv("SSL_CERT_FILE", str(paths[0]))
    box = Mailbox()
    context = server_context(paths)
    with MailServer(
        box, **{"tls_context" if security == "starttls" else "ssl_context": context}
    ) as server:
        failure = mail_fails(settings(server.port, security))
    assert "certificate is not trusted: Hostname mismatch" in str(failure)
    assert box.tried == []


def test_a_server_without_encryption_gets_neither_login_nor_letter() -> None:
    box = Mailbox(login=("robot", PASSWORD))
    with MailServer(box, auth_require_tls=False) as server:
        failure = mail_fails(settings(server.port, "starttls"), LOGIN)
    assert "STARTTLS" in str(failure)
    assert (box.tried, box.logins) == ([], [])


def test_a_login(trusted: tuple[Path, Path]) -> None:
    box = Mailbox(login=("robot", PASSWORD))
    with MailServer(box, tls_context=server_context(trusted), auth_required=True) as server:
        mail(settings(server.port, "starttls"), LOGIN)
    assert box.logins == [("robot", PASSWORD)]
    assert len(box.taken) == 1


def test_a_login_over_tls_from_the_first_byte(trusted: tuple[Path, Path]) -> None:
    box = Mailbox(login=("robot", PASSWORD))
    with MailServer(box, ssl_context=server_context(trusted), auth_require_tls=False) as server:
        mail(settings(server.port, "tls"), LOGIN)
    assert box.logins == [("robot", PASSWORD)]


def test_a_wrong_login_is_no_fault_of_the_letter_and_is_not_repeated(
    trusted: tuple[Path, Path],
) -> None:
    box = Mailbox(login=("robot", "another"), login_answer=f"535 robot {PASSWORD} is wrong")
    with MailServer(box, tls_context=server_context(trusted), auth_required=True) as server:
        failure = mail_fails(settings(server.port, "starttls"), LOGIN)
    assert str(failure) == "localhost refused the login (535)"
    assert not failure.lasting
    assert box.tried == []


def test_a_server_that_wants_a_login_which_is_not_there_is_no_fault_of_the_letter(
    trusted: tuple[Path, Path],
) -> None:
    with MailServer(Mailbox(), tls_context=server_context(trusted), auth_required=True) as server:
        failure = mail_fails(settings(server.port, "starttls"))
    assert "localhost answered 530" in str(failure)
    assert not failure.lasting


def test_no_login_without_encryption() -> None:
    box = Mailbox(login=("robot", PASSWORD))
    with MailServer(box, auth_require_tls=False) as server:
        mail(settings(server.port), LOGIN)
    assert box.logins == []
    assert len(box.taken) == 1


def test_half_a_login_is_named_before_anything_is_sent() -> None:
    with pytest.raises(
        NoticeError, match=r"only one of BLOBPIPE_SMTP_USER and BLOBPIPE_SMTP_PASSWORD is set"
    ):
        mail(settings(1), {delivery.USER: "robot"})


@pytest.mark.parametrize(
    ("code", "lasting"), [(421, False), (451, False), (452, False), (550, True), (554, True)]
)
def test_a_refusal_is_for_now_or_for_good(code: int, lasting: bool) -> None:
    with MailServer(Mailbox(answers=[f"{code} not this one"])) as server:
        failure = mail_fails(settings(server.port))
    assert str(failure) == f"localhost answered {code} not this one"
    assert failure.lasting is lasting


def test_a_refusal_that_repeats_the_login_is_blanked(trusted: tuple[Path, Path]) -> None:
    box = Mailbox(login=("robot", PASSWORD), answers=[f"550 {PASSWORD} of robot may not do this"])
    with MailServer(box, tls_context=server_context(trusted)) as server:
        failure = mail_fails(settings(server.port, "starttls"), LOGIN)
    assert str(failure) == "localhost answered 550 *** of *** may not do this"


def test_a_server_that_closes_the_connection() -> None:
    with MailServer(Mailbox(answers=["close"])) as server:
        failure = mail_fails(settings(server.port))
    assert str(failure) == "localhost closed the connection"
    assert not failure.lasting
    with silent_server(after="close") as port:
        assert str(mail_fails(settings(port))) == "localhost closed the connection"


def test_a_server_that_hangs_costs_the_time_limit_only() -> None:
    start = time.monotonic()
    with MailServer(Mailbox(answers=["hang"])) as server:
        failure = mail_fails(settings(server.port, timeout_s=PATIENCE_S))
    assert str(failure) == NO_ANSWER
    for greeting in (b"", b"220 localhost\r\n"):
        with silent_server(greeting) as port:
            assert str(mail_fails(settings(port, timeout_s=PATIENCE_S))) == NO_ANSWER
    with silent_server() as port:
        assert str(mail_fails(settings(port, "tls", timeout_s=PATIENCE_S))) == NO_ANSWER
    assert time.monotonic() - start < 2 * LIMIT_S


def test_a_server_that_is_not_there() -> None:
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        failure = mail_fails(settings(taken.getsockname()[1]))
    assert str(failure) == "localhost: Connection refused"
    assert not failure.lasting


def test_what_is_no_mail_server() -> None:
    with silent_server(b"HTTP/1.1 400 Bad Request\r\n\r\n", after="close") as port:
        assert str(mail_fails(settings(port))).startswith("localhost")
    with silent_server(b"\x00\xff" * 10_000 + b"\n") as port:
        assert len(str(mail_fails(settings(port, timeout_s=0.5)))) <= 300


def test_one_refused_recipient_does_not_keep_it_from_the_others() -> None:
    box = Mailbox(refused={TO[1]: ["550 no such user"]})
    with MailServer(box) as server:
        assert mail(settings(server.port)) == f"refused for {TO[1]}: 550 no such user"
    assert box.recipients == [[TO[0]]]


def test_a_mail_that_is_refused_for_all_is_refused() -> None:
    box = Mailbox(refused={to: ["550 no such user"] for to in TO})
    with MailServer(box) as server:
        assert mail_fails(settings(server.port)).lasting
    box = Mailbox(refused={TO[0]: ["450 greylisted"], TO[1]: ["550 no such user"]})
    with MailServer(box) as server:
        failure = mail_fails(settings(server.port))
    assert "450 greylisted" in str(failure)  # for one of them another attempt is worth it
    assert not failure.lasting


def test_greylisting_is_waited_for_but_not_for_ever() -> None:
    box = Mailbox(refused={TO[1]: ["450 try again later"]})
    with MailServer(box) as server:
        for attempt in range(1, delivery.PATIENT_ATTEMPTS):
            assert "450" in str(mail_fails(settings(server.port), letter=_attempt(attempt)))
        assert box.taken == []  # nobody gets it twice
        remark = mail(settings(server.port), letter=_attempt(delivery.PATIENT_ATTEMPTS))
    assert remark == f"refused for {TO[1]}: 450 try again later"
    assert box.recipients == [[TO[0]]]


def test_the_first_attempt_is_the_first() -> None:
    assert Letter.__dataclass_fields__["attempt"].default == 1


@pytest.mark.parametrize(("code", "yes"), [(199, False), (200, True), (299, True), (300, False)])
def test_a_server_says_yes_by_the_two_hundreds(code: int, yes: bool) -> None:
    assert delivery._is_yes(code) == yes


def _attempt(number: int) -> Letter:
    return Letter(LETTER.id, LETTER.subject, LETTER.text, LETTER.created, attempt=number)


# --- logins beyond ASCII, and what a server may say of them ----------------------------------------------------------

BEYOND = ("jürgen@例え.example", "Überschall-2026 ß€")


def login(user: str, password: str) -> dict[str, str]:
    return {delivery.USER: user, delivery.PASSWORD: password}


@pytest.mark.parametrize("way", ["PLAIN", "LOGIN"])
@pytest.mark.parametrize("given", [BEYOND, ("robot", "x" * 400), ("robot", " spaces inside ")])
def test_a_login_beyond_ascii_goes_out_in_utf_8(
    trusted: tuple[Path, Path], way: str, given: tuple[str, str]
) -> None:
    box = Mailbox(login=given)
    other = {"PLAIN": "LOGIN", "LOGIN": "PLAIN"}[way]
    settled = {
        "tls_context": server_context(trusted),
        "auth_required": True,
        "auth_exclude_mechanism": [other],
    }
    with MailServer(box, **settled) as server:
        mail(settings(server.port, "starttls"), login(*given))
    assert box.logins == [given]
    assert len(box.taken) == 1


def test_a_login_that_does_not_show_the_password(trusted: tuple[Path, Path]) -> None:
    user, password = BEYOND
    challenge = b"<1896.697170952@localhost>"
    heard = []

    def talk(connection: socket.socket, over: threading.Event) -> None:
        connection.sendall(b"220 here\r\n")
        for line in connection.makefile("rb"):
            heard.append(line.strip())
            match line.split()[0].upper():
                case b"EHLO":
                    connection.sendall(b"250-here\r\n250 AUTH CRAM-MD5\r\n")
                case b"AUTH":
                    connection.sendall(b"334 " + base64.b64encode(challenge) + b"\r\n")
                case b"QUIT":
                    return
                case _:
                    connection.sendall(
                        b"235 good\r\n" if heard[-2].startswith(b"AUTH") else b"550 no\r\n"
                    )

    with RawServer(talk, server_context(trusted)) as server:
        assert (
            str(mail_fails(settings(server.port, "tls"), login(user, password)))
            == "localhost answered 550 no"
        )
    proof = hmac.new(password.encode(), challenge, "md5").hexdigest()
    assert base64.b64decode(heard[2]) == f"{user} {proof}".encode()


def test_a_server_that_knows_no_login_of_ours(trusted: tuple[Path, Path]) -> None:
    with RawServer(
        reading({b"EHLO": b"250-here\r\n250 AUTH GSSAPI\r\n"}), server_context(trusted)
    ) as server:
        failure = mail_fails(settings(server.port, "tls"), LOGIN)
    assert (
        str(failure)
        == "localhost: the server offers no login that blobpipe knows (PLAIN, LOGIN, CRAM-MD5)"
    )


@pytest.mark.parametrize("name", [delivery.USER, delivery.PASSWORD])
def test_a_login_that_is_not_utf_8_is_named_and_not_shown(name: str) -> None:
    environ = LOGIN | {name: b"s\xfcss".decode("utf-8", "surrogateescape")}
    with pytest.raises(NoticeError) as caught:
        mail(settings(1), environ)
    assert str(caught.value) == (
        f"{name}: found bytes that are not UTF-8, expected UTF-8; set it again in that encoding"
    )


USER = "robot"
SECOND = "Überschall-2026"
PLAIN = base64.b64encode(f"\0{USER}\0{SECOND}".encode())


@pytest.mark.parametrize(
    "words",
    [
        f"may {SECOND} not".encode(),
        f"may {SECOND} not".encode("latin-1"),
        f"may {SECOND.upper()} not".encode(),
        b"x" * 145 + SECOND.encode(),  # where words are cut
        b"x " * 100 + SECOND.encode(),
        SECOND.encode()[:-3],
        b"may " + PLAIN + b" not",
        b"may " + base64.b64encode(SECOND.encode()) + b" not",
        b"may " + base64.b64encode(USER.encode()) + b" not",
        b"may ROBOT not",
    ],
)
@pytest.mark.parametrize("where", [b"RCPT", b"."])
def test_no_part_of_a_login_is_shown_whatever_the_server_repeats(
    trusted: tuple[Path, Path], words: bytes, where: bytes
) -> None:
    answers = {
        b"EHLO": b"250-here\r\n250 AUTH PLAIN\r\n",
        b"AUTH": b"235 ok\r\n",
        where: b"550 " + words + b"\r\n",
    }
    with RawServer(reading(answers), server_context(trusted)) as server:
        said = str(mail_fails(settings(server.port, "tls"), login(USER, SECOND)))
    assert said.startswith("localhost answered 550")
    for secret in (SECOND, USER, PLAIN.decode(), base64.b64encode(SECOND.encode()).decode()):
        parts = {secret[at : at + 4].casefold() for at in range(len(secret) - 3)}
        assert not [part for part in parts if part in said.casefold()]


def test_a_refused_recipient_does_not_show_the_login(trusted: tuple[Path, Path]) -> None:
    box = Mailbox(
        login=("robot", PASSWORD), refused={TO[1]: [f"550 not for robot with {PASSWORD}"]}
    )
    with MailServer(box, tls_context=server_context(trusted)) as server:
        remark = mail(settings(server.port, "starttls"), LOGIN)
    assert remark == f"refused for {TO[1]}: 550 not for *** with ***"


# --- servers that drip, talk nonsense, or do not stop ----------------------------------------------------------------


def timed(fails: Callable[[], DeliveryError]) -> str:
    start = time.monotonic()
    failure = fails()
    assert time.monotonic() - start < LIMIT_S
    assert not failure.lasting
    return str(failure)


@pytest.mark.parametrize(
    ("before", "drop"),
    [
        (b"220 wel", b"c"),
        (b"220-wel", b"come\r\n220-"),
        (b"220 here\r\n250-he", b"r"),
        (b"", b"220-\r\n"),
    ],
)
@pytest.mark.parametrize("security", ["none", "tls"])
def test_a_mail_server_that_drips_is_cut_off(
    trusted: tuple[Path, Path], security: str, before: bytes, drop: bytes
) -> None:
    with RawServer(
        dripping(before, drop), server_context(trusted) if security == "tls" else None
    ) as server:
        said = timed(lambda: mail_fails(settings(server.port, security, timeout_s=PATIENCE_S)))
    assert said == f"localhost: {NOT_DELIVERED}"


def test_a_mail_server_that_drips_while_it_encrypts_is_cut_off() -> None:
    with RawServer(
        dripping(b"220 here\r\n250-here\r\n250 STARTTLS\r\n220 go\r\n", b"\x16")
    ) as server:
        assert "localhost" in timed(
            lambda: mail_fails(settings(server.port, "starttls", timeout_s=PATIENCE_S))
        )


def test_a_farewell_that_drips_costs_the_limit_and_not_the_letter() -> None:
    def talk(connection: socket.socket, over: threading.Event) -> None:
        reading({b"QUIT": b"221-b"}, until=b"QUIT")(connection, over)
        dripping(b"", b"y")(connection, over)

    start = time.monotonic()
    with RawServer(talk) as server:
        assert mail(settings(server.port, timeout_s=2 * PATIENCE_S)) == ""
    assert time.monotonic() - start < LIMIT_S


def test_a_mail_server_that_does_not_stop_talking_is_cut_off() -> None:
    with RawServer(dripping(b"", b"220-" + b"x" * 4000 + b"\r\n", 0.0)) as server:
        said = str(mail_fails(settings(server.port, timeout_s=5.0)))
    assert (
        said == f"the mail server answered more than {delivery.MOST_ANSWERED} bytes to one message"
    )


NONSENSE = (
    b"what?\r\n",
    b"\xff\xfe\x00\r\n",
    b"-50 no\r\n",
    b"999 x\r\n",
    b"\r\n",
    b"354 go on\r\n",
)


@pytest.mark.parametrize(
    ("word", "nonsense"),
    [
        (word, said)
        for word in (b"MAIL", b"RCPT", b"DATA", b".")
        for said in NONSENSE[: 5 if word == b"DATA" else 6]
    ],
)
def test_nonsense_is_no_yes(word: bytes, nonsense: bytes) -> None:
    with RawServer(reading({word: nonsense})) as server:
        assert not mail_fails(settings(server.port, timeout_s=0.3)).lasting


@pytest.mark.parametrize(
    "host",
    ["a..b", "x" * 64 + ".example", ".", "a b", "\udcfc.example", "x" * 300, "[::1]", "h:25"],
)
def test_a_host_that_is_none_is_refused_with_the_settings(host: str) -> None:
    with pytest.raises(
        ValueError, match=r"expected the name of a server alone, such as mail\.example\.org"
    ):
        settings(smtp_host=host)


@pytest.mark.parametrize("host", ["a..b", "x" * 64, "\udcfc.example"])
def test_a_host_that_cannot_be_looked_up_is_a_failure_and_no_more(host: str) -> None:
    assert "UnicodeE" in str(mail_fails(settings().model_copy(update={"smtp_host": host})))


@pytest.mark.parametrize(
    "address",
    [
        "a@b..c",
        "a..b@c",
        "<a@b>",
        "a,b@c",
        "a;b@c",
        '"a@b',
        "ü@b.example",
        "a@b\nBcc: c@d",
        "a@b\r",
        "a b@c",
        "a@",
        "@b",
        "a",
        "x" * 65 + "@b",
        "a@" + "x" * 64,
    ],
)
def test_a_mail_address_that_is_none_is_refused_with_the_settings(address: str) -> None:
    with pytest.raises(ValueError, match="mail_to"):
        settings(mail_to=(address,))
    with pytest.raises(ValueError, match="mail_from"):
        settings(mail_from=address)


# --- webhook ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "drop"),
    [
        (b"HTT", b"P"),
        (b"HTTP/1.1 20", b"0"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    ],
)
@pytest.mark.parametrize("encrypted", [False, True])
def test_a_webhook_that_drips_is_cut_off(
    trusted: tuple[Path, Path], before: bytes, drop: bytes, encrypted: bool
) -> None:
    scheme = "https" if encrypted else "http"
    with RawServer(
        dripping(before, drop), server_context(trusted) if encrypted else None
    ) as server:
        said = timed(lambda: post_fails(f"{scheme}://localhost:{server.port}/{SECRET}", PATIENCE_S))
    assert said == f"the webhook: {NOT_DELIVERED}"


@pytest.mark.parametrize(("before", "drop"), [(b"X", b"x"), (b"", b"X: y\r\n"), (b"\r\n", b"body")])
def test_a_webhook_that_has_accepted_may_drip(before: bytes, drop: bytes) -> None:
    start = time.monotonic()
    with RawServer(dripping(b"HTTP/1.1 200 OK\r\n" + before, drop)) as server:
        assert post(f"http://localhost:{server.port}/{SECRET}", 2 * PATIENCE_S) == ""
    assert time.monotonic() - start < LIMIT_S


@pytest.mark.parametrize(
    "after",
    [
        b"",
        b"X: y\r\n" * 200,
        b"X" * 70_000 + b"\r\n\r\n",
        b"Content-Length: -1\r\n\r\n",
        b"\xff\r\n",
    ],
    ids=["nothing", "many headers", "a long line", "no length", "no header"],
)
def test_a_webhook_that_has_accepted_may_say_what_it_likes(after: bytes) -> None:
    def talk(connection: socket.socket, over: threading.Event) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n" + after)
        over.wait()

    with RawServer(talk) as server:
        assert post(f"http://localhost:{server.port}/{SECRET}", PATIENCE_S) == ""


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\r\n\r\n",
        b"\x00\xff\xfe" * 50_000,
        b"HTTP/1.1 " + b"9" * 100_000 + b"\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        "HTTP/1.1 503 später\r\nRetry-After: ½\r\n\r\n".encode(),
    ],
)
def test_a_webhook_that_answers_nonsense_is_a_failure_and_no_more(answer: bytes) -> None:
    with RawServer(lambda connection, over: connection.sendall(answer)) as server:
        failure = post_fails(f"http://127.0.0.1:{server.port}/{SECRET}")
    assert not failure.lasting


@pytest.mark.parametrize(
    "to",
    ["http://[::1", "http://a..b/", "//[", "javascript:alert(1)", "\x00", "https://ü" + SECRET],
)
@pytest.mark.parametrize("code", [302, 308])
def test_a_redirect_to_nowhere_is_a_refusal(to: str, code: int) -> None:
    with HookServer(Hook(answers=[(code, {"Location": to})])) as server:
        assert str(post_fails(server.url)).startswith(f"the webhook answered {code} ")


def test_a_webhook_gets_what_slack_takes() -> None:
    hook = Hook()
    with HookServer(hook) as server:
        assert post(server.url) == ""
    [got] = hook.taken
    assert (got["id"], got["type"]) == (LETTER.id, "application/json")
    assert got["path"].endswith(SECRET)
    assert "S/N: 14.20 &amp; &lt;more&gt;" in got["text"]
    assert got["text"].splitlines()[0] == LETTER.subject
    header, section, link = got["blocks"]
    assert header == {"type": "header", "text": {"type": "plain_text", "text": LETTER.subject}}
    assert section == {"type": "section", "text": {"type": "plain_text", "text": TEXT}}
    assert link["text"] == {"type": "mrkdwn", "text": f"<{LETTER.link}|Look at it>"}


def test_slacks_limits_are_kept() -> None:
    hook = Hook()
    with HookServer(hook) as server:
        post(server.url, letter=Letter("a", "s" * 500, "t" * 9000, LETTER.created))
    lengths = [len(block["text"]["text"]) for block in hook.taken[0]["blocks"]]
    assert lengths == [delivery.TITLE_LENGTH, delivery.TEXT_LENGTH]


@pytest.mark.parametrize(
    ("code", "lasting"),
    [(code, False) for code in (401, 403, 404, 407, 408, 409, 410, 425, 429, 500, 503)]
    + [(code, True) for code in (400, 402, 406, 411, 413, 424, 426, 431)],
)
def test_an_error_is_for_now_or_for_good(code: int, lasting: bool) -> None:
    with HookServer(Hook(answers=[code])) as server:
        failure = post_fails(server.url)
    assert re.fullmatch(rf"the webhook answered {code} [\w ]+", str(failure))
    assert failure.lasting is lasting
    assert failure.wait_s == 0


def test_a_wait_that_the_server_asks_for_is_kept() -> None:
    with HookServer(
        Hook(answers=[(429, {"Retry-After": "77"}), (503, {"Retry-After": "soon"})])
    ) as server:
        assert [post_fails(server.url).wait_s for _ in range(2)] == [77, 0]


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(code: int) -> None:
    other = Hook()
    with (
        HookServer(other) as there,
        HookServer(Hook(answers=[(code, {"Location": there.url})])) as server,
    ):
        failure = post_fails(server.url)
    assert str(failure).startswith(f"the webhook answered {code}")
    assert not failure.lasting
    assert other.tried == []


def test_a_webhook_that_closes_hangs_or_is_not_there() -> None:
    with HookServer(Hook(answers=["close", "hang"])) as server:
        assert str(post_fails(server.url)) == "the webhook: the server closed the connection"
        assert (
            str(post_fails(server.url, timeout_s=PATIENCE_S))
            == "the webhook: no answer within 0.5 s"
        )
    assert str(post_fails(server.url)) == "the webhook: Connection refused"


def test_a_slow_webhook_is_waited_for() -> None:
    hook = Hook(answers=["slow"])
    with HookServer(hook) as server:
        assert post(server.url, timeout_s=1.0) == ""
    assert len(hook.taken) == 1


def test_what_is_no_webhook() -> None:
    with silent_server(b"220 localhost ESMTP\r\n", after="close") as port:
        failure = post_fails(f"http://127.0.0.1:{port}/{SECRET}")
    assert str(failure).startswith("the webhook: ")
    assert not failure.lasting


def test_a_webhook_with_a_certificate(trusted: tuple[Path, Path]) -> None:
    hook = Hook()
    with HookServer(hook) as server:
        server.socket = server_context(trusted).wrap_socket(server.socket, server_side=True)
        port = server.server_address[1]
        post(f"https://localhost:{port}/{SECRET}")
        failure = post_fails(f"https://127.0.0.1:{port}/{SECRET}")
    assert "its certificate is not trusted: IP address mismatch" in str(failure)
    assert len(hook.tried) == 1


def test_an_unknown_certificate_of_a_webhook_is_refused(tmp_path: Path) -> None:
    hook = Hook()
    with HookServer(hook) as server:
        context = server_context(certificate(tmp_path / "unknown", HOST))
        server.socket = context.wrap_socket(server.socket, server_side=True)
        failure = post_fails(f"https://localhost:{server.server_address[1]}/{SECRET}")
    assert "its certificate is not trusted: self-signed certificate" in str(failure)
    assert hook.tried == []


def test_a_letter_to_this_machine_goes_past_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = Hook()
    hook = Hook()
    with HookServer(proxy) as between, HookServer(hook) as server:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{between.server_address[1]}")
        post(server.url)
    assert proxy.tried == []
    assert len(hook.taken) == 1


@pytest.mark.parametrize(
    "url",
    [
        f"http://hooks.example.org/{SECRET}",
        f"ftp://hooks.example.org/{SECRET}",
        f"https:///{SECRET}",
        f"https://hooks.example.org:port/{SECRET}",
        f"https://hooks.example.org/{SECRET} \n",
        f"file:///{SECRET}",
        SECRET,
        f"https://a..b/{SECRET}",
        f"https://{'a' * 64}.example/{SECRET}",
        f"https://{'a.' * 200}example/{SECRET}",
        f"https://robot:{SECRET}@hooks.example.org/",
        f"https://hooks.example.org:0/{SECRET}",
        f"https://hooks.example.org:99999/{SECRET}",
        f"https://[::1/{SECRET}",
        f"https://hooks.example.org/{SECRET}ü",
        f"https://hooks.example.org/{SECRET}\udcfc",
    ],
)
def test_an_address_that_is_not_safe_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(NoticeError, match=r"BLOBPIPE_WEBHOOK_URL: expected an address") as caught:
        post(url)
    assert SECRET not in str(caught.value)


def test_a_webhook_without_an_address_is_named() -> None:
    with pytest.raises(
        NoticeError, match=r"notices\.webhook is true, but BLOBPIPE_WEBHOOK_URL is not set"
    ):
        delivery.by_webhook(LETTER, Notices(webhook=True), {}, ExitStack())
    assert (
        delivery.webhook_url({delivery.WEBHOOK: "https://hooks.example.org/x"})
        == "https://hooks.example.org/x"
    )


def test_the_default_settings_verify_certificates() -> None:
    context = ssl.create_default_context()
    assert context.check_hostname
    assert context.verify_mode is ssl.CERT_REQUIRED
