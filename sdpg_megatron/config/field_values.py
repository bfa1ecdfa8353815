"""Convert every value of a configuration to the type of its field.

Unquoted scalars follow the annotation of the field: text stays text, `~` and environment variables are expanded in
paths, numbers are decimal. A null section, list or mapping is empty. A value that cannot be converted becomes a
`Refused`, which validation reports under the name of the field.
"""

from __future__ import annotations

import os
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from sdpg_megatron.config.yaml_reader import Plain

ExpandedText = Annotated[str, "expanded"]
"""Text in which `~` and environment variables are expanded, such as the name or path of a program."""
INTEGER_BOUND = 2**63
"""Exclusive bound of whole numbers: torch, NumPy and file formats use 64 bits."""
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)")
_FLOAT = re.compile(r"[-+]?((0|[1-9][0-9]*)\.[0-9]*|\.[0-9]+|(0|[1-9][0-9]*)(?=[eE]))([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"([-+]?)\.(inf|nan)", re.IGNORECASE)
_MAX_DIGITS = 400
NULLS = ("", "~", "null", "Null", "NULL")
_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")
_VARIABLE = re.compile(r"\$(\$|[A-Za-z_]\w*|\{[^}]*\})")


@dataclass(frozen=True, slots=True)
class Refused:
    """A value that cannot be converted to the type of its field."""

    found: object
    fix: str
    expected: str | None = None
    """None: derived from the type and bounds of the field."""


def typed(tree: Mapping[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """Convert a configuration tree to the field types of a model. Unknown keys are kept; validation refuses them."""
    fields = model.model_fields
    return {
        key: _convert(value, fields[key].annotation) if key in fields else plain_data(value)
        for key, value in tree.items()
    }


def plain_data(value: Any) -> Any:
    """Convert a value without a declared type; unquoted scalars are read as in YAML's core schema."""
    if isinstance(value, Plain):
        return read_scalar(value)
    if isinstance(value, Mapping):
        return {key: plain_data(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_data(item) for item in value]
    return value


def read_scalar(text: str) -> Any:
    """Read an unquoted scalar as null, bool, int, float or else text."""
    if text in NULLS:
        return None
    if text in ("true", "True", "TRUE", "false", "False", "FALSE"):
        return text.lower() == "true"
    if len(text) <= _MAX_DIGITS and _INTEGER.fullmatch(text):
        return int(text)
    if len(text) <= _MAX_DIGITS and _FLOAT.fullmatch(text):
        return float(text)
    if found := _NOT_FINITE.fullmatch(text):
        return float(found[1] + found[2])
    return str(text)


def takes_text(annotation: Any) -> bool:
    """True if a field is a string, a path or a choice of words."""
    kind = without_none(annotation)
    words = get_args(kind) if get_origin(kind) is Literal else ()
    return kind in (str, Path, ExpandedText) or (bool(words) and all(isinstance(word, str) for word in words))


def _convert(value: Any, annotation: Any) -> Any:
    kind = without_none(annotation)
    if _is_null(value) and (kind is not annotation or annotation is Any):
        return None
    origin = get_origin(kind)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return _section(value, kind)
    if origin is dict:
        return _mapping(value, get_args(kind)[1])
    if origin is tuple:
        return _list(value, get_args(kind))
    if kind in (Path, ExpandedText):
        return read_path(value) if kind is Path else _as_text(read_path(value))
    if takes_text(kind):
        return _text(value)
    if kind in (int, float):
        return _number(value, kind)
    if kind is bool:
        return _switch(value)
    return plain_data(value)


def without_none(annotation: Any) -> Any:
    """Type of an optional field without None."""
    if get_origin(annotation) in (Union, types.UnionType):
        others = [part for part in get_args(annotation) if part is not type(None)]
        return others[0] if len(others) == 1 else annotation
    return annotation


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, Plain) and value in NULLS)


def _section(value: Any, model: type[BaseModel]) -> Any:
    if _is_null(value):
        return {}
    if isinstance(value, Mapping):
        return typed(value, model)
    if isinstance(value, model):
        return value
    return Refused(plain_data(value), "indent its fields below its name, one a line")


def _mapping(value: Any, item: Any) -> Any:
    if _is_null(value):
        return {}
    if isinstance(value, Mapping):
        return {key: _convert(part, item) for key, part in value.items()}
    return Refused(plain_data(value), "write {name: value}")


def _list(value: Any, items: tuple[Any, ...]) -> Any:
    if _is_null(value):
        return ()
    if not isinstance(value, list | tuple):
        found = plain_data(value)
        return Refused(found, f"write [{found}]" if isinstance(found, str | int | float) else "write [a, b]")
    if items[1:] == (...,):
        return tuple(_convert(part, items[0]) for part in value)
    if len(value) != len(items):
        return Refused(plain_data(value), f"write {len(items)} values")
    return tuple(_convert(part, item) for part, item in zip(value, items, strict=True))


def _text(value: Any) -> Any:
    if cut := _cut(value):
        return cut
    if isinstance(value, str) and not _is_null(value):
        return str(value)
    found = plain_data(value)
    return Refused(found, "put it in quotes" if found is not None else "write it; the word null itself goes in quotes")


def _cut(value: Any) -> Refused | None:
    """Refuse text cut by YAML at a ``#`` that looks like part of the text."""
    if not isinstance(value, Plain) or not value.after:
        return None
    fix = "put quotes around text that has a #; write a comment with a space after the #"
    return Refused(value + value.after, fix, f"text that YAML does not cut before {value.after.strip()!r}")


def read_path(value: Any) -> Any:
    """Expand `~` and environment variables in a path; `Refused` if that is not possible."""
    if isinstance(value, Path):
        return value
    if cut := _cut(value):
        return cut
    if not isinstance(value, str) or _is_null(value):
        return Refused(
            plain_data(value), "write one; null, and ~ alone, mean no value" if _is_null(value) else "quote it"
        )
    if not value.strip():
        return Refused(str(value), 'write one; "." is the working directory')
    if "\0" in value:
        return Refused(str(value), "remove the NUL character")
    if missing := [name for name in _variables(value) if name not in os.environ]:
        fix = f"export {missing[0]}, or write the path out, with $$ for a dollar sign"
        return Refused(str(value), fix, f"{missing[0]} in the environment")
    found = os.path.expanduser(value)
    if value.startswith("~") and found == value:
        return Refused(str(value), "write the path out, or ./~ for a name that begins so", "a user whose home is known")
    return Path(_VARIABLE.sub(_variable, found))


def _variable(match: re.Match[str]) -> str:
    return "$" if match[1] == "$" else os.environ[match[1].strip("{}")]


def escaped(config: BaseModel) -> dict[str, Any]:
    """Plain data of a configuration, with paths escaped so that `typed` reads them back unchanged."""
    tree = config.model_dump(mode="json")
    for name, info in type(config).model_fields.items():
        value, kind = getattr(config, name), without_none(info.annotation)
        if isinstance(value, BaseModel):
            tree[name] = escaped(value)
        elif kind in (Path, ExpandedText) and value is not None:
            tree[name] = _escaped_path(tree[name])
        elif get_origin(kind) is tuple and get_args(kind)[0] in (Path, ExpandedText):
            tree[name] = [_escaped_path(path) for path in tree[name]]
    return tree


def _escaped_path(path: str) -> str:
    return ("./" if path.startswith("~") else "") + path.replace("$", "$$")


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _variables(text: str) -> list[str]:
    return [name.strip("{}") for name in _VARIABLE.findall(text) if name != "$"]


def _number(value: Any, kind: type[int] | type[float]) -> Any:
    found = read_scalar(value) if isinstance(value, str) else value
    if isinstance(found, bool) or not isinstance(found, int | float):
        return Refused(plain_data(value), _number_fix(value, "8" if kind is int else "0.5 or 1e-6"))
    if kind is float:
        return found
    if isinstance(found, float):
        if not found.is_integer():
            return Refused(found, "round it")
        found = int(found)
    if not -INTEGER_BOUND <= found < INTEGER_BOUND:
        return Refused(found, "use a smaller one", "a whole number below 2^63")
    return found


def _number_fix(value: Any, example: str) -> str:
    text = str(value)
    if re.fullmatch(r"[-+]?0[0-9_]+", text):
        return "write it without leading zeros: YAML versions differ on whether those mean octal"
    if re.fullmatch(r"[-+]?0[xob]\w+", text):
        return "write it in decimal"
    if re.fullmatch(r"[-+]?[0-9]+(:[0-9]+)+(\.[0-9]*)?", text):
        return "write it as one decimal number, a time in seconds"
    return f"write digits, for example {example}"


def _switch(value: Any) -> Any:
    if isinstance(value, str) and value.lower() in (*_TRUE, *_FALSE):
        return value.lower() in _TRUE
    found = plain_data(value)
    if isinstance(found, int) and found in (0, 1):
        return bool(found)
    return Refused(found, "write true or false")
