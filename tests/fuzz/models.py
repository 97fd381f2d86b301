"""Model files, mutated: each is read as a network whose answers are finite numbers, or refused in one line.

python -m tests.fuzz.models --seed 0 --count 300
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from blobpipe.detection.detectors import load_dense_detector
from blobpipe.detection.operating_point import OperatingPoint
from blobpipe.detection.score import score_candidates
from blobpipe.errors import ModelError
from blobpipe.networks import model_file, report_network
from tests.fuzz import runner


def load_operating_point(path: Path) -> tuple[torch.nn.Module, OperatingPoint]:
    """Load a dense network and its operating point."""
    detector = load_dense_detector(path)
    return detector.network, detector.point


READERS: tuple[Callable[[Path], Any], ...] = (
    model_file.kind_of_model,
    model_file.load_model,
    model_file.load_dense,
    load_operating_point,
)
NUMBERS = (
    float("nan"),
    float("inf"),
    -1.0,
    0.0,
    1e308,
    -1e300,
    10**30,
    True,
    "0.5",
    None,
    [],
    {},
    [[1.0]],
    41,
)
# floats by their bits
WORDS = (0, 1, 0x7FC00000, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 0x7E000000, 0x80000000)


@functools.cache
def sources() -> tuple[bytes, bytes]:
    """The packaged dense model, and one of the report's network."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.safetensors"
        model_file.save_model(path, report_network.new_network(1, "plain"), {})
        return model_file.PACKAGED.read_bytes(), path.read_bytes()


def parts(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and weights of a model file."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header: dict[str, Any] | str, weights: bytes) -> bytes:
    """A model file of a header and weights."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(text).to_bytes(8, "little") + text + weights


def _bits(rng: np.random.Generator, content: bytes, start: int, stop: int) -> bytes:
    changed = bytearray(content)
    for at in rng.integers(start, min(stop, len(content)), rng.integers(1, 5)):
        changed[at] ^= 1 << rng.integers(8)
    return bytes(changed)


def _length(rng: np.random.Generator, content: bytes) -> bytes:
    size = rng.choice([0, 1, 7, len(content), len(content) - 8, 2**31, 2**60, 2**63 - 1])
    return int(size).to_bytes(8, "little") + content[8:]


def _cut(rng: np.random.Generator, content: bytes) -> bytes:
    start = rng.integers(len(content))
    stop = start + rng.integers(1, 2000)
    return [content[:start], content[:start] + content[stop:], content + content[start:stop]][
        rng.integers(3)
    ]


def _weights(rng: np.random.Generator, content: bytes) -> bytes:
    header, weights = parts(content)
    numbers = np.frombuffer(weights, np.uint32).copy()
    numbers[rng.integers(0, len(numbers), rng.integers(1, 4))] = rng.choice(WORDS)
    return joined(header, numbers.tobytes())


def _tensors(rng: np.random.Generator, content: bytes) -> bytes:
    header, weights = parts(content)
    names = sorted(name for name in header if name != "__metadata__")
    one, other = rng.choice(names, 2, replace=False)
    size = rng.choice([0, 1, 2**31, 2**60, 2**63 - 1])
    match rng.integers(9):
        case 0:
            del header[one]
        case 1:
            header[one] = header[other]
        case 2:
            header[one]["shape"] = [int(size), *header[one]["shape"]]
        case 3:
            header[one]["shape"] = header[one]["shape"][::-1]
        case 4:
            header[one]["dtype"] = str(
                rng.choice(["F16", "F64", "I32", "BF16", "F8_E4M3", "X", "BOOL"])
            )
        case 5:
            header[one]["data_offsets"] = [int(size), int(size) + 4]
        case 6:
            header[one], header[other] = header[other], header[one]
        case 7:
            header["another\ntensor"] = header.pop(one)
        case _:
            header[one] = rng.choice(["text", "0"])
    return joined(header, weights)


def _metadata(rng: np.random.Generator, content: bytes) -> bytes:
    header, weights = parts(content)
    story = json.loads(header["__metadata__"]["blobpipe"])
    point = story.setdefault(
        "operating_point", {"threshold": 0.6, "slope": 2.0, "offset": -1.0, "frames": 10.0}
    )
    odd = NUMBERS[rng.integers(len(NUMBERS))]
    match rng.integers(10):
        case 0 | 1 | 2:
            point[str(rng.choice(sorted(point)))] = odd
        case 3:
            point["weights"] = [odd] * int(rng.choice([1, 9, 10, 11]))
        case 4:
            del point[str(rng.choice(sorted(point)))]
        case 5:
            story["operating_point"] = odd
        case 6:
            story["network"] = odd if rng.random() < 0.5 else "dense\nreport"
        case 7:
            story = odd
        case 8:
            story["params"] = "x" * 2 ** int(rng.integers(20, 27))
        case _:
            return joined(
                {**header, "__metadata__": {"blobpipe": "[" * 10 ** int(rng.integers(2, 6))}},
                weights,
            )
    header["__metadata__"]["blobpipe"] = json.dumps(story)
    return joined(header, weights)


def _header(rng: np.random.Generator, content: bytes) -> bytes:
    header, weights = parts(content)
    text = json.dumps(header)
    at = rng.integers(len(text))
    word = str(
        rng.choice(
            ['"', "{", "}", "[", "\\", ",", "NaN", "\0", "1e999", '"__metadata__":{},', "[" * 5000]
        )
    )
    return joined(text[:at] + word + text[at + rng.integers(3) :], weights)


MUTATIONS: dict[str, Callable[[np.random.Generator, bytes], bytes]] = {
    "nothing": lambda rng, content: content,
    "length": _length,
    "bits of the header": lambda rng, content: _bits(
        rng, content, 0, len(content) - len(parts(content)[1])
    ),
    "bits of the weights": lambda rng, content: _bits(
        rng, content, len(content) // 2, len(content)
    ),
    "a number among the weights": _weights,
    "cut": _cut,
    "tensors": _tensors,
    "metadata": _metadata,
    "text of the header": _header,
}


def case(seed: int, folder: Path) -> str:
    """Mutate one model, and read it by all that read models."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    kind = str(rng.choice(sorted(MUTATIONS)))
    which = int(rng.random() < 0.3)
    original = sources()[which]
    content = MUTATIONS[kind](rng, original)
    path = folder / "m.safetensors"
    path.write_bytes(content)
    read = [found for reader in READERS if (found := _read(reader, path)) is not None]
    if kind == "nothing":
        assert len(read) == (2 if which else 3), "a whole model is refused"
    for found in read:
        if not isinstance(found, str):
            _check(*found, _answers(original, content, folder))
    return f"{kind}: {'read' if len(read) > 1 else 'refused'}"


def _read(reader: Callable[[Path], Any], path: Path) -> Any:
    try:
        return reader(path)
    except ModelError as error:
        said = str(error)
        assert said.startswith(f"{path}: "), said
        assert said.isprintable(), said
        assert len(said) < 600, said
        return None


def _answers(original: bytes, content: bytes, folder: Path) -> Callable[[Any], torch.Tensor] | None:
    """What the original answers, where its tensors are untouched."""
    try:
        (before, weights) = parts(original)
        (after, same) = parts(content)
    except ValueError:
        return None
    for header in (before, after):
        header.pop("__metadata__", None)
    if before != after or weights != same:
        return None
    path = folder / "original.safetensors"
    path.write_bytes(original)
    load = (
        model_file.load_model
        if model_file.kind_of_model(path) == "report"
        else model_file.load_dense
    )
    return load(path)[0]


def _check(
    network: torch.nn.Module, about: Any, original: Callable[[Any], torch.Tensor] | None
) -> None:
    images = torch.randn(2, 1, 256, 256, generator=torch.Generator().manual_seed(1))
    images[1] *= 300.0
    with torch.inference_mode():
        answers = network(images)
        assert torch.isfinite(answers).all(), "an answer is no finite number"
        if original is not None:
            torch.testing.assert_close(answers, original(images), rtol=1e-3, atol=1e-3)
    if isinstance(about, OperatingPoint):
        scores = np.array([0.0, 1e-9, 0.3, 1.0])
        found = pd.DataFrame(
            {
                "score": scores,
                "snr": [3.0, np.nan, 500.0, 7.0],
                "misfit": [1.0, 9.0, 0.1, np.nan],
                "radius_ratio": [1.0, np.nan, 0.01, 99.0],
                "size_log_odds": [0.0, 0.0, -300.0, -9.0],
                "radius_px": [4.0, np.nan, 0.01, 99.0],
                "line_snr": [1.0, 0.0, 99.0, 3.0],
            }
        )
        joint = score_candidates(found, about.weights)["score"].to_numpy()
        for probability in (joint, about.probability(scores), about.probability(joint)):
            assert ((probability >= 0) & (probability <= 1)).all(), "a probability is none"


if __name__ == "__main__":
    runner.main(case)
