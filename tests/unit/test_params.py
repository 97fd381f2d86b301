"""Every setting: read strictly, written back the same, and one source for YAML, schema and file."""

from __future__ import annotations

import json
import re
import typing
from pathlib import Path

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blobpipe.errors import ParamsError
from blobpipe.params import Clip, Cutout, Params, Train, json_schema, load_params, to_yaml

ROOT = Path(__file__).parents[2]
SECTIONS = list(Params.model_fields)


def test_the_file_in_the_project_holds_the_defaults() -> None:
    assert (ROOT / "params.yaml").read_text(encoding="utf-8") == to_yaml(Params()), "regenerate it: blobpipe params"


def test_the_schema_in_the_project_is_in_step() -> None:
    assert (ROOT / "workflow/schemas/params.schema.json").read_text(encoding="utf-8") == json_schema()


def test_the_schema_forbids_unknown_keys_everywhere() -> None:
    schema = json.loads(json_schema())
    models = [schema, *schema["$defs"].values()]
    assert len(models) == len(SECTIONS) + 1
    assert all(model["additionalProperties"] is False for model in models)


@pytest.mark.parametrize("section", SECTIONS)
def test_every_setting_is_described_in_one_line(section: str) -> None:
    model = type(getattr(Params(), section))
    assert model.__doc__
    for key, field in model.model_fields.items():
        assert field.description, f"{section}.{key}"
        assert field.description.endswith("."), f"{section}.{key}"
        assert "\n" not in field.description


@pytest.mark.parametrize("section", SECTIONS)
def test_every_number_is_bounded(section: str) -> None:
    for key, field in type(getattr(Params(), section)).model_fields.items():
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
    tmp_path_factory: pytest.TempPathFactory, seed: int, factor: float, strength: tuple[float, float], amplitude: str
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
    path.write_text(to_yaml(Params()).replace("  factor: 0.5", "  factor: 1").replace("[12000.0, 30000.0]", "[9, 10]"))
    params = load_params(path)
    assert params.clip.factor == 1.0
    assert params.campaign.photons_e == (9.0, 10.0)


FAULTS = {
    "unknown key": ("  factor: ", "  faktor: ", "unknown key clip.faktor"),
    "unknown section": ("augment:", "augmentation:", "unknown key augmentation"),
    "text for a number": ("  factor", "half", 'clip.factor: found "half", expected'),
    "number without a point in YAML 1.1": ("  factor", "5e-1", 'clip.factor: found "5e-1", expected'),
    "float for an integer": ("  epochs", "4.5", "train.epochs: found 4.5, expected"),
    "yes for an integer": ("  epochs", "yes", "train.epochs: found true, expected"),
    "number for a choice": ("  amplitude", "1", "cutout.amplitude: found 1, expected"),
    "no such choice": ("  amplitude", "reports", 'cutout.amplitude: found "reports", expected'),
    "below its range": ("  factor", "-1.0", "clip.factor: found -1.0, expected"),
    "above its range": ("  momentum", "1.0", "train.momentum: found 1.0, expected"),
    "not a number": ("  factor", ".nan", "clip.factor: found NaN, expected"),
    "infinite": ("  factor", ".inf", "clip.factor: found Infinity, expected"),
    "one value for a range": ("  strength", "[0.5]", "cutout.strength"),
    "a range the wrong way round": ("  strength", "[1.5, 0.5]", "cutout.strength: found [1.5, 0.5], expected"),
    "a range from zero": ("  dip_px", "[0.0, 3.0]", "cutout.dip_px"),
    "no photons": ("  photons_e", "[-1.0, 30000.0]", "campaign.photons_e"),
    "no radii": ("  radii_px", "[]", "evaluate.radii_px"),
    "a radius of nothing": ("  radii_px", "[0.0]", "evaluate.radii_px"),
    "a date": ("  factor", "2020-01-01", "date"),
    "no room for a quiet image": ("  n_cases", "100000", "campaign.n_cases=100000 leaves no image"),
    "a missing key": ("  factor", None, "clip.factor is missing"),
    "an empty section": ("scale:", "scale: {}\nunread:", "unknown key unread"),
    "a missing section": ("clip:", None, "clip.factor is missing"),
    "broken YAML": ("clip:", "clip: [", "cannot be read as YAML"),
}


def with_fault(key: str, value: str | None) -> str:
    """The defaults with another value; with a section or a key renamed (``key:``), or left out (None)."""
    text = re.sub("  # .*", "", to_yaml(Params()))
    if value is None:
        return re.sub(rf"^{key}.*\n" + ("" if key.startswith(" ") else "(  .*\n)*"), "", text, count=1, flags=re.M)
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
