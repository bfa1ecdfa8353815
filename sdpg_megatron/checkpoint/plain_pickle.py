"""Pickles that say nothing but which tensors lie where.

torch's distributed checkpoints describe themselves in a pickle, which torch reads with no restriction: what a stranger
has written there would be run.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from sdpg_megatron.errors import CheckpointError

_DCP = "torch.distributed.checkpoint"
_ALLOWED = frozenset(
    {
        *((f"{_DCP}.metadata", name) for name in (
            "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
            "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
        )),
        *((f"{_DCP}.planner", name) for name in (
            "BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType",
        )),
        *((f"{_DCP}.filesystem", name) for name in ("_StorageInfo", "_StoragePrefix")),
        *(("torch", name) for name in (
            "Size", "bfloat16", "bool", "float16", "float32", "float64", "int16", "int32", "int64", "int8", "uint8",
            "float8_e4m3fn", "float8_e5m2",
        )),
        ("torch.serialization", "_get_layout"),
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
        ("pathlib", "PurePosixPath"),
        ("pathlib._local", "PosixPath"),  # where Python 3.13 has it
        ("_io", "BytesIO"),
    }
)  # fmt: skip
"""What such a description is made of, as (module, name)."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no description of tensors needs")
        return super().find_class(module, name)


def read_metadata(path: Path) -> Metadata:
    """The description of a distributed checkpoint's tensors.

    Args:
        path: the file ``.metadata``.

    Raises:
        CheckpointError: the file cannot be read, is damaged, or names anything else than parts of a description.
    """
    try:
        with path.open("rb") as file:
            found = _Unpickler(file).load()
    except Exception as error:  # a damaged pickle may raise anything
        raise CheckpointError(
            f"{path}: found {error}, expected a description of tensors. Fix: copy it again"
        ) from error
    if not isinstance(found, Metadata) or not isinstance(found.storage_data, dict):
        raise CheckpointError(f"{path}: found a {type(found).__name__}, expected a description of tensors")
    return found
