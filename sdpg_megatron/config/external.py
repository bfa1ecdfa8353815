"""Load custom functions and classes, named as ``module:name`` in a configuration."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from sdpg_megatron.errors import ConfigError, did_you_mean

NO_EXTRAS: Mapping[str, str] = {}


def is_external(name: str) -> bool:
    """True if the name has the form ``module:name``."""
    module, _, attribute = name.partition(":")
    return bool(module and attribute)


def load_object(field: str, spec: str, *, extras: Mapping[str, str] = NO_EXTRAS) -> Callable[..., Any]:
    """Import the callable ``module:name``. Modules are also searched in the working directory.

    Args:
        field: configuration field, for errors.
        extras: optional packages, with the extra of this project that installs each.

    Raises:
        ConfigError: another form, a module that does not import, or no such callable in it.
    """
    module_name, _, name = spec.partition(":")
    if not is_external(spec):
        raise ConfigError(field, spec, "module:function", "write it as module:function")
    _search_working_directory()
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and (extra := extras.get(error.name or "")):
            fix = f"pip install -e '.[{extra}]'"
            raise ConfigError(field, spec, f"the package {error.name}, which is not installed", fix) from error
        expected = f"a module that imports ({type(error).__name__}: {error})"
        fix = "correct it, or put its folder on PYTHONPATH"
        if module_name.endswith(".py"):
            module_name = module_name.removesuffix(".py").strip("./").replace("/", ".")
            expected, fix = "the name of a module, not of a file", f"write {module_name}:{name}"
        raise ConfigError(field, spec, expected, fix) from error
    found: Callable[..., Any] | None = getattr(module, name, None)
    if not callable(found):
        names = [key for key, value in vars(module).items() if callable(value)]
        fix = did_you_mean(name, names) or f"define {name} in {module.__file__}"
        raise ConfigError(field, spec, f"a function or class of {module_name}", fix)
    return found


def _search_working_directory() -> None:
    """Append the working directory to the search path, as ``python -m`` does. Spawned processes inherit the path."""
    here = os.getcwd()
    if not (sys.flags.safe_path or here in sys.path or "" in sys.path):
        sys.path.append(here)
