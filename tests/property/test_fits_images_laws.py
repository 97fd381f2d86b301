"""Laws of reading and writing: nothing is lost beyond what is stated, and no half file is ever left."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from astropy.io import fits
from hypothesis import given, settings
from hypothesis import strategies as st

from blobpipe.core import files, fits_images, tables
from blobpipe.core.random_streams import stream
from blobpipe.errors import BlobpipeError

Words = st.one_of(st.integers(0, 2**31), st.text(min_size=1, max_size=8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("laws")


def complaint(read: Callable[[], object]) -> str | None:
    """What blobpipe says against a file; any other exception is a fault of ours."""
    try:
        read()
    except BlobpipeError as error:
        return str(error)
    return None


@settings(max_examples=40)
@given(
    seed=st.integers(0, 99),
    log_sigma=st.floats(-4, 1),
    side=st.tuples(st.integers(2, 90), st.integers(2, 90)),
    missing=st.sampled_from([0.0, 0.1, 1.0]),
)
def test_what_is_read_is_what_was_written(
    folder: Path, seed: int, log_sigma: float, side: tuple[int, int], missing: float
) -> None:
    """To half a step of sigma / 32, and a little for the rounding of float32; gaps where they were."""
    rng = np.random.default_rng(seed)
    sigma = 10**log_sigma
    image = rng.normal(0, sigma, side).astype(np.float32)
    image[rng.random(side) < 0.02] *= 30
    image[rng.random(side) < missing] = np.nan
    fits_images.write_image(folder / "a.fits.fz", image, name="SCI", sigma=sigma)
    found = fits_images.read_frame(folder / "a.fits.fz").data
    np.testing.assert_allclose(found, image, atol=sigma / 64 * 1.01, rtol=1e-6)


@settings(max_examples=20)
@given(seed=st.integers(0, 99), top=st.sampled_from([3, 300, 2**15]))
def test_integers_are_kept_exactly(folder: Path, seed: int, top: int) -> None:
    image = np.random.default_rng(seed).integers(-top, top, (40, 50)).astype(np.int16)
    fits_images.write_image(folder / "i.fits.fz", image, name="SCI")
    np.testing.assert_array_equal(
        fits_images.read_frame(folder / "i.fits.fz").data, image.astype(np.float32)
    )


@settings(max_examples=150)
@given(data=st.data(), suffix=st.sampled_from([".fits", ".fits.gz"]))
def test_damaged_bytes_are_read_or_refused(folder: Path, data: st.DataObject, suffix: str) -> None:
    """Whatever bytes a file holds: an image or an error of one line, and nothing else."""
    path = folder / f"good{suffix}"
    if not path.exists():
        image = fits.ImageHDU(
            np.random.default_rng(1).normal(size=(30, 30)).astype(np.float32), name="SCI"
        )
        fits.HDUList([fits.PrimaryHDU(), image]).writeto(path)
    content = bytearray(path.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=5)):
        content[place] = data.draw(st.sampled_from(b"9 -'\0=\xff"))
    damaged = folder / f"damaged{suffix}"
    damaged.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    said = complaint(lambda: fits_images.read_frame(damaged))
    assert said is None or (said.startswith(str(damaged)) and "\n" not in said)


@given(
    name=st.from_regex(r"[a-z0-9_.]{1,12}(\.csv|\.fits\.fz|\.json|)", fullmatch=True).filter(
        lambda n: n.strip(".")
    ),
    failure=st.sampled_from([None, ValueError, KeyboardInterrupt, OSError]),
    wrote=st.booleans(),
)
def test_an_exception_leaves_nothing_behind(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    failure: type[BaseException] | None,
    wrote: bool,
) -> None:
    path = tmp_path_factory.mktemp("atomic") / name

    def write() -> None:
        with files.atomic(path) as temporary:
            if wrote or failure is None:
                temporary.write_text("half")
            if failure:
                raise failure

    if failure is None:
        write()
        assert path.read_text() == "half"
    else:
        with pytest.raises(failure):
            write()
    assert list(path.parent.iterdir()) == ([] if failure else [path])


@given(
    st.integers(0, 2**31 - 1),
    st.lists(st.tuples(st.text(max_size=9), st.lists(Words, max_size=3)), unique_by=repr),
)
def test_streams_depend_on_neither_order_nor_company(
    seed: int, items: list[tuple[str, list[int | str]]]
) -> None:
    alone = {repr(item): stream(seed, item[0], *item[1]).integers(2**62) for item in items}
    together = {
        repr(item): stream(seed, item[0], *item[1]).integers(2**62) for item in reversed(items)
    }
    assert alone == together


@given(st.integers(0, 2**31 - 2), st.text(max_size=9), st.lists(Words, max_size=3), Words)
def test_streams_of_different_items_differ(
    seed: int, stage: str, items: list[int | str], more: int | str
) -> None:
    streams = [
        stream(seed, stage, *items),
        stream(seed + 1, stage, *items),
        stream(seed, stage + "x", *items),
        stream(seed, stage, *items, more),
        stream(seed, stage, *items, 0),
        stream(seed, stage, *items, 0, 0),
    ]
    if more == 0:
        streams.pop(3)
    assert len({generator.integers(2**62) for generator in streams}) == len(streams)


def test_streams_are_uncorrelated() -> None:
    draws = np.array([stream(1, "cutout", i).standard_normal(4000) for i in range(20)])
    correlation = np.corrcoef(draws)[np.triu_indices(20, 1)]
    # 190 pairs, each of standard deviation 1 / sqrt(4000)
    assert np.abs(correlation).max() < 4.5 / np.sqrt(4000)


@given(
    st.lists(st.floats(-1e9, 1e9) | st.none(), min_size=1, max_size=20),
    st.text("abcNA .,\"'07é", max_size=5),
)
def test_tables_come_back(folder: Path, numbers: list[float | None], text: str) -> None:
    table = pd.DataFrame(
        {
            "reason": text,
            "x_px": pd.array([np.nan if n is None else n for n in numbers], dtype=float),
        }
    )
    tables.write_table(folder / "t.csv", table)
    found = tables.read_table(folder / "t.csv", ("reason", "x_px"))
    assert list(found["reason"]) == list(table["reason"])
    np.testing.assert_allclose(found["x_px"].astype(float), table["x_px"], rtol=1e-8, atol=1e-300)


@settings(max_examples=200)
@given(st.binary(max_size=60) | st.text("frame,mjd\n1\"'ab ", max_size=40).map(str.encode))
def test_any_bytes_as_a_list_of_frames_are_read_or_refused(folder: Path, content: bytes) -> None:
    (folder / "frames.csv").write_bytes(content)
    said = complaint(lambda: tables.read_frame_list(folder))
    assert said is None or (said.startswith(str(folder / "frames.csv")) and "\n" not in said)


@given(
    st.integers(0, 99),
    st.integers(1, 6000),
    st.sampled_from(["noise", "constant", "few values", "sorted", "outliers"]),
)
def test_the_fast_median_is_the_median(seed: int, n: int, kind: str) -> None:
    values = np.random.default_rng(seed).normal(size=n).astype(np.float32)
    match kind:
        case "constant":
            values[:] = 3
        case "few values":
            values = np.round(values)
        case "sorted":
            values = np.sort(values)
        case "outliers":
            values[:: n // 500 + 1] = 1e6
    assert fits_images.median(values) == np.median(values)


@given(st.integers(0, 50_000))
def test_batches_cover_every_row_once(n: int) -> None:
    slices = tables.batches(n)
    rows = list(itertools.chain.from_iterable(range(n)[part] for part in slices))
    assert rows == list(range(n))
    assert all(0 < part.stop - part.start <= tables.batch_size(n) for part in slices)
    assert len(slices) <= tables.MAX_BATCHES


def test_a_longer_list_hardly_ever_moves_a_batch() -> None:
    sizes = [tables.batch_size(n) for n in range(50_000)]
    assert set(sizes) == {64, 128, 256, 512, 1024, 2048}
    assert tables.batch_size(tables.MAX_BATCHES * 64) == 64
