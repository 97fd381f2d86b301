"""Difference images: the right sign, the right noise, no dips, and new blobs new only once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from astropy.io import fits

from blobpipe.core import files, fits_images, tables
from blobpipe.core.blob_shapes import blob_profile, matched_snr
from blobpipe.core.detector import DEFAULT
from blobpipe.errors import FrameError, TableError
from blobpipe.images import difference
from blobpipe.images.bad_pixels import BadPixels, read_bad_pixels
from blobpipe.images.register import NO_SHIFT, Shift
from blobpipe.images.template import make_template
from blobpipe.noise.level import clean_noise
from blobpipe.params import BadPixels as Settings
from blobpipe.params import Difference

NOISE = 0.0101


@pytest.fixture(scope="module")
def done(campaign_dir: Path, difference_dir: Path) -> pd.DataFrame:
    """What the stage wrote, beside the truth (columns with ``_true``)."""
    truth = tables.read_frame_list(campaign_dir)
    return truth.merge(tables.read_stage(difference_dir), on="frame", suffixes=("_true", ""))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def snr_at(image: np.ndarray, blob: object, noise: float) -> float:
    """Matched-filter signal-to-noise ratio of a blob of the catalogue on an image."""
    row = round(blob.y_px)
    column = round(blob.x_px)
    window = np.pad(np.nan_to_num(image), 20)[row : row + 41, column : column + 41]
    profile = blob_profile(blob.shape, blob.radius_px, blob.x_px - column, blob.y_px - row)
    return float((window * profile).sum() / np.sqrt((profile**2).sum()) / noise)


def some(campaign_dir: Path, folder: Path, n: int) -> pd.DataFrame:
    """The first images of the campaign in a folder of their own; its table."""
    table = tables.read_frame_list(campaign_dir)[["frame", "mjd"]][:n]
    folder.mkdir()
    for name in table["frame"]:
        shutil.copy(fits_images.find_image(campaign_dir, name), folder)
    tables.write_table(folder / "frames.csv", table)
    return table


def test_each_image_after_the_first_stack_has_a_difference(
    done: pd.DataFrame, difference_dir: Path
) -> None:
    assert done["status"].tolist() == ["stack"] * 16 + ["ok"] * 20
    assert done["n_stack"].tolist() == list(range(16)) + [16] * 20
    columns = [
        "frame",
        "mjd",
        "status",
        "reason",
        "shift_x_px",
        "shift_y_px",
        "noise_frac",
        "n_stack",
        "sha256",
    ]
    assert list(tables.read_stage(difference_dir).columns) == columns
    for row in done.query("status == 'ok'").itertuples():
        assert files.sha256(difference_dir / f"{row.frame}.fits.fz") == row.sha256


def test_noise_is_that_of_real_difference_images(done: pd.DataFrame) -> None:
    assert done["noise_frac"].median() == pytest.approx(NOISE, rel=0.1)


def test_noise_of_the_stack_is_that_of_a_real_one(reference: tuple[np.ndarray, np.ndarray]) -> None:
    """0.0055 for 30 images: the fixed pattern, and what the median leaves of the rest; here there are 16."""
    rest = clean_noise(reference[0]) ** 2 - 0.005**2
    assert np.sqrt(0.005**2 + rest * 16 / 30) == pytest.approx(0.0055, rel=0.05)


def test_shifts_are_recovered(done: pd.DataFrame) -> None:
    """The requirement is 0.1 px, for shifts above 0.2 px; the usual small ones must not suffer either."""
    ok = done.query("status == 'ok'")
    error = (
        ok[["shift_x_px", "shift_y_px"]].to_numpy()
        - ok[["shift_x_px_true", "shift_y_px_true"]].to_numpy()
    )
    large = np.hypot(ok["shift_x_px_true"], ok["shift_y_px_true"]) > 0.2
    assert large.sum() >= 4
    assert (np.sqrt((error[large] ** 2).mean(axis=0)) < 0.1).all()
    assert (np.sqrt((error[~large] ** 2).mean(axis=0)) < 0.06).all()


def test_new_blob_is_positive_and_as_deep_as_it_is(
    done: pd.DataFrame, campaign_dir: Path, difference_dir: Path
) -> None:
    blobs = tables.read_blobs(campaign_dir).set_index("first_frame", drop=False)
    ratios = []
    for row in done.query("status == 'ok' and label == 'historical'").itertuples():
        image = fits_images.read_frame(difference_dir / f"{row.frame}.fits.fz").data
        for blob in blobs.loc[[row.frame]].itertuples():
            profile = blob_profile(blob.shape, blob.radius_px) * blob.depth_frac
            found = snr_at(image, blob, row.noise_frac)
            true = matched_snr(profile, row.noise_frac)
            assert found > 0
            ratios += [found / true] if true > 10 else []
    assert np.median(ratios) == pytest.approx(1.0, abs=0.1)


def test_blob_is_new_only_once(
    done: pd.DataFrame, campaign_dir: Path, difference_dir: Path
) -> None:
    """In the images after its first, it is gone, though the plain median has not learnt it yet."""
    rows = {name: row for row, name in enumerate(done["frame"])}
    residuals = []
    plain = []
    for blob in tables.read_blobs(campaign_dir).query("first_frame != ''").itertuples():
        for row in range(rows[blob.first_frame] + 1, min(rows[blob.first_frame] + 6, len(done))):
            image = fits_images.read_frame(difference_dir / f"{done['frame'][row]}.fits.fz").data
            residuals.append(abs(snr_at(image, blob, done["noise_frac"][row])))
            plain.append(
                matched_snr(blob_profile(blob.shape, blob.radius_px) * blob.depth_frac, NOISE)
            )
    assert np.median(residuals) < 2
    assert np.mean(np.array(residuals) > 5) < 0.1 < np.mean(np.array(plain) > 5)


def test_header_keeps_the_frame_and_says_what_was_done(
    done: pd.DataFrame, difference_dir: Path
) -> None:
    row = done.iloc[-1]
    frame = fits_images.read_frame(difference_dir / f"{row['frame']}.fits.fz")
    assert frame.header["EXTNAME"] == "DIFFERENCE"
    assert frame.header["ROOTNAME"] == row["frame"].removesuffix("_blob")
    assert frame.header["NSTACK"] == 16
    assert frame.header["SHIFT_X"] == pytest.approx(row["shift_x_px"], abs=1e-6)


def test_border_stays_without_values(done: pd.DataFrame, difference_dir: Path) -> None:
    image = fits_images.read_frame(difference_dir / f"{done['frame'].iloc[-1]}.fits.fz").data
    assert np.isnan(image[:5]).all()
    assert np.isfinite(image[5:-5, 5:-5]).all()


def test_another_process_gives_the_same_bytes(campaign_dir: Path, tmp_path: Path) -> None:
    """With another number of threads, too."""
    some(campaign_dir, tmp_path / "raw", 7)
    difference.write_differences(tmp_path / "raw", tmp_path / "here", Difference(stack_size=4))
    code = (
        "import sys; from blobpipe.images import difference; from blobpipe.params import Difference;"
        "difference.write_differences(sys.argv[1], sys.argv[2], Difference(stack_size=4), 0)"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "raw"), str(tmp_path / "there")]
    subprocess.run(
        words, check=True, env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    )
    assert content(tmp_path / "here") == content(tmp_path / "there")


def test_batches_may_be_made_in_any_order(
    campaign_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some(campaign_dir, tmp_path / "raw", 7)
    params = Difference(stack_size=3)
    monkeypatch.setattr(tables, "BATCH", 4)
    difference.write_differences(tmp_path / "raw", tmp_path / "all", params)
    for batch in (1, 0):
        difference.write_differences(tmp_path / "raw", tmp_path / "each", params, batch)
    assert content(tmp_path / "all") == content(tmp_path / "each")
    assert tables.read_stage(tmp_path / "all")["status"].tolist() == ["stack"] * 3 + ["ok"] * 4


def test_as_many_images_before_a_batch_are_read_as_its_stacks_take(
    campaign_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three usable ones before rows 6 and 7, of which the fifth cannot be used."""
    names = some(campaign_dir, tmp_path / "raw", 8)["frame"]
    fits_images.find_image(tmp_path / "raw", names[4]).write_bytes(b"")
    monkeypatch.setattr(tables, "BATCH", 6)
    read: list[int] = []
    original = difference._read
    monkeypatch.setattr(difference, "_read", lambda *args: read.append(args[1]) or original(*args))
    difference.write_differences(tmp_path / "raw", tmp_path / "out", Difference(stack_size=3), 1)
    assert sorted(read) == [2, 3, 4, 5, 6, 7]
    assert pd.read_csv(tmp_path / "out" / "frames-001.csv")["n_stack"].tolist() == [3, 3]


def test_bad_images_are_rejected_and_the_rest_goes_on(campaign_dir: Path, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    names = some(campaign_dir, raw, 9)["frame"]
    truncated, empty, cut = (fits_images.find_image(raw, names[i]) for i in (1, 4, 6))
    truncated.write_bytes(truncated.read_bytes()[:100_000])
    fits_images.write_image(empty, np.full((1024, 1024), np.nan, np.float32), name="SCI")
    fits_images.write_image(
        cut, np.random.default_rng(1).normal(0, 0.01, (512, 512)).astype(np.float32), name="SCI"
    )
    difference.write_differences(raw, tmp_path / "out", Difference(stack_size=3))
    done = tables.read_stage(tmp_path / "out")
    s = "stack"
    o = "ok"
    r = "rejected"
    assert done["status"].tolist() == [s, r, s, s, r, o, r, o, o]
    assert all(done["reason"][i].startswith(str(raw / names[i])) for i in (1, 4, 6))
    assert "512x512 pixels, expected 1024x1024" in done["reason"][6]
    assert done.query("status == 'ok'")["n_stack"].tolist() == [3, 3, 3]
    assert done.query("status != 'ok'")[["shift_x_px", "shift_y_px"]].eq(0).all(axis=None)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.fz")) == sorted(
        f"{names[i]}.fits.fz" for i in (5, 7, 8)
    )


@pytest.mark.parametrize(
    "factor", [1 / 40, *(pytest.param(f, marks=pytest.mark.long) for f in (30.0, 1e-9))]
)
def test_images_of_another_noise_are_rejected_and_left_out_of_stacks(
    campaign_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    """Among the first images, too, and where batches end."""
    names = some(campaign_dir, tmp_path / "raw", 9)["frame"]
    for i in (1, 4, 7):
        path = fits_images.find_image(tmp_path / "raw", names[i])
        plane = fits_images.read_frame(path).data * np.float32(factor)
        path.unlink()  # a link to the one that other tests use
        fits_images.write_image(path, plane, name="SCI", sigma=0.01 * factor)
    monkeypatch.setattr(tables, "BATCH", 5)
    difference.write_differences(tmp_path / "raw", tmp_path / "out", Difference(stack_size=3))
    done = tables.read_stage(tmp_path / "out")
    s = "stack"
    o = "ok"
    r = "rejected"
    assert done["status"].tolist() == [s, r, s, s, r, o, o, r, o]
    assert all(
        f"{names[i]}" in done["reason"][i] and "noise" in done["reason"][i] for i in (1, 4, 7)
    )
    assert done.query("status == 'ok'")["noise_frac"].between(0.005, 0.02).all()
    difference.reference(tmp_path / "raw", tmp_path / "out", Difference(stack_size=3))
    rms = fits_images.read_plane(tmp_path / "out" / "reference.fits.fz", "SCATTER")
    assert not rms.any()  # of three images; a fourth has not been taken
    stack = fits_images.read_plane(tmp_path / "out" / "reference.fits.fz", "STACK")
    assert clean_noise(stack) < 0.02


def test_unregistered_difference_is_image_minus_median(campaign_dir: Path, tmp_path: Path) -> None:
    names = some(campaign_dir, tmp_path / "raw", 5)["frame"]
    params = Difference(stack_size=3, register_shift=False, known_blobs=False)
    difference.write_differences(tmp_path / "raw", tmp_path / "out", params)
    images = [
        fits_images.read_frame(fits_images.find_image(tmp_path / "raw", name)).data
        for name in names
    ]
    expected = images[4] - np.median(images[1:4], axis=0)
    found = fits_images.read_frame(tmp_path / "out" / f"{names[4]}.fits.fz").data
    np.testing.assert_allclose(found, expected, atol=NOISE / 16)
    assert tables.read_stage(tmp_path / "out")[["shift_x_px", "shift_y_px"]].eq(0).all(axis=None)


def test_bad_pixels_have_no_value_and_the_headers_name_their_files(
    campaign_dir: Path, tmp_path: Path
) -> None:
    """In the differences, the stack and its RMS map; the rest is as without, but for the registration."""
    names = some(campaign_dir, tmp_path / "raw", 5)["frame"]
    mask = np.zeros((1014, 1014), np.uint8)
    mask[295:300, 195:205] = 1
    fits.PrimaryHDU(mask).writeto(tmp_path / "mask.fits")
    bad = read_bad_pixels(Settings(files=(str(tmp_path / "mask.fits"),)))
    params = Difference(stack_size=4)
    for out, given in (("plain", None), ("masked", bad)):
        difference.write_differences(tmp_path / "raw", tmp_path / out, params, bad_pixels=given)
        difference.reference(tmp_path / "raw", tmp_path / out, params, given)
    inside = np.pad(mask != 0, 5)
    for name, plane in ((names[4], "DIFFERENCE"), ("reference", "STACK")):
        path = tmp_path / "masked" / f"{name}.fits.fz"
        found = fits_images.read_plane(path, plane)
        without = fits_images.read_plane(tmp_path / "plain" / path.name, plane)
        np.testing.assert_array_equal(np.isnan(found), np.isnan(without) | inside)
        near = np.isfinite(found)
        assert np.abs(found - without)[near].mean() < 1e-4
        rms = fits_images.read_plane(path, "SCATTER")
        assert not rms[150:152, 100:105].any()
        assert (rms[100:140, 100:140] > 0).all()
        header = fits_images.read_frame(path).header
        assert header["BPXFIL1"] == "mask.fits"
        assert header["BPXNUM1"] == header["BPXCOUNT"] == 50
        assert header["BPXSHA1"] == bad.files[0].sha256
        assert "BPXCOUNT" not in fits_images.read_frame(tmp_path / "plain" / path.name).header
    pattern = fits_images.read_plane(tmp_path / "masked" / "reference.fits.fz", "PATTERN")
    assert np.isfinite(pattern).all()


def test_the_reference_reads_each_image_once(
    campaign_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where early ones cannot be used, so that later ones take their place."""
    names = some(campaign_dir, tmp_path / "raw", 6)["frame"]
    for name in (names[0], names[2]):
        (tmp_path / "raw" / f"{name}.fits.fz").write_bytes(b"damaged")
    rows = []

    def read(source: Any, row: int, reader: Any = difference._read) -> Any:
        rows.append(row)
        return reader(source, row)

    monkeypatch.setattr(difference, "_read", read)
    difference.reference(tmp_path / "raw", tmp_path / "out", Difference(stack_size=3))
    assert rows == [0, 1, 2, 3, 4]


def test_too_few_images_for_the_reference(campaign_dir: Path, tmp_path: Path) -> None:
    some(campaign_dir, tmp_path / "raw", 4)
    with pytest.raises(
        FrameError, match=r"found 4 usable images, expected at least difference.stack_size=5"
    ):
        difference.reference(tmp_path / "raw", tmp_path / "out", Difference(stack_size=5))
    assert not (tmp_path / "out").exists()


def test_unknown_batch_is_refused(
    campaign_dir: Path, tmp_path: Path, difference_params: Difference
) -> None:
    with pytest.raises(TableError, match="found no batch 7, expected 0 to "):
        difference.write_differences(campaign_dir, tmp_path, difference_params, 7)


def test_difference_and_reference_hold_the_rms_map(
    done: pd.DataFrame, difference_dir: Path
) -> None:
    for name in (done.query("status == 'ok'")["frame"].iloc[0], "reference"):
        found = fits_images.read_plane(difference_dir / f"{name}.fits.fz", "SCATTER")
        assert found.shape == (512, 512)
        assert 0.005 < np.median(found[20:-20, 20:-20]) < 0.015


def test_dips_go_and_noise_stays(
    shifted: dict[Shift, np.ndarray], reference: tuple[np.ndarray, np.ndarray], known: pd.DataFrame
) -> None:
    stack, pattern = reference
    near = (pattern > 0.01) & np.isfinite(stack)
    for shift, image in shifted.items():
        template = make_template(stack, None, known)
        left, found = difference.subtract(image, template, Difference())
        plain, nowhere = difference.subtract(image, template, Difference(register_shift=False))
        assert nowhere == (0.0, 0.0)
        assert tuple(found) == pytest.approx(tuple(shift), abs=0.15)
        assert clean_noise(left) == pytest.approx(clean_noise(plain), rel=0.01)
        before, after = (np.sqrt(max(np.var(each[near]) - NOISE**2, 0)) for each in (plain, left))
        assert after < (0.4 * before if np.hypot(*shift) > 0.9 else before + 0.003)


@pytest.mark.parametrize("shift", [Shift(1.9, -1.9), Shift(-2.2, 0.7)])
def test_blob_that_the_border_cuts_leaves_no_dip_either(shift: Shift) -> None:
    rng = np.random.default_rng(4)
    places = [
        (6.2, 100.8),
        (150.3, 250.4),
        (60.7, 6.1),
        (130.1, 60.9),
        (200.4, 150.2),
        (60.3, 200.7),
        (250.1, 90.4),
    ]

    def image(shift: Shift, noise: float) -> np.ndarray:
        padded = np.zeros((256 + 40, 256 + 40), np.float32)
        for x, y in places:
            x = x + shift.x_px + 20
            y = y + shift.y_px + 20
            stamp = blob_profile("diamond", 5.9, x - round(x), y - round(y))
            padded[round(y) - 20 : round(y) + 21, round(x) - 20 : round(x) + 21] += 0.066 * stamp
        inner = padded[25:-25, 25:-25] + noise * rng.standard_normal((246, 246), np.float32)
        return np.pad(inner, 5, constant_values=np.nan)

    template = make_template(image(Shift(0, 0), 0.0055))
    left, found = difference.subtract(image(shift, 0.0085), template, Difference())
    assert tuple(found) == pytest.approx(tuple(shift), abs=0.1)
    at_the_border = left[95:107, 5:9], left[5:9, 55:67]
    assert max(abs(part.mean()) for part in at_the_border) < 0.01  # a sixth of the depth


def test_stack_of_another_size_is_refused(images: np.ndarray) -> None:
    with pytest.raises(FrameError, match="found 1024x1024 pixels, expected 512x512"):
        difference.subtract(images[0], make_template(images[1, :512, :512]), Difference())


SMALL_NOISE = 0.004


OLD = [
    (40.2, 60.7, 6.0),
    (150.4, 40.3, 5.0),
    (100.0, 100.0, 7.0),
    (30.8, 150.1, 4.5),
    (160.6, 150.9, 6.5),
]


# row of the image on which it landed
LATER = {2: (90.3, 30.2, 5.0), 3: (60.1, 110.4, 5.0), 5: (120.3, 165.6, 5.5)}


MIRROR = {4: Shift(1.5, -1.0), 6: Shift(-2.0, 0.6)}


REJECTED = 7


def small_image(row: int, rng: np.random.Generator) -> np.ndarray:
    """What has landed by this row, where the mirror puts it, and noise."""
    image = rng.normal(0, SMALL_NOISE, (256, 256)).astype(np.float32)
    shift = MIRROR.get(row, NO_SHIFT)
    for x, y, radius in [*OLD, *(blob for first, blob in LATER.items() if first <= row)]:
        x = x + shift.x_px
        y = y + shift.y_px
        window = image[round(y) - 20 : round(y) + 21, round(x) - 20 : round(x) + 21]
        window += 0.1 * blob_profile("disc", radius, x - round(x), y - round(y), 41)
    return image


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten images, of which one cannot be read, and their catalogue; only for reading."""
    raw = tmp_path_factory.mktemp("small") / "raw"
    rng = np.random.default_rng(6)
    names = [f"f{row}" for row in range(10)]
    for row, name in enumerate(names):
        fits_images.write_image(
            raw / f"{name}.fits.fz", small_image(row, rng), name="SCI", sigma=SMALL_NOISE
        )
    fits_images.write_image(
        raw / f"f{REJECTED}.fits.fz", np.zeros((50, 256), np.float32), name="SCI", sigma=1.0
    )
    tables.write_table(raw / "frames.csv", pd.DataFrame({"frame": names, "mjd": np.arange(10.0)}))
    blobs = pd.DataFrame([*OLD, *LATER.values()], columns=["x_px", "y_px", "radius_px"])
    blobs = blobs.assign(first_frame=[""] * len(OLD) + [f"f{row}" for row in LATER])
    blobs = blobs.assign(blob=[f"b{i}" for i in range(len(blobs))], depth_frac=0.1)
    tables.write_table(raw / "blobs.csv", blobs)
    return raw


SMALL = DEFAULT.model_copy(update={"width_px": 256, "height_px": 256, "border_px": 0})


def light_at(image: np.ndarray, blob: tuple[float, float, float]) -> float:
    """Mean around the middle of a blob."""
    x = round(blob[0])
    y = round(blob[1])
    return float(np.nanmean(image[y - 1 : y + 2, x - 1 : x + 2]))


@pytest.mark.parametrize("batch", [4, 10])
def test_a_blob_is_new_on_the_image_on_which_it_lands(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    """However the images are shared out, whatever the mirror does: as deep as it is then, gone from then on."""
    monkeypatch.setattr(tables, "BATCH", batch)
    difference.write_differences(small, tmp_path, Difference(stack_size=3), detector=SMALL)
    done = tables.read_stage(tmp_path)
    assert done["status"].tolist() == ["stack"] * 3 + ["ok"] * 4 + ["rejected"] + ["ok"] * 2
    assert done["reason"].tolist()[:3] == [f"{k} usable images before it" for k in range(3)]
    assert done["n_stack"].tolist() == [0, 1, 2, 3, 3, 3, 3, 0, 3, 3]
    assert (done["shift_x_px"].abs() + done["shift_y_px"].abs()).gt(0.2).tolist() == [
        row in MIRROR for row in range(10)
    ]
    for row in np.flatnonzero(done["status"] == "ok"):
        image = fits_images.read_frame(tmp_path / f"f{row}.fits.fz").data
        assert tuple(done.loc[row, ["shift_x_px", "shift_y_px"]]) == pytest.approx(
            MIRROR.get(row, (0, 0)), abs=0.1
        )
        assert clean_noise(image) == pytest.approx(SMALL_NOISE * np.sqrt(1 + np.pi / 6), rel=0.1)
        for first, blob in LATER.items():
            assert light_at(image, blob) == pytest.approx(0.1 if first == row else 0, abs=0.015), (
                row,
                first,
            )
        assert max(abs(light_at(image, blob)) for blob in OLD) < 0.015


def test_the_reference_knows_what_landed_on_its_images_and_nothing_later(
    small: Path, tmp_path: Path
) -> None:
    difference.reference(small, tmp_path, Difference(stack_size=3), detector=SMALL)
    stack, pattern = (
        fits_images.read_plane(tmp_path / "reference.fits.fz", name)
        for name in ("STACK", "PATTERN")
    )
    for image in (stack, pattern):
        assert light_at(image, LATER[2]) == pytest.approx(0.1, abs=0.015)
        assert light_at(image, LATER[3]) == pytest.approx(0, abs=0.01)
        assert [light_at(image, blob) for blob in OLD] == pytest.approx([0.1] * len(OLD), abs=0.015)
    difference.reference(
        small, tmp_path / "plain", Difference(stack_size=3, known_blobs=False), detector=SMALL
    )
    assert (
        light_at(fits_images.read_plane(tmp_path / "plain/reference.fits.fz", "STACK"), LATER[2])
        < 0.02
    )


def test_the_blobs_that_are_moved_back_are_those_known_by_the_end_of_the_first_stack(
    small: Path,
) -> None:
    table = tables.read_frame_list(small)
    blobs = difference._catalogue(small, SMALL)
    source = difference.Source(small, table, BadPixels(), SMALL)
    members, images = zip(*(difference._read(source, row) for row in range(7)), strict=True)
    pattern = difference._register(
        list(images), list(members), Difference(stack_size=3), blobs, SMALL
    ).pattern
    assert light_at(pattern, LATER[2]) == pytest.approx(0.1, abs=0.015)
    assert light_at(pattern, LATER[3]) == 0  # not even the noise at the place of what lands later
