"""Images of a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from blobpipe.images.listing import list_images


def test_images_are_listed_and_what_only_looks_like_one_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in (
        "b.fits",
        "a.fits.gz",
        "c.fits.fz",
        ".hidden.fits",
        "d.FITS",
        "e.fit",
        "notes.txt",
    ):
        (tmp_path / name).touch()
    with caplog.at_level("INFO"):
        assert [path.name for path in list_images(tmp_path)] == ["a.fits.gz", "b.fits", "c.fits.fz"]
    assert caplog.messages == ["skipped, expected .fits.fz, .fits, .fits.gz: d.FITS, e.fit"]
    caplog.clear()
    (tmp_path / "d.FITS").unlink()
    (tmp_path / "e.fit").unlink()
    list_images(tmp_path)
    assert not caplog.messages


def test_of_many_that_look_like_images_twenty_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(25):
        (tmp_path / f"{number:02d}.FITS").touch()
    with caplog.at_level("INFO"):
        assert list_images(tmp_path) == []
    [line] = caplog.messages
    assert line.endswith("18.FITS, 19.FITS and 5 more")
