"""Convert pydantic validation errors into `ConfigError`s with field, value, expectation and fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from sdpg_megatron.config import RunConfig
from sdpg_megatron.config.aliases import normal, translate
from sdpg_megatron.config.field_values import Refused, without_none
from sdpg_megatron.errors import ConfigError

SIMILAR, SIMILAR_ELSEWHERE = 0.8, 0.85
"""Minimum similarity (difflib ratio) of a suggested name: in the same section, and in other sections."""
_NOUNS: Mapping[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
}
_BOUNDS = {Ge: "at least", Gt: "over", Le: "at most", Lt: "below"}


def config_errors(error: ValidationError) -> list[ConfigError]:
    """One error per finding, in field order."""
    return [found for finding in error.errors() for found in _errors(finding["type"], finding["loc"], finding["input"])]


def _errors(kind: str, location: Sequence[str | int], value: Any) -> Iterator[ConfigError]:
    if kind == "extra_forbidden":
        yield from _unknown([str(part) for part in location], value)
        return
    field, info = _dotted(location), _field(location)
    is_item = isinstance(location[-1], int)
    expected = _item_description(info) if is_item else _description(info)
    if kind == "missing":
        yield ConfigError(field, None, expected, f"set {field} in the file or on the command line")
    elif isinstance(value, Refused):
        yield ConfigError(field, value.found, value.expected or expected, value.fix)
    else:
        expected = "a finite number" if kind == "finite_number" else expected
        yield ConfigError(
            field, value, expected, f"set {field} to such a value" if is_item else _fix(field, info, value)
        )


def _dotted(location: Sequence[str | int]) -> str:
    """Location as ``section.field``, or ``section.field[0]`` for an item of a list."""
    first, *others = location
    return str(first) + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in others)


def _unknown(path: list[str], value: Any) -> Iterator[ConfigError]:
    """Errors of an unknown key; for a section of another framework, one for each key with a counterpart."""
    is_section = isinstance(value, Mapping) and bool(value)
    hint = _typo(path) if is_section else _suggestion(path)
    leaves = [] if hint or not is_section else [(leaf, _suggestion(leaf)) for leaf in _leaves(path, value)]
    known = [(leaf, found) for leaf, found in leaves if found]
    for leaf, found in known or [(path, hint or f"known here: {', '.join(_names(path[:-1]))}")]:
        yield ConfigError(".".join(leaf), leaf[-1], "a known key", found)


def _leaves(path: list[str], value: Any) -> Iterator[list[str]]:
    if isinstance(value, Mapping) and value:
        for name, part in value.items():
            yield from _leaves([*path, str(name)], part)
    else:
        yield path


def _suggestion(path: list[str]) -> str | None:
    """Fix for an unknown key: its counterpart, a field of the same name in another section, or a similar name."""
    name = normal(path[-1])
    elsewhere: dict[str, list[str]] = {}
    for field in _all_fields(RunConfig):
        elsewhere.setdefault(normal(field.rpartition(".")[2]), []).append(field)
    if counterpart := translate(path):
        return counterpart
    if name in elsewhere:
        return _did_you_mean(elsewhere[name])
    if found := _typo(path):
        return found
    near = difflib.get_close_matches(name, list(elsewhere), n=1, cutoff=SIMILAR_ELSEWHERE)
    return _did_you_mean(elsewhere[near[0]]) if near else None


def _typo(path: list[str]) -> str | None:
    """Suggest fields of the same section with a similar name."""
    here = {normal(field): field for field in _names(path[:-1])}
    near = difflib.get_close_matches(normal(path[-1]), list(here), n=3, cutoff=SIMILAR)
    return _did_you_mean([here[one] for one in near]) if near else None


def _did_you_mean(fields: Sequence[str]) -> str:
    return f"did you mean {' or '.join(map(repr, fields))}?"


def _all_fields(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted names of all fields and sections, depth first."""
    for name, info in model.model_fields.items():
        yield prefix + name
        if _is_section(kind := without_none(info.annotation)):
            yield from _all_fields(kind, f"{prefix}{name}.")


def _names(sections: Sequence[str]) -> list[str]:
    """Field names of a section; empty if there is no such section."""
    section = section_at(sections)
    return [] if section is None else list(section.model_fields)


def section_at(path: Sequence[str | int]) -> type[BaseModel] | None:
    """Section class at a path of names; None if there is none."""
    kind: Any = RunConfig
    for name in path:
        if get_origin(kind) is dict:
            kind = get_args(kind)[1]
        elif _is_section(kind) and name in kind.model_fields:
            kind = without_none(kind.model_fields[str(name)].annotation)
        else:
            return None
    return kind if _is_section(kind) else None


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _field(location: Sequence[str | int]) -> FieldInfo:
    """Field at a location, or the field with the list or mapping that contains it."""
    for end in range(len(location), 0, -1):
        section = section_at(location[: end - 1])
        if section is not None and (found := section.model_fields.get(str(location[end - 1]))):
            return found
    raise AssertionError(f"no field at {location}")


def _description(info: FieldInfo) -> str:
    """Type and bounds of a field, with null if it is optional."""
    kind = without_none(info.annotation)
    return _bounded(kind, info.metadata) + ("" if kind is info.annotation else "; or null")


def _item_description(info: FieldInfo) -> str:
    """Type and bounds of the items of a list field."""
    return _bounded(get_args(without_none(info.annotation))[0], [])


def _bounded(kind: Any, metadata: Sequence[Any]) -> str:
    if get_origin(kind) is Annotated:
        kind, *more = get_args(kind)
        return _bounded(kind, [*metadata, *more])
    metadata = [one for part in metadata for one in (part.metadata if isinstance(part, FieldInfo) else [part])]
    bounds = [
        f"{word} {getattr(one, bound.__name__.lower())!r}"
        for one in metadata
        for bound, word in _BOUNDS.items()
        if isinstance(one, bound)
    ]
    return _noun(kind) + (f", {' and '.join(bounds)}" if bounds else "")


def _noun(kind: Any) -> str:
    origin, items = get_origin(kind), get_args(kind)
    if origin is Literal:
        *others, last = map(repr, items)
        return f"{', '.join(others)} or {last}" if others else str(last)
    if origin is tuple and items[1:] == (...,):
        return f"a list, each item {_bounded(items[0], [])}"
    if origin is tuple:
        return f"a list of {len(items)}, each item {_bounded(items[0], [])}"
    if origin is dict:
        return "a mapping"
    if _is_section(kind):
        return "a section of fields"
    return _NOUNS.get(kind, "another value")


def _fix(field: str, info: FieldInfo, value: Any) -> str:
    choices = get_args(without_none(info.annotation)) if get_origin(without_none(info.annotation)) is Literal else ()
    near = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=2, cutoff=0.6)
    if len(near) == 1:
        return f"did you mean {near[0]!r}?"
    if info.default is PydanticUndefined:
        return f"set {field} to such a value"
    if choices:
        return "choose one of these"
    if field.startswith("objective.") or isinstance(info.default, tuple):  # defaults depend on the method
        return f"set {field} to such a value, or leave it out"
    default = "null" if info.default is None else repr(info.default)
    return f"set {field} to such a value, or leave it out for {default}"
