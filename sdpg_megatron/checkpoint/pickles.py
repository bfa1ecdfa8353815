"""The pickles of a checkpoint: a stranger's would be run where torch reads them with no restriction."""

from __future__ import annotations

import dataclasses
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from sdpg_megatron.errors import CheckpointError

TENSOR_LIST = ".metadata"
"""What lies where, as `torch.distributed.checkpoint` keeps it."""
DESCRIPTIONS = ("torch.distributed.checkpoint.", "megatron.core.dist_checkpointing.")
"""Modules whose data classes and enumerations describe tensors, and do nothing when they are made."""
OTHERS = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib._local", "PosixPath"),  # where Python 3.13 has it
    ("_io", "BytesIO"),
}
_ONLY_WEIGHTS = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@contextmanager
def only_weights() -> Iterator[None]:
    """Have torch read tensors and plain data alone, also where torch and Megatron ask it for any object."""
    before = os.environ.get(_ONLY_WEIGHTS)
    os.environ[_ONLY_WEIGHTS] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_ONLY_WEIGHTS]
        else:
            os.environ[_ONLY_WEIGHTS] = before


def read_tensor_list(checkpoint: Path) -> Metadata:
    """A checkpoint's list of tensors.

    Raises:
        CheckpointError: it is missing or damaged, or a pickle of anything but descriptions.
    """
    path = checkpoint / TENSOR_LIST
    try:
        with path.open("rb") as file:
            found = _Unpickler(file).load()
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except Exception as error:  # a damaged pickle may raise anything
        raise _no_list(path, f"{type(error).__name__}: {error}") from error
    if not isinstance(found, Metadata) or not isinstance(found.storage_data, dict):
        raise _no_list(path, f"a {type(found).__name__}")
    return found


def _no_list(path: Path, found: str) -> CheckpointError:
    return CheckpointError(f"{path}: found {found}, expected torch's list of tensors. Fix: copy it again")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """What a pickle asks for, if it may."""
        if (module, name) == ("builtins", "getattr"):
            return _member
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype | torch.layout):
            return found
        if (module, name) in OTHERS or (module.startswith(DESCRIPTIONS) and "." not in name):
            found = super().find_class(module, name)
            if (module, name) in OTHERS or _describes(found):
                return found
        raise CheckpointError(
            f"found {module}.{name}, expected torch's and Megatron's descriptions of tensors alone. "
            "Fix: do not read this checkpoint: it would run code"
        )


def _member(kind: Any, name: Any) -> Any:
    """In the place of getattr, by which early releases of Python 3.11 pickle members of enumerations: these alone."""
    if isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__:
        return kind[name]
    raise CheckpointError(
        f"found builtins.getattr of {kind!r}, expected a member of an enumeration. "
        "Fix: do not read this checkpoint: it would run code"
    )


def _describes(found: Any) -> bool:
    return isinstance(found, type) and (dataclasses.is_dataclass(found) or issubclass(found, Enum))
