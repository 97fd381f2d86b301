"""The drift monitors: what a reading is, when it crosses its limit, and that it must come back before it can do so again."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from pathlib import Path

import pytest
from tests.unit import synthetic_log

from blobpipe.history.watch import BlobHealth
from blobpipe.monitor import health, logbook
from blobpipe.params import Health

PARAMS = Health(
    window=4,
    baseline=10,
    noise_frac=0.013,
    signal_e=(12_000.0, 30_000.0),
    shift_px=0.5,
    clipped_frac=0.05,
    false_alarms_per_100=15.0,
    probability_distance=0.5,
    rejected_frac=0.3,
    hysteresis_frac=0.1,
)
USUAL = {
    "noise_frac": 0.01,
    "signal_e": 20_000.0,
    "shift_x_px": 0.05,
    "shift_y_px": 0.0,
    "clipped_frac": 0.02,
}
QUIET = (0.01,) * 16  # probabilities of an image's subframes


BLOBS = ("blobs_deeper_frac", "blobs_moved_px", "blobs_grown_px", "blobs_changed")


@pytest.fixture
def log(tmp_path: Path) -> sqlite3.Connection:
    connection = logbook.connect(tmp_path / "log.sqlite", make=True)
    with logbook.writing(connection):
        logbook.insert(connection, "runs", synthetic_log.RUN)
    return connection


def add(log: sqlite3.Connection, probabilities: Iterable[float] = QUIET, **more: object) -> int:
    """An image and its subframes; its number."""
    number = log.execute("SELECT count(*) FROM images").fetchone()[0] + 1
    row = {
        "run": 1,
        "sha256": f"{number:064}",
        "name": f"day{number}",
        "kind": "image",
        "mjd": 60000.0 + number,
    }
    with logbook.writing(log):
        image = logbook.insert(
            log, "images", row | USUAL | {"logged": logbook.now(), "outcome": "searched", **more}
        )
        for k, value in enumerate(probabilities):
            part = {
                "row": k // 4,
                "col": k % 4,
                "probability": value,
                "positive": 0,
                "saliency": b"",
            }
            logbook.insert(log, "subframes", {"image": image, **part})
    return image


def take(log: sqlite3.Connection, image: int) -> list[str]:
    with logbook.writing(log):
        return health.log_readings(log, image, PARAMS)


def add_candidate(log: sqlite3.Connection, image: int, status: str, decision: str = "") -> None:
    with logbook.writing(log):
        number = logbook.insert(
            log, "candidates", {"image": image, "status": status, "x_px": 9.0, "y_px": 9.0}
        )
        row = {
            "image": image,
            "candidate": number,
            "status": "new",
            "x_px": 9.0,
            "y_px": 9.0,
            "snr": 9.0,
        }
        logbook.insert(log, "detections", row | {"score": 0.99, "probability": 0.9})
        if decision:
            review = {
                "candidate": number,
                "decision": decision,
                "reviewer": "Ada",
                "at": logbook.now(),
            }
            logbook.insert(log, "reviews", review)


def reading(log: sqlite3.Connection, image: int, what: str) -> float | None:
    row = log.execute(
        "SELECT value FROM health WHERE image = ? AND what = ?", (image, what)
    ).fetchone()
    return row["value"] if row else None


# --- each monitor crosses its limit and comes back -------------------------------------------------------------------

REJECTED = {"outcome": "rejected", **dict.fromkeys(USUAL)}


@pytest.mark.parametrize(
    ("what", "beyond", "almost", "within", "bound"),
    [
        ("noise_frac", {"noise_frac": 0.02}, {"noise_frac": 0.0125}, {"noise_frac": 0.0115}, 0.013),
        (
            "signal_e",
            {"signal_e": 31_000.0},
            {"signal_e": 28_000.0},
            {"signal_e": 26_000.0},
            30_000.0,
        ),
        (
            "signal_e",
            {"signal_e": 11_000.0},
            {"signal_e": 12_500.0},
            {"signal_e": 14_000.0},
            12_000.0,
        ),
        ("shift_px", {"shift_y_px": -0.8}, {"shift_y_px": 0.48}, {"shift_y_px": 0.1}, 0.5),
        (
            "clipped_frac",
            {"clipped_frac": 0.06},
            {"clipped_frac": 0.048},
            {"clipped_frac": 0.01},
            0.05,
        ),
    ],
    ids=["noise_frac", "signal_e high", "signal_e low", "shift_px", "clipped_frac"],
)
def test_a_median_crosses_once_and_comes_back_with_a_margin(
    log: sqlite3.Connection, what: str, beyond: dict, almost: dict, within: dict, bound: float
) -> None:
    for values, crossings in (
        (USUAL, 0),
        (beyond, 1),
        (almost, 0),
        (beyond, 0),
        (within, 0),
        (beyond, 1),
    ):
        lines = [line for _ in range(PARAMS.window) for line in take(log, add(log, **values))]
        assert len(lines) == crossings, values
        if lines:
            assert lines[0].startswith(health.MONITORS[what].label)
            assert f"limit {bound:.4g}; {health.MONITORS[what].advice}" in lines[0]
        assert len(health.current_warnings(log)) == (values not in (USUAL, within))


def test_one_odd_image_moves_nothing(log: sqlite3.Connection) -> None:
    for _ in range(PARAMS.window):
        take(log, add(log))
    assert (
        take(log, add(log, noise_frac=1.0, signal_e=1.0, shift_x_px=50.0, clipped_frac=1.0)) == []
    )
    assert health.current_warnings(log) == []


def test_rejected_images_cross_and_come_back(log: sqlite3.Connection) -> None:
    crossed = []
    for kind in ("ok", "ok", "ok", "bad", "bad", "ok", "ok", "ok", "ok", "bad", "bad"):
        image = add(log, **(REJECTED if kind == "bad" else {}))
        crossed += [
            image for line in take(log, image) if line.startswith("share of rejected images")
        ]
    assert crossed == [5, 11]  # two of four
    assert reading(log, 4, "rejected_frac") == 0.25
    assert "0.5, limit 0.3; read their reasons" in health.current_warnings(log)[0]


def test_false_alarms_are_what_faded_or_was_rejected(log: sqlite3.Connection) -> None:
    for _ in range(PARAMS.baseline):
        take(log, image := add(log))
    for status, decision in (
        ("new", ""),
        ("seen_again", ""),
        ("faded", "confirmed"),
        ("new", "unsure"),
        ("faded", ""),
    ):
        add_candidate(log, image, status, decision)
    take(log, image := add(log))
    # the one that faded, on the last ten images
    assert reading(log, image, "false_alarms_per_100") == 10.0
    add_candidate(log, image, "seen_again", "rejected")  # a person's word stands above the search's
    [line] = take(log, image := add(log))
    assert "20, limit 15" in line
    for _ in range(PARAMS.baseline - 3):
        lines = take(log, add(log))
        assert lines == []
    assert len(health.current_warnings(log)) == 1  # both are among the last ten still
    for _ in range(2):
        take(log, image := add(log))
    assert reading(log, image, "false_alarms_per_100") == 0.0
    assert health.current_warnings(log) == []


def test_a_promise_is_broken_when_chance_cannot_explain_the_false_alarms(
    log: sqlite3.Connection,
) -> None:
    promised = {"operating_point_sha256": "c" * 64, "false_alarms_per_100": 10.0}
    with logbook.writing(log):
        logbook.insert(log, "runs", synthetic_log.RUN | promised)

    # Those before the operating point count neither as images nor as alarms
    for _ in range(PARAMS.baseline):
        image = add(log)
    add_candidate(log, image, "faded")
    for _ in range(PARAMS.window - 1):
        take(log, image := add(log, run=2))
        assert reading(log, image, "broken_promise") is None
    for _ in range(PARAMS.baseline - PARAMS.window + 1):
        take(log, image := add(log, run=2))
    assert reading(log, image, "broken_promise") == 0.0

    # One is expected on ten images: four are still chance, five are not
    for _ in range(4):
        add_candidate(log, image, "faded")
    add_candidate(log, image, "seen_again")
    lines = take(log, image := add(log, run=2))
    assert reading(log, image, "broken_promise") == 4.0
    assert "promise" not in " ".join(lines)
    add_candidate(log, image, "seen_again", "rejected")
    lines = take(log, image := add(log, run=2))
    assert reading(log, image, "broken_promise") == 5.0
    [line] = [line for line in lines if "against the promise" in line]
    assert "5, limit 4; the images are no longer those" in line


def test_another_kind_of_probabilities_is_noticed_and_comes_back(log: sqlite3.Connection) -> None:
    usual = (0.0, 0.1, 0.2, 0.3) * 4
    odd = (0.7, 0.8, 0.9, 1.0) * 4
    crossed = []
    for probabilities in [usual] * 14 + [odd] * 14:
        image = add(log, probabilities)
        crossed += [image for line in take(log, image) if "subframes' probabilities" in line]
    assert crossed == [17]  # the third of four: a share of 0.75 above a limit of 0.5
    assert reading(log, 14, "probability_distance") == 0.0
    assert reading(log, 18, "probability_distance") == 1.0
    assert reading(log, 28, "probability_distance") == 0.0  # what is odd for long is usual
    assert health.current_warnings(log) == []


def test_another_model_starts_anew(log: sqlite3.Connection) -> None:
    for _ in range(8):
        take(log, add(log, (0.0,) * 16))
    with logbook.writing(log):
        logbook.insert(log, "runs", synthetic_log.RUN | {"model_sha256": "f" * 64})
    for _ in range(7):
        assert take(log, image := add(log, (1.0,) * 16, run=2)) == []
        assert reading(log, image, "probability_distance") is None
    take(log, image := add(log, (1.0,) * 16, run=2))
    assert reading(log, image, "probability_distance") == 0.0


# --- what a reading is over ------------------------------------------------------------------------------------------


def test_there_is_no_reading_of_too_few_images(log: sqlite3.Connection) -> None:
    for number in range(1, 2 * PARAMS.window + 1):
        take(log, add(log))
        there = {
            row["what"] for row in log.execute("SELECT what FROM health WHERE image = ?", (number,))
        }
        # Without an operating point nothing is promised, and without a catalogue no blob is watched
        later = {"broken_promise", *BLOBS}
        if number < 2 * PARAMS.window:
            later |= {"probability_distance"}
        assert there == (set() if number < PARAMS.window else set(health.MONITORS) - later)


def test_known_blobs_that_change_cross_their_limits(log: sqlite3.Connection) -> None:
    steady = BlobHealth(100, 0.01, 0.02, -0.01, 0.03, 1)
    changed = BlobHealth(100, -0.2, 0.3, -0.4, 0.6, 5)
    images = [add(log), add(log)]
    with logbook.writing(log):
        assert health.log_readings(log, images[0], PARAMS, steady) == []
        lines = health.log_readings(log, images[1], PARAMS, changed)
    assert reading(log, 1, "blobs_moved_px") == pytest.approx(0.0224, abs=1e-3)
    assert len(lines) == len(BLOBS)
    assert {reading(log, 2, what) for what in BLOBS} == {0.2, 0.5, 0.6, 5.0}


def test_late_images_and_those_not_searched_are_left_out(log: sqlite3.Connection) -> None:
    for _ in range(PARAMS.window):
        take(log, add(log))
    for more in ({"late": 1, "noise_frac": 9.0}, {"outcome": "stack", "noise_frac": 9.0}):
        for _ in range(PARAMS.window):
            take(log, image := add(log, **more))
    assert reading(log, image, "noise_frac") == 0.01


def test_a_level_that_most_images_do_not_state_has_no_reading(log: sqlite3.Connection) -> None:
    for level in (None, None, 20_000.0, 20_000.0):
        take(log, image := add(log, signal_e=level))
    assert reading(log, image, "signal_e") is None
    take(log, image := add(log, signal_e=22_000.0))
    assert reading(log, image, "signal_e") == 20_000.0


def test_an_empty_log_has_no_readings(log: sqlite3.Connection) -> None:
    assert health.current_warnings(log) == []
