"""Load a configuration from a YAML file and ``key=value`` overrides, before any process group exists.

Checks that need the model's own configuration are in `sdpg_megatron.architecture`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from sdpg_megatron.config import RunConfig
from sdpg_megatron.config.checks import check
from sdpg_megatron.config.field_values import NULLS, escaped, read_scalar, takes_text, typed
from sdpg_megatron.config.validation_errors import config_errors, section_at
from sdpg_megatron.config.yaml_reader import Plain, read_value, read_yaml
from sdpg_megatron.errors import ConfigError, fix_of


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read and check a run's configuration.

    Args:
        path: YAML file; relative paths in it are relative to the working directory.
        overrides: ``section.field=value`` items; see `apply_override`.

    Raises:
        ConfigError: unreadable file, repeated or unknown keys, values of the wrong type or range, or invalid
            combinations. One error shows all findings of a pass.
    """
    return parse(read_tree(path, overrides))


def read_tree(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Plain data of a configuration file with overrides, unchecked; see `load_config`. `parse` makes the configuration.

    Raises:
        ConfigError: unreadable file, invalid YAML, repeated keys, or an invalid override.
    """
    tree = read_yaml(_text_of(path), str(path))
    if not isinstance(tree, dict):
        raise ConfigError(str(path), type(tree).__name__, "a mapping of sections", "write `section:` lines")
    faults = []
    for override in overrides:
        try:
            apply_override(tree, override)
        except ConfigError as error:
            faults.append(error)
    if faults:
        raise ConfigError.joined(faults)
    return tree


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        expected = "a readable YAML file in UTF-8"
        raise ConfigError(str(path), error.strerror, expected, fix_of(error, path, reading=True)) from error
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), str(error), "a YAML file in UTF-8", "save it in that encoding") from error
    except ValueError as error:  # a NUL character in the path
        raise ConfigError("CONFIG", str(path), "the path of a YAML file", "correct the path") from error


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set ``a.b=value`` in a nested mapping, in place. Missing sections are created.

    The value of a text or path field is taken literally, unless it begins with a quote. Other values are read as YAML.

    Raises:
        ConfigError: no key and value, a section that is a single value, or invalid YAML.
    """
    key, separator, text = override.partition("=")
    *sections, name = key.split(".")
    if not separator or not all([*sections, name]):
        raise ConfigError("command line", override, "key=value", "for example objective.beta=0.001")
    for section in sections:
        if tree.get(section) in (None, *map(Plain, NULLS)):
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, dict):
            raise ConfigError(key, section, "a section", f"{section} is a single value; set it as a whole")
    tree[name] = _override_value(key, text.strip())


def _override_value(key: str, text: str) -> Any:
    *sections, name = key.split(".")
    section = section_at(sections)
    info = section.model_fields.get(name) if section is not None else None
    if info is not None and takes_text(info.annotation) and text[:1] not in ("'", '"'):
        return Plain(text)
    return read_value(text, key)


def parse(tree: Mapping[str, Any]) -> RunConfig:
    """Build a `RunConfig` from plain data and check it.

    Raises:
        ConfigError: shows all invalid fields; or, if there are none, all invalid combinations.
    """
    try:
        config = RunConfig.model_validate(typed(tree, RunConfig))
    except ValidationError as error:
        raise ConfigError.joined(config_errors(error)) from error
    check(config)
    return config


def dump(config: RunConfig) -> str:
    """Resolved configuration as YAML; `load` reads it back to an equal one."""
    return yaml.dump(escaped(config), Dumper=_Dumper, sort_keys=False)


class _Dumper(yaml.SafeDumper):
    """Quotes text that `read_scalar` would convert."""


def _text_node(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    plain = isinstance(read_scalar(text), str)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else "'")


_Dumper.add_representer(str, _text_node)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Map dotted field names to values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
