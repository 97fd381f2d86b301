"""Files are written completely or not at all, and names of frames are names of files."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from blobpipe.core import files, fits_images, tables
from blobpipe.errors import TableError


def test_atomic_makes_the_folder_and_replaces_the_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.b.csv"
    for text in ("one", "two"):
        with files.atomic(path) as temporary:
            assert temporary.parent == path.parent
            assert temporary.name.startswith(".")
            assert temporary.suffix == ".csv"
            temporary.write_text(text)
            assert not path.exists() or path.read_text() == "one"
        assert path.read_text() == text
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("old")
    with pytest.raises(TypeError), files.atomic(path) as temporary:
        temporary.write_text(7)  # type: ignore[arg-type]
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


NAMES = [
    "../raw/x",
    "..",
    ".",
    ".hidden",
    "-rf",
    "a/b",
    "/a",
    "a\\b",
    "a\0",
    "a\nb",
    "a\x1b[2J",
    "a\u202eb",
    "é" * 101,
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_a_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "good.fits").touch()
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "x.fits").touch()
    with pytest.raises(TableError, match="expected the name of a file"):
        fits_images.find_image(tmp_path / "raw", name)
    if "\0" in name:
        return  # no table may hold it
    for folder, table in (
        ("frames", {"mjd": 1.0}),
        ("stage", {"status": "ok"}),
        ("cases", {"first_frame": name}),
    ):
        path = tmp_path / folder / "frames-000.csv"
        tables.write_table(path, pd.DataFrame({"frame": ["good", name], **table}))
        with pytest.raises(TableError, match="expected the name of a file") as refusal:
            tables.read_table(path, ("frame",))
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "name",
    ["ibxy01z8q_blob", "a.b-c_d+e (2)", "Fleck-ä", "日", "x" * 200, "nan", "007", "a.", " a "],
)
def test_names_that_files_have_are_names(tmp_path: Path, name: str) -> None:
    (tmp_path / f"{name}.fits").touch()
    assert fits_images.find_image(tmp_path, name) == tmp_path / f"{name}.fits"
    tables.write_table(tmp_path / "frames.csv", pd.DataFrame({"frame": [name], "mjd": 1.0}))
    assert list(tables.read_frame_list(tmp_path)["frame"]) == [name]


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert files.sha256(tmp_path / "a").startswith("ba7816bf8f01cfea")
