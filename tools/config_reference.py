"""Generate the field reference in docs/configuration.md, and docs/config.schema.json for editors.

python tools/config_reference.py [--check]
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdpg_megatron.config import RunConfig
from sdpg_megatron.config.method_defaults import DEFAULTS

DOCS = Path(__file__).parents[1] / "docs"
PAGE, SCHEMA = "configuration.md", "config.schema.json"
BEGIN, END = "<!-- begin: tools/config_reference.py -->\n", "<!-- end: tools/config_reference.py -->\n"
BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
TYPES = {"integer": "int", "number": "float", "boolean": "bool", "string": "str", "array": "list", "object": "mapping"}
Schema = Mapping[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a file is stale; write nothing")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the files (default: %(default)s)")
    options = parser.parse_args(arguments)
    files = generate(options.docs).items()
    stale = {
        path: content for path, content in files if not path.exists() or path.read_text(encoding="utf-8") != content
    }
    for path, content in stale.items():
        if options.check:
            sys.stdout.write(f"{path}: stale. Fix: python tools/config_reference.py\n")
        else:
            path.write_text(content, encoding="utf-8")
    return 1 if options.check and stale else 0


def generate(docs: Path) -> dict[Path, str]:
    """Content of both files, by path."""
    schema = clean(RunConfig.model_json_schema())
    before, _, rest = (docs / PAGE).read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    page = f"{before}{BEGIN}\n{reference(schema)}\n{method_table(schema)}\n{END}{after}"
    return {docs / PAGE: page, docs / SCHEMA: json.dumps(for_editors(schema), indent=1) + "\n"}


def clean(schema: Any) -> Any:
    """Schema with descriptions on one line, without automatic titles and without defaults of sections."""
    if isinstance(schema, list):
        return [clean(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    parts = {key: clean(part) for key, part in schema.items() if not (key == "title" and isinstance(part, str))}
    if isinstance(parts.get("description"), str):
        parts["description"] = " ".join(parts["description"].split())
    if "$ref" in parts:
        parts.pop("default", None)
    return parts


def for_editors(schema: Schema) -> dict[str, Any]:
    """Schema without required fields, which may be set on the command line."""
    sections = {name: {k: v for k, v in part.items() if k != "required"} for name, part in schema["$defs"].items()}
    root = {key: part for key, part in schema.items() if key not in ("required", "$defs")}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **root, "$defs": sections}


def sections(schema: Schema, section: Schema, name: str = "") -> Iterator[tuple[str, Schema]]:
    """Yield dotted name and schema of a section and the sections below it."""
    yield name, section
    for key, field in section["properties"].items():
        below = f"{name}.{key}".lstrip(".")
        for suffix, part in (("", field), (".NAME", field.get("additionalProperties"))):
            if isinstance(part, dict) and "$ref" in part:
                yield from sections(schema, schema["$defs"][part["$ref"].rpartition("/")[2]], below + suffix)


def reference(schema: Schema) -> str:
    """One table of fields per section."""
    parts = []
    for name, section in sections(schema, schema):
        rows = [
            (f"`{key}`", type_of(field), default_of(section, key), field["description"])
            for key, field in section["properties"].items()
            if "$ref" not in field
        ]
        heading = f"### `{name}`" if name else "### Top level"
        introduction = textwrap.fill(section["description"], 118, break_on_hyphens=False)
        parts.append(f"{heading}\n\n{introduction}\n\n{table(('field', 'type', 'default', 'description'), rows)}")
    return "\n".join(parts)


def method_table(schema: Schema) -> str:
    """Defaults of `objective` that differ between methods."""
    section = schema["$defs"]["ObjectiveConfig"]
    fields = [name for name in section["properties"] if any(name in defaults for defaults in DEFAULTS.values())]
    rows = [
        (f"`{name}`", *(text(found[name]) if name in found else "" for found in all_defaults(section)))
        for name in fields
    ]
    return f"### Defaults of `objective` by method\n\n{table(('field', *(f'`{name}`' for name in DEFAULTS)), rows)}"


def all_defaults(section: Schema) -> list[Mapping[str, object]]:
    """Defaults of each method: all fields for `sdpg`, differences from it for the others."""
    sdpg = {name: field.get("default") for name, field in section["properties"].items()}
    others = [defaults for name, defaults in DEFAULTS.items() if name != "sdpg"]
    return [sdpg, *({k: v for k, v in defaults.items() if v != sdpg[k]} for defaults in others)]


def type_of(field: Schema) -> str:
    """Type, choices and bounds of a field."""
    if "anyOf" in field:
        return " or ".join(type_of(choice) for choice in field["anyOf"])
    if "enum" in field:
        return ", ".join(f"`{choice}`" for choice in field["enum"])
    if field["type"] == "array":
        items = field.get("prefixItems") or [field["items"]]
        return f"list of {f'{len(items)} ' if 'prefixItems' in field else ''}{type_of(items[0])}"
    kind = "path" if field.get("format") == "path" else TYPES.get(field["type"], field["type"])
    bounds = ", ".join(f"{sign} {number(field[key])}" for key, sign in BOUNDS.items() if key in field)
    return f"{kind} ({bounds})" if bounds else kind


def default_of(section: Schema, name: str) -> str:
    if name in section.get("required", ()):
        return "required"
    return f"`{text(section['properties'][name].get('default', {}))}`"


def number(value: float) -> str:
    return f"{value:g}" if abs(value) > 1e12 or value != int(value) else str(int(value))


def text(value: object) -> str:
    """Value as in YAML."""
    return value if isinstance(value, str) else json.dumps(value)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
