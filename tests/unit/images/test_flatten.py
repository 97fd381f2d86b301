"""Calibrated exposures, simulated with blobs in them: what the blob image must say about each pixel."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from scipy import ndimage

from blobpipe import cli
from blobpipe.core import fits_images
from blobpipe.core.blob_shapes import SHAPES, blob_profile
from blobpipe.errors import FrameError
from blobpipe.images import check, flatten
from blobpipe.images.bad_pixels import read_bad_pixels
from blobpipe.params import BadPixels

N = 1014
PHOTONS_E = 20_000.0
READ_NOISE_E = 20.0
REACH = 30
Places = list[tuple[tuple[slice, slice], np.ndarray]]


def light(rng: np.random.Generator) -> np.ndarray:
    """Airglow as no flat takes it out: it falls off by a quarter, with waves and lumps of 1 %."""
    y, x = np.mgrid[:N, :N] / N
    field = (
        1
        + 0.15 * (x - 0.5)
        - 0.1 * (y - 0.5)
        + 0.06 * np.sin(2 * np.pi * x * 1.3 + 0.5) * np.cos(2 * np.pi * y)
    )
    for cx, cy in rng.random((12, 2)):
        field += rng.normal(0, 0.01) * np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / 2 / (100 / N) ** 2)
    return field


def with_blobs(rng: np.random.Generator, radius: float, depth: float) -> tuple[np.ndarray, Places]:
    """What is left of the light, and where it goes: 100 blobs of all shapes, between pixels."""
    loss = np.zeros((N, N))
    places = []
    for x in 96 * np.arange(10) + 70:
        for y in 96 * np.arange(10) + 70:
            (column, row) = rng.integers((x - 5, y - 5), (x + 6, y + 6))
            (dx, dy) = rng.uniform(-0.5, 0.5, 2)
            window = (
                slice(row - REACH, row + REACH + 1),
                slice(column - REACH, column + REACH + 1),
            )
            profile = blob_profile(SHAPES[rng.integers(3)], radius, dx, dy, 2 * REACH + 1)
            loss[window] += depth * profile
            places.append((window, profile))
    return light(rng) * (1 - loss), places


def exposed(rng: np.random.Generator, rate: np.ndarray) -> np.ndarray:
    expected = PHOTONS_E * rate
    return rng.normal(expected, np.sqrt(expected + READ_NOISE_E**2)).astype(np.float32)


def bad_pixels(rng: np.random.Generator) -> np.ndarray:
    return np.where(rng.random((N, N)) < 0.02, rng.choice([4, 16, 32 + 512, 8], (N, N)), 0).astype(
        np.int32
    )


def measured_depths(loss: np.ndarray, places: Places) -> np.ndarray:
    """Least-squares depth of each blob, on its good pixels."""
    good = np.isfinite(loss)
    pairs = [(profile[good[window]], loss[window][good[window]]) for window, profile in places]
    return np.array([np.sum(profile * values) / np.sum(profile**2) for profile, values in pairs])


def write_exposure(path: Path, science: np.ndarray, dq: np.ndarray, **cards: object) -> Path:
    """An FLT file; with 1024 pixels, an IMA file whose first read has nothing on it."""
    primary = fits.PrimaryHDU()
    primary.header.update(
        {
            "TELESCOP": "HST",
            "FILTER": "F153M",
            "TARGNAME": "DARK-EARTH-CALIB",
            "ROOTNAME": "idbb01a1q",
        }
        | {"EXPSTART": 56197.25, "FLATCORR": "COMPLETE", "NOISY": "not kept"}
        | cards
    )
    hdus = [primary]
    for version in range(1, 2 if len(science) == N else 3):
        images = (("SCI", science), ("ERR", np.sqrt(np.abs(science))), ("DQ", dq.astype(np.int16)))
        for name, image in images:
            hdu = fits.ImageHDU(
                image if version == 1 else np.zeros_like(image), name=name, ver=version
            )
            hdu.header["BUNIT"] = "ELECTRONS/S"
            hdus.append(hdu)
    fits.HDUList(hdus).writeto(path)
    return path


@pytest.fixture(scope="module")
def scene() -> tuple[np.ndarray, np.ndarray, Places]:
    rng = np.random.default_rng(7)
    rate, places = with_blobs(rng, 6.0, 0.1)
    return exposed(rng, rate), bad_pixels(rng), places


@pytest.mark.parametrize("depth", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("radius", [3.0, 6.0, 9.0, 12.0])
def test_a_blob_keeps_its_depth(radius: float, depth: float) -> None:
    rng = np.random.default_rng([int(radius), int(100 * depth)])
    rate, places = with_blobs(rng, radius, depth)
    depths = measured_depths(flatten.light_loss(exposed(rng, rate), bad_pixels(rng)), places)
    bias = depths.mean() / depth - 1
    error = depths.std() / depth / np.sqrt(len(depths))
    assert error < 0.01
    assert abs(bias) < 0.03


def test_the_large_scales_are_gone() -> None:
    """Nothing is left on the scale of a box: the light falls off by a quarter, the image by less than a third of its noise."""
    rng = np.random.default_rng(3)
    loss = flatten.light_loss(exposed(rng, light(rng)), np.zeros((N, N), np.int32))
    coarse = loss[:1000, :1000].reshape(20, 50, 20, 50).mean(axis=(1, 3))
    assert np.abs(coarse).max() < 0.003
    assert coarse.std() < 0.0008
    assert 0.006 < fits_images.median_and_noise(loss)[1] < 0.009


def test_the_file_is_a_blob_image_of_the_products_convention(
    scene: tuple[np.ndarray, np.ndarray, Places], tmp_path: Path
) -> None:
    science, dq, places = scene
    out = flatten.flatten_exposure(
        write_exposure(tmp_path / "idbb01a1q_flt.fits", science, dq), tmp_path / "out"
    )
    assert out == tmp_path / "out" / "idbb01a1q_blob.fits.fz"
    frame = fits_images.read_image(out)
    assert frame.data.shape == (1024, 1024)
    assert check.describe(out).fault == ""
    core = frame.data[5:-5, 5:-5]
    np.testing.assert_array_equal(np.isnan(core), (dq & ~512) != 0)
    assert np.isnan(frame.data).sum() == np.isnan(core).sum() + 1024**2 - N**2
    # light lost is positive
    assert measured_depths(core, places).mean() == pytest.approx(0.1, rel=0.01)
    assert {
        card: frame.header[card] for card in ("ROOTNAME", "EXPSTART", "FILTER", "TARGNAME", "BUNIT")
    } == {
        **{
            "ROOTNAME": "idbb01a1q",
            "EXPSTART": 56197.25,
            "FILTER": "F153M",
            "TARGNAME": "DARK-EARTH-CALIB",
        },
        "BUNIT": "",
    }
    assert "NOISY" not in frame.header
    history = " ".join(fits.getheader(out, 1)["HISTORY"])
    assert f"blobpipe {flatten.__version__} flatten: idbb01a1q_flt.fits" in history
    assert str(tmp_path) not in history


def test_bad_pixels_have_no_value_and_other_flags_may_count(
    scene: tuple[np.ndarray, np.ndarray, Places], tmp_path: Path
) -> None:
    science, dq, _ = scene
    path = write_exposure(tmp_path / "idbb01a1q_flt.fits", science, dq)
    mask = np.zeros((N, N), np.uint8)
    mask[400:404, 500:503] = 1
    fits.PrimaryHDU(mask).writeto(tmp_path / "mask.fits")
    bad = read_bad_pixels(BadPixels(files=(str(tmp_path / "mask.fits"),), dq_flags=4))
    frame = fits_images.read_frame(flatten.flatten_exposure(path, tmp_path / "out", bad))
    expected = ((dq & 4) != 0) | (mask != 0)
    np.testing.assert_array_equal(np.isnan(frame.data[5:-5, 5:-5]), expected)
    assert frame.header["BPXFIL1"] == "mask.fits"
    assert frame.header["BPXNUM1"] == 12
    assert frame.header["BPXCOUNT"] == expected.sum()
    assert frame.header["BPXFLAGS"] == 4


def test_an_ima_gives_what_its_flt_gives(
    scene: tuple[np.ndarray, np.ndarray, Places], tmp_path: Path
) -> None:
    science, dq, _ = scene
    flt = flatten.flatten_exposure(
        write_exposure(tmp_path / "a_flt.fits", science, dq), tmp_path / "flt"
    )
    padded = np.pad(science, 5, constant_values=1e6)
    ima = flatten.flatten_exposure(
        write_exposure(tmp_path / "a_ima.fits", padded, np.pad(dq, 5)), tmp_path / "ima"
    )
    assert flt.name == ima.name == "a_blob.fits.fz"
    np.testing.assert_array_equal(
        fits_images.read_frame(flt).data, fits_images.read_frame(ima).data
    )


def test_the_same_bytes(scene: tuple[np.ndarray, np.ndarray, Places], tmp_path: Path) -> None:
    path = write_exposure(tmp_path / "a_flt.fits", *scene[:2])
    once, again = (
        flatten.flatten_exposure(path, tmp_path / folder) for folder in ("once", "again")
    )
    assert once.read_bytes() == again.read_bytes()
    assert [file.name for file in (tmp_path / "once").iterdir()] == [once.name]


DARK = np.random.default_rng(1).normal(0, 24, (N, N)).astype(np.float32)
BRIGHT = DARK + 5000


@pytest.mark.parametrize(
    ("science", "cards", "fault"),
    [
        (BRIGHT[:256, :256], {}, "found 256x256 pixels, expected a full frame"),
        (DARK, {}, "too little light"),
        (-BRIGHT, {}, "too little light"),
        (BRIGHT, {"FLATCORR": "OMIT"}, "FLATCORR is OMIT, expected COMPLETE"),
        (
            np.where(np.arange(N) < 600, np.nan, BRIGHT).astype(np.float32),
            {},
            "41% of its pixels are good",
        ),
    ],
)
def test_what_is_no_exposure_of_the_dark_earth_is_refused(
    science: np.ndarray, cards: dict[str, object], fault: str, tmp_path: Path
) -> None:
    path = write_exposure(tmp_path / "a_flt.fits", science, np.zeros(science.shape), **cards)
    with pytest.raises(FrameError, match=f"a_flt.fits: .*{fault}"):
        flatten.flatten_exposure(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_flags_are_needed_and_of_the_same_size(tmp_path: Path) -> None:
    fits.HDUList([fits.PrimaryHDU(), fits.ImageHDU(BRIGHT, name="SCI")]).writeto(
        tmp_path / "a_flt.fits"
    )
    with pytest.raises(FrameError, match="no image DQ"):
        flatten.flatten_exposure(tmp_path / "a_flt.fits", tmp_path)
    path = write_exposure(tmp_path / "b_flt.fits", BRIGHT, np.zeros((266, 266)))
    with pytest.raises(FrameError, match=r"DQ has the shape \(266, 266\)"):
        flatten.flatten_exposure(path, tmp_path)


def test_an_exposure_without_good_pixels_is_refused(tmp_path: Path) -> None:
    path = write_exposure(tmp_path / "a_flt.fits", BRIGHT, np.full((N, N), 4))
    with pytest.raises(FrameError, match="0% of its pixels"):
        flatten.flatten_exposure(path, tmp_path)


def test_a_frame_full_of_stars_is_refused(tmp_path: Path) -> None:
    stars = BRIGHT.copy()
    stars[::16, ::16] += 20_000
    path = write_exposure(tmp_path / "a_flt.fits", stars, np.zeros((N, N)))
    with pytest.raises(FrameError, match=r"a_flt.fits: .*stands out or is flagged"):
        flatten.flatten_exposure(path, tmp_path)


def test_a_delta_flat_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    flatten.flatten_exposure(
        write_exposure(tmp_path / "a_flt.fits", BRIGHT, np.zeros((N, N)), DFLTFILE="N/A"), tmp_path
    )
    assert not caplog.text
    flatten.flatten_exposure(
        write_exposure(
            tmp_path / "b_flt.fits", BRIGHT, np.zeros((N, N)), DFLTFILE="iref$x_dfl.fits"
        ),
        tmp_path,
    )
    assert "known blobs may be corrected already" in caplog.text


def test_the_command_goes_on_after_a_bad_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write_exposure(tmp_path / "a_flt.fits", BRIGHT, np.zeros((N, N)))
    dark = write_exposure(tmp_path / "b_flt.fits", DARK, np.zeros((N, N)))
    assert cli.main(["flatten", str(dark), str(good), "--out", str(tmp_path / "out")]) == 1
    out, err = capsys.readouterr()
    assert out.splitlines() == [str(tmp_path / "out" / "a_blob.fits.fz")]
    assert "b_flt.fits" in err
    assert "too little light" in err
    assert len(err.splitlines()) == 1
    assert cli.main(["flatten", str(good), "--out", str(tmp_path / "out")]) == 0


def test_no_blob_image_is_written_over_another_or_over_an_exposure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flt = write_exposure(tmp_path / "a_flt.fits", BRIGHT, np.zeros((N, N)))
    ima = write_exposure(tmp_path / "a_ima.fits", np.pad(BRIGHT, 5), np.zeros((1024, 1024)))
    named = write_exposure(tmp_path / "c_blob.fits.fz", BRIGHT, np.zeros((N, N)))
    other = write_exposure(tmp_path / "c_flt.fits", BRIGHT, np.zeros((N, N)))
    content = named.read_bytes()
    assert cli.main(["flatten", *map(str, (flt, ima, other, named)), "--out", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        str(tmp_path / "a_blob.fits.fz"),
        str(tmp_path / "c_blob_blob.fits.fz"),
    ]
    assert [line.partition(": ")[2] for line in err.splitlines()] == [
        f"{ima}: {tmp_path / 'a_blob.fits.fz'} is the blob image of another exposure of this list; leave one of them out",
        f"{other}: {named} is an exposure of this list; choose another folder for the blob images",
    ]
    assert named.read_bytes() == content


def test_flags_that_are_all_the_same_may_be_one_number(tmp_path: Path) -> None:
    """A DQ without pixels, as HST's pipelines write a constant one."""
    path = write_exposure(tmp_path / "a_flt.fits", BRIGHT, np.zeros((N, N)))
    with fits.open(path) as hdus:
        constant = fits.ImageHDU(
            name="DQ", header=fits.Header({"NPIX1": N, "NPIX2": N, "PIXVALUE": 0})
        )
        fits.HDUList([hdus[0], hdus["SCI"], constant]).writeto(tmp_path / "b_flt.fits")
    loss = fits_images.read_frame(flatten.flatten_exposure(tmp_path / "b_flt.fits", tmp_path)).data
    np.testing.assert_array_equal(
        loss, fits_images.read_frame(flatten.flatten_exposure(path, tmp_path)).data
    )


def test_pixels_that_are_infinite_have_no_loss(tmp_path: Path) -> None:
    """A name beyond ASCII does not hinder the history."""
    science = BRIGHT.copy()
    science[100, 100:103] = np.inf, -np.inf, 1e30
    out = flatten.flatten_exposure(
        write_exposure(tmp_path / "tägɬich_flt.fits", science, np.zeros((N, N))), tmp_path
    )
    assert np.isnan(fits_images.read_frame(out).data[105, 105:108]).all()
    assert out.name == "tägɬich_blob.fits.fz"


# On real pixels.

ROOT = Path(__file__).parents[3]
NAMED = os.environ.get("BLOBPIPE_REAL")
FOLDERS = [Path(NAMED)] if NAMED else sorted(ROOT.parent.glob("*/real"))
REAL = next((folder for folder in FOLDERS if (folder / "example_blob.fits.gz").exists()), Path())


def real(test: object) -> object:
    skip = pytest.mark.skipif(
        Path() == REAL, reason="no real images at hand: name their folder in BLOBPIPE_REAL"
    )
    return pytest.mark.real(skip(test))  # type: ignore[arg-type]


@real
def test_a_real_subarray_of_stars_is_refused() -> None:
    with pytest.raises(FrameError, match="found 266x266 pixels, expected a full frame"):
        flatten.flatten_exposure(REAL / "ibxy01z8q_ima.fits.gz", "nowhere")


@real
def test_blobs_behind_real_flags_and_real_noise_are_found_where_they_are_flagged() -> None:
    """The real exposure's own DQ and read noise, on airglow that its five known blobs dim by 10 %."""
    path = REAL / "ibxy01z8q_ima.fits.gz"
    dq = fits_images.read_plane(path, "DQ")[5:-5, 5:-5].astype(np.int32)
    noise = fits_images.read_frame(path).data[5:-5, 5:-5]
    blobs = (dq & 512) != 0
    rate = np.where(blobs, 0.9, 1.0) * np.linspace(0.95, 1.05, dq.shape[1])
    loss = flatten.light_loss((PHOTONS_E * rate + noise).astype(np.float32), dq)
    assert ndimage.label(blobs)[1] == 5
    assert np.isfinite(loss[dq == 512]).all()
    assert np.isnan(loss[(dq & (4 | 8 | 16 | 32 | 256)) != 0]).all()
    assert np.nanmedian(loss[blobs]) == pytest.approx(0.1, rel=0.03)
    assert np.nanmedian(loss[~blobs]) == pytest.approx(0, abs=0.001)


@real
def test_a_real_blob_image_comes_back() -> None:
    """Airglow dimmed as a real blob image says, behind a real bad-pixel map: flattened, it is that blob image again."""
    truth = fits_images.read_frame(REAL / "example_blob.fits.gz").data[5:-5, 5:-5]
    flags = np.nan_to_num(
        fits_images.read_frame(REAL / "wfc3ir_badpix_spars200_22.03.31.fits.gz").data
    )[5:-5, 5:-5]
    science = (PHOTONS_E * light(np.random.default_rng(5)) * (1 - truth)).astype(np.float32)
    loss = flatten.light_loss(science, flags.astype(np.int32))
    good = flags == 0
    np.testing.assert_array_equal(np.isfinite(loss), good)
    assert np.std((loss - truth)[good]) < 0.001  # an eighth of the image's noise
    blobs = good & (ndimage.gaussian_filter(truth, 2) > 0.015)
    assert blobs.sum() > 1000
    assert np.sum((loss * truth)[blobs]) / np.sum(np.square(truth[blobs])) == pytest.approx(
        1, abs=0.02
    )


def test_an_exposure_is_read_as_its_blob_image(
    scene: tuple[np.ndarray, np.ndarray, Places], tmp_path: Path
) -> None:
    science, dq, _ = scene
    path = write_exposure(tmp_path / "a_flt.fits", science, dq)
    bad = read_bad_pixels(BadPixels())
    frame = flatten.read_blob_image(path, bad)
    written = fits_images.read_image(flatten.flatten_exposure(path, tmp_path, bad)).data
    assert np.array_equal(np.isfinite(frame.data), np.isfinite(written))
    # the file is compressed with a loss of a fraction of the noise
    noise = fits_images.median_and_noise(written)[1]
    assert np.nanmax(np.abs(frame.data - written)) < noise
    assert frame.header["EXPSTART"] == fits_images.read_frame(path).header["EXPSTART"]

    # what is a blob image already stays what it is
    again = flatten.read_blob_image(flatten.output(path, tmp_path), bad)
    assert np.array_equal(again.data, written, equal_nan=True)


def test_check_names_the_command_for_an_exposure(
    scene: tuple[np.ndarray, np.ndarray, Places],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    science, dq, _ = scene
    path = write_exposure(tmp_path / "a_flt.fits", science, dq)
    assert cli.main(["check", str(path)]) == 1
    assert "a calibrated exposure, expected a blob image; make one with 'blobpipe flatten'" in (
        capsys.readouterr().out
    )
