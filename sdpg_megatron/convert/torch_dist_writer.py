"""Write a Megatron checkpoint of the format torch_dist from one process, by blocks of rows."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save

from sdpg_megatron.convert.torch_dist import BACKEND, BACKEND_FILE, COMMON_FILE, Index


@dataclass(frozen=True, slots=True)
class Block:
    """Rows of a slice of a tensor, computed when they are written."""

    key: str
    shape: tuple[int, ...]
    """Shape of the whole tensor: leading dimensions, rows, columns."""
    dtype: torch.dtype
    index: Index
    start: int
    length: int
    make: Callable[[], Tensor]
    """Returns the rows, [length, ...], of `dtype`."""

    @property
    def sizes(self) -> tuple[int, ...]:
        return (*(1 for _ in self.index), self.length, *self.shape[len(self.index) + 1 :])

    @property
    def offsets(self) -> tuple[int, ...]:
        return (*self.index, self.start, *(0 for _ in self.shape[len(self.index) + 1 :]))


def write_torch_dist(folder: Path, blocks: Sequence[Block], objects: Sequence[str], common: Mapping[str, Any]) -> None:
    """Write a checkpoint into an empty folder.

    Args:
        blocks: cover every tensor exactly once. One block is in memory at a time.
        objects: keys of the extra states that a model expects; written empty.
        common: plain data, and Megatron-LM's arguments.
    """
    planner = _Planner(blocks, objects)
    try:
        # The warning is about saving without a process group.
        with warnings.catch_warnings(action="ignore", category=UserWarning), _without_checksums():
            save({}, storage_writer=FileSystemWriter(folder, sync_files=False), planner=planner, no_dist=True)
    except CheckpointException as error:  # torch wraps the writer's error
        raise next(iter(error.failures.values()))[0] from None
    with (folder / COMMON_FILE).open("wb") as file:
        torch.save(dict(common), file)
    (folder / BACKEND_FILE).write_text(json.dumps(_BACKENDS), encoding="utf-8")


_BACKENDS = {"sharded_backend": BACKEND, "sharded_backend_version": 1, "common_backend": "torch"} | {
    "common_backend_version": 1
}


class _Planner(DefaultSavePlanner):
    """Plans from a list of blocks instead of a state dict, which would keep all tensors in memory."""

    def __init__(self, blocks: Sequence[Block], objects: Sequence[str]) -> None:
        super().__init__(flatten_state_dict=False)
        self._blocks = {MetadataIndex(block.key, block.offsets): block for block in blocks}
        self._objects = objects

    def create_local_plan(self) -> SavePlan:
        tensors = [_item(entry, block) for entry, block in self._blocks.items()]
        return SavePlan([*tensors, *(WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in self._objects)])

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type is WriteItemType.BYTE_IO:
            return _empty_state()
        block = self._blocks[write_item.index]
        return _own_storage(block.make()).view(block.sizes)


def _own_storage(rows: Tensor) -> Tensor:
    """View the same memory with its own storage: torch copies parts of a larger storage before writing."""
    return torch.from_numpy(rows.contiguous().flatten().view(torch.uint8).numpy()).view(rows.dtype).view(rows.shape)


@contextmanager
def _without_checksums() -> Iterator[None]:
    """Write archives without CRC-32, which takes as long as writing; torch does not verify it."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _item(entry: MetadataIndex, block: Block) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size(block.offsets), torch.Size(block.sizes))
    data = TensorWriteData(chunk, TensorProperties(dtype=block.dtype), torch.Size(block.shape))
    return WriteItem(entry, WriteItemType.SHARD, tensor_data=data)


def _empty_state() -> io.BytesIO:
    """Extra state of a module that has none, as megatron-core writes it."""
    buffer = io.BytesIO()
    torch.save([None], buffer)
    buffer.seek(0)
    return buffer
