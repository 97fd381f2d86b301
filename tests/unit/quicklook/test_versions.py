"""Versions of an exposure: the newest counts, and confirms nothing that another version showed."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from tests.unit.quicklook.days import MODEL, NEW, SETTINGS, STACK, candidates, outcomes, run, write

from blobpipe.monitor import logbook
from blobpipe.params import Notices
from blobpipe.quicklook import running_stack
from blobpipe.quicklook.options import Options
from blobpipe.quicklook.run import quicklook


def reprocess(path: Path, name: str = "", seed: int = 1, **cards: object) -> Path:
    """Write another version of an image beside it: pixels that differ a little, and other cards."""
    with fits.open(path) as hdus:
        data = np.array(hdus[0].data, np.float32)
        header = hdus[0].header.copy()
    data += np.random.default_rng([9, seed]).normal(0, 1e-4, data.shape).astype(np.float32)
    for card, value in cards.items():
        header["DATE-OBS" if card == "DATE_OBS" else card] = value
    new = path.with_name(name or path.name)
    fits.PrimaryHDU(data, header).writeto(new, overwrite=True)
    return new


FALSE = (150.0, 300.0, 6.0, 0.08)
NOTIFIED = SETTINGS.model_copy(
    update={
        "notices": Notices(
            mail_to=("a@b.org",), mail_from="c@d.org", smtp_host="127.0.0.1", smtp_port=1
        )
    }
)


def run_notified(tmp_path: Path) -> sqlite3.Connection:
    """A run whose notices stay in the outbox: nobody listens at that port."""
    made = Options(tmp_path / "out" / "log.sqlite", MODEL, NOTIFIED)
    quicklook(tmp_path / "in", made)
    return logbook.connect(made.log_path)


def superseded(log: sqlite3.Connection) -> dict[str, str]:
    """Which image counts in the place of which."""
    rows = log.execute(
        "SELECT i.id, i.name, n.id, n.name FROM images i JOIN images n ON n.id = i.superseded_by"
    )
    return {f"{row[0]} {row[1]}": f"{row[2]} {row[3]}" for row in rows}


@pytest.mark.parametrize("way", ["same name", "other name", "gzipped", "ROOTNAME"])
def test_a_second_version_of_an_exposure_confirms_nothing(again: Path, way: str) -> None:
    path = write(again / "in", STACK + 5, NEW, FALSE)
    if way == "ROOTNAME":
        reprocess(path, ROOTNAME="IABC05Q")
    log = run_notified(again)
    last = outcomes(log) | {"": len(outcomes(log))}
    told = [tuple(row) for row in log.execute("SELECT key, channel FROM notices")]
    assert ("candidate-2-new", "mail") in told
    match way:
        case "same name":
            reprocess(path, CAL_VER="3.7.2")
        case "other name":
            reprocess(path, "anew.fits", CAL_VER="3.7.2")
        case "gzipped":
            reprocess(path, path.name + ".gz")
        case _:
            reprocess(path, "anew.fits", ROOTNAME="iabc05q", EXPSTART=60000.003 + STACK + 5)
    log = run_notified(again)
    assert len(log.execute("SELECT 1 FROM images").fetchall()) == last[""] + 1
    newest = log.execute("SELECT id, name FROM images ORDER BY id DESC LIMIT 1").fetchone()
    assert superseded(log) == {
        f"{newest['id'] - 1} {path.stem}": f"{newest['id']} {newest['name']}"
    }
    found = candidates(log)
    assert found["status"].tolist() == ["seen_again", "new"]
    assert found["sightings"].tolist()[1] == 1
    assert found["first_image"].tolist()[1] == newest["id"]
    assert [
        tuple(row)
        for row in log.execute("SELECT key, channel FROM notices WHERE candidate IS NOT NULL")
    ] == told
    members = running_stack.members_before(log, 70000.0, STACK)
    assert len({member.mjd for member in members}) == STACK
    assert (
        log.execute("SELECT sha256 FROM images WHERE id = ?", (newest["id"],)).fetchone()[0]
        == members[-1].sha256
    )


def test_an_older_version_that_is_dated_earlier_is_not_in_the_stack(again: Path) -> None:
    path = write(again / "in", STACK + 5, NEW)
    reprocess(path, ROOTNAME="IABC05Q")
    run(again).close()
    reprocess(path, "anew.fits", ROOTNAME="iabc05q", EXPSTART=60000.003 + STACK + 5)
    noise = run(again).execute(
        "SELECT noise_frac, stack_sha256 FROM images ORDER BY id DESC LIMIT 2"
    )
    newer, older = noise.fetchall()
    assert newer["stack_sha256"] == older["stack_sha256"]
    assert newer["noise_frac"] == pytest.approx(older["noise_frac"], rel=0.01)


def test_the_next_exposure_still_confirms(again: Path) -> None:
    path = write(again / "in", STACK + 5, NEW, FALSE)
    run(again).close()
    reprocess(path)
    run(again).close()
    write(again / "in", STACK + 6, NEW, FALSE)
    found = candidates(run(again))
    assert found["status"].tolist() == ["seen_again", "seen_again"]
    assert found["sightings"].tolist()[1] == 2
    assert found["first_frame"].tolist()[1] == path.stem


def test_what_the_newer_version_does_not_show_has_faded_and_counts_for_nothing(again: Path) -> None:
    write(again / "in", STACK + 5, NEW, FALSE)
    run(again).close()
    write(again / "in", STACK + 5, NEW)
    log = run(again)
    found = candidates(log)
    assert found["status"].tolist() == ["seen_again", "faded"]
    assert found["sightings"].tolist()[1] == 1  # those who look back find it
    write(again / "in", STACK + 6, NEW, FALSE)
    found = candidates(run(again))
    assert found["status"].tolist() == ["seen_again", "new"]
    assert found["sightings"].tolist()[1] == 1
    assert found["first_frame"].tolist()[1] == f"day{STACK + 6:03d}"


def test_what_only_an_older_version_confirmed_is_new_again(again: Path) -> None:
    write(again / "in", STACK + 5, NEW, FALSE)
    write(again / "in", STACK + 6, NEW, FALSE)
    assert candidates(run(again))["status"].tolist() == ["seen_again", "seen_again"]
    write(again / "in", STACK + 6, NEW)
    found = candidates(run(again))
    assert found["status"].tolist() == ["seen_again", "new"]
    assert found["missed"].tolist() == [0, 1]


def test_two_versions_of_a_later_image_let_a_candidate_fade_by_one(again: Path) -> None:
    write(again / "in", STACK + 5, NEW, FALSE)
    later = write(again / "in", STACK + 6, NEW)
    run(again).close()
    for seed in range(3):
        reprocess(later, seed=seed)
        found = candidates(run(again))
        assert (found["status"].tolist()[1], found["missed"].tolist()[1]) == ("new", 1)


@pytest.mark.parametrize(
    ("first", "second", "older"),
    [
        ({"DATE": "2024-05-02"}, {"DATE": "2023-01-01T10:00:00"}, True),
        ({"DATE": "2023-01-01"}, {"DATE": "2024-05-02"}, False),
        ({"CAL_VER": "3.10.1(28-Oct-2020)"}, {"CAL_VER": "3.9.2(01-Jan-2021)"}, True),
        ({"DATE": "2024-05-02", "CAL_VER": "3.5"}, {"DATE": "2024-05-03", "CAL_VER": "3.4"}, False),
        ({"CAL_VER": "3.5"}, {}, False),
    ],
)
def test_an_older_version_that_comes_late_replaces_nothing(
    again: Path, first: dict[str, object], second: dict[str, object], older: bool
) -> None:
    path = reprocess(write(again / "in", STACK + 5, FALSE), **first)
    run(again).close()
    with fits.open(path) as hdus:
        hdus[0].header.remove("CAL_VER", ignore_missing=True)
        hdus.writeto(again / "in" / "other.fits")
    reprocess(again / "in" / "other.fits", **second)
    log = run(again)
    (old, new) = ("other", path.stem) if older else (path.stem, "other")
    assert [(key.split()[1], value.split()[1]) for key, value in superseded(log).items()] == [
        (old, new)
    ]
    row = log.execute("SELECT outcome, reason FROM images WHERE name = 'other'").fetchone()
    assert row["outcome"] == ("rejected" if older else "searched")
    assert ("an older version of the exposure" in row["reason"]) == older
    assert candidates(log)[["sightings", "first_frame"]].to_numpy().tolist()[1] == [1, new]


def test_different_exposures_are_not_taken_for_versions(again: Path) -> None:
    inbox = again / "in"
    one = write(inbox, STACK + 5, NEW)
    reprocess(one, "second.fits", EXPSTART=60000.0 + STACK + 5 + 2 / 86400)  # two seconds later
    reprocess(one, "filter.fits", FILTER="F105W")
    for number, name in enumerate(("iabc01q", "iabc02q")):  # one date, two names
        reprocess(one, f"{name}.fits", seed=number, ROOTNAME=name, EXPSTART=60000.0 + STACK + 6)
    for day in (7, 9):  # a header that was copied from image to image
        reprocess(
            one, f"copied{day}.fits", seed=day, ROOTNAME="template", EXPSTART=60000.0 + STACK + day
        )
    for number in range(2):  # nobody knows when on that day
        bare = reprocess(one, f"bare{number}.fits", seed=20 + number, DATE_OBS="2023-03-20")
        with fits.open(bare, mode="update") as hdus:
            del hdus[0].header["EXPSTART"]
    log = run(again)
    assert superseded(log) == {}
    assert set(outcomes(log).values()) == {"stack", "searched"}


def test_a_version_that_cannot_be_used_replaces_nothing(again: Path) -> None:
    before = candidates(logbook.connect(again / "out" / "log.sqlite"))["sightings"].tolist()
    path = again / "in" / f"day{STACK + 4:03d}.fits"
    path.write_bytes(path.read_bytes()[:200_000])
    log = run(again)
    assert outcomes(log)[path.stem] == "rejected"
    assert superseded(log) == {}
    assert candidates(log)["sightings"].tolist() == before


def test_images_that_wait_for_the_first_stack_count_once(tmp_path: Path) -> None:
    for day in range(STACK - 1):
        write(tmp_path / "in", day)
    reprocess(tmp_path / "in" / "day001.fits", "anew.fits")
    log = run(tmp_path)
    write(tmp_path / "in", STACK)
    log = run(tmp_path)
    assert set(outcomes(log).values()) == {"stack"}  # four files, three exposures before it
    write(tmp_path / "in", STACK + 1)
    assert outcomes(run(tmp_path))[f"day{STACK + 1:03d}"] == "searched"
