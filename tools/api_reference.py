"""Write docs/api.md, the reference of the public interface, from signatures and docstrings (read by griffe).

python tools/api_reference.py            # write the page
python tools/api_reference.py --check    # exit code 1 if it is stale
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import griffe

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "api.md"
HEADER = """# Public interface

`from sdpg_megatron import ...` gives these names. All other modules are private and may change without notice.
`tools/api_reference.py` makes this page from the docstrings.
"""
GROUPS = {
    "The head": "head",
    "Objectives": "objectives",
    "Megatron": "mcore",
    "Records": "records",
    "Configuration, errors, writers, transports": "",
}
"""Headings, and the room of the names below each; "" for all others."""


def render() -> str:
    """The page's text."""
    package = griffe.load("sdpg_megatron", search_paths=[str(ROOT)])
    path = ROOT / "sdpg_megatron" / "__init__.pyi"
    stub = griffe.visit("stub", path, path.read_text(encoding="utf-8"))
    paths = {name: member.target_path for name, member in stub.members.items() if member.is_alias}
    pages: dict[str, list[str]] = {heading: [] for heading in GROUPS}
    for name, path in sorted(paths.items(), key=lambda pair: pair[0].lower()):
        room = path.split(".")[1]
        heading = next(heading for heading, own in GROUPS.items() if own in (room, ""))
        pages[heading].append(entry(name, package[path.removeprefix("sdpg_megatron.")]))
    return "\n".join([HEADER, *(f"## {heading}\n\n{''.join(entries)}" for heading, entries in pages.items())])


def entry(name: str, found: griffe.Object | griffe.Alias) -> str:
    """Heading, signature and docstring of a name; of a class also its fields and methods."""
    found = found.final_target if isinstance(found, griffe.Alias) else found
    lines = [f"### {name}\n\n"]
    if isinstance(found, griffe.Function):
        return "".join([*lines, signature(found), text(found)])
    lines.append(text(found))
    fields = [m for m in found.members.values() if isinstance(m, griffe.Attribute) and m.annotation]
    fields = [m for m in fields if not m.name.startswith("_")]
    if fields:
        lines.append("| field | type | |\n|---|---|---|\n")
        lines += [f"| `{m.name}` | `{escaped(str(m.annotation))}` | {escaped(summary(m))} |\n" for m in fields]
        lines.append("\n")
    for member in found.members.values():
        if isinstance(member, griffe.Function) and not member.name.startswith("_") and member.docstring:
            lines += [signature(member), text(member)]
    return "".join(lines)


def signature(function: griffe.Function) -> str:
    """The signature as a code block, a parameter a line if it is long."""
    line = str(function.signature())
    if len(line) > 100:
        head, _, rest = line.partition("(")
        inner, _, returns = rest.rpartition(")")
        line = f"{head}(\n" + "".join(f"    {part},\n" for part in split_parameters(inner)) + f"){returns}"
    return f"```python\n{line}\n```\n\n"


def split_parameters(parameters: str) -> list[str]:
    """Split at commas outside brackets."""
    parts, depth = [""], 0
    for character in parameters:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def text(found: griffe.Object) -> str:
    """The docstring; sections of arguments and errors keep their indentation as a block."""
    if found.docstring is None:
        return ""
    paragraphs = found.docstring.value.split("\n\n")
    blocks = [f"```text\n{p}\n```" if p.startswith(("Args:", "Returns:", "Raises:")) else p for p in paragraphs]
    return "\n\n".join(blocks) + "\n\n"


def summary(found: griffe.Object) -> str:
    return " ".join(found.docstring.value.split()) if found.docstring else ""


def escaped(cell: str) -> str:
    return cell.replace("|", "\\|")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    page = render()
    if parser.parse_args().check:
        return int(PAGE.read_text(encoding="utf-8") != page)
    PAGE.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
