"""The search of an image against the stack of those before it, whatever the cache holds."""

from __future__ import annotations

import json
import logging
import re
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from astropy.io import fits
from tests.unit.monitor import masked
from tests.unit.quicklook.days import (
    KNOWN,
    NEW,
    SETTINGS,
    SIDE,
    STACK,
    candidates,
    long,
    options,
    outcomes,
    part,
    pixels,
    places,
    run,
    write,
    write_small,
)

from blobpipe.core import files
from blobpipe.errors import FrameError
from blobpipe.history import deep
from blobpipe.monitor import logbook
from blobpipe.params import Difference
from blobpipe.quicklook import running_stack
from blobpipe.quicklook.run import quicklook
from blobpipe.quicklook.running_stack import Cache


def test_an_exposure_is_taken_as_it_is(tmp_path: Path) -> None:
    """As FLT files come from the archive: in electrons, with flags, and not a blob image yet."""
    rng = np.random.default_rng(3)
    science = rng.normal(20_000, 150, (1014, 1014)).astype(np.float32)
    (tmp_path / "in").mkdir()
    hdus = [fits.PrimaryHDU(header=fits.Header({"EXPSTART": 60000.0, "FLATCORR": "COMPLETE"}))]
    for name, image in (("SCI", science), ("DQ", np.zeros((1014, 1014), np.int16))):
        hdus.append(fits.ImageHDU(image, fits.Header({"BUNIT": "ELECTRONS"}), name))
    fits.HDUList(hdus).writeto(tmp_path / "in" / "a_flt.fits")
    log = run(tmp_path)
    [row] = log.execute("SELECT outcome, reason, nx_px, ny_px FROM images").fetchall()
    assert (row["outcome"], row["nx_px"], row["ny_px"]) == ("stack", 1024, 1024)
    assert "usable images before it; kept for stacks" in row["reason"]

    # the stack reads it as the search does
    cache = Cache(tmp_path / "stack")
    [member] = running_stack.members_before(log, 70000.0, 1)
    data = running_stack._read(member, cache)
    assert abs(np.nanmedian(data)) < 0.001
    assert np.isnan(data[:5]).all()


def test_a_late_image_is_searched_against_the_images_before_it(again: Path) -> None:
    write(again / "in", STACK + 2, NEW, name="late")
    with fits.open(again / "in" / "late.fits", mode="update") as hdus:
        hdus[0].header["EXPSTART"] += 0.5
    log = run(again)
    row = log.execute("SELECT outcome, late, n_stack FROM images WHERE name = 'late'").fetchone()
    assert tuple(row) == ("searched", 1, STACK)
    on_time = log.execute("SELECT max(late) FROM images WHERE name != 'late'").fetchone()[0]
    assert on_time == 0


def test_a_blob_of_the_catalogue_is_known(tmp_path: Path) -> None:
    for day in range(STACK):
        write(tmp_path / "in", day)
    write(tmp_path / "in", STACK, NEW)
    table = pd.DataFrame(
        {"blob": ["b0001"], "x_px": [NEW[0]], "y_px": [NEW[1]], "radius_px": [6.0]}
    )
    table.to_csv(tmp_path / "known.csv", index=False)
    log = run(tmp_path, catalogue=tmp_path / "known.csv")
    assert candidates(log).empty
    assert [row["status"] for row in log.execute("SELECT status FROM detections")] == ["known"]


def test_a_stack_can_be_named_for_the_first_images(tmp_path: Path) -> None:
    write(tmp_path, 1, name="stack")
    write(tmp_path / "in", 2, NEW)
    log = run(tmp_path, reference=tmp_path / "stack.fits")
    assert outcomes(log) == {"day002": "searched"}
    assert len(candidates(log)) == 1


def test_ready_differences_are_searched_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    image = pixels(1, (*KNOWN, NEW)) - pixels(2, KNOWN)
    fits.PrimaryHDU(image, fits.Header({"EXPSTART": 60000.0})).writeto(
        tmp_path / "in" / "difference.fits"
    )
    log = run(tmp_path, difference=True)
    assert candidates(log)["first_frame"].tolist() == ["difference"]
    assert log.execute("SELECT kind, n_stack FROM images").fetchone()["kind"] == "difference"


def test_the_stack_does_not_hang_on_the_cache(again: Path) -> None:
    log = logbook.connect(again / "out" / "log.sqlite")
    params = SETTINGS.difference
    once = running_stack.stack_before(log, Cache(again / "out" / "empty"), 60000.0 + STACK, params)
    part = sorted((again / "out" / "empty").glob("*.npy"))[0]
    part.unlink()
    twice = running_stack.stack_before(log, Cache(again / "out" / "empty"), 60000.0 + STACK, params)
    assert once is not None
    assert twice is not None
    assert once.sha256 == twice.sha256


def test_the_stack_finds_an_image_wherever_it_still_is(again: Path) -> None:
    log = logbook.connect(again / "out" / "log.sqlite")
    once = running_stack.stack_before(
        log, Cache(again / "out" / "empty"), 60000.0 + STACK, SETTINGS.difference
    )
    copy = again / "in" / "copy.fits"
    first = again / "in" / "day001.fits"
    shutil.copy(first, copy)
    write(again / "in", STACK + 5, NEW, name="day002")  # other bytes under its name
    run(again)
    copy.unlink()  # the place where it was seen last
    shutil.rmtree(again / "out" / "empty")
    with pytest.raises(
        FrameError,
        match=r"day002.fits: not found, or changed, expected the image \w{12} of the log",
    ):
        running_stack.stack_before(
            log, Cache(again / "out" / "empty"), 60000.0 + STACK, SETTINGS.difference
        )
    write(again / "in", 2)
    twice = running_stack.stack_before(
        log, Cache(again / "out" / "empty"), 60000.0 + STACK, SETTINGS.difference
    )
    assert once is not None
    assert twice is not None
    assert once.sha256 == twice.sha256


def test_images_that_lacked_a_file_of_the_stack_are_searched_once_it_is_back(again: Path) -> None:
    """What lands while the stack cannot be made would be in the stacks to come, and never told."""
    shutil.rmtree(again / "out" / "stack")
    (again / "in").rename(again / "archive")
    later = (150.0, 300.0, 6.0, 0.08)
    gap = range(STACK + 5, 2 * STACK + 5)
    for day in (*gap, 2 * STACK + 5):
        write(again / "in", day, NEW, later)
        log = run(again)
    assert [outcomes(log)[f"day{day:03d}"] for day in gap] == ["stack"] * STACK
    assert len(candidates(log)) == 1

    for path in (again / "archive").iterdir():
        path.rename(again / "in" / path.name)
    log = run(again, again=True)
    found = candidates(log)
    assert outcomes(log)[f"day{STACK + 5:03d}"] == "searched"
    assert found["first_frame"].tolist()[1:] == [f"day{STACK + 5:03d}"]
    assert found["status"].tolist()[1:] == ["seen_again"]

    # those of the first stack still have none before them
    rows = logbook.table(log, "images")
    run(again, again=True)
    pd.testing.assert_frame_equal(logbook.table(log, "images"), rows)


def test_images_that_came_before_those_of_their_stack_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    hint = "2 images kept for stacks alone, although enough images precede"
    for day in (STACK, STACK + 1):
        write(tmp_path / "in", day, NEW)
    run(tmp_path)
    assert hint not in caplog.text
    for day in range(STACK):
        write(tmp_path / "in", day)
    run(tmp_path)
    assert hint in caplog.text

    caplog.clear()
    assert candidates(run(tmp_path, again=True))["first_frame"].tolist() == [f"day{STACK:03d}"]
    assert hint not in caplog.text


def test_images_that_a_smaller_stack_passes_over_are_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    hint = "2 images kept for stacks alone, although enough images precede"
    large = replace(
        options(tmp_path),
        params=SETTINGS.model_copy(update={"difference": Difference(stack_size=STACK + 2)}),
    )
    for day in range(STACK + 2):
        write(tmp_path / "in", day)
    quicklook(tmp_path / "in", large)
    assert hint not in caplog.text
    for named in (1, 1):
        run(tmp_path)
        assert caplog.text.count(hint) == named
    run(tmp_path, again=True)
    assert caplog.text.count(hint) == 1
    assert list(outcomes(run(tmp_path)).values()).count("searched") == 2


def test_an_image_that_a_later_stack_rejects_keeps_what_its_search_has_found(again: Path) -> None:
    log = logbook.connect(again / "out" / "log.sqlite")
    with logbook.writing(log):
        log.execute(
            "UPDATE images SET outcome = 'rejected', reason = 'noise' WHERE id = ?", (STACK + 2,)
        )
    found = candidates(log)
    log = run(again, again=True)
    row = log.execute("SELECT outcome, reason FROM images WHERE id = ?", (STACK + 2,)).fetchone()
    assert tuple(row) == ("rejected", "noise")
    pd.testing.assert_frame_equal(candidates(log), found)


@pytest.mark.parametrize("left", ["cut off", "empty", "of another registration"])
def test_what_a_kill_or_a_power_failure_leaves_in_the_cache_does_not_matter(
    again: Path, left: str
) -> None:
    log = logbook.connect(again / "out" / "log.sqlite")
    cache = again / "out" / "other"
    date = 60000.0 + STACK
    params = SETTINGS.difference
    once = running_stack.stack_before(log, Cache(cache), date, params)
    first, second, *_ = sorted(cache.glob("*.npy"))
    match left:
        case "cut off":
            first.write_bytes(first.read_bytes()[:1000])
        case "empty":
            first.write_bytes(b"")
        case _:
            first.unlink()
            np.save(second, np.zeros((SIDE, SIDE), np.float16))
    twice = running_stack.stack_before(log, Cache(cache), date, params)
    assert once is not None
    assert twice is not None
    assert once.sha256 == twice.sha256


@pytest.mark.parametrize("harm", ["deleted", long("half deleted"), long("mixed up")])
def test_every_image_has_the_same_stack_with_the_cache_and_without(
    tmp_path: Path, harm: str
) -> None:
    found = []
    for root, harmed in ((tmp_path / "one", False), (tmp_path / "other", True)):
        for day in range(STACK + 6):
            write_small(root / "in", day) if day else (root / "in").mkdir(parents=True)
            cached = sorted((root / "out" / "stack").glob("*.npy"))
            if harmed and day in (STACK + 2, STACK + 3, STACK + 5):
                match harm:
                    case "deleted":
                        shutil.rmtree(root / "out" / "stack")
                    case "half deleted":
                        for path in cached[::2]:
                            path.unlink()
                    case _:
                        for path, other in pairwise(cached):
                            shutil.copy(other, path)
            run(root).close()
        log = logbook.connect(root / "out" / "log.sqlite")
        found.append(
            [
                row["stack_sha256"]
                for row in log.execute("SELECT stack_sha256 FROM images ORDER BY id")
            ]
        )
    assert found[0] == found[1]
    assert len(set(found[0])) == 6


def test_an_absurd_pixel_does_no_harm(again: Path) -> None:
    for day, value in (
        (STACK + 5, 1e38),
        (STACK + 6, -1e38),
        (STACK + 7, np.inf),
        (STACK + 8, 0.0),
    ):
        with fits.open(write(again / "in", day, NEW), mode="update") as hdus:
            hdus[0].data[40, 50] = value
    log = run(again)
    assert log.execute("SELECT count(*) FROM images WHERE outcome = 'searched'").fetchone()[0] == 9
    assert len(candidates(log)) == 1


def test_a_stack_is_of_the_last_images_before_a_date(again: Path) -> None:
    log = logbook.connect(again / "out" / "log.sqlite")
    by_day = {row["mjd"]: row["sha256"] for row in log.execute("SELECT mjd, sha256 FROM images")}
    with logbook.writing(log):
        log.execute("UPDATE images SET outcome = 'rejected' WHERE mjd = 60003")
    found = [member.sha256 for member in running_stack.members_before(log, 60005.0, 3)]
    # not the day itself, nor what was rejected
    assert found == [by_day[60000.0 + day] for day in (1, 2, 4)]
    assert (
        running_stack.stack_before(log, Cache(again / "cache"), 60002.0, Difference(stack_size=3))
        is None
    )


def test_the_median_of_a_stack_is_that_of_each_pixel() -> None:
    """Of every block of rows, missing values left out."""
    images = np.random.default_rng(1).normal(0, 1, (5, 2 * 64 + 7, 9)).astype(np.float32)
    images[0, :, 3], images[:4, 70, 5] = np.nan, np.nan
    np.testing.assert_array_equal(running_stack._median(images), np.nanmedian(images, axis=0))


def test_the_cache_hangs_on_the_log_alone(again: Path) -> None:
    cache = again / "out" / "stack"
    before = {path.name for path in cache.iterdir()}
    log = logbook.connect(again / "out" / "log.sqlite")
    row = {"run": 1, "sha256": "0" * 64, "name": "x", "kind": "image", "logged": ""}
    logbook.insert(log, "images", row | {"outcome": "rejected"})
    for ending in (".npy", "-settled.npy", ".123.tmp.npy", "-settled.123.tmp.npy"):
        start = "." if ".tmp" in ending else ""
        (cache / f"{start}{'0' * 64}{ending}").write_bytes(b"half an image")
    # what others, and other logs, keep in a folder of that name is theirs
    others = {"mine.npy", f"{'1' * 64}.npy", f"{'1' * 64}-settled.npy", f".{'1' * 64}.12.tmp.npy"}
    for name in others:
        (cache / name).write_bytes(b"an image")
    kept = Cache(cache)
    kept.settled["0" * 64] = deep.SettledImage(np.zeros((SIDE, SIDE), np.int16), 0.01)
    running_stack.prune(log, kept, STACK)
    assert {path.name for path in cache.iterdir()} == before | others
    assert not kept.settled


def test_the_cache_keeps_two_stacks_and_the_latest_settled_images(again: Path) -> None:
    for day in range(STACK + 5, STACK + 10):
        write(again / "in", day, NEW)
    run(again)
    cached = {path.name for path in (again / "out" / "stack").glob("*.npy")}
    settled = {name for name in cached if name.endswith("-settled.npy")}
    assert len(cached - settled) == running_stack.KEPT * STACK
    assert len(settled) == STACK + 10


@pytest.mark.parametrize(
    ("day", "factor"),
    [
        (2, 40),
        (STACK + 5, 1 / 40),
        *(long(day, factor) for day in (2, STACK + 5) for factor in (1e-10, 5, 0.2)),
    ],
)
def test_an_image_of_another_noise_is_rejected_and_kept_out_of_stacks(
    again: Path, tmp_path_factory: pytest.TempPathFactory, day: int, factor: float
) -> None:
    root = again if day > STACK else tmp_path_factory.mktemp("first")
    for other in range(0 if day < STACK else STACK + 6, STACK + 2 if day < STACK else STACK + 7):
        if other != day:
            write(root / "in", other)
    path = write(root / "in", day)
    with fits.open(path, mode="update") as hdus:
        hdus[0].data = (hdus[0].data * factor).astype(np.float32)
    log = run(root)
    row = log.execute("SELECT outcome, reason FROM images WHERE name = ?", (path.stem,)).fetchone()
    assert row["outcome"] == "rejected"
    assert re.search(r"noise \S+, expected", row["reason"])
    assert path.stem in row["reason"]
    last = STACK + 1 if day < STACK else STACK + 6
    assert outcomes(log)[f"day{last:03d}"] == "searched"
    assert candidates(log).empty == (day < STACK)


@pytest.mark.parametrize("factor", [0.6, 1.5])
def test_half_and_twice_the_light_are_usual(again: Path, factor: float) -> None:
    path = write(again / "in", STACK + 5)
    with fits.open(path, mode="update") as hdus:
        noise = np.random.default_rng([7, STACK + 5]).normal(0, 0.0076, (SIDE, SIDE))
        hdus[0].data = (hdus[0].data + (factor - 1) * noise).astype(np.float32)
    assert outcomes(run(again))[path.stem] == "searched"


@pytest.mark.parametrize(
    ("odd", "at_once"), [({0}, True), ({1, 3, 5}, True), ({0, 2}, False), ({STACK + 1}, False)]
)
def test_images_of_another_size_are_rejected_and_the_rest_is_searched(
    tmp_path: Path, odd: set[int], at_once: bool
) -> None:
    days = range(STACK + len(odd) + 2)
    for day in days:
        path = write(tmp_path / "in", day, NEW)
        if day in odd:
            part(day, path)
        if not at_once:
            run(tmp_path).close()
    log = run(tmp_path)
    usual = [f"day{day:03d}" for day in days if day not in odd]
    expected = dict.fromkeys(usual[:STACK], "stack") | dict.fromkeys(usual[STACK:], "searched")
    assert outcomes(log) == expected | {f"day{day:03d}": "rejected" for day in odd}
    reasons = {
        row["reason"] for row in log.execute("SELECT reason FROM images WHERE outcome = 'rejected'")
    }
    assert all(
        "found 300x300 pixels, expected 512x512 as the images that this log searches" in text
        for text in reasons
    )


@pytest.mark.parametrize(
    ("card", "kept"),
    [
        (b"LEVEL_E = 'bright'", None),
        (b"LEVEL_E = (1.0, 2.0)", None),
        (b"LEVEL_E = " + b"9" * 60, None),
        (b"LEVEL_E =", None),
        (b"LEVEL_E = T", None),
        (b"LEVEL_E = 20000", 20000.0),
        (b"EXPTIME =             1402,937", None),
        (b"PROPOSID= (1.0, 2.0)", None),
        (b"TARGNAME= 'TERRE \xe9clair\xe9e'", None),
    ],
    ids=str,
)
def test_an_image_with_an_odd_card_is_logged_without_it(
    tmp_path: Path, card: bytes, kept: float | None
) -> None:
    path = write(tmp_path / "in", 1)
    content = path.read_bytes()
    place = content.index(b"FILTER  =")
    path.write_bytes(content[:place] + card.ljust(80) + content[place + 80 :])
    log = run(tmp_path)
    row = log.execute("SELECT outcome, signal_e, header FROM images").fetchone()
    assert (row["outcome"], row["signal_e"]) == ("stack", kept)
    assert json.loads(row["header"], parse_constant=pytest.fail)["EXPSTART"] == 60001.0


def test_infinite_pixels_hide_no_blob(tmp_path: Path) -> None:
    """What is found is what would be found if they were NaN; so with numbers beyond all sense."""
    found = []
    for name, values in (("nan", [np.nan]), ("bad", [np.inf, -np.inf, 1e38])):
        for day in range(STACK + 1):
            (tmp_path / name).mkdir(exist_ok=True)
            path = write(tmp_path / name / "in", day, *([NEW] if day == STACK else []))
            with fits.open(path, mode="update") as hdus:
                rng = np.random.default_rng(day)
                bad = rng.random((SIDE, SIDE)) < 0.005
                hdus[0].data[bad] = rng.choice(values, int(bad.sum()))
        log = run(tmp_path / name)
        found.append(
            [
                tuple(row)
                for row in log.execute("SELECT status, x_px, y_px, snr, score FROM detections")
            ]
        )
    assert found[0] == found[1]
    assert [row[0] for row in found[0]].count("new") == 1


def test_what_is_taken_off_an_image_is_logged_for_every_image_of_a_stack(month: Path) -> None:
    log = logbook.connect(month / "out" / "log.sqlite")
    stacked = {
        row["name"]
        for row in log.execute("SELECT i.name FROM corrections c JOIN images i ON i.id = c.image")
    }
    assert stacked == {row["name"] for row in log.execute("SELECT name FROM images")}


BOTH = {(300, 600), (600, 450)}


def test_a_mask_keeps_a_cluster_of_bad_pixels_from_becoming_a_candidate(
    full_frames: Path, tmp_path: Path
) -> None:
    (tmp_path / "in").symlink_to(full_frames / "in")
    assert places(run(tmp_path)) == BOTH
    shutil.rmtree(tmp_path / "out")
    mask = full_frames / "mask.fits"
    log = run(tmp_path, bad_pixels=(mask,))
    assert places(log) == {(300, 600)}
    [row] = log.execute("SELECT bad_pixels FROM runs").fetchall()
    n_px = int(masked.around(*masked.CLUSTER[:2], 9).sum())
    assert json.loads(row["bad_pixels"]) == [
        {"file": str(mask), "n_px": n_px, "sha256": files.sha256(mask)}
    ]


@pytest.mark.parametrize("besides", [False, True])
def test_another_mask_makes_the_same_stacks_as_if_it_had_been_there_from_the_start(
    full_frames: Path, tmp_path: Path, besides: bool
) -> None:
    """The cache holds images without the pixels of the mask before; it is not used."""
    shutil.copytree(full_frames / "in", tmp_path / "in")
    last = tmp_path / "in" / f"day{STACK + 1:03d}.fits"
    late = last.rename(tmp_path / "late.fits")
    log_path = tmp_path / "out" / "log.sqlite"
    run(tmp_path, bad_pixels=(full_frames / "mask.fits",)).close()

    # a second mask, besides the first or instead of it
    other = masked.write_mask(tmp_path / "other.fits", masked.around(500, 500, 6))
    later = (full_frames / "mask.fits", other) if besides else (other,)
    late.rename(last)
    log = run(tmp_path, bad_pixels=later)
    [stack] = log.execute("SELECT stack_sha256 FROM images WHERE name = ?", (last.stem,))
    kept = (tmp_path / "out" / "stack").glob("*.npy")
    assert sum(not path.stem.endswith("-settled") for path in kept) == STACK + 2
    log.close()

    shutil.rmtree(log_path.parent)
    fresh = run(tmp_path, bad_pixels=later)
    [expected] = fresh.execute("SELECT stack_sha256 FROM images WHERE name = ?", (last.stem,))
    assert stack["stack_sha256"] == expected["stack_sha256"]
