"""Mutated params.yaml: the settings that another reading finds too, or one line.

``python -m tests.fuzz.params --seed 0 --count 3000``
"""

# ruff: noqa: SIM905 (a list of odd words is easier to read as a text)

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pydantic
import yaml

from blobpipe.errors import ParamsError
from blobpipe.params import Params, load_params, to_yaml
from tests.fuzz import runner

PLAIN = "\n".join(
    line.partition("  #")[0] for line in to_yaml(Params()).splitlines() if not line.startswith("#")
)
FLOW = yaml.safe_dump(json.loads(Params().model_dump_json()), default_flow_style=True)
ODD = """~ .nan -.inf 1e400 1.0e+999 -0.0 0x1F 0o17 010 1_000 1:30 yes off null 2020-01-01 2020-13-45 2001-12-14t21:59:43Z
"" '' "\\ud800" "\\0" [] {} [[[]]] {a:1} [1.0,2.0] [2.0,1.0] *a &a !!str !!binary !!python/name:os.system !foo = << - ? | >
@ ` % 99999999999999999999 1e5 .5 5. +5 1. 0b1 0b 0x_ ._ 1:60:60:60""".split()
TOKENS = "\t \n \r \x00 \x07 \x85 \u2028 \ufeff \U0001f52d : , [ ] { } # & * ! | > ' \" % @ ` - ? --- ... \\ <<: <<<<<<<".split(
    " "
)
BY_DESIGN = (
    "the tag",
    "the alias",
    "found a date",
    "found a merge",
    "found a value",
    "mark of a merge",
    "levels of",
)
MOST_BYTES = 20_000  # of a file that another parser is asked about: deeper nesting kills it
Mutation = Callable[[random.Random, str], str]


def case(seed: int, folder: Path) -> str:
    """One file of one to three faults."""
    draw = random.Random(seed)
    text = draw.choice([PLAIN, PLAIN, to_yaml(Params()), FLOW])
    for _ in range(draw.choice([1, 1, 2, 3])):
        text = draw.choice(MUTATIONS)(draw, text)
    path = folder / "params.yaml"
    path.write_bytes(_encoded(draw, text))
    try:
        found = load_params(path)
    except ParamsError as error:
        message = str(error)
        assert message.startswith(f"{path}: "), message
        assert message.isprintable(), repr(message)
        assert len(message) < 600 + len(str(path)), message
        if path.stat().st_size < MOST_BYTES and not any(reason in message for reason in BY_DESIGN):
            assert _read_otherwise(path, seed) is None, f"refused, but whole: {message}"
        return "one line"
    other = _read_otherwise(path, seed)
    assert found == other, f"{found!r}\n{other!r}"
    return "as another reads it"


def _read_otherwise(path: Path, seed: int) -> Params | None:
    """The settings, by PyYAML alone and every tenth time by its parser in Python; None if there is anything wrong."""
    text = path.read_bytes().decode("utf-8-sig", errors="surrogateescape")
    try:
        content = _python(text) if seed % 10 == 0 else yaml.load(text, Loader=_Loader)
        params = Params.model_validate_json(json.dumps(content))
    except (
        yaml.YAMLError,
        pydantic.ValidationError,
        ArithmeticError,
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
    ):
        return None
    return (
        params
        if "detector" in content and all(_is_whole(*part) for part in _parts(params, content))
        else None
    )


def _parts(model: pydantic.BaseModel, content: Any) -> list[tuple[pydantic.BaseModel, Any]]:
    """The sections of settings with what a file says of them."""
    return [
        (section, content.get(name, {}))
        for name, section in model
        if isinstance(section, pydantic.BaseModel)
    ]


def _is_whole(section: pydantic.BaseModel, content: Any) -> bool:
    """Whether a file gives all settings of a section, and of the sections in it."""
    if set(content) != set(type(section).model_fields):
        return False
    return all(_is_whole(*part) for part in _parts(section, content))


def _python(text: str) -> Any:
    """As PyYAML's parser in Python reads it, or where that is stricter than the one in C, as that one does: of tabs."""
    try:
        return yaml.load(text, Loader=_PythonLoader)
    except yaml.YAMLError:
        return yaml.load(text, Loader=_Loader)


def _once(loader: Any, node: yaml.MappingNode) -> dict[Any, Any]:
    pairs = loader.construct_pairs(node, deep=True)
    if len(dict(pairs)) < len(pairs):
        raise yaml.YAMLError("a key twice")
    return dict(pairs)


class _Loader(yaml.CSafeLoader):
    """In C."""


class _PythonLoader(yaml.SafeLoader):
    """In Python."""


for _kind in (_Loader, _PythonLoader):
    _kind.add_constructor("tag:yaml.org,2002:map", _once)


def _encoded(draw: random.Random, text: str) -> bytes:
    code = draw.choice(["utf-8"] * 12 + ["utf-8-sig", "utf-16", "latin-1", "bytes"])
    data = bytearray(text.encode("utf-8" if code == "bytes" else code, errors="replace"))
    if code == "bytes" and data:
        for _ in range(draw.randrange(1, 4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
    return bytes(data)


# ---------------------------------------------------------------- mutations of a text


def _cut(draw: random.Random, text: str) -> str:
    start = draw.randrange(len(text) + 1)
    return text[:start] + text[start + draw.choice([1, 2, 10, 100, len(text)]) :]


def _insert(draw: random.Random, text: str) -> str:
    place = draw.randrange(len(text) + 1)
    return text[:place] + draw.choice(TOKENS + ODD) * draw.choice([1, 1, 1, 2, 50]) + text[place:]


def _value(draw: random.Random, text: str) -> str:
    """Put something odd in place of a value."""
    lines = text.split("\n")
    places = [number for number, line in enumerate(lines) if ": " in line]
    if places:
        number = draw.choice(places)
        lines[number] = f"{lines[number].partition(': ')[0]}: {draw.choice(ODD)}"
    return "\n".join(lines)


def _digits(draw: random.Random, text: str) -> str:
    """Make a number another one, or a very long one."""
    places = [place for place, letter in enumerate(text) if letter.isdigit()]
    if not places:
        return text
    place = draw.choice(places)
    return (
        text[:place]
        + str(draw.randrange(10)) * draw.choice([1, 1, 1, 20, 400, 5000])
        + text[place + 1 :]
    )


def _lines(draw: random.Random, text: str) -> str:
    """Say a line twice, leave it out, move or indent it."""
    lines = text.split("\n")
    number = draw.randrange(len(lines))
    line = lines.pop(number)
    kept = draw.choice(
        [
            [line, line],
            [],
            [f" {line}"],
            [f"\t{line}"],
            [line.lstrip()],
            [f"{line}\r"],
            [line, line.upper()],
        ]
    )
    place = number if draw.random() < 0.7 else draw.randrange(len(lines) + 1)
    return "\n".join([*lines[:place], *kept, *lines[place:]])


def _grow(draw: random.Random, text: str) -> str:
    """Nest deeply, multiply by anchors, or repeat the whole."""
    laughs = "a0: &a0 [x, x]\n" + "".join(
        f"a{n}: &a{n} [{f'*a{n - 1}, ' * 9}]\n" for n in range(1, 30)
    )
    bombs = [
        "x: " + "[" * 30_000,
        "x: " + "{a: " * 10_000,
        "".join(f"{' ' * n}a:\n" for n in range(500)),
        laughs,
    ]
    return draw.choice(
        [
            *(f"{text}\n{bomb}" for bomb in bombs),
            *bombs,
            f"{text}\n---\n{text}",
            f"{text}\n{text}",
            text * 90,
        ]
    )


MUTATIONS: list[Mutation] = [
    _cut,
    _insert,
    _insert,
    _value,
    _value,
    _value,
    _digits,
    _digits,
    _lines,
    _lines,
    _grow,
]

if __name__ == "__main__":
    runner.main(case)
