"""Self-Distilled Policy Gradient on Megatron-core: the public interface, documented in docs/api.md.

`__init__.pyi` lists the names. Each is imported on first use: ``import sdpg_megatron`` needs neither torch nor
megatron-core.
"""

import ast
import importlib
from pathlib import Path
from typing import Any

__version__ = "0.1.0"


def _read_sources() -> dict[str, tuple[str, str]]:
    """Module and name of each exported name."""
    stub = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name: (str(node.module), alias.name) for node in imports for alias in node.names}


_SOURCES = _read_sources()
__all__ = [*_SOURCES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _SOURCES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _SOURCES[name]
    return getattr(importlib.import_module(module), attribute)
