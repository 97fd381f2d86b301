"""Candidates: new blobs are followed from image to image; what later images do not show fades."""

from __future__ import annotations

import shutil
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from astropy.io import fits
from tests.unit.quicklook.days import (
    KNOWN,
    LANDED,
    LONG_STACK,
    MODEL,
    NEW,
    SETTINGS,
    STACK,
    candidates,
    deep_log,
    deep_row,
    long,
    outcomes,
    pixels,
    run,
    write,
    write_small,
)

from blobpipe.core import fits_images, tables
from blobpipe.core.blob_shapes import blob_profile
from blobpipe.images import difference
from blobpipe.monitor import logbook
from blobpipe.params import Campaign, Difference, Quicklook
from blobpipe.quicklook import search as quicklook_search
from blobpipe.quicklook.candidates import _recount, date_candidate, match_candidates
from blobpipe.quicklook.options import Options
from blobpipe.quicklook.run import quicklook
from blobpipe.simulation import campaign

PATIENT = Quicklook(settle_s=0.0, fade_after=10)


def test_a_new_blob_is_found_on_its_day_and_seen_again_on_the_next(month: Path) -> None:
    log = logbook.connect(month / "out" / "log.sqlite")
    assert list(outcomes(log).values()) == ["stack"] * STACK + ["searched"] * 5
    found = candidates(log)
    assert len(found) == 1
    only = found.iloc[0]
    assert (only["first_frame"], only["status"]) == (f"day{STACK + 1:03d}", "seen_again")
    assert np.hypot(only["x_px"] - NEW[0], only["y_px"] - NEW[1]) < 0.5
    assert abs(only["depth_frac"] - NEW[3]) < 4 * only["depth_err_frac"]
    first = log.execute("SELECT status, probability FROM detections ORDER BY id").fetchone()
    assert first["status"] == "new"
    assert first["probability"] > 0.9


def test_a_late_image_that_shows_the_blob_first_dates_it(again: Path) -> None:
    write(again / "in", STACK, NEW, name="late")
    with fits.open(again / "in" / "late.fits", mode="update") as hdus:
        hdus[0].header["EXPSTART"] += 0.5
    assert candidates(run(again))["first_frame"].tolist() == ["late"]


def test_what_one_image_alone_shows_fades(again: Path) -> None:
    fake = (150.0, 300.0, 6.0, 0.08)
    write(again / "in", STACK + 5, NEW, fake)
    for day in range(STACK + 6, STACK + 9):
        write(again / "in", day, NEW)
    found = candidates(run(again))
    assert found["status"].tolist() == ["seen_again", "faded"]
    assert found["missed"].tolist() == [0, 3]


def test_a_candidate_is_followed_wherever_the_mirror_puts_it(tmp_path: Path) -> None:
    """It is logged where it would be without a shift, each sighting where the image shows it."""
    shifts = [(0, 0)] * STACK + [(4, -3), (0, 0), (-3, 2)]
    for day, (dx, dy) in enumerate(shifts):
        moved = [
            (x + dx, y + dy, radius, depth)
            for x, y, radius, depth in (*KNOWN, NEW)[: 4 if day >= STACK else 3]
        ]
        path = write(tmp_path / "in", day)
        fits.PrimaryHDU(pixels(day, moved), fits.getheader(path)).writeto(path, overwrite=True)
    log = run(tmp_path)
    [only] = candidates(log).to_dict("records")
    assert np.hypot(only["x_px"] - NEW[0], only["y_px"] - NEW[1]) < 0.7
    seen = log.execute(
        "SELECT x_px, y_px FROM detections WHERE candidate = ? ORDER BY image", (only["id"],)
    ).fetchall()
    expected = [(NEW[0] + dx, NEW[1] + dy) for dx, dy in shifts[STACK:]]
    assert np.abs(np.array([tuple(row) for row in seen]) - expected).max() < 1
    logged = log.execute(
        "SELECT shift_x_px, shift_y_px FROM images WHERE outcome = 'searched' ORDER BY mjd"
    ).fetchall()
    assert np.abs(np.array([tuple(row) for row in logged]) - shifts[STACK:]).max() < 0.3


@pytest.mark.parametrize(
    "known",
    [
        "by the log",
        *(long(way) for way in ("by a person", "by a catalogue", "by a dated catalogue")),
    ],
)
def test_what_has_landed_is_never_taken_for_bad_pixels_later(tmp_path: Path, known: str) -> None:
    params = SETTINGS.model_copy(update={"difference": Difference(stack_size=LONG_STACK)})
    more = {}
    if "catalogue" in known:
        table = pd.DataFrame(LANDED, columns=["first", "x_px", "y_px", "radius_px", "depth_frac"])
        table["first_frame"] = [f"day{day:03d}" for day in table.pop("first")]
        table = table.drop(columns="first_frame") if known == "by a catalogue" else table
        table.to_csv(tmp_path / "known.csv", index=False)
        more["catalogue"] = tmp_path / "known.csv"
    made = Options(tmp_path / "out" / "log.sqlite", MODEL, params, **more)
    for day in range(LONG_STACK):
        write_small(tmp_path / "in", day)
    quicklook(tmp_path / "in", made)
    log = logbook.connect(made.log_path)
    for day in range(LONG_STACK, LONG_STACK + 10):
        write_small(tmp_path / "in", day)
        quicklook(tmp_path / "in", made)
        if known == "by a person":
            with logbook.writing(log):
                log.execute(
                    "INSERT INTO reviews (candidate, decision, reviewer, at) SELECT id, 'confirmed', 'A', '' FROM candidates"
                )
        _require_sightings(log, day, catalogued="catalogue" in known)
    assert len(candidates(log)) == (0 if "catalogue" in known else len(LANDED))


def _require_sightings(log: sqlite3.Connection, day: int, *, catalogued: bool) -> None:
    """What has landed is on the image of a day, until half of the stack shows it, as what it is."""
    image = log.execute("SELECT * FROM images ORDER BY id DESC LIMIT 1").fetchone()
    found = pd.read_sql_query(
        "SELECT * FROM detections WHERE image = ?", log, params=(image["id"],)
    )
    for first, x, y, _, depth in LANDED:
        apart = np.hypot(
            found["x_px"] - image["shift_x_px"] - x, found["y_px"] - image["shift_y_px"] - y
        )
        there = found[apart < 3.0]
        assert "bad_pixels" not in set(there["status"]), (day, x, y)
        if first <= day < first + LONG_STACK // 2 and depth > 0.05:
            assert len(there) == 1, (day, x, y)
            assert (
                there["status"]
                .isin(["known", "dip"] if catalogued else ["new", "known", "dip"])
                .all()
            ), (day, x, y)
            assert there["candidate"].notna().all() != catalogued, (day, x, y)


def test_pixels_that_flicker_do_not_become_a_blob_by_having_been_a_candidate(
    tmp_path: Path,
) -> None:
    """A cluster reads high on one day and is a candidate; it does so again while it waits to be confirmed."""
    params = SETTINGS.model_copy(
        update={"difference": Difference(stack_size=12), "quicklook": PATIENT}
    )
    made = Options(tmp_path / "out" / "log.sqlite", MODEL, params)
    for day in range(22):
        path = write_small(tmp_path / "in", day)
        if day in (13, 19):
            with fits.open(path, mode="update") as hdus:
                hdus[0].data[200 - 20 : 200 + 21, 140 - 20 : 140 + 21] += 0.1 * blob_profile(
                    "disc", 5.0, 0, 0
                )
    quicklook(tmp_path / "in", made)
    log = logbook.connect(made.log_path)
    found = candidates(log)
    flickering = found[np.hypot(found["x_px"] - 140, found["y_px"] - 200) < 3]
    assert flickering["sightings"].tolist() == [1]
    statuses = log.execute(
        "SELECT i.name, d.status FROM detections d JOIN images i ON i.id = d.image "
        "WHERE abs(d.x_px - 140) < 3 AND abs(d.y_px - 200) < 3 ORDER BY i.id"
    ).fetchall()
    assert [tuple(row) for row in statuses] == [("day013", "new"), ("day019", "bad_pixels")]


@pytest.mark.long
@pytest.mark.parametrize("begun", ["by its own stack", "by a named stack"])
def test_every_blob_of_a_simulated_month_keeps_its_candidate(tmp_path: Path, begun: str) -> None:
    size = 20
    raw = tmp_path / "raw"
    inbox = tmp_path / "in"
    settings = Campaign(seed=5, n_frames=54, first_frames=size, n_cases=20)
    campaign.simulate(raw, settings)
    params = SETTINGS.model_copy(update={"difference": Difference(stack_size=size)})
    listed = tables.read_frame_list(raw)
    named = None
    if begun == "by a named stack":
        difference.reference(raw, tmp_path, params.difference)
        listed = listed[size - 5 :].reset_index(drop=True)
        named = tmp_path / "reference.fits.fz"
    inbox.mkdir()
    for name in listed["frame"]:
        shutil.move(fits_images.find_image(raw, name), inbox)
    made = Options(tmp_path / "out" / "log.sqlite", MODEL, params, reference=named)
    quicklook(inbox, made)
    log = logbook.connect(made.log_path)
    found = pd.read_sql_query(
        "SELECT d.*, i.name, i.mjd, d.x_px - i.shift_x_px AS x, d.y_px - i.shift_y_px AS y "
        "FROM detections d JOIN images i ON i.id = d.image",
        log,
    )
    blobs = [blob for blob in campaign.population(settings) if blob.first >= size]
    names = campaign.frame_names(settings)
    followed = 0
    on_blobs = set()
    for blob in blobs:
        there = found[
            np.hypot(found["x"] - blob.x_px, found["y"] - blob.y_px) <= max(3.0, blob.radius_px / 2)
        ]
        on_blobs |= set(there["candidate"].dropna())
        if not (there["snr"] >= 12).any():
            continue
        followed += 1
        for name in names[blob.first : blob.first + size // 2 - 1]:
            today = there[there["name"] == name]
            assert today["candidate"].notna().any(), (blob.blob, name, list(today["status"]))
    assert followed >= 12
    false = candidates(log).query("id not in @on_blobs")
    assert len(false) <= 0.15 * len(listed)
    assert not (false["status"] == "seen_again").any()


def test_what_the_latest_images_show_together_outlives_a_version_of_one_of_them(
    tmp_path: Path,
) -> None:
    log, candidate = deep_log(tmp_path, "", "seen_again")
    log.execute("UPDATE detections SET n_images = 8")
    log.execute("UPDATE images SET superseded_by = 2 WHERE id = 1")
    _recount(log, candidate, fade_after=3)
    assert candidates(log)["status"].tolist() == ["seen_again"]
    assert candidates(log)["n_images"].tolist() == [8]


def log_depths(log: sqlite3.Connection, candidate: int, depths: list[float]) -> list[int]:
    """Add images with depths of a candidate before and after the two of `deep_log`; return all in order of date."""
    images = []
    for k, depth in enumerate(depths):
        row = {"run": 1, "sha256": f"d{k:063}", "name": f"more{k}", "kind": "image", "logged": ""}
        row |= {"mjd": 59990.0 + k, "outcome": "searched"}
        image = logbook.insert(log, "images", row)
        measured = {"depth_frac": depth, "depth_err_frac": 0.001}
        logbook.insert(log, "depths", {"image": image, "candidate": candidate, **measured})
        images.append(image)
    return images


LANDS = [0.0005, -0.0004, 0.0, 0.0003, 0.02, 0.0206, 0.0198]


def test_the_log_keeps_with_which_image_the_depths_told_that_a_candidate_stays(
    tmp_path: Path,
) -> None:
    log, candidate = deep_log(tmp_path, "", "new")
    images = log_depths(log, candidate, LANDS[:5])
    date_candidate(log, candidate, images[-1], 3)
    assert tuple(log.execute("SELECT status, stays_image FROM candidates").fetchone()) == (
        "new",
        None,
    )
    log.execute("DELETE FROM depths")
    log.execute("DELETE FROM images WHERE id > 2")
    images = log_depths(log, candidate, LANDS)
    date_candidate(log, candidate, images[-1], 3)
    row = log.execute("SELECT status, image, history, stays_image FROM candidates").fetchone()
    assert tuple(row) == ("seen_again", images[4], "landed", images[-1])

    # Told once, even if its status is counted anew
    log.execute("UPDATE candidates SET status = 'new'")
    date_candidate(log, candidate, 1, 3)
    row = log.execute("SELECT status, stays_image FROM candidates").fetchone()
    assert tuple(row) == ("seen_again", images[-1])


@pytest.mark.parametrize(("sightings", "status"), [(1, "faded"), (2, "seen_again")])
def test_what_later_depths_do_not_show_does_not_stay(
    tmp_path: Path, sightings: int, status: str
) -> None:
    """A false alarm and the image after it look like a landing; with more images there is nothing."""
    log, candidate = deep_log(tmp_path, "", "new")
    images = log_depths(log, candidate, LANDS)
    date_candidate(log, candidate, images[-1], 3)
    [before] = log.execute("SELECT status FROM candidates").fetchone()
    assert before == "seen_again"
    log.execute("UPDATE depths SET depth_frac = 0.0004 * (image % 2)")
    if sightings == 2:
        logbook.insert(log, "detections", deep_row(1) | {"image": 2, "candidate": candidate})
    date_candidate(log, candidate, images[-1], 1)
    row = log.execute("SELECT status, history FROM candidates").fetchone()
    assert tuple(row) == (status, "nothing")


def test_a_fainter_second_sighting_does_not_date_a_blob_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Depths that are limited where the network is less sure would date the landing after its finding."""
    landed = STACK + 1
    search_difference = quicklook_search._search_difference

    def less_sure(row: dict[str, Any], *args: Any) -> quicklook_search.ImageResult:
        result = search_difference(row, *args)
        if row["mjd"] <= 60000.0 + landed:
            return result
        return replace(result, candidates=result.candidates.assign(score=0.38))

    monkeypatch.setattr(quicklook_search, "_search_difference", less_sure)
    for day in range(landed + 6):
        write(tmp_path / "in", day, *[NEW] * (day >= landed))
    log = run(tmp_path)
    only = candidates(log).iloc[0]
    scores = log.execute("SELECT score FROM detections WHERE candidate = 1 ORDER BY id").fetchall()
    assert scores[1]["score"] < 0.5 < scores[0]["score"]
    assert (only["history"], only["first_frame"]) == ("landed", f"day{landed:03d}")
    assert only["after_mjd"] < 60000.0 + landed
    assert only["before_mjd"] <= 60000.0 + landed


def test_depths_tell_nothing_of_what_a_second_image_has_shown(tmp_path: Path) -> None:
    log, candidate = deep_log(tmp_path, "", "seen_again")
    images = log_depths(log, candidate, LANDS)
    date_candidate(log, candidate, images[-1], 3)
    row = log.execute("SELECT history, stays_image FROM candidates").fetchone()
    assert tuple(row) == ("landed", None)


# --- which candidate a detection shows -------------------------------------------------------------------------------


def shown(log: sqlite3.Connection, *rows: dict[str, object]) -> list[int | None]:
    """Which candidates the detections of an image show, in the order in which they are given."""
    found = pd.DataFrame([deep_row(1) | row for row in rows])
    return [candidate for _, candidate in match_candidates(log, found, np.zeros(2), 3.0)]


def add_candidate(log: sqlite3.Connection, x: float, decision: str = "") -> int:
    """Add a candidate that an image has shown, decided on."""
    row = {"image": 1, "status": "seen_again", "x_px": x, "y_px": 90.0}
    candidate = logbook.insert(log, "candidates", row)
    logbook.insert(log, "detections", deep_row(1) | {"image": 1, "candidate": candidate})
    if decision:
        review = {"candidate": candidate, "decision": decision, "reviewer": "me", "at": ""}
        logbook.insert(log, "reviews", review)
    return candidate


def test_of_two_detections_near_a_candidate_the_nearer_shows_it(tmp_path: Path) -> None:
    log, candidate = deep_log(tmp_path, "", "seen_again")
    assert shown(log, {"x_px": 97.8}, {"x_px": 101.0}) == [None, candidate]
    known = {"status": "known"}
    assert shown(log, {"x_px": 95.0} | known, {"x_px": 101.0} | known) == [None, candidate]


def test_a_detection_at_a_candidate_is_not_given_to_another_beside_it(tmp_path: Path) -> None:
    """Two candidates lie 3.4 px apart: one is seen again, the other not, and something is new beside them."""
    log, candidate = deep_log(tmp_path, "", "seen_again")
    other = add_candidate(log, 103.4)
    assert shown(log, {"x_px": 100.5}, {"x_px": 97.1}) == [candidate, None]
    assert shown(log, {"x_px": 100.1}, {"x_px": 103.3}) == [candidate, other]


REJECTED = {"depth_frac": 0.02, "depth_err_frac": 0.002, "radius_px": 4.0, "radius_err_px": 0.3}


@pytest.mark.parametrize(
    ("measured", "is_another"),
    [
        ({}, False),
        # As strong as it flickers, and fainter
        ({"depth_frac": 0.04}, False),
        ({"depth_frac": 0.005}, False),
        # Several times deeper, unless the errors allow for the same depth
        ({"depth_frac": 0.07}, True),
        ({"depth_frac": 0.07, "depth_err_frac": 0.02}, False),
        # Larger and smaller, unless the errors allow for the same radius
        ({"radius_px": 5.0}, False),
        ({"radius_px": 6.5}, True),
        ({"radius_px": 2.0, "radius_err_px": 0.2}, True),
        ({"radius_px": 6.5, "radius_err_px": 0.9}, False),
        # Not measured
        (dict.fromkeys(REJECTED, np.nan), False),
    ],
)
def test_what_is_clearly_not_what_was_rejected_is_told(
    tmp_path: Path, measured: dict[str, float], is_another: bool
) -> None:
    log, candidate = deep_log(tmp_path, "rejected", "seen_again")
    logbook.update(log, "detections", 1, REJECTED)
    assert shown(log, REJECTED | measured) == [None if is_another else candidate]


def test_each_of_the_sightings_of_a_flickering_place_is_what_was_rejected(tmp_path: Path) -> None:
    log, candidate = deep_log(tmp_path, "rejected", "seen_again")
    logbook.update(log, "detections", 1, REJECTED)
    again = REJECTED | {"depth_frac": 0.05, "radius_px": 5.4}
    logbook.insert(log, "detections", deep_row(1) | again | {"image": 2, "candidate": candidate})
    assert shown(log, REJECTED | {"depth_frac": 0.14}) == [candidate]
    assert shown(log, REJECTED | {"depth_frac": 0.16}) == [None]
    assert shown(log, REJECTED | {"radius_px": 7.3}) == [candidate]
    assert shown(log, REJECTED | {"radius_px": 7.8}) == [None]


def test_without_a_decision_the_depth_of_a_candidate_may_change(tmp_path: Path) -> None:
    log, candidate = deep_log(tmp_path, "", "seen_again")
    logbook.update(log, "detections", 1, REJECTED)
    assert shown(log, REJECTED | {"depth_frac": 0.07}) == [candidate]


def test_a_rejected_candidate_takes_no_sighting_of_another(tmp_path: Path) -> None:
    log, rejected = deep_log(tmp_path, "rejected", "seen_again")
    other = add_candidate(log, 101.0)
    assert shown(log, {"x_px": 100.1}) == [other]
    assert shown(log, {"x_px": 101.2}, {"x_px": 98.0}) == [other, rejected]
