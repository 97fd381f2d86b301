"""Bad input: one clear line that names the file, a non-zero exit, no half-written output, and the next run goes on."""

from __future__ import annotations

import errno
import gzip
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from astropy.io import fits

from blobpipe import cli
from blobpipe.cli.paths import MODEL
from blobpipe.core import files, fits_images, tables
from blobpipe.errors import BlobpipeError
from blobpipe.monitor import logbook
from blobpipe.networks import model_file, report_network
from blobpipe.params import Difference, Params, to_yaml

pytestmark = pytest.mark.xdist_group("bad input")  # most look at one folder
SIDE = 1024
Write = Callable[[Path, np.ndarray], None]


def one_line(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 1) -> str:
    """The single line on stderr of a command that must fail; and it shows its traceback if asked."""
    capsys.readouterr()
    assert cli.main(list(argv)) == code
    err = capsys.readouterr().err
    assert err.startswith("blobpipe: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    with pytest.raises((BlobpipeError, OSError)):
        cli.main([*argv, "--debug"])
    capsys.readouterr()
    return err.strip()


def files_in(folder: Path) -> dict[str, str]:
    """Every file below a folder, hidden ones too, and its hash."""
    return {
        str(path.relative_to(folder)): files.sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --- images ----------------------------------------------------------------------------------------------------------


def plain(path: Path, image: np.ndarray) -> None:
    fits.PrimaryHDU(image).writeto(path)


def cut_to(share: float) -> Write:
    def write(path: Path, image: np.ndarray) -> None:
        plain(path, image)
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])

    return write


def truncated_gz(path: Path, image: np.ndarray) -> None:
    plain(path.with_name("whole.fits"), image[:, :200])
    path.write_bytes(gzip.compress(path.with_name("whole.fits").read_bytes(), 1)[:50_000])
    path.with_name("whole.fits").unlink()


def truncated_fz(path: Path, image: np.ndarray) -> None:
    fits_images.write_image(path, image, name="SCI", sigma=0.008)
    path.write_bytes(path.read_bytes()[:100_000])


def only_a_table(path: Path, image: np.ndarray) -> None:
    table = fits.BinTableHDU.from_columns([fits.Column("a", "J", array=np.arange(5))])
    fits.HDUList([fits.PrimaryHDU(), table]).writeto(path)


BAD: dict[str, tuple[str, Write, str]] = {
    "truncated": (".fits", cut_to(0.5), "truncated"),
    "truncated in its header": (".fits", cut_to(0.0003), "truncated, 1259 bytes found"),
    "truncated gz": (".fits.gz", truncated_gz, "ended before the end-of-stream marker"),
    "truncated fz": (".fits.fz", truncated_fz, "truncated"),
    "empty": (".fits", lambda path, _: path.write_bytes(b"") and None, "0 bytes"),
    "empty fz": (".fits.fz", lambda path, _: path.write_bytes(b"") and None, "0 bytes"),
    "no FITS": (".fits", lambda path, _: path.write_text("a,b\n1,2\n" * 999) and None, "not a whole FITS file"),
    "a web page as gz": (".fits.gz", lambda path, _: path.write_text("<html>") and None, "not a whole FITS file"),
    "a folder": (".fits", lambda path, _: path.mkdir(), "a folder, expected a FITS image"),
    "too small": (".fits", lambda path, image: plain(path, image[:100, :100]), "expected a full frame"),
    "all NaN": (".fits", lambda path, image: plain(path, image * np.float32(np.nan)), "0% of its pixels are finite"),
    "constant": (".fits", lambda path, image: plain(path, image * 0 + 1), "constant"),
    "one-dimensional": (".fits", lambda path, image: plain(path, image.ravel()), "expected (ny, nx)"),
    "four-dimensional": (".fits", lambda path, image: plain(path, image[None, None]), "expected (ny, nx)"),
    "without an image": (".fits", lambda path, _: fits.HDUList([fits.PrimaryHDU()]).writeto(path), "no image found"),
    "with a table alone": (".fits", only_a_table, "no image found"),
    "in electrons": (".fits", lambda path, image: plain(path, image * 20_000 + 20_000), "divide it by the flat"),
    "not flattened": (".fits", lambda path, image: plain(path, image + 1), "not flattened"),
}  # fmt: skip
LISTED = [kind for kind in BAD if kind != "a folder"]  # frames.csv may only list files


def scaled_integers(path: Path, image: np.ndarray) -> None:
    hdu = fits.PrimaryHDU(np.nan_to_num(image).astype(np.float32))
    hdu.scale("int16", bscale=1e-4)
    hdu.writeto(path)


GOOD: dict[str, Write] = {
    "integer": scaled_integers,
    "big-endian": lambda path, image: plain(path, image.astype(">f4")),
    "double": lambda path, image: plain(path, image.astype(">f8")),
    "cube": lambda path, image: plain(path, np.stack([image, image, image])),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good and bad images in one folder, in turn, with their list."""
    raw = tmp_path_factory.mktemp("images") / "data" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(1)
    names = []
    for kind, write in GOOD.items():
        names.append(kind.replace(" ", "_"))
        write(raw / f"{names[-1]}.fits", noise(rng))
    for kind, (suffix, write, _) in BAD.items():
        write(raw / f"{kind.replace(' ', '_')}{suffix}", noise(rng))
        if kind in LISTED:
            names.append(kind.replace(" ", "_"))
    names += ["half", "last"]
    plain(raw / "half.fits", noise(rng)[:512, :512])
    fits_images.write_image(raw / "last.fits.fz", noise(rng), name="SCI", sigma=0.008)
    tables.write_table(
        raw / "frames.csv", pd.DataFrame({"frame": names, "mjd": 55_000.0 + np.arange(len(names))})
    )
    settings = Params(difference=Difference(stack_size=4, register_shift=False, known_blobs=False))
    (raw.parents[1] / "params.yaml").write_text(to_yaml(settings))
    return raw


def noise(rng: np.random.Generator) -> np.ndarray:
    image = rng.normal(0, 0.0076, (SIDE, SIDE)).astype(np.float32)
    image[:5], image[-5:], image[:, :5], image[:, -5:] = np.nan, np.nan, np.nan, np.nan
    return image


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_image_is_checked_in_one_line(
    kind: str, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suffix, _, reason = BAD[kind]
    path = images / f"{kind.replace(' ', '_')}{suffix}"
    assert cli.main(["check", str(path)]) == 1
    out, err = capsys.readouterr()
    assert out.startswith(f"{path}: ")
    assert reason in out
    assert (out + err).count("\n") == 1


@pytest.mark.parametrize("kind", GOOD)
def test_an_unusual_image_is_read_as_any(
    kind: str, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["check", str(images / f"{kind}.fits")]) == 0
    noise_frac = float(capsys.readouterr().out.split("noise ")[1].split(";")[0])
    assert noise_frac == pytest.approx(0.0076, rel=0.03)


def test_a_bad_header_card_does_no_harm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain(tmp_path / "a.fits", noise(np.random.default_rng(1)))
    content = (
        (tmp_path / "a.fits")
        .read_bytes()
        .replace(b"EXTEND  =                    T", b"EXTEND  = what is this    ", 1)
    )
    (tmp_path / "a.fits").write_bytes(content)
    assert cli.main(["check", str(tmp_path / "a.fits")]) in (0, 1)
    assert capsys.readouterr().err == ""


@pytest.fixture(scope="module")
def with_bad_images(images: Path) -> Path:
    """The difference stage of that folder."""
    before = Path.cwd()
    os.chdir(images.parents[1])
    try:
        assert cli.main(["difference"]) == 0
    finally:
        os.chdir(before)
    return images.parent / "difference"


@pytest.mark.parametrize("kind", LISTED)
def test_a_bad_image_in_a_folder_is_rejected_with_its_reason(
    kind: str, with_bad_images: Path
) -> None:
    row = tables.read_stage(with_bad_images).set_index("frame").loc[kind.replace(" ", "_")]
    assert row["status"] == "rejected"
    assert BAD[kind][2] in row["reason"]
    assert kind.replace(" ", "_") in row["reason"]
    assert not list(with_bad_images.glob(f"{row.name}.fits*"))


def test_the_other_images_of_the_folder_go_on(with_bad_images: Path) -> None:
    table = tables.read_stage(with_bad_images).set_index("frame")
    assert dict(table["status"].value_counts()) == {
        "rejected": len(LISTED) + 1,
        "stack": len(GOOD),
        "ok": 1,
    }
    assert "half.fits: found 512x512 pixels, expected 1024x1024" in table.loc["half", "reason"]
    assert table.loc["last", "status"] == "ok"
    assert table.loc["last", "n_stack"] == len(GOOD)
    assert table.loc["last", "noise_frac"] == pytest.approx(0.0076 * np.hypot(1, 0.56), rel=0.1)
    assert sorted(path.name for path in with_bad_images.glob("*.fits.fz")) == [
        "last.fits.fz",
        "reference.fits.fz",
    ]


def test_scan_rejects_bad_images_and_goes_on(
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    model_file.save_model(tmp_path / "m.safetensors", report_network.new_network(1, "plain"), {})
    paths = [images / "empty.fits", images / "integer.fits", images / "four-dimensional.fits"]
    argv = [
        "scan",
        *map(str, paths),
        "--difference",
        "--model",
        str(tmp_path / "m.safetensors"),
        "--out",
        str(tmp_path / "o"),
    ]
    assert cli.main(argv) == 1
    table = tables.read_table(tmp_path / "o/frames.csv", ("frame", "status", "reason"))
    assert list(table["status"]) == ["rejected", "ok", "rejected"]
    assert "0 bytes" in table["reason"][0]
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == 2
    assert all("\n" not in line for line in warned)
    assert len(tables.read_table(tmp_path / "o/subframes.csv", ("frame",))) == 16


@pytest.mark.parametrize("kind", ["missing", "empty", "without PATTERN", "truncated"])
def test_a_bad_reference_is_named(
    project: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    path = project / "data/difference/reference.fits.fz"
    match kind:
        case "missing":
            path.unlink()
        case "empty":
            path.write_bytes(b"")
        case "truncated":
            path.write_bytes(path.read_bytes()[:20_000])
        case _:
            fits_images.write_image(path, fits_images.read_plane(path, "STACK"), name="STACK")
    line = one_line(capsys, "augment")
    assert "data/difference/reference.fits.fz: " in line


@pytest.mark.parametrize("content", [b"", b"text", None])
def test_bad_stamps_and_models_are_named(
    project: Path, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    for name, command in (("results/cutout/stamps.fits", ["augment"]), (MODEL, ["evaluate"])):
        path = project / name
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        assert f"{name}: " in one_line(capsys, *command)
    (project / "a.fits").touch()
    model = ["scan", "a.fits", "--difference", "--model", MODEL, "--out", "o"]
    assert f"{MODEL}: " in one_line(capsys, *model)
    assert not (project / "o").exists()


def test_a_missing_image_of_a_later_stage_is_rejected_there(project: Path) -> None:
    (project / "data/difference/frame2.fits.fz").unlink()
    assert cli.main(["clip"]) == 0
    table = tables.read_stage("data/clip").set_index("frame")
    assert table.loc["frame2", "status"] == "rejected"
    assert "frame2.fits.fz: not found" in table.loc["frame2", "reason"]


# --- tables ----------------------------------------------------------------------------------------------------------

FRAMES = "frame,mjd\nframe0,1\nframe1,2\nframe2,3\nframe3,4\nframe4,5\nframe5,6\n"
FRAME_FAULTS = {
    "no column frame": ("frame,mjd", "image,mjd", "column frame is missing"),
    "no column mjd": ("frame,mjd", "frame,date", "column mjd is missing"),
    "unknown frame": ("frame1,2", "frame9,2", "frame frame9 has no image"),
    "frame without a name": ("frame1,2", ",2", "frame is '', expected the name of a file"),
    "a path for a frame": (
        "frame1,2",
        "../scale/frame1,2",
        "frame is '../scale/frame1', expected the name of a file",
    ),
    "the name of the stack": (
        "frame1,2",
        "Reference,2",
        "frame reference would overwrite the median stack",
    ),
    "names that differ by case alone": (
        "frame1,2",
        "FRAME0,2",
        "frame FRAME0 differs from another in upper and lower case alone",
    ),
    "a Julian date": (
        "frame5,6",
        "frame5,2456197.8",
        "row 7: mjd is 2456197.8, expected a modified Julian date",
    ),
    "duplicate row": ("frame1,2", "frame0,2", "frame frame0 is listed twice"),
    "date in words": (
        "frame1,2",
        "frame1,2010-03-01",
        "row 3: mjd is '2010-03-01', expected a number",
    ),
    "date missing": ("frame1,2", "frame1,", "row 3: mjd is"),
    "date infinite": ("frame1,2", "frame1,inf", "row 3: mjd is"),
    "unsorted": ("frame1,2", "frame1,9", "does not increase"),
    "too many fields": (
        "frame1,2",
        "frame1,2,3,4",
        "cannot be read as CSV (line 3: 4 fields, 2 in the header)",
    ),
    "one comma more in each row": (
        FRAMES,
        FRAMES.replace("\nf", "\n,f").strip(","),
        "line 2: 3 fields, 2 in the header",
    ),
    "too few fields": (
        "frame1,2",
        "frame1",
        "cannot be read as CSV (line 3: 1 fields, 2 in the header)",
    ),
    "a column twice": ("frame,mjd", "frame,frame", "two columns are called 'frame'"),
    "semicolons": (",", ";", "semicolons between its fields, commas expected"),
    "open quote": ("frame1,2", 'frame1,"2', "frames.csv: "),
    "binary": ("frame1,2", "\0\xff\ufffe", "frames.csv: "),
    "empty": (FRAMES, "", "cannot be read as CSV"),
    "only a header": (FRAMES, "frame,mjd\n", "frames.csv: "),
    "missing": (FRAMES, None, "not found"),
}


@pytest.mark.parametrize("fault", FRAME_FAULTS)
@pytest.mark.parametrize("command", ["difference", "difference --batch 0"])
def test_a_bad_list_of_frames_is_explained(
    project: Path, capsys: pytest.CaptureFixture[str], fault: str, command: str
) -> None:
    good, bad, message = FRAME_FAULTS[fault]
    path = project / "data/raw/frames.csv"
    path.unlink() if bad is None else path.write_text(FRAMES.replace(good, bad))
    before = files_in(project / "data")
    line = one_line(capsys, *command.split())
    assert line.startswith("blobpipe: data/raw/frames.csv: ")
    assert message in line
    assert files_in(project / "data") == before


BLOBS = (
    "blob,x_px,y_px,radius_px,depth_frac,first_frame\nb0,60,70,7,0.05,\nb1,200,300,5,0.1,frame5\n"
)
BLOB_FAULTS = {
    "no column": ("depth_frac", "depth", "column depth_frac is missing"),
    "text for a number": ("200,300", "200,three", "row 3: y_px is 'three', expected a number"),
    "no number": ("200,300", "200,", "row 3: y_px is"),
    "duplicate row": ("b1", "b0", "blob b0 is listed twice"),
    "unknown frame": ("frame5", "frame9", "first_frame frame9 is not a frame of frames.csv"),
    "off the detector": ("200,300", "200,1024", "row 3: y_px is 1024, expected -0.5 to 1023.5"),
    "infinity": ("200,300", "inf,300", "row 3: x_px is inf, expected a number"),
    "a huge number": ("5,0.1", "1e308,0.1", "row 3: radius_px is 1e+308, expected 0.1 to 100"),
    "no radius": ("300,5,", "300,0,", "row 3: radius_px is 0"),
    "a negative depth": ("5,0.1", "5,-0.1", "row 3: depth_frac is -0.1"),
    "more than all light": ("5,0.1", "5,1.5", "row 3: depth_frac is 1.5"),
    "an unknown shape": (
        BLOBS,
        BLOBS.replace("\nb0", ",shape\nb0")
        .replace("0.05,", "0.05,,star")
        .replace("frame5", "frame5,"),
        "shape is 'star'",
    ),
    "empty": (BLOBS, "", "cannot be read as CSV"),
}


@pytest.mark.parametrize("fault", BLOB_FAULTS)
def test_a_bad_catalogue_is_explained(
    project: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    good, bad, message = BLOB_FAULTS[fault]
    assert good in BLOBS
    (project / "data/raw/blobs.csv").write_text(BLOBS.replace(good, bad, 1))
    shutil.rmtree(project / "results/cutout")
    line = one_line(capsys, "cutout")
    assert line.startswith("blobpipe: data/raw/blobs.csv: ")
    assert message in line
    assert not (project / "results/cutout").exists()


@pytest.mark.parametrize("command", ["scan", "quicklook", "catalogue", "export", "cutout"])
def test_a_shifted_catalogue_is_refused_by_every_command(
    project: Path, dense_model: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    """One comma more in each row: x would be what stands under y."""
    path = project / "data/raw/blobs.csv"
    path.write_text(BLOBS.replace(",60", ",,60").replace(",200", ",,200"))
    before = path.read_bytes()
    logbook.connect(project / "log.sqlite", make=True).close()
    given = ["--catalogue", str(path)]
    words = {
        "scan": [
            "scan",
            "data/raw/frame5.fits.fz",
            "--out",
            "out",
            "--model",
            str(dense_model),
            "--difference",
            *given,
        ],
        "quicklook": [
            "quicklook",
            "data/raw",
            "--log",
            "log.sqlite",
            "--model",
            str(dense_model),
            *given,
        ],
        "catalogue": ["catalogue", "update", "--log", "log.sqlite", *given],
        "export": ["export", str(path), "--out", "out"],
        "cutout": ["cutout"],
    }
    line = one_line(capsys, *words[command])
    assert "data/raw/blobs.csv: cannot be read as CSV (line 2: 7 fields, 6 in the header)" in line
    assert path.read_bytes() == before
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "stage", ["clip", "scale", "cutout", "augment", "train", "evaluate", "regression"]
)
def test_a_stage_without_the_one_before_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(to_yaml(Params()))
    line = one_line(capsys, stage)
    assert any(words in line for words in ("run the stage", "not found"))
    assert list(Path().iterdir()) == [Path("params.yaml")]


def test_a_batch_that_does_not_exist_says_so(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for stage in ("difference", "clip", "scale"):
        for batch in ("7", "-1"):
            line = one_line(capsys, stage, "--batch", batch)
            assert "data/" in line


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        ("  factor: ", "  faktor: ", "unknown key clip.faktor"),
        ("  factor: 0.5", "  factor: half", "clip.factor: found"),
        ("  factor: 0.5", "  factor: -1.0", "clip.factor: found -1.0"),
        ("  factor: 0.5", "  # factor: 0.5", "clip.factor is missing"),
        ("clip:", "clip: [", "cannot be read as YAML"),
    ],
)
def test_bad_settings_are_explained(
    project: Path, capsys: pytest.CaptureFixture[str], good: str, bad: str, message: str
) -> None:
    text = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(text.replace(good, bad, 1))
    before = files_in(project / "data")
    line = one_line(capsys, "clip")
    assert line.startswith("blobpipe: params.yaml: ")
    assert message in line
    assert files_in(project / "data") == before


def test_missing_settings_are_explained(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "none.yaml: " in one_line(capsys, "clip", "--params", "none.yaml")


# --- no space, no permission -----------------------------------------------------------------------------------------

OUTPUTS = {
    "clip": "data/clip",
    "scale": "data/scale",
    "cutout": "results/cutout",
    "augment": "results/augment",
    "train": "results/train",
}


@contextmanager
def small_disk() -> Iterator[None]:
    """No file may grow beyond 3,000 bytes: the kernel then fails each write, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("stage", OUTPUTS)
def test_a_full_disk_is_said_and_leaves_no_half_file(
    made_project: Path, project: Path, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    """And once there is room, the same command ends as if nothing had happened."""
    shutil.rmtree(project / OUTPUTS[stage], ignore_errors=True)
    with small_disk():
        line = one_line(capsys, stage)
    assert f"blobpipe: {OUTPUTS[stage]}/" in line
    assert "free some space" in line
    left = files_in(project / OUTPUTS[stage])
    assert not any(".tmp" in name for name in left)
    whole = files_in(made_project / OUTPUTS[stage]) if stage != "train" else {}
    assert left.items() <= whole.items()
    assert cli.main([stage]) == 0
    if whole:
        assert files_in(project / OUTPUTS[stage]) == whole
    else:
        assert (project / MODEL).exists()


@pytest.mark.parametrize("stage", OUTPUTS)
def test_a_folder_that_cannot_be_written_to_is_said(
    project: Path, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    """A file stands where the folder should be: that stops even root."""
    shutil.rmtree(project / OUTPUTS[stage], ignore_errors=True)
    (project / OUTPUTS[stage]).write_text("in the way")
    line = one_line(capsys, stage)
    assert f"blobpipe: {OUTPUTS[stage]}" in line
    assert "this is a file, expected a folder" in line


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT])
def test_a_rename_that_fails_names_the_file(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(source: Path, target: Path) -> None:
        raise OSError(number, os.strerror(number), str(source))

    before = files_in(project)
    monkeypatch.setattr(os, "replace", fail)
    line = one_line(capsys, "clip")
    assert line.startswith(f"blobpipe: data/clip/frame0.fits.fz: {os.strerror(number)}")
    assert files_in(project) == before


# --- interrupted -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["clip", "cutout"])
@pytest.mark.parametrize("at", [1, 3])
def test_an_interrupted_stage_leaves_no_half_file_and_goes_on(
    made_project: Path,
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stage: str,
    at: int,
) -> None:
    shutil.rmtree(project / OUTPUTS[stage])
    count = [0]
    replace = os.replace

    def interrupt(source: Path, target: Path) -> None:
        count[0] += 1
        if count[0] == at:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupt)
        assert cli.main([stage]) == 130
    assert (
        capsys.readouterr().err
        == "blobpipe: interrupted; the next run goes on where this one stopped\n"
    )
    whole = files_in(made_project / OUTPUTS[stage])
    left = files_in(project / OUTPUTS[stage])
    assert left.items() < whole.items()
    assert not [name for name in left if name.startswith("frames-")], (
        "the table comes last: it says that all is there"
    )
    assert cli.main([stage]) == 0
    assert files_in(project / OUTPUTS[stage]) == whole


KILL = """
import os, signal, sys
def replace(source, target, replace=os.replace):
    if str(target).endswith(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = replace
from blobpipe import cli
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("stage", "file"), [("scale", "frame3.fits.fz"), ("augment", "contact_sheet.png")]
)
def test_a_killed_stage_leaves_no_half_file_under_its_name_and_goes_on(
    made_project: Path, project: Path, stage: str, file: str
) -> None:
    """kill -9 between writing and renaming: all that stays is a hidden file, which no stage reads."""
    shutil.rmtree(project / OUTPUTS[stage])
    done = subprocess.run(
        [sys.executable, "-c", KILL, file, stage], cwd=project, capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL
    whole = files_in(made_project / OUTPUTS[stage])
    left = files_in(project / OUTPUTS[stage])
    visible = {name: digest for name, digest in left.items() if not name.startswith(".")}
    assert visible.items() < whole.items()
    assert file not in visible
    assert len(left) == len(visible) + 1
    assert cli.main([stage]) == 0
    again = files_in(project / OUTPUTS[stage])
    assert {name: digest for name, digest in again.items() if not name.startswith(".")} == whole
