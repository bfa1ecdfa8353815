"""Read rows of tensors from a Megatron checkpoint of the format torch_dist, without a model or process group.

A checkpoint is a folder of files; each is a sequence of ``torch.save`` archives with one chunk of one tensor. The
tensors are unsharded, independent of the layout of the run: a layer's parameter is a slice of one tensor over all
layers.

`torch.distributed.checkpoint.load` is not used: it loads the whole chunk of every row that it reads.
"""

from __future__ import annotations

import json
import pickle
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

from sdpg_megatron.checkpoint.pickles import TENSOR_LIST, read_tensor_list
from sdpg_megatron.errors import CheckpointError, reason_of

BACKEND_FILE = "metadata.json"
COMMON_FILE = "common.pt"
COMMON_OBJECT = "common_state/shard_0_1"
"""Key of the data other than tensors: a separate file with megatron-core 0.16.1, among the tensors with 0.19.2."""
BACKEND = "torch_dist"
_NUMBERS = "data/0"
"""Record of an archive with the data of its only tensor."""

Index = tuple[int, ...]
"""Leading indices of a slice: the layer, and an expert in it."""


class TorchDist:
    """Tensors of a checkpoint. Files are opened on use, and read in parts."""

    def __init__(self, folder: Path) -> None:
        """Read the metadata. Raises `CheckpointError` if `folder` is not such a checkpoint, or damaged."""
        self.folder = folder
        check_backend(folder)
        self._metadata = read_tensor_list(folder)
        self._chunks: dict[str, dict[Index, list[ChunkStorageMetadata]]] = {}
        self._offsets: dict[MetadataIndex, int] = {}

    @cached_property
    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """Shape, dtype and chunks of each tensor, by key."""
        found = self._metadata.state_dict_metadata.items()
        return {key: value for key, value in found if isinstance(value, TensorStorageMetadata)}

    def common(self) -> dict[str, Any]:
        """Data other than tensors: Megatron-LM's arguments, iteration, learning-rate schedule.

        Only plain data and the classes of Megatron-LM's arguments are unpickled.

        Raises:
            CheckpointError: it is missing, damaged, or contains other objects.
        """
        path = self.folder / COMMON_FILE
        try:
            try:
                found = self._read_common(path, [Namespace, SimpleNamespace])
            except pickle.UnpicklingError:
                found = self._read_common(path, trusted_globals())  # slow to import
        except CheckpointError:
            raise
        except Exception as error:  # a damaged archive may raise anything
            raise CheckpointError(f"{path}: found {error}, expected plain data. Fix: copy it again") from error
        if not isinstance(found, dict):
            raise CheckpointError(f"{path}: found a {type(found).__name__}, expected a dictionary")
        return found

    def _read_common(self, path: Path, classes: list[Any]) -> Any:
        entry = MetadataIndex(COMMON_OBJECT)
        with torch.serialization.safe_globals(classes):
            if entry not in self._metadata.storage_data:
                return torch.load(path, map_location="cpu", weights_only=True)
            with self._open(entry) as archive:
                (found,) = torch.load(archive, map_location="cpu", weights_only=True)
                return found

    def rows(self, key: str, index: Index, start: int, length: int) -> Tensor:
        """Read `length` rows from `start` of the slice of tensor `key` at `index`, as stored.

        Raises:
            CheckpointError: a part of it is missing or damaged.
        """
        meta, dim = self.tensors[key], len(index)
        found = torch.empty(length, *meta.size[dim + 1 :], dtype=meta.properties.dtype)  # lazily allocated
        filled = 0
        for chunk in self._chunks_at(key, index):
            first = max(start, chunk.offsets[dim])
            last = min(start + length, chunk.offsets[dim] + chunk.sizes[dim])
            if first < last:
                part = self._read(key, meta, chunk, index, first, last)
                if part.shape == found.shape:
                    return part
                target = found[first - start : last - start]
                for axis, (offset, size) in enumerate(
                    zip(chunk.offsets[dim + 1 :], chunk.sizes[dim + 1 :], strict=True), start=1
                ):
                    target = target.narrow(axis, offset, size)
                target.copy_(part)
                filled += part.numel()
        if filled != found.numel():
            raise CheckpointError(
                f"{self.folder / TENSOR_LIST}: {key!r} at {list(index)}: found {filled} elements of rows {start} to "
                f"{start + length}, expected {found.numel()}. Fix: copy the checkpoint again"
            )
        return found

    def faults(self) -> list[CheckpointError]:
        """Errors for files that are missing, or shorter than the metadata says."""
        ends: defaultdict[str, int] = defaultdict(int)
        for info in self._metadata.storage_data.values():
            ends[info.relative_path] = max(ends[info.relative_path], info.offset + info.length)
        return [fault for name, end in sorted(ends.items()) if (fault := self._fault(name, end))]

    def _fault(self, name: str, end: int) -> CheckpointError | None:
        path = self._file(name)
        size = path.stat().st_size if path.is_file() else None
        if size is not None and size >= end:
            return None
        found = "no such file" if size is None else f"{size} bytes"
        return CheckpointError(f"{path}: found {found}, expected {end} bytes. Fix: copy the file again")

    def _chunks_at(self, key: str, index: Index) -> list[ChunkStorageMetadata]:
        if key not in self._chunks:
            dims, groups = len(index), defaultdict[Index, list[ChunkStorageMetadata]](list)
            for chunk in self.tensors[key].chunks:
                if any(size != 1 for size in chunk.sizes[:dims]):
                    raise CheckpointError(f"{self.folder}: {key!r}: found several layers in a chunk, expected one")
                groups[tuple(chunk.offsets[:dims])].append(chunk)
            self._chunks[key] = groups
        return self._chunks[key].get(index, [])

    def _read(
        self, key: str, meta: TensorStorageMetadata, chunk: ChunkStorageMetadata, index: Index, first: int, last: int
    ) -> Tensor:
        """Read rows `first` to `last` (row numbers of the whole slice) from a chunk."""
        dim = len(index)
        columns, dtype = prod(chunk.sizes[dim + 1 :]), meta.properties.dtype
        entry = MetadataIndex(key, chunk.offsets)
        offset = self._offset(entry, chunk, dtype) + (first - chunk.offsets[dim]) * columns * dtype.itemsize
        path = self._file(self._metadata.storage_data[entry].relative_path)
        buffer = torch.empty((last - first) * columns, dtype=dtype)
        with path.open("rb") as file:
            file.seek(offset)
            if file.readinto(buffer.view(torch.uint8).numpy().data) != buffer.nbytes:
                raise CheckpointError(f"{path}: found the end of the file within {key!r}. Fix: copy it again")
        return buffer.view(last - first, *chunk.sizes[dim + 1 :])

    def _offset(self, entry: MetadataIndex, chunk: ChunkStorageMetadata, dtype: torch.dtype) -> int:
        """Offset of a chunk's contiguous data in its file, in bytes."""
        if entry not in self._offsets:
            info = self._metadata.storage_data.get(entry)
            if info is None or info.transform_descriptors:
                raise CheckpointError(f"{self.folder / TENSOR_LIST}: {entry.fqn!r}: a chunk is missing or compressed")
            self._offsets[entry] = info.offset + self._offset_in_archive(entry, chunk, dtype)
        return self._offsets[entry]

    def _offset_in_archive(self, entry: MetadataIndex, chunk: ChunkStorageMetadata, dtype: torch.dtype) -> int:
        try:
            with self._open(entry) as archive, torch.serialization.skip_data():  # shape and dtype only
                tensor = torch.load(archive, map_location="cpu", weights_only=True)
                archive.seek(0)
                records: Any = torch._C.PyTorchFileReader(archive)  # incomplete in torch's stubs
                start = records.get_record_offset(_NUMBERS)
        except CheckpointError:
            raise
        except Exception as error:  # a damaged archive may raise anything
            raise CheckpointError(f"{self.folder}: {entry.fqn!r}: {error}. Fix: copy the checkpoint again") from error
        found = (tuple(tensor.shape), tensor.dtype, tensor.is_contiguous())
        if found != (expected := (tuple(chunk.sizes), dtype, True)):
            raise CheckpointError(
                f"{self.folder}: {entry.fqn!r}: found (shape, type, contiguous) {found}, expected {expected}"
            )
        return int(start) + int(tensor.storage_offset()) * dtype.itemsize

    @contextmanager
    def _open(self, entry: MetadataIndex) -> Iterator[IO[bytes]]:
        info = self._metadata.storage_data[entry]
        if fault := self._fault(info.relative_path, info.offset + info.length):
            raise fault
        with self._file(info.relative_path).open("rb") as file:
            yield cast(IO[bytes], _create_file_view(file, info.offset, info.length))

    def _file(self, name: str) -> Path:
        if Path(name).name != name:
            raise CheckpointError(f"{self.folder / TENSOR_LIST}: found the file {name!r}, expected one of the folder")
        return self.folder / name


def check_backend(folder: Path) -> None:
    """Raise `CheckpointError` if a folder is not a Megatron checkpoint of the format torch_dist."""
    path = folder / BACKEND_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        found = reason_of(error) if isinstance(error, OSError) else repr(error)
        raise CheckpointError(f"{path}: found {found}, expected a Megatron checkpoint. Fix: check the path") from error
    if found != BACKEND:
        raise CheckpointError(f"{path}: found the format {found!r}, expected {BACKEND!r}. Fix: save it as {BACKEND}")


def trusted_globals() -> list[Any]:
    """Classes that megatron-core allows in the arguments of a Megatron-LM checkpoint, besides plain data."""
    from megatron.core.safe_globals import SAFE_GLOBALS  # the import takes seconds

    return list(SAFE_GLOBALS)
