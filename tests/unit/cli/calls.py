"""Settings of the tests of commands, and the form in which calls are recorded."""

from __future__ import annotations

from typing import Any

from blobpipe.params import Params, Regression

Calls = list[tuple[str, tuple[Any, ...], dict[str, Any]]]

PARAMS = Params(regression=Regression(min_cases=7))
