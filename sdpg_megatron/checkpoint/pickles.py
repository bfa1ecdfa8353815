"""Restricted unpickling of a checkpoint's metadata. Unrestricted, a pickle from elsewhere could run code."""

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
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from sdpg_megatron.errors import CheckpointError

TENSOR_LIST = ".metadata"
"""Metadata file of `torch.distributed.checkpoint`: each tensor's shape, dtype, and position in the files."""
DESCRIPTIONS = ("torch.distributed.checkpoint.", "megatron.core.dist_checkpointing.")
"""Modules with data classes and enumerations that only describe tensors and are safe to construct."""
OTHERS = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib._local", "PosixPath"),  # Python 3.13
    ("_io", "BytesIO"),
}
_ONLY_WEIGHTS = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@contextmanager
def only_weights() -> Iterator[None]:
    """Make torch load tensors and plain data only, also where torch or Megatron ask for arbitrary objects."""
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
    """Read a checkpoint's metadata.

    Raises:
        CheckpointError: it is missing or damaged, or pickles anything but tensor descriptions.
    """
    path = checkpoint / TENSOR_LIST
    try:
        with path.open("rb") as file:
            found = _Unpickler(file).load()
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except Exception as error:  # a damaged pickle may raise anything
        raise _no_list(path, f"{type(error).__name__}: {error}") from error
    try:
        return _checked(found)
    except (AttributeError, TypeError, ValueError) as error:  # an object lacks a field of its class
        raise _no_list(path, str(error)) from error


def _checked(found: Any) -> Metadata:
    """Validate types and ranges that readers rely on. Raises AttributeError, TypeError or ValueError."""
    if not isinstance(found, Metadata):
        raise TypeError(f"a {type(found).__name__}")
    for key, tensor in found.state_dict_metadata.items():
        if isinstance(tensor, TensorStorageMetadata):
            _check_tensor(key, tensor)
    for index, info in found.storage_data.items():
        where = (index.fqn, info.relative_path, info.offset, info.length)
        known = isinstance(index, MetadataIndex) and isinstance(index.fqn, str) and isinstance(info.relative_path, str)
        if not known or not _are_counts((info.offset, info.length)):
            raise ValueError(f"a chunk at {where!r}")
    return found


def _check_tensor(key: Any, tensor: TensorStorageMetadata) -> None:
    if not isinstance(key, str) or not isinstance(tensor.properties.dtype, torch.dtype) or not _are_counts(tensor.size):
        raise ValueError(f"a tensor {key!r} of {tensor.size!r}")
    for chunk in tensor.chunks:
        if not _are_counts(chunk.offsets) or not _are_counts(chunk.sizes):
            raise ValueError(f"a chunk of {key!r} with {chunk!r}")
        for start, length, size in zip(chunk.offsets, chunk.sizes, tensor.size, strict=True):
            if start + length > size:
                raise ValueError(f"a chunk of {key!r} with {chunk!r}, beyond {list(tensor.size)}")


def _are_counts(numbers: Any) -> bool:
    return all(type(number) is int and number >= 0 for number in numbers)


def _no_list(path: Path, found: str) -> CheckpointError:
    return CheckpointError(f"{path}: found {found}, expected torch's list of tensors. Fix: copy it again")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Return an allowed class. Raises `CheckpointError` for any other."""
        if (module, name) == ("builtins", "getattr"):
            return _member
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype | torch.layout):
            return found
        if (module, name) in OTHERS or (module.startswith(DESCRIPTIONS) and "." not in name):
            found = super().find_class(module, name)
            if (module, name) in OTHERS or _describes(found):
                return found
        raise CheckpointError(
            f"found {module}.{name}, expected only torch's and Megatron's descriptions of tensors. "
            "Fix: do not read this checkpoint: it would run code"
        )


def _member(kind: Any, name: Any) -> Any:
    """Restricted getattr, with which early releases of Python 3.11 pickle members of enumerations."""
    if isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__:
        return kind[name]
    raise CheckpointError(
        f"found builtins.getattr of {kind!r}, expected a member of an enumeration. "
        "Fix: do not read this checkpoint: it would run code"
    )


def _describes(found: Any) -> bool:
    return isinstance(found, type) and (dataclasses.is_dataclass(found) or issubclass(found, Enum))
