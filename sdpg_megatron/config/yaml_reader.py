"""Read YAML without implicit types: unquoted scalars stay text, and repeated keys are errors.

YAML 1.1 reads `1:30` as 90, `017` as 15, `on` as True and `2026-11-27` as a date. `field_values` converts each scalar
to the type of its field instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from sdpg_megatron.errors import ConfigError

MAX_VALUES = 100_000
"""Maximum number of values in a file. Nested aliases grow exponentially."""
_PREFIX = "tag:yaml.org,2002:"
_NAME_AFTER = re.compile(r"[ \t]+#[^\s#!][^\n]*")
_QUOTE = "quote text that holds one of : # [ ] { } & * ! | > % @ `, and indent with spaces"


class Plain(str):
    """Unquoted YAML scalar: its type depends on the field."""

    __slots__ = ("after",)
    after: str
    """Rest of the line that may have been meant as part of the text: a ``#`` followed by a word without a space."""

    def __new__(cls, text: str, after: str = "") -> Plain:
        found = super().__new__(cls, text)
        found.after = after
        return found


class _Loader(yaml.SafeLoader):
    """Composes nodes. Every scalar without an explicit tag is text."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  # PyYAML's own class attribute


def read_yaml(text: str, source: str) -> Any:
    """Parse one YAML document into dicts, lists, `str` (quoted) and `Plain` (unquoted); None for an empty document.

    Args:
        source: name for errors, as ``source:line``.

    Raises:
        ConfigError: invalid YAML, repeated keys (all are listed, with both lines), a tag, or a recursive alias.
    """
    reader = _Reader(source)
    value = reader.value(_compose(text, source))
    if reader.errors:
        raise ConfigError.joined(reader.errors)
    return value


def read_value(text: str, source: str) -> Any:
    """Parse a single value, such as the right-hand side of a command-line override.

    Raises:
        ConfigError: as `read_yaml`; or the text has a comment, which would cut the value.
    """
    try:
        node = _compose(text, source)
    except ConfigError as error:
        raise ConfigError(source, text, "a YAML value", "quote it, or close its brackets and quotes") from error
    start, end = (0, 0) if node is None else (node.start_mark.index, node.end_mark.index)
    if (text[:start] + text[end:]).strip():
        raise ConfigError(source, text, "a YAML value without a comment", "put quotes around a value that has a #")
    return read_yaml(text, source)


def _compose(text: str, source: str) -> Any:
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        where = f"{source}:{error.problem_mark.line + 1}" if error.problem_mark else source
        found = " ".join(filter(None, (error.problem, error.context)))
        raise ConfigError(where, found, "valid YAML", _QUOTE) from error
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise ConfigError(source, " ".join(str(error).split()), "valid YAML", "remove that character") from error
    except RecursionError as error:
        raise ConfigError(source, "values nested too deeply", "sections of fields", "check the brackets") from error


class _Reader:
    """Converts nodes into values and collects errors."""

    def __init__(self, source: str) -> None:
        self.errors: list[ConfigError] = []
        self._source = source
        self._count = 0
        self._open: list[yaml.Node] = []

    def value(self, node: yaml.Node | None) -> Any:
        if node is None:
            return None
        self._count += 1
        if node in self._open or self._count > MAX_VALUES:
            found = "a recursive alias, or one that expands to very many values"
            raise ConfigError(self._where(node), found, "a finite configuration", "write the values out")
        self._open.append(node)
        try:
            return self._value(node)
        finally:
            self._open.pop()

    def _value(self, node: yaml.Node) -> Any:
        kind = node.tag.removeprefix(_PREFIX)
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return self._mapping(node)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return [self.value(item) for item in node.value]
        if isinstance(node, yaml.ScalarNode) and kind in ("str", "int", "float", "bool", "null"):
            return Plain(node.value, _after(node.end_mark)) if node.style is None else str(node.value)
        self._add(node, f"the tag {node.tag}", "a plain value", "remove the tag")
        return None

    def _mapping(self, node: yaml.MappingNode) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        found: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                self._add(key_node, "a list or mapping as a key", "a name", "quote it if it is a name")
                continue
            key = str(key_node.value)
            if key == "<<" and key_node.style is None:
                merged |= self._merged(value_node)
                continue
            if key in found:
                fix = f"merge it with the {key!r} of line {lines[key]}, or remove one"
                self._add(key_node, f"{key!r} again, after line {lines[key]}", "each key once", fix)
            lines.setdefault(key, line)
            found[key] = self.value(value_node)
        return {**merged, **found}

    def _merged(self, node: yaml.Node) -> dict[str, Any]:
        """Content of a merge key. Of several mappings the first takes precedence."""
        merged: dict[str, Any] = {}
        for part in reversed(list(_parts(node))):
            value = self.value(part)
            if isinstance(value, dict):
                merged |= value
            else:
                self._add(part, "a merge key (<<) with another value", "a mapping", "refer to a mapping")
        return merged

    def _add(self, node: yaml.Node, found: str, expected: str, fix: str) -> None:
        where = self._where(node)
        self.errors.append(ConfigError.of_text(where, f"{where}: found {found}, expected {expected}. Fix: {fix}"))

    def _where(self, node: yaml.Node) -> str:
        return f"{self._source}:{node.start_mark.line + 1}"


def _after(end: yaml.Mark) -> str:
    match = _NAME_AFTER.match(end.buffer, end.pointer) if end.buffer is not None else None
    return match[0].rstrip() if match else ""


def _parts(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        yield from node.value
    else:
        yield node
