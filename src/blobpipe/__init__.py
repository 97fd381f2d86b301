"""Find blobs, small dark patches, in images of infrared detectors.

The names below are what a notebook needs; each is loaded when it is first used, so that importing
blobpipe, and `blobpipe --help`, stay fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blobpipe.core.blob_shapes import blob_profile
    from blobpipe.core.fits_images import read_image
    from blobpipe.detection.detectors import load_detector
    from blobpipe.detection.match import pair as match
    from blobpipe.detection.search import find_blobs
    from blobpipe.errors import BlobpipeError
    from blobpipe.images.clip import clip_image as clip
    from blobpipe.images.difference import subtract
    from blobpipe.images.flatten import light_loss as flatten
    from blobpipe.images.scale import scale_image as scale
    from blobpipe.images.template import Template, median_template, read_template
    from blobpipe.monitor.export import write_regions
    from blobpipe.params import Params, load_params

__version__ = "0.2.0"

PLACES = {  # where each name is defined, and as what
    "read_image": ("core.fits_images", "read_image"),
    "flatten": ("images.flatten", "light_loss"),
    "Template": ("images.template", "Template"),
    "read_template": ("images.template", "read_template"),
    "median_template": ("images.template", "median_template"),
    "subtract": ("images.difference", "subtract"),
    "clip": ("images.clip", "clip_image"),
    "scale": ("images.scale", "scale_image"),
    "load_detector": ("detection.detectors", "load_detector"),
    "find_blobs": ("detection.search", "find_blobs"),
    "match": ("detection.match", "pair"),
    "blob_profile": ("core.blob_shapes", "blob_profile"),
    "write_regions": ("monitor.export", "write_regions"),
    "load_params": ("params", "load_params"),
    "Params": ("params", "Params"),
    "BlobpipeError": ("errors", "BlobpipeError"),
}

__all__ = [
    "BlobpipeError",
    "Params",
    "Template",
    "__version__",
    "blob_profile",
    "clip",
    "find_blobs",
    "flatten",
    "load_detector",
    "load_params",
    "match",
    "median_template",
    "read_image",
    "read_template",
    "scale",
    "subtract",
    "write_regions",
]


def __getattr__(name: str) -> Any:
    """Load one of the names of `PLACES` (PEP 562)."""
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, defined = PLACES[name]
    found = getattr(importlib.import_module(f"{__name__}.{module}"), defined)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return [*__all__]
