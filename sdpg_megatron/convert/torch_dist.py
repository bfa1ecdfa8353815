"""Rows of the tensors in a Megatron checkpoint of the format torch_dist, with no model and no process group.

A checkpoint is a folder of files, each a row of archives that ``torch.save`` wrote; one archive is one chunk of one
tensor. The tensors are whole ones, independent of the layout that they were saved under: a layer's parameter is a slice
of one tensor over all layers.
"""

from __future__ import annotations

import io
import json
import pickle
from argparse import Namespace
from collections import defaultdict
from functools import cached_property
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from sdpg_megatron.checkpoint.pickles import TENSOR_LIST, read_tensor_list
from sdpg_megatron.errors import CheckpointError, reason_of

BACKEND_FILE = "metadata.json"
COMMON_FILE = "common.pt"
COMMON_OBJECT = "common_state/shard_0_1"
"""Where megatron-core keeps what is no tensor: 0.16.1 in a file of its own, 0.19.2 among the tensors."""
BACKEND = "torch_dist"
_NUMBERS = "data/0"
"""The record of an archive with the numbers of its only tensor."""

Index = tuple[int, ...]
"""Leading indices of a slice: of a layer, and of an expert in it."""


class _Place(NamedTuple):
    """Where a chunk's numbers lie, end to end."""

    file: Path
    offset: int


class TorchDist:
    """The tensors of a checkpoint. Files are opened when they are needed, and read in the parts that are asked for."""

    def __init__(self, folder: Path) -> None:
        """Raises `CheckpointError` where `folder` is no such checkpoint, or its description is damaged."""
        self.folder = folder
        check_backend(folder)
        self._metadata = read_tensor_list(folder)
        self._places: dict[MetadataIndex, _Place] = {}

    @cached_property
    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """Shape and type of each tensor, by its key."""
        found = self._metadata.state_dict_metadata.items()
        return {key: value for key, value in found if isinstance(value, TensorStorageMetadata)}

    def common(self) -> dict[str, Any]:
        """What is no tensor: Megatron-LM's arguments, iteration, the learning-rate schedule.

        Only plain data and the classes that Megatron-LM's arguments consist of are read.

        Raises:
            CheckpointError: it is missing, damaged, or has anything else in it.
        """
        path = self.folder / COMMON_FILE
        try:
            try:
                found = self._read_common(path, [Namespace, SimpleNamespace])
            except pickle.UnpicklingError:
                found = self._read_common(path, trusted_globals())
        except CheckpointError:
            raise
        except Exception as error:  # a damaged archive may raise anything
            raise CheckpointError(f"{path}: found {error}, expected plain data. Fix: copy it again") from error
        if not isinstance(found, dict):
            raise CheckpointError(f"{path}: found a {type(found).__name__}, expected a dictionary")
        return found

    def _read_common(self, path: Path, classes: list[Any]) -> Any:
        at = MetadataIndex(COMMON_OBJECT)
        with torch.serialization.safe_globals(classes):
            if at not in self._metadata.storage_data:
                return torch.load(path, map_location="cpu", weights_only=True)
            with self._open(at) as archive:
                (found,) = torch.load(archive, map_location="cpu", weights_only=True)
                return found

    def rows(self, key: str, index: Index, start: int, length: int) -> Tensor:
        """`length` rows from `start` of the slice of tensor `key` at `index`, as stored.

        Raises:
            CheckpointError: a part of it is missing or damaged.
        """
        meta, dim = self.tensors[key], len(index)
        found = torch.empty(length, *meta.size[dim + 1 :], dtype=meta.properties.dtype)  # no memory before it is filled
        filled = 0
        for chunk in self._chunks(key, index):
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
                f"{self.folder / TENSOR_LIST}: {key!r} at {list(index)}: found {filled} numbers of rows {start} to "
                f"{start + length}, expected {found.numel()}. Fix: copy the checkpoint again"
            )
        return found

    def faults(self) -> list[CheckpointError]:
        """Files that are missing, or shorter than the description says."""
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

    def _chunks(self, key: str, index: Index) -> list[ChunkStorageMetadata]:
        return self._by_index(key, len(index)).get(index, [])

    def _by_index(self, key: str, dims: int) -> dict[Index, list[ChunkStorageMetadata]]:
        if key not in self._grouped:
            groups: defaultdict[Index, list[ChunkStorageMetadata]] = defaultdict(list)
            for chunk in self.tensors[key].chunks:
                if any(size != 1 for size in chunk.sizes[:dims]):
                    raise CheckpointError(f"{self.folder}: {key!r}: found several layers in a chunk, expected one")
                groups[tuple(chunk.offsets[:dims])].append(chunk)
            self._grouped[key] = groups
        return self._grouped[key]

    @cached_property
    def _grouped(self) -> dict[str, dict[Index, list[ChunkStorageMetadata]]]:
        return {}

    def _read(
        self, key: str, meta: TensorStorageMetadata, chunk: ChunkStorageMetadata, index: Index, first: int, last: int
    ) -> Tensor:
        """Rows `first` to `last`, counted in the whole slice, that a chunk has of it."""
        dim = len(index)
        columns, dtype = prod(chunk.sizes[dim + 1 :]), meta.properties.dtype
        place = self._place(MetadataIndex(key, chunk.offsets), chunk, dtype)
        skipped = (first - chunk.offsets[dim]) * columns * dtype.itemsize
        room = torch.empty((last - first) * columns, dtype=dtype)
        with place.file.open("rb") as file:
            file.seek(place.offset + skipped)
            if file.readinto(room.view(torch.uint8).numpy().data) != room.nbytes:
                raise CheckpointError(f"{place.file}: found the end of the file within {key!r}. Fix: copy it again")
        return room.view(last - first, *chunk.sizes[dim + 1 :])

    def _place(self, at: MetadataIndex, chunk: ChunkStorageMetadata, dtype: torch.dtype) -> _Place:
        if at not in self._places:
            info = self._metadata.storage_data.get(at)
            if info is None or info.transform_descriptors:
                raise CheckpointError(f"{self.folder / TENSOR_LIST}: {at.fqn!r}: a chunk has no place, or is packed")
            self._places[at] = _Place(self._file(info.relative_path), info.offset + self._start(at, chunk, dtype))
        return self._places[at]

    def _start(self, at: MetadataIndex, chunk: ChunkStorageMetadata, dtype: torch.dtype) -> int:
        """Bytes from the start of a chunk's archive to its numbers."""
        try:
            with self._open(at) as archive, torch.serialization.skip_data():  # what the tensor is, not its numbers
                tensor = torch.load(archive, map_location="cpu", weights_only=True)
                archive.seek(0)
                records: Any = torch._C.PyTorchFileReader(archive)  # torch's stub does not know all of it
                start = records.get_record_offset(_NUMBERS)
        except CheckpointError:
            raise
        except Exception as error:  # a damaged archive may raise anything
            raise CheckpointError(f"{self.folder}: {at.fqn!r}: {error}. Fix: copy the checkpoint again") from error
        found = (tuple(tensor.shape), tensor.dtype, tensor.is_contiguous())
        if found != (expected := (tuple(chunk.sizes), dtype, True)):
            raise CheckpointError(f"{self.folder}: {at.fqn!r}: found (shape, type, in order) {found}, not {expected}")
        return int(start) + int(tensor.storage_offset()) * dtype.itemsize

    def _open(self, at: MetadataIndex) -> IO[bytes]:
        info = self._metadata.storage_data[at]
        if fault := self._fault(info.relative_path, info.offset + info.length):
            raise fault
        return cast(IO[bytes], _Slice(self._file(info.relative_path), info.offset, info.length))

    def _file(self, name: str) -> Path:
        if Path(name).name != name:
            raise CheckpointError(f"{self.folder / TENSOR_LIST}: found the file {name!r}, expected one of the folder")
        return self.folder / name


def check_backend(folder: Path) -> None:
    """Raises `CheckpointError` where a folder is no Megatron checkpoint of the format torch_dist."""
    path = folder / BACKEND_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        found = reason_of(error) if isinstance(error, OSError) else repr(error)
        raise CheckpointError(f"{path}: found {found}, expected a Megatron checkpoint. Fix: check the path") from error
    if found != BACKEND:
        raise CheckpointError(f"{path}: found the format {found!r}, expected {BACKEND!r}. Fix: save it as {BACKEND}")


class _Slice(io.RawIOBase):
    """Part of a file as a file."""

    def __init__(self, path: Path, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = path.open("rb"), start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = origin + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self._length - self._at)]
        self._file.seek(self._start + self._at)
        count = self._file.readinto(view)
        self._at += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def trusted_globals() -> list[Any]:
    """Classes that megatron-core allows in the arguments of a Megatron-LM checkpoint, besides plain data."""
    from megatron.core.safe_globals import SAFE_GLOBALS  # the import takes seconds

    return list(SAFE_GLOBALS)
