"""The running stack: the same images give the same one, whatever the cache holds."""

from __future__ import annotations

import io
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits

from blobpipe.core import files, fits_images
from blobpipe.core.blob_shapes import blob_profile
from blobpipe.core.detector import read_detector
from blobpipe.history.deep import SettledImage
from blobpipe.images import difference
from blobpipe.images.bad_pixels import BadPixels, MaskFile
from blobpipe.images.register import NO_SHIFT, Shift
from blobpipe.images.template import make_template
from blobpipe.monitor import logbook
from blobpipe.params import Difference
from blobpipe.quicklook import running_stack

SIDE = 256
STACK = 4
DAYS = 12
PARAMS = Difference(stack_size=STACK)
KNOWN = [(50 + 75 * i, 40 + 60 * j, 6.0, 0.1) for i in range(3) for j in range(4)]
DIRECTIONS = np.random.default_rng(21).normal(0, 1, (DAYS, 2))


def write(path: Path, day: int) -> None:
    """An image on which the mirror has stopped up to some pixels elsewhere."""
    image = np.random.default_rng([20, day]).normal(0, 0.0076, (SIDE, SIDE)).astype(np.float32)
    shift_x, shift_y = (0.0, 0.0) if day % 3 == 0 else DIRECTIONS[day]
    for x, y, radius, depth in KNOWN:
        image[y - 20 : y + 21, x - 20 : x + 21] += depth * blob_profile(
            "disc", radius, shift_x, shift_y
        )
    image[30, 40] = np.inf
    fits.PrimaryHDU(image, fits.Header({"EXPSTART": 60000.0 + day})).writeto(path)


def subtract_each(
    root: Path, harm: Callable[[Path, int], None] = lambda cache, day: None
) -> list[str]:
    """The stack of each image, in order, as the routine takes and logs it; first something happens to the cache."""
    (root / "in").mkdir(parents=True)
    log = logbook.connect(root / "log.sqlite", make=True)
    cache = root / "stack"
    with logbook.writing(log):
        log.execute(
            "INSERT INTO runs (started, version, model, model_sha256, params_sha256, catalogue_sha256, threshold) "
            "VALUES ('', '', '', '', '', '', 0.5)"
        )
    found = []
    for day in range(DAYS):
        path = root / "in" / f"day{day:02d}.fits"
        write(path, day)
        sha256 = files.sha256(path)
        image = fits_images.read_image(path).data
        harm(cache, day)
        kept = running_stack.Cache(cache)
        stack = running_stack.stack_before(log, kept, 60000.0 + day, PARAMS)
        corrections = {}
        shift = NO_SHIFT
        if stack is not None:
            template = make_template(stack.data)
            _, shift = difference.subtract(image, template, PARAMS)
            assert template.pattern is not None
            packed = running_stack.correction(template.pattern, shift)
            corrections = stack.corrections | {sha256: packed}
            running_stack.keep(kept, sha256, image, corrections[sha256])
            found.append(stack.sha256)
        with logbook.writing(log):
            _log(log, path, day, sha256, shift, corrections)
    log.close()
    return found


def _log(
    log: sqlite3.Connection,
    path: Path,
    day: int,
    sha256: str,
    shift: Shift,
    corrections: dict[str, bytes],
) -> None:
    row = {
        "run": 1,
        "sha256": sha256,
        "name": path.stem,
        "kind": "image",
        "mjd": 60000.0 + day,
        "logged": "",
    }
    row |= {"outcome": "searched", "shift_x_px": shift.x_px, "shift_y_px": shift.y_px}
    number = logbook.insert(log, "images", row)
    log.execute(
        "INSERT INTO files (path, sha256, size_bytes, modified_ns, seen, outcome, image) VALUES (?, ?, 0, 0, '', 'logged', ?)",
        (str(path), sha256, number),
    )
    for image, packed in corrections.items():
        log.execute(
            "INSERT INTO corrections SELECT id, ? FROM images WHERE sha256 = ?", (packed, image)
        )


@pytest.fixture(scope="module")
def month(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("month")


@pytest.fixture(scope="module")
def undisturbed(month: Path) -> list[str]:
    return subtract_each(month)


def test_each_image_has_its_own_stack_and_large_shifts_are_corrected(
    undisturbed: list[str], month: Path
) -> None:
    assert len(undisturbed) == len(set(undisturbed)) == DAYS - STACK
    log = logbook.connect(month / "log.sqlite")
    corrections = [
        row["bytes"] for row in log.execute("SELECT bytes FROM corrections ORDER BY image")
    ]
    assert len(corrections) == DAYS
    shifted = [bool(packed) for packed in corrections]
    assert shifted[STACK:] == [day % 3 != 0 for day in range(STACK, DAYS)]


@pytest.mark.parametrize("seed", range(2))
def test_deleting_the_cache_on_any_day_changes_no_stack(
    undisturbed: list[str], tmp_path: Path, seed: int
) -> None:
    rng = np.random.default_rng([22, seed])
    days = set(rng.choice(DAYS, 4, replace=False).tolist())

    def delete(cache: Path, day: int) -> None:
        if day in days and seed % 2:
            shutil.rmtree(cache, ignore_errors=True)
        elif day in days:
            for path in rng.permutation(sorted(cache.glob("*.npy")))[:2]:
                path.unlink()

    assert subtract_each(tmp_path, delete) == undisturbed


def _npy(image: np.ndarray, **more: bool) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, image, **more)
    return buffer.getvalue()


HARM: dict[str, Callable[[bytes, bytes], bytes]] = {
    "empty": lambda content, other: b"",
    "cut off": lambda content, other: content[:1000],
    "cut by a byte": lambda content, other: content[:-1],
    "a byte more": lambda content, other: content + b"\0",
    "one bit": lambda content, other: (
        content[:90_000] + bytes([content[90_000] ^ 4]) + content[90_001:]
    ),
    "one bit of the header": lambda content, other: bytes([content[0] ^ 1]) + content[1:],
    "text": lambda content, other: b"garbage " * 1000,
    "another image": lambda content, other: other,
    "of version 1": lambda content, other: _npy(np.zeros((SIDE, SIDE), np.float16)),
    "wrong shape": lambda content, other: _npy(np.zeros((SIDE, SIDE // 2), np.float16)),
    "wrong type": lambda content, other: _npy(np.full((SIDE, SIDE), 1 + 1j)),
    "pickled": lambda content, other: _npy(np.array([{"a": 1}], object), allow_pickle=True),
    "zeros": lambda content, other: bytes(len(content)),
}


@pytest.mark.parametrize("kind", HARM)
def test_a_corrupt_file_of_the_cache_is_not_believed(
    undisturbed: list[str], month: Path, tmp_path: Path, kind: str
) -> None:
    assert undisturbed
    log = logbook.connect(month / "log.sqlite")
    cache = tmp_path / "stack"
    date = 60000.0 + DAYS
    whole = running_stack.stack_before(log, running_stack.Cache(cache), date, PARAMS)
    contents = {path: path.read_bytes() for path in sorted(cache.glob("*.npy"))}
    assert len(contents) == STACK
    last = list(contents)[-1]
    for path in list(contents)[:-1]:
        path.write_bytes(HARM[kind](contents[path], contents[last]))
    again = running_stack.stack_before(log, running_stack.Cache(cache), date, PARAMS)
    assert whole is not None
    assert again is not None
    assert again.sha256 == whole.sha256
    assert {path: path.read_bytes() for path in contents} == contents


@pytest.mark.parametrize("kind", HARM)
def test_a_corrupt_settled_image_is_not_believed(tmp_path: Path, kind: str) -> None:
    cache = running_stack.Cache(tmp_path)
    values = np.zeros((300, 400), np.int16)
    names = ["a" * 64, "b" * 64]
    for k, name in enumerate(names):
        running_stack.keep_settled(cache, name, SettledImage(values + np.int16(k), 0.0076))
    found = running_stack._load_settled(names[0], cache, (300, 400))
    assert found is not None
    assert (found.values == values).all()
    assert found.noise_frac == 0.0076
    contents = [cache.settled_path(name).read_bytes() for name in names]
    cache.settled_path(names[0]).write_bytes(HARM[kind](*contents))
    assert running_stack._load_settled(names[0], cache, (300, 400)) is None
    assert running_stack._load_settled(names[1], cache, (300, 401)) is None
    other = running_stack.Cache(tmp_path, BadPixels(dq_flags=4))
    assert running_stack._load_settled(names[1], other, (300, 400)) is None


def test_a_folder_in_the_place_of_a_cached_image_is_named(
    undisturbed: list[str], month: Path, tmp_path: Path
) -> None:
    assert undisturbed
    log = logbook.connect(month / "log.sqlite")
    date = 60000.0 + DAYS
    member = running_stack.members_before(log, date, STACK)[0]
    (tmp_path / f"{member.sha256}.npy").mkdir()
    with pytest.raises(OSError, match=r"\.npy"):
        running_stack.stack_before(log, running_stack.Cache(tmp_path), date, PARAMS)


def test_a_cached_image_is_of_its_correction(tmp_path: Path) -> None:
    image = np.random.default_rng(1).normal(0, 0.01, (SIDE, SIDE)).astype(np.float32)
    packed = running_stack.correction(image, Shift(1.0, 0.0))
    cache = running_stack.Cache(tmp_path)
    running_stack.keep(cache, "a" * 64, image, packed)
    for correction, found in ((packed, True), (b"", False), (None, False)):
        member = running_stack.Member("a" * 64, (), 60000.0, NO_SHIFT, correction)
        assert (running_stack._loaded(member, cache) is not None) == found


def test_a_cached_image_is_of_its_bad_pixels(tmp_path: Path) -> None:
    """Of the same files and the same flags."""
    image = np.zeros((SIDE, SIDE), np.float32)
    mask = np.zeros((SIDE, SIDE), bool)
    masked = BadPixels(mask, (MaskFile(Path("a.fits"), "b" * 64, 0),))
    running_stack.keep(running_stack.Cache(tmp_path, masked), "a" * 64, image, b"")
    member = running_stack.Member("a" * 64, (), 60000.0, NO_SHIFT, b"")
    renamed = BadPixels(mask, (MaskFile(Path("c.fits"), "b" * 64, 0),))
    other = BadPixels(mask, (MaskFile(Path("a.fits"), "d" * 64, 0),))
    flags = BadPixels(mask, masked.files, 4)
    for bad, found in ((masked, True), (renamed, True), (other, False), (flags, False)):
        cache = running_stack.Cache(tmp_path, bad)
        assert (running_stack._loaded(member, cache) is not None) == found
    assert running_stack._loaded(member, running_stack.Cache(tmp_path)) is None


def test_a_cached_image_is_of_its_detector(tmp_path: Path) -> None:
    """A file of a detector that was corrected reads exposures anew; what it says of other things does not matter."""
    image = np.zeros((SIDE, SIDE), np.float32)
    found = read_detector("nircam_lw")
    turned = found.exposure.model_copy(update={"blobs": "positive"})
    running_stack.keep(running_stack.Cache(tmp_path, detector=found), "a" * 64, image, b"")
    member = running_stack.Member("a" * 64, (), 60000.0, NO_SHIFT, b"")
    for change, is_used in (({}, True), ({"exposure": turned}, False), ({"gain_e": 3.0}, True)):
        cache = running_stack.Cache(tmp_path, detector=found.model_copy(update=change))
        assert (running_stack._loaded(member, cache) is not None) == is_used
    assert running_stack._loaded(member, running_stack.Cache(tmp_path)) is None


def test_a_correction_has_no_holes_where_pixels_are_bad(tmp_path: Path) -> None:
    """The image may be used with other bad pixels later."""
    pattern = np.zeros((SIDE, SIDE), np.float32)
    pattern[100:120, 100:120] = 0.1
    packed = running_stack.correction(pattern, Shift(2.0, 0.0))
    image = pattern.copy()
    image[110, 105] = np.nan
    moved = running_stack._corrected(image, packed)
    assert np.isnan(moved[110, 105])
    # the edges move: right ones lose what left ones gain
    whole = running_stack._corrected(pattern, packed)
    np.testing.assert_array_equal(np.delete(moved[110], 105), np.delete(whole[110], 105))
    assert whole[110, 100] > 0.15
    assert whole[110, 120] < -0.05


def test_a_file_that_cannot_be_read_is_not_the_image_of_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "day00.fits", 0)
    sha256 = files.sha256(tmp_path / "day00.fits")
    assert running_stack._holds(tmp_path / "day00.fits", sha256)

    def fail(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(files, "sha256", fail)
    assert not running_stack._holds(tmp_path / "day00.fits", sha256)
