"""Every setting: read strictly, written back the same, and one source for YAML, schema and file."""

from __future__ import annotations

import functools
import json
import os
import re
import typing
from pathlib import Path

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.fuzz import runner

from blobpipe.errors import ParamsError
from blobpipe.params import Clip, Cutout, Params, Train, json_schema, load_params, to_yaml

ROOT = Path(__file__).parents[2]
SECTIONS = [name for name in Params.model_fields if name != "detector"]
INNER = ["train.network", "dense.network"]  # sections in a section
ELSEWHERE = ["Span"]  # what a value may be


def model_of(section: str) -> type[pydantic.BaseModel]:
    return type(functools.reduce(getattr, section.split("."), Params()))


def test_the_file_in_the_project_holds_the_defaults() -> None:
    assert (ROOT / "params.yaml").read_text(encoding="utf-8") == to_yaml(Params()), (
        "regenerate it: blobpipe params"
    )


def test_the_schema_in_the_project_is_in_step() -> None:
    assert (ROOT / "workflow/schemas/params.schema.json").read_text(
        encoding="utf-8"
    ) == json_schema()


def test_the_schema_forbids_unknown_keys_everywhere() -> None:
    schema = json.loads(json_schema())
    models = [schema, *schema["$defs"].values()]
    assert len(models) == len(SECTIONS) + len(INNER) + len(ELSEWHERE) + 1
    assert all(model["additionalProperties"] is False for model in models)


@pytest.mark.parametrize("section", [*SECTIONS, *INNER])
def test_every_setting_is_described_in_one_line(section: str) -> None:
    model = model_of(section)
    assert model.__doc__
    for key, field in model.model_fields.items():
        assert field.description, f"{section}.{key}"
        assert field.description.endswith("."), f"{section}.{key}"
        assert "\n" not in field.description


@pytest.mark.parametrize("section", [*SECTIONS, *INNER])
def test_every_number_is_bounded(section: str) -> None:
    for key, field in model_of(section).model_fields.items():
        if field.annotation in (int, float):
            assert field.metadata, f"{section}.{key} has no bounds"


def test_settings_are_frozen() -> None:
    with pytest.raises(pydantic.ValidationError):
        Params().clip.factor = 2.0  # type: ignore[misc]


@given(
    seed=st.integers(0, 2**31 - 1),
    factor=st.floats(0.001, 10),
    strength=st.tuples(st.floats(0.01, 1), st.floats(1, 100)),
    amplitude=st.sampled_from(typing.get_args(Cutout.model_fields["amplitude"].annotation)),
)
def test_what_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    factor: float,
    strength: tuple[float, float],
    amplitude: str,
) -> None:
    params = Params(
        clip=Clip(factor=factor),
        cutout=Cutout(seed=seed, strength=strength, amplitude=amplitude),
        train=Train(seed=seed),
    )
    path = tmp_path_factory.mktemp("params") / "params.yaml"
    path.write_text(to_yaml(params), encoding="utf-8")
    assert load_params(path) == params


def test_a_whole_number_may_stand_for_a_float(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(
        to_yaml(Params())
        .replace("  factor: 0.5", "  factor: 1")
        .replace("[12000.0, 30000.0]", "[9, 10]")
    )
    params = load_params(path)
    assert params.clip.factor == 1.0
    assert params.campaign.photons_e == (9.0, 10.0)


FAULTS = {
    "unknown key": ("  factor: ", "  faktor: ", "unknown key clip.faktor"),
    "unknown section": ("augment:", "augmentation:", "unknown key augmentation"),
    "text for a number": ("  factor", "half", 'clip.factor: found "half", expected'),
    "number without a point in YAML 1.1": (
        "  factor",
        "5e-1",
        'clip.factor: found "5e-1", expected',
    ),
    "float for an integer": ("  epochs", "4.5", "train.epochs: found 4.5, expected"),
    "yes for an integer": ("  epochs", "yes", "train.epochs: found true, expected"),
    "number for a choice": ("  amplitude", "1", "cutout.amplitude: found 1, expected"),
    "no such choice": ("  amplitude", "reports", 'cutout.amplitude: found "reports", expected'),
    "below its range": ("  factor", "-1.0", "clip.factor: found -1.0, expected"),
    "above its range": ("  momentum", "1.0", "train.momentum: found 1.0, expected"),
    "not a number": ("  factor", ".nan", "clip.factor: found NaN, expected"),
    "infinite": ("  factor", ".inf", "clip.factor: found Infinity, expected"),
    "one value for a range": ("  strength", "[0.5]", "cutout.strength"),
    "a range the wrong way round": (
        "  strength",
        "[1.5, 0.5]",
        "cutout.strength: found [1.5, 0.5], expected",
    ),
    "a range from zero": ("  dip_px", "[0.0, 3.0]", "cutout.dip_px"),
    "no photons": ("  photons_e", "[-1.0, 30000.0]", "campaign.photons_e"),
    "no radii": ("  radii_px", "[]", "evaluate.radii_px"),
    "a radius of nothing": ("  radii_px", "[0.0]", "evaluate.radii_px"),
    "a date": ("  factor", "2020-01-01", "date"),
    "no room for a quiet image": ("  n_cases", "100000", "campaign.n_cases=100000 leaves no image"),
    "a missing key": ("  factor", None, "clip.factor is missing"),
    "an empty section": ("scale:", "scale: {}\nunread:", "unknown key unread"),
    "a missing section": ("clip:", None, "clip.factor is missing"),
    "a missing key of an inner section": (
        "    pool_px",
        None,
        "train.network.pool_px is missing; the whole file is read, so add it (its default is 4)",
    ),
    "an unknown key of an inner section": (
        "    pool_px:",
        "    pool:",
        "unknown key train.network.pool",
    ),
    "an inner section that is a number": (
        "  network:",
        "  network: 3\n  rest:",
        "train.network: found 3, expected",
    ),
    "a block without a dropout": (
        "    dropout",
        "[0.15]",
        "train.network: found 2 blocks (filters) and a dropout for 1, expected one number per block",
    ),
    "a network without a block": ("    filters", "[]", "train.network.filters"),
    "a dropout of everything": ("    dropout", "[0.15, 1.0]", "train.network.dropout.1: found 1.0"),
    "an even kernel": ("    kernel_px", "4", "train.network.kernel_px: found 4, expected"),
    "windows larger than what is left": (
        "    filters",
        "[8, 16, 8, 8, 8]",
        "train.network: found 5 blocks with a pool_px of 4",
    ),
    "a network that is too large": (
        "    pool_px",
        "2",
        "train.network: found 8,392,418 weights, expected at most 6,000,000",
    ),
    "broken YAML": ("clip:", "clip: [", "cannot be read as YAML"),
}


def with_fault(key: str, value: str | None) -> str:
    """The defaults with another value; with a section or a key renamed (``key:``), or left out (None)."""
    text = re.sub("  # .*", "", to_yaml(Params()))
    if value is None:
        return re.sub(
            rf"^{key}.*\n" + ("" if key.startswith(" ") else "(  .*\n)*"),
            "",
            text,
            count=1,
            flags=re.M,
        )
    if ":" in key:
        return re.sub(rf"^{key}", value, text, count=1, flags=re.M)
    return re.sub(rf"^{key}: .*$", f"{key}: {value}", text, count=1, flags=re.M)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_in_one_line(tmp_path: Path, fault: str) -> None:
    key, value, message = FAULTS[fault]
    path = tmp_path / "params.yaml"
    path.write_text(with_fault(key, value))
    with pytest.raises(ParamsError) as caught:
        load_params(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"# nothing\n", b"- a\n- b\n", b"text", b"\xff\xfe\x00", b"clip:\n\tfactor: 1"]
)
def test_what_is_no_parameter_file_is_said_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    with pytest.raises(ParamsError, match=r"params\.yaml: ") as caught:
        load_params(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"none\.yaml"):
        load_params(tmp_path / "none.yaml")


WHOLE = to_yaml(Params())
END = WHOLE.count("\n") + 1  # line after the last one
LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [{f'*{a}, ' * 9}]\n" for a, b in zip("abcdefghijk", "bcdefghijkl", strict=True)
)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "found nothing, expected sections detector"),
        ("# nothing\n", "found nothing, expected sections"),
        ("- 1\n", "found list, expected sections"),
        ("3\n", "found int, expected sections"),
        (WHOLE.encode("utf-16"), "expected a text file in UTF-8"),
        ((WHOLE + "# \u00e9\n").encode("latin-1"), "expected a text file in UTF-8"),
        (WHOLE.replace("  factor", "\tfactor"), r"line 33: .*cannot start any token: '\\t'"),
        (
            WHOLE.replace("  factor", "  factor: 0.6\n  factor"),
            "line 34: factor is listed twice; remove one",
        ),
        (WHOLE + "clip:\n  factor: 0.5\n", f"line {END}: clip is listed twice; remove one"),
        (
            WHOLE.replace("clip:\n", "<<<<<<< HEAD\nclip:\n"),
            "line 32: found <<<<<<<, the mark of a merge",
        ),
        (LAUGHS, r"line 2: found the alias \*a, expected the value itself"),
        ("a: " + "[" * 100_000, "line 1: found more than 20 levels of nesting"),
        ("[" * 100_000 + "]" * 100_000, "line 1: found more than 20 levels of nesting"),
        ("".join(f"{' ' * n}a:\n" for n in range(1000)), "found more than 20 levels of nesting"),
        (
            WHOLE.replace("factor: 0.5", "factor: .nan"),
            "clip.factor: found NaN, expected: input should be a finite",
        ),
        (WHOLE.replace("factor: 0.5", "factor: -.inf"), "clip.factor: found -Infinity, expected"),
        (
            WHOLE.replace("factor: 0.5", f"factor: 1{'0' * 400}"),
            r"clip.factor: found 1000+\.\.\., expected",
        ),
        (WHOLE.replace("border_px: 5", f"border_px: 1{'0' * 400}"), "clip.border_px: found 1000"),
        (
            WHOLE.replace("border_px: 5", f"border_px: 1{'0' * 5000}"),
            "cannot be read as YAML: Exceeds the limit",
        ),
        (
            WHOLE.replace("border_px: 5", "border_px: 0x_"),
            "cannot be read as YAML: invalid literal",
        ),
        (
            WHOLE.replace("factor: 0.5", "factor: 2020-01-01"),
            "line 33: found a date, expected a number",
        ),
        (
            WHOLE.replace("factor: 0.5", "factor: 2020-13-01"),
            "line 33: found a date, expected a number",
        ),
        (
            WHOLE.replace("factor: 0.5", "factor: !!binary aGVsbG8="),
            "line 33: found the tag tag:yaml.org,2002:binary",
        ),
        (
            WHOLE.replace("factor: 0.5", "factor: !!python/name:os.system"),
            "line 33: found the tag .*os.system",
        ),
        (WHOLE.replace("factor: 0.5", "factor: !!float half"), "line 33: found the tag"),
        (WHOLE.replace("factor: 0.5", "<<: {factor: 0.5}"), "line 33: found a merge"),
        (
            WHOLE.replace("factor: 0.5", f"factor: {'x' * 100_000}"),
            r'clip.factor: found "x{76}\.\.\., expected',
        ),
        (WHOLE + "? [a, b]\n: 1\n", f"line {END}: found a list or a section in place of a key"),
        (WHOLE + '"a\\nb": 1\n', r'unknown key "a\\nb"'),
        (WHOLE + "\0", "control characters are not allowed"),
        (WHOLE + "---\n" + WHOLE, f"line {END}: expected a single document"),
        (WHOLE.replace("clip:\n", "clip: [1]\nclips:\n"), r"clip: found \[1\], expected"),
        ("#" * 1_000_001, "found 1000001 bytes, expected a YAML file of at most 1000000"),
    ],
)
def test_what_is_no_file_of_settings_is_one_line(
    content: str | bytes, expected: str, tmp_path: Path
) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ParamsError, match=expected) as caught:
        load_params(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


def test_a_folder_or_a_pipe_is_no_file_of_settings(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # which would be waited for
    with pytest.raises(ParamsError, match=r"pipe: found a pipe or a device, expected a YAML file"):
        load_params(tmp_path / "pipe")
    with pytest.raises(ParamsError, match=r": found a folder, expected a YAML file"):
        load_params(tmp_path)
    with pytest.raises(ParamsError, match=r"missing.yaml: not found, expected a YAML file"):
        load_params(tmp_path / "missing.yaml")


@pytest.mark.parametrize(
    "content", [b"\xef\xbb\xbf" + WHOLE.encode(), WHOLE.replace("\n", "\r\n").encode()]
)
def test_a_byte_order_mark_or_other_ends_of_lines_are_read(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    assert load_params(path) == Params()


@pytest.mark.parametrize(
    ("seed", "count"), [(0, 500), pytest.param(1000, 3000, marks=pytest.mark.long)]
)
def test_mutated_settings_are_read_right_or_refused_in_one_line(seed: int, count: int) -> None:
    assert ": 0 faults;" in runner.check("tests.fuzz.params", seed=seed, count=count)
