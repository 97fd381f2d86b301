"""A detector is a file: what the files of blobpipe say, and one clear line for each fault of others."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from blobpipe.core.detector import DEFAULT, FOLDER, detector_names, read_detector
from blobpipe.errors import ParamsError
from blobpipe.params import Campaign
from blobpipe.simulation import campaign

SOURCE = Path(__file__).parents[3] / "src" / "blobpipe"

# What only the file of WFC3/IR may say
OF_WFC3 = re.compile(r"(?<![\w.])(1024|1014|512)(?![\w.])|F153M|DARK-EARTH")

# Other numbers of that size: a byte limit, a cache, a number of pieces of clutter, a disc's largest box
OTHER_NUMBERS = {
    "core/blob_shapes.py": "lru_cache(maxsize=512)",
    "monitor/delivery.py": "of the 512 that a command holds",
    "params.py": "512, ge=1, le=10_000",
    "review/server.py": "reserved for the system, expected one from 1024",
}

# The only call without a detector: it makes a table without candidates
NO_CANDIDATES = "detection.detect: observe without instrument"


def test_the_default_is_wfc3_ir() -> None:
    assert read_detector("wfc3_ir") == DEFAULT
    assert DEFAULT.shape == (1024, 1024)
    assert DEFAULT.light_shape == (1014, 1014)
    assert DEFAULT.table_offset == -4  # x of the full frame, from 0, is PIX1 + 4
    assert DEFAULT.exposure.bad_dq == 0xFFFF - 64 - 512 - 2048
    assert hash(DEFAULT) == hash(read_detector("wfc3_ir"))


@pytest.mark.parametrize("name", detector_names())
def test_each_file_of_blobpipe_can_be_read(name: str) -> None:
    detector = read_detector(name)
    ny, nx = detector.shape
    radii = detector.typical_radius(np.array([0.0, nx]), np.array([0.0, ny]))
    assert ((radii >= detector.blobs.radius_px[0]) & (radii <= detector.blobs.radius_px[1])).all()
    assert detector.light_shape == (ny - 2 * detector.border_px, nx - 2 * detector.border_px)
    # The boxes of the background fill the detector
    assert all(side % detector.exposure.box_px == 0 for side in detector.light_shape)


def test_no_module_holds_a_constant_of_wfc3() -> None:
    for path in SOURCE.rglob("*.py"):
        name = path.relative_to(SOURCE).as_posix()
        text = path.read_text(encoding="utf-8").replace(OTHER_NUMBERS.get(name, "-"), "")
        assert OF_WFC3.findall(text) == [], name


def test_no_module_takes_wfc3_by_default() -> None:
    trees = {
        ".".join(path.relative_to(SOURCE).with_suffix("").parts): ast.parse(path.read_text())
        for path in SOURCE.rglob("*.py")
    }
    optional = {name: _optional_detectors(tree) for name, tree in trees.items()}
    silent = [
        f"{name}: {function} without {argument}"
        for name, tree in trees.items()
        for call, module, function in _calls(name, tree)
        for argument, place in optional.get(module, {}).get(function, {}).items()
        if not _gives(call, argument, place)
    ]
    assert sum(map(len, optional.values())) > 50  # functions with such an argument
    assert silent == [NO_CANDIDATES]


def _optional_detectors(tree: ast.Module) -> dict[str, dict[str, int]]:
    """Return the arguments of functions and dataclasses that are WFC3's by default, with their places."""
    found: dict[str, dict[str, int]] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            arguments = node.args.args + node.args.kwonlyargs
            missing = len(node.args.args) - len(node.args.defaults)
            defaults = [*[None] * missing, *node.args.defaults, *node.args.kw_defaults]
            names = [argument.arg for argument in arguments]
        elif isinstance(node, ast.ClassDef):
            fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
            names = [ast.unparse(field.target) for field in fields]
            defaults = [field.value for field in fields]
        else:
            continue
        for place, (name, default) in enumerate(zip(names, defaults, strict=True)):
            if default is not None and re.search(r"\bDEFAULT\b", ast.unparse(default)):
                found.setdefault(node.name, {})[name] = place
    return found


def _calls(name: str, tree: ast.Module) -> Iterator[tuple[ast.Call, str, str]]:
    """Return the calls of blobpipe's functions in a module, with the module and name of each."""
    known = {
        node.name: (name, node.name)
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    modules = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("blobpipe"):
            origin = (node.module or "").removeprefix("blobpipe").removeprefix(".")
            for alias in node.names:
                known[alias.asname or alias.name] = (origin, alias.name)
                modules[alias.asname or alias.name] = f"{origin}.{alias.name}".removeprefix(".")
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        if isinstance(called, ast.Name) and called.id in known:
            yield node, *known[called.id]
        elif isinstance(called, ast.Attribute) and ast.unparse(called.value) in modules:
            yield node, modules[ast.unparse(called.value)], called.attr


def _gives(call: ast.Call, argument: str, place: int) -> bool:
    """Return whether a call gives an argument, or may do so by * or **."""
    named = {keyword.arg for keyword in call.keywords}
    is_open = any(isinstance(value, ast.Starred) for value in call.args)
    return bool({argument, None} & named) or is_open or len(call.args) > place


def test_a_plane_loses_its_border() -> None:
    full = np.zeros(DEFAULT.shape)
    assert DEFAULT.without_border(full).shape == DEFAULT.light_shape
    assert DEFAULT.without_border(full[5:-5, 5:-5]).shape == DEFAULT.light_shape


def _entries() -> dict[str, Any]:
    content = yaml.safe_load((FOLDER / "wfc3_ir.yaml").read_text())
    assert isinstance(content, dict)
    return content


def _set(place: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Return a change of one entry."""

    def change(entries: dict[str, Any]) -> None:
        *sections, key = place.split(".")
        for section in sections:
            entries = entries[section]
        entries[key] = value

    return change


def _drop(place: str) -> Callable[[dict[str, Any]], None]:
    """Return the removal of one entry."""

    def change(entries: dict[str, Any]) -> None:
        *sections, key = place.split(".")
        for section in sections:
            entries = entries[section]
        del entries[key]

    return change


FAULTS = {
    # missing and unknown entries
    "no width": (_drop("width_px"), "width_px is missing; add it"),
    "no exposure": (_drop("exposure"), "exposure is missing; add it"),
    "no dq": (_drop("exposure.dq"), "exposure.dq is missing; add it"),
    "no size law": (_drop("blobs.size_law"), "blobs.size_law is missing; add it"),
    "unknown key": (_set("colour", "red"), "unknown key colour"),
    "unknown key inside": (_set("motion.speed", 1), "unknown key motion.speed"),
    # wrong kinds
    "text for a number": (_set("width_px", "wide"), 'width_px: found "wide"'),
    "number as text": (_set("border_px", "5"), 'border_px: found "5"'),
    "fraction of a pixel": (_set("height_px", 1024.5), "height_px: found 1024.5"),
    "three amplifiers": (_set("amplifiers", [2, 2, 2]), "amplifiers"),
    "list for a section": (_set("cards", []), "cards: found []"),
    "number for a card": (_set("cards.date", 5), "cards.date: found 5"),
    # out of range
    "too small": (_set("width_px", 100), "width_px: found 100"),
    "too large": (_set("height_px", 8192), "height_px: found 8192"),
    "negative border": (_set("border_px", -1), "border_px: found -1"),
    "no gain": (_set("gain_e", 0.0), "gain_e: found 0.0"),
    "noise of a count": (_set("difference_noise_frac", 12.0), "difference_noise_frac: found 12.0"),
    "another subframe": (_set("subframe_px", 128), "subframe_px: found 128"),
    "date in seconds": (_set("first_mjd", 1.6e9), "first_mjd"),
    "far shift": (_set("motion.largest_px", 50.0), "motion.largest_px: found 50.0"),
    # not one of a few
    "another format": (_set("exposure.format", "hdf5"), 'exposure.format: found "hdf5"'),
    "another unit": (_set("exposure.unit", "magnitudes"), 'exposure.unit: found "magnitudes"'),
    "another sign": (_set("exposure.blobs", "dark"), 'exposure.blobs: found "dark"'),
    "a long card": (_set("cards.target", "TARGETNAME"), "cards.target: found 'TARGETNAME'"),
    "no pattern": (_set("archive.file_name", "*_flt"), "expected a regular expression"),
    # contradictions
    "amplifiers do not fit": (_set("amplifiers", [3, 2]), "3 do not divide width_px=1024"),
    "large boxes": (_set("exposure.box_px", 300), "exposure.box_px=300, expected at least 4 boxes"),
    "radii in the wrong order": (_set("blobs.radius_px", [9.0, 3.0]), "lower limit first"),
    "radii that no fit has": (_set("blobs.radius_px", [2.0, 40.0]), "0.7 to 12.7"),
    "law beyond the radii": (_set("blobs.size_law.per_x", -0.01), "in the corners"),
    "motion of nothing": (_set("motion.moves", "nothing"), "moves: nothing and largest_px: 6"),
    "blobs are bad pixels": (_set("exposure.bad_dq", 65535), "holds blob_bit=512"),
    "two bits": (_set("bad_pixel_table.blob_bit", 513), "expected a power of 2"),
    "detectors without a place": (_set("exposure.detectors", ["A", "B"]), "expected {detector}"),
    "a place without detectors": (_set("exposure.image", "{detector}.SCI"), "expected detectors"),
    "half a flat": (_set("exposure.flat_done", ""), "flat_card and flat_done"),
    "flags of nothing": (_set("exposure.dq", ""), "bad_dq is 62911 and dq is empty"),
    "a path in FITS": (_set("cards.date", "roman.meta.date"), "cards.date is roman.meta.date"),
    "a star off the detector": (_set("simulation.notch_x_px", 2000.0), "simulation.notch_x_px"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_clear_line(fault: str, tmp_path: Path) -> None:
    change, expected = FAULTS[fault]
    entries = _entries()
    change(entries)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(entries))
    with pytest.raises(ParamsError) as caught:
        read_detector(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert expected in message
    assert "\n" not in message
    assert len(message.removeprefix(str(path))) < 200


def test_there_are_thirty_faults_and_more() -> None:
    assert len(FAULTS) >= 30


def test_a_file_that_is_no_detector_is_named(tmp_path: Path) -> None:
    empty = tmp_path / "empty.yaml"
    empty.write_text("")
    with pytest.raises(ParamsError, match=r"empty\.yaml: found nothing, expected the entries"):
        read_detector(empty)
    with pytest.raises(ParamsError, match=r"missing\.yaml: not found"):
        read_detector(tmp_path / "missing.yaml")
    with pytest.raises(
        ParamsError, match="detector: found hawaii, expected euclid_nisp, nircam_lw"
    ):
        read_detector("hawaii")


@pytest.mark.parametrize("name", detector_names())
def test_simulated_images_have_dates_that_the_detector_can_have(name: str) -> None:
    assert read_detector(name).first_mjd <= campaign.dates(Campaign()).min()
