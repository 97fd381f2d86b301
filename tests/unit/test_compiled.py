"""Compiled functions give the same bytes whether they were compiled just now or are read from the cache."""

from __future__ import annotations

import ast
from pathlib import Path

import blobpipe

MODULES = sorted(Path(blobpipe.__file__).parent.rglob("*.py"))


def decorators(function: ast.FunctionDef) -> str:
    return " ".join(map(ast.unparse, function.decorator_list))


def called(function: ast.FunctionDef) -> set[str]:
    calls = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]
    return {ast.unparse(call).rpartition(".")[2] for call in calls}


def test_no_compiled_function_calls_one_whose_sums_may_be_reordered() -> None:
    """Each caller has a copy, whose order may be another; which copy is used depends on what is compiled first."""
    nodes = [node for path in MODULES for node in ast.walk(ast.parse(path.read_text()))]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    reordered = {each.name for each in functions if "fastmath" in decorators(each)}
    compiled = [each for each in functions if "jit" in decorators(each)]
    assert len(compiled) > 30
    assert not {name for each in compiled for name in called(each) & reordered}
