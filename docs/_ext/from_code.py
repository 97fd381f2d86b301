"""Parts of the documentation that the code writes: settings, commands, and measured numbers.

``{stage-params} STAGE`` is the table of a stage's settings, ``{command-help} COMMAND`` what the command line says about
itself, and the role ``{measured}`` (``stage key``) a number of ``results/STAGE/metrics.json``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

from docutils import nodes
from measured import UNKNOWN, measured, metrics_file
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective, SphinxRole

from blobpipe import params
from blobpipe.cli import daily, images, options, parser, results, stages


class StageParams(SphinxDirective):
    """The settings of a stage: key, default, what is accepted, meaning."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        self.env.note_dependency(params.__file__)
        rows = ["| key | default | accepted | meaning |", "|---|---|---|---|"]
        rows += ["| " + " | ".join(row) + " |" for row in settings(self.arguments[0])]
        return self.parse_text_to_nodes("\n".join(rows))


def settings(stage: str) -> list[tuple[str, str, str, str]]:
    """Key, default, accepted values and meaning of each setting of a stage, as Markdown."""
    schema = params.Params.model_json_schema()
    return list(_rows(schema, params.Params.model_fields[stage].annotation.__name__))


def _rows(
    schema: dict[str, Any], section: str, prefix: str = ""
) -> Iterator[tuple[str, str, str, str]]:
    """Yield the row of each setting of a section, and of the sections in it."""
    for key, field in schema["$defs"][section]["properties"].items():
        name = prefix + key
        if "$ref" in field:
            yield from _rows(schema, field["$ref"].rpartition("/")[2], f"{name}.")
            continue
        default = json.dumps(field["default"])
        yield f"`{name}`", f"`{default}`", accepted(field), field["description"].replace("|", "\\|")


def accepted(field: dict[str, Any]) -> str:
    """Type and bounds of a field, in words."""
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{json.dumps(field['const'])}`"
    if "anyOf" in field:
        return " or ".join(accepted(one) for one in field["anyOf"])
    match field["type"]:
        case "boolean":
            return "`true`, `false`"
        case "array" if "prefixItems" in field:
            return f"[{', '.join(accepted(item) for item in field['prefixItems'])}]"
        case "array":
            return f"[{accepted(field['items'])}, ...]"
        case kind:
            return " ".join([kind, *bounds(field)])


def bounds(field: dict[str, Any]) -> list[str]:
    """Lowest and highest accepted value."""
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    found = [f"{sign} {field[name]}" for name, sign in signs.items() if name in field]
    return [", ".join(found)] if found else []


class CommandHelp(SphinxDirective):
    """What ``blobpipe COMMAND --help`` says."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        for module in (daily, images, options, parser, results, stages):
            self.env.note_dependency(module.__file__)
        text = help_text(self.arguments[0])
        return [nodes.literal_block(text, text, language="text")]


def help_text(command: str) -> str:
    """The help of a command, 100 characters wide wherever it is made."""
    os.environ["COLUMNS"] = "100"
    os.environ["NO_COLOR"] = "1"
    [commands] = [action for action in parser.build_parser()._actions if action.dest == "command"]
    return commands.choices[command].format_help()  # type: ignore[call-overload,index,no-any-return]


class Measured(SphinxRole):
    """A measured number, or plain words that there is none."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        stage, key = self.text.split()
        self.env.note_dependency(str(metrics_file(stage)))
        text = measured(stage, key)
        return [nodes.emphasis(text, text) if text == UNKNOWN else nodes.strong(text, text)], []


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directives and the role."""
    app.add_directive("stage-params", StageParams)
    app.add_directive("command-help", CommandHelp)
    app.add_role("measured", Measured())
    return {"parallel_read_safe": True, "parallel_write_safe": True}
