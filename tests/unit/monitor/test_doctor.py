"""The doctor: each thing that the daily routine needs, in order and out of order."""

from __future__ import annotations

import importlib.metadata
import shutil
import sqlite3
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from astropy.io import fits
from tests.unit import synthetic_log
from tests.unit.detection import test_promise

from blobpipe import cli
from blobpipe.core import files
from blobpipe.detection.detectors import load_dense_detector
from blobpipe.detection.promise import write_promised_point
from blobpipe.errors import NoticeError
from blobpipe.monitor import doctor, logbook, notices
from blobpipe.monitor.doctor import Check, Setup
from blobpipe.networks import dense_network, model_file
from blobpipe.params import Health, Notices, Params, Quicklook, to_yaml

MAIL = {
    "mail_to": ("team@example.org",),
    "mail_from": "blobs@example.org",
    "smtp_host": "mail.example.org",
}


@pytest.fixture
def log_path(tmp_path: Path) -> Path:
    path = tmp_path / "log.sqlite"
    synthetic_log.make_log(path, 40).close()
    return path


@pytest.fixture
def setup(log_path: Path, dense_model: Path) -> Setup:
    """Everything in order."""
    catalogue = log_path.with_name("blobs.csv")
    catalogue.write_text("blob,x_px,y_px,radius_px\nb1,10,20,5\n")
    return Setup(settings(log_path.parent), dense_model, catalogue, log_path)


def settings(folder: Path, **notices: object) -> Path:
    path = folder / "params.yaml"
    path.write_text(to_yaml(Params(notices=Notices(**notices), health=Health(window=3))))  # type: ignore[arg-type]
    return path


def found(
    setup: Setup, what: str, environ: Mapping[str, str] | None = None, **more: bool
) -> list[Check]:
    return [check for check in doctor.examine(setup, environ or {}, **more) if check.what == what]


def changed(setup: Setup, **more: Path | None) -> Setup:
    return Setup(**{**vars(setup), **more})  # type: ignore[arg-type]


def spoil(path: Path, statement: str, *values: object) -> None:
    with logbook.writing(logbook.connect(path)) as log:
        log.execute(statement, values)


def notice(path: Path, **more: object) -> None:
    with logbook.writing(logbook.connect(path)) as log:
        number = log.execute("SELECT count(*) FROM notices").fetchone()[0]
        row = {
            "key": f"k{number}",
            "channel": "mail",
            "subject": "s",
            "text": "t",
            "created": logbook.now(),
        }
        logbook.insert(log, "notices", row | more)


def test_all_is_well(setup: Setup) -> None:
    checks = list(doctor.examine(setup, {}))
    assert {check.state for check in checks} == {"ok"}
    names = [check.what for check in checks if check.what != "packages"]
    expected = [
        "installation",
        "settings",
        "detector",
        "model",
        "catalogue",
        "bad pixels",
        "log",
        "outbox",
        "readings",
        "disk",
        "mail",
    ]
    assert names == [*expected, "webhook"]


def test_nothing_is_changed(setup: Setup, tmp_path: Path) -> None:
    absent = tmp_path / "new" / "log.sqlite"
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for log in (setup.log, absent):
        list(doctor.examine(changed(setup, log=log), {}))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not absent.parent.exists()


# --- installation, settings, model, catalogue ------------------------------------------------------------------------


def test_missing_packages_fail_and_missing_extras_are_named(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking = {"numpy", "watchfiles", "cosmic-ray", "sep"}
    monkeypatch.setattr(doctor, "_installed", lambda name: name not in lacking)
    assert found(setup, "packages") == [
        Check("fail", "packages", "missing: numpy; install blobpipe again"),
        Check(
            "ok",
            "packages",
            "without the optional [watch] (watchfiles): pip install 'blobpipe[watch]'",
        ),
    ]


def test_run_from_its_sources_it_says_so(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", fail)
    [check] = found(setup, "installation")
    assert (check.state, "run from its sources" in check.found) == ("warn", True)


def test_faulty_settings_fail_and_the_rest_is_looked_at(setup: Setup, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("clip:\n  factor: much\n")
    checks = list(doctor.examine(setup, {}))
    assert [check.what for check in checks if check.state == "fail"] == ["settings"]
    assert "clip.factor: found" in next(check.found for check in checks if check.what == "settings")
    assert checks[-1].what == "webhook"
    assert found(changed(setup, params=None), "settings") == [
        Check("ok", "settings", "none named: the defaults")
    ]


def test_a_model_that_cannot_be_used_fails(setup: Setup, model: Path, tmp_path: Path) -> None:
    [missing] = found(changed(setup, model=tmp_path / "none.safetensors"), "model")
    assert (missing.state, "none.safetensors: not found, expected a model" in missing.found) == (
        "fail",
        True,
    )
    [other] = found(changed(setup, model=model), "model")
    assert (other.state, "the report's network, expected the dense one" in other.found) == (
        "fail",
        True,
    )
    (tmp_path / "text.safetensors").write_text("no model")
    [damaged] = found(changed(setup, model=tmp_path / "text.safetensors"), "model")
    assert (damaged.state, "not a model of the" in damaged.found) == ("fail", True)


def test_a_model_without_an_operating_point_is_warned_of(setup: Setup, tmp_path: Path) -> None:
    model_file.save_model(tmp_path / "raw.safetensors", dense_network.DenseNetwork(), {})
    [check] = found(changed(setup, model=tmp_path / "raw.safetensors"), "model")
    assert (
        check.state,
        "threshold 0.5000, the default, not set by any test: run the stage detect" in check.found,
    ) == (
        "warn",
        True,
    )
    [good] = found(setup, "model")
    assert "threshold 0.6000, set on 10 held-out images" in good.found
    assert load_dense_detector(setup.model).point.frames == 10


def test_a_bad_catalogue_fails(setup: Setup, tmp_path: Path) -> None:
    assert "blobs.csv, 1 blob" in found(setup, "catalogue")[0].found
    assert found(changed(setup, catalogue=None), "catalogue")[0].state == "ok"
    (tmp_path / "blobs.csv").write_text("blob,x_px\n")
    [check] = found(setup, "catalogue")
    assert (check.state, "blobs.csv: column y_px is missing" in check.found) == ("fail", True)


def test_a_mask_of_bad_pixels_is_read(setup: Setup, tmp_path: Path) -> None:
    assert found(setup, "bad pixels")[0].found == "none named: all pixels count as good"
    mask = np.zeros((1014, 1014), np.uint8)
    mask[3, 4] = 1
    fits.PrimaryHDU(mask).writeto(tmp_path / "mask.fits")
    named = changed(setup, bad_pixels=(tmp_path / "mask.fits",))
    assert found(named, "bad pixels") == [
        Check("ok", "bad pixels", f"{tmp_path / 'mask.fits'}, 1 pixel")
    ]
    (tmp_path / "mask.fits").write_text("no mask")
    [check] = found(named, "bad pixels")
    assert (check.state, "mask.fits: 7 bytes that are not" in check.found) == ("fail", True)


@pytest.mark.parametrize("where", ["option", "settings"])
def test_an_operating_point_is_named_with_its_promise(
    setup: Setup, tmp_path: Path, where: str
) -> None:
    assert found(setup, "operating point") == []
    path = tmp_path / "point.yaml"
    point = replace(test_promise.POINT, model_sha256=files.sha256(setup.model))
    named = changed(setup, operating_point=path)
    if where == "settings":
        params = Params(quicklook=Quicklook(operating_point=str(path)))
        (tmp_path / "params.yaml").write_text(to_yaml(params))
        named = setup
    [check] = found(named, "operating point")
    assert (check.state, "point.yaml: not found" in check.found) == ("fail", True)
    write_promised_point(path, point)
    [check] = found(named, "operating point")
    assert (check.state, check.found.endswith("47 are needed for 5")) == ("warn", True)
    write_promised_point(path, replace(point, false_alarms_per_100_images=4.9, n_images=47))
    assert found(named, "operating point") == [
        Check(
            "ok",
            "operating point",
            f"{path}, threshold 0.93, at most 4.9 false alarms per 100 images (confidence 0.9, 47 images)",
        )
    ]
    write_promised_point(path, test_promise.POINT)
    [check] = found(named, "operating point")
    assert (check.state, "the operating point of the model aaaa" in check.found) == ("fail", True)


# --- the log ---------------------------------------------------------------------------------------------------------


def test_a_log_in_order_is_whole_and_writable(setup: Setup) -> None:
    version = len(logbook.versions())
    assert found(setup, "log") == [
        Check("ok", "log", f"{setup.log}: whole, version {version}, wal, writable")
    ]


def test_without_a_log_the_way_to_one_is_told(setup: Setup, tmp_path: Path) -> None:
    for log, words in (
        (None, "none named"),
        (tmp_path / "none.sqlite", "none.sqlite: does not exist yet"),
    ):
        [check] = found(changed(setup, log=log), "log")
        assert check.state == "ok"
        assert words in check.found
        assert "'blobpipe quicklook' makes it" in check.found


def test_a_damaged_log_fails(setup: Setup, log_path: Path) -> None:
    content = log_path.read_bytes()
    log_path.write_bytes(content[:20_000] + b"\xff" * 40_000 + content[60_000:])
    [check] = found(setup, "log")
    assert check.state == "fail"
    assert "restore its latest copy" in check.found
    assert found(setup, "webhook")
    log_path.write_text("not a database, but a text that somebody saved under its name\n" * 9)
    [check] = found(setup, "log")
    assert check == Check(
        "fail",
        "log",
        f"{log_path}: file is not a database; restore its latest copy, or name another --log",
    )


def test_rows_that_refer_to_nothing_fail(setup: Setup, log_path: Path) -> None:
    log = logbook.connect(log_path)
    log.execute("PRAGMA foreign_keys = OFF")
    log.execute("DELETE FROM candidates WHERE id = 1")
    [check] = found(setup, "log")
    assert check.state == "fail"
    assert "rows refer to rows that do not exist" in check.found


def test_a_log_that_another_program_holds_fails(
    setup: Setup, log_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = sqlite3.connect
    monkeypatch.setattr(
        sqlite3, "connect", lambda *args, **more: connect(*args, **more | {"timeout": 0.1})
    )
    with logbook.writing(logbook.connect(log_path)):
        [check] = found(setup, "log")
    assert check.state == "fail"
    assert "log.sqlite: database is locked; close other programs that use it" in check.found


@pytest.mark.parametrize(
    ("version", "state", "words"),
    [(-1, "warn", "the next run brings it to"), (1, "fail", "later than this blobpipe's")],
    ids=["older", "newer"],
)
def test_the_version_of_a_log_is_looked_at(
    setup: Setup, log_path: Path, version: int, state: str, words: str
) -> None:
    spoil(log_path, f"PRAGMA user_version = {len(logbook.versions()) + version}")
    [check] = found(setup, "log")
    assert check.state == state
    assert words in check.found
    assert found(setup, "outbox") == []  # its tables may be others


def test_a_log_without_wal_is_warned_of(setup: Setup, log_path: Path) -> None:
    sqlite3.connect(log_path).execute("PRAGMA journal_mode = DELETE")
    [check] = found(setup, "log")
    assert check.state == "warn"
    assert "journal mode delete, not wal: is it on a network drive?" in check.found


# --- outbox, readings, disk ------------------------------------------------------------------------------------------


def test_what_waits_in_the_outbox_is_told(setup: Setup, log_path: Path, tmp_path: Path) -> None:
    assert found(setup, "outbox") == [Check("ok", "outbox", "nothing waits")]
    settings(tmp_path, **MAIL)
    notice(log_path)
    assert found(setup, "outbox") == [Check("ok", "outbox", "waiting: 1 by mail")]
    notice(log_path, attempts=3, error="mail.example.org: no answer within 20 s")
    [check] = found(setup, "outbox")
    assert check.state == "warn"
    assert (
        check.found
        == "waiting: 2 by mail, after 3 attempts (mail.example.org: no answer within 20 s)"
    )


def test_what_was_given_up_fails(setup: Setup, log_path: Path) -> None:
    notice(
        log_path, state="given_up", attempts=20, error="mail.example.org answered 550 no such user"
    )
    [check] = found(setup, "outbox")
    assert check.state == "fail"
    assert check.found.startswith(
        "GIVEN UP: 1 by mail (mail.example.org answered 550 no such user)"
    )
    assert check.found.endswith("run 'blobpipe notify --again'")


def test_a_channel_that_is_not_used_any_more_is_warned_of(setup: Setup, log_path: Path) -> None:
    notice(log_path, channel="webhook")
    [check] = found(setup, "outbox")
    assert (check.state, check.found) == (
        "warn",
        "waiting: 1 by webhook, which the settings do not use; set it up again",
    )


def test_a_recipient_that_was_refused_is_named(setup: Setup, log_path: Path) -> None:
    notice(log_path, state="sent", error="refused for x@example.org: 550 no such user")
    assert found(setup, "outbox")[0] == Check(
        "warn",
        "outbox",
        "the last notice was refused for x@example.org: 550 no such user; correct mail_to",
    )


def test_a_reading_beyond_its_limit_is_warned_of(setup: Setup, log_path: Path) -> None:
    assert found(setup, "readings") == [Check("ok", "readings", "all within their limits")]
    row = {"image": 40, "what": "noise_frac", "value": 0.02, "bound": 0.013, "since": 38}
    with logbook.writing(logbook.connect(log_path)) as log:
        logbook.insert(log, "health", row)
    [check] = found(setup, "readings")
    assert check.state == "warn"
    assert "0.02, limit 0.013; faint blobs are missed" in check.found


def test_images_that_were_never_searched_are_warned_of(setup: Setup, log_path: Path) -> None:
    assert found(setup, "images") == []
    # of images in order of date, the 31st has as many before it as a stack needs
    in_order = "SELECT id FROM images WHERE outcome != 'rejected' ORDER BY mjd LIMIT 1 OFFSET ?"
    never = f"UPDATE images SET outcome = 'stack' WHERE id = ({in_order})"
    spoil(log_path, never, 29)
    assert found(setup, "images") == []
    spoil(log_path, never, 30)
    [check] = found(setup, "images")
    assert check.state == "warn"
    assert check.found == (
        "1 image kept for stacks alone, although enough images precede by now; "
        "run 'blobpipe quicklook' once with --again"
    )


@pytest.mark.parametrize(("free", "state"), [(50e9, "ok"), (3e9, "warn"), (0.1e9, "fail")])
def test_free_disk_is_measured_where_the_log_is(
    setup: Setup, tmp_path: Path, free: float, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(
        shutil, "disk_usage", lambda folder: asked.append(folder) or SimpleNamespace(free=free)
    )
    [check] = found(changed(setup, log=tmp_path / "not" / "there" / "log.sqlite"), "disk")
    assert check.state == state
    assert asked == [tmp_path]
    assert check.found.endswith("make room") == (state != "ok")


# --- mail and webhook ------------------------------------------------------------------------------------------------

LOGIN = {"BLOBPIPE_SMTP_USER": "blobs", "BLOBPIPE_SMTP_PASSWORD": "s3cret-of-the-team"}


@pytest.mark.parametrize(
    ("notices", "environ", "state", "words"),
    [
        ({}, {}, "ok", "not set up: notices.mail_to is empty"),
        (
            MAIL,
            {},
            "ok",
            "to team@example.org by mail.example.org:587, starttls, without a login; --send-test",
        ),
        (MAIL, LOGIN, "ok", "starttls, with a login"),
        (
            MAIL,
            {"BLOBPIPE_SMTP_USER": "blobs"},
            "fail",
            "only one of BLOBPIPE_SMTP_USER and BLOBPIPE_SMTP_PASSWORD",
        ),
        (
            MAIL,
            LOGIN | {"BLOBPIPE_SMTP_PASSWORD": "s\udcfcss"},
            "fail",
            "BLOBPIPE_SMTP_PASSWORD: found bytes that are not",
        ),
        (MAIL | {"security": "none"}, {}, "warn", "not encrypted"),
        (MAIL | {"security": "none", "smtp_host": "localhost"}, {}, "ok", "localhost:587, none"),
        (
            MAIL | {"security": "none", "smtp_host": "localhost"},
            LOGIN,
            "warn",
            "the login is not used",
        ),
    ],
)
def test_mail_is_checked(
    setup: Setup,
    tmp_path: Path,
    notices: dict[str, object],
    environ: dict[str, str],
    state: str,
    words: str,
) -> None:
    settings(tmp_path, **notices)
    [check] = found(setup, "mail", environ)
    assert check.state == state
    assert words in check.found
    assert LOGIN["BLOBPIPE_SMTP_PASSWORD"] not in check.found


@pytest.mark.parametrize(
    ("url", "state", "words"),
    [
        (None, "fail", "BLOBPIPE_WEBHOOK_URL is not set"),
        (
            "http://hooks.example.org/s3cret",
            "fail",
            "expected an address that begins with https://",
        ),
        ("https://hooks..example.org/s3cret", "fail", "and the name of a server"),
        ("https://hooks.example.org/s3cret", "ok", "set up; --send-test tries it"),
    ],
)
def test_a_webhook_wants_its_variable(
    setup: Setup, tmp_path: Path, url: str | None, state: str, words: str
) -> None:
    assert found(setup, "webhook") == [
        Check("ok", "webhook", "not set up: notices.webhook is false")
    ]
    settings(tmp_path, webhook=True)
    [check] = found(setup, "webhook", {"BLOBPIPE_WEBHOOK_URL": url} if url else {})
    assert check.state == state
    assert words in check.found
    assert "s3cret" not in check.found


def test_a_test_notice_is_sent_on_request_alone(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> list[str]:
        raise NoticeError("mail: the test notice was not accepted: no answer within 20 s")

    assert found(setup, "test notice") == []
    monkeypatch.setattr(notices, "send_test", lambda *_: ["mail", "webhook"])
    assert found(setup, "test notice", send_test=True) == [
        Check("ok", "test notice", "accepted by mail, webhook")
    ]
    monkeypatch.setattr(notices, "send_test", refuse)
    assert [check.state for check in found(setup, "test notice", send_test=True)] == ["fail"]


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_exits_non_zero_on_a_fail_alone(
    setup: Setup,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)  # its params.yaml is taken
    words = ["doctor", "--model", str(setup.model)]
    assert cli.main([*words, "--log", str(setup.log), "--catalogue", str(setup.catalogue)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "ok    settings: params.yaml" in lines
    assert {line.split()[0] for line in lines} == {"ok"}
    assert cli.main(words) == 0  # there is no log yet: a warning
    assert "ok    log: quicklook/log.sqlite: does not exist yet" in capsys.readouterr().out
    assert cli.main([*words, "--catalogue", "none.csv"]) == 1
    assert "fail  catalogue: none.csv: not found" in capsys.readouterr().out
