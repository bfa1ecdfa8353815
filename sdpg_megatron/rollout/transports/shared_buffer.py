"""Shared memory that other processes of this machine open by name, through torch's rebuild of a storage by file name.

torch can allocate such memory, but through a helper process (torch_shm_manager) that lives as long as any reader and
keeps the trainer's standard output open. Here the file is made directly, in the layout that torch's readers expect: a
reference count, and the content from byte 64 on. The last reader would remove the file; the count starts so high that
no reader is the last. A reader's helper removes the reader's files when it dies: each reader has its own hard link.
Source: RefcountedMapAllocator in ATen/MapAllocator.cpp and libshm/manager.cpp of torch 2.13.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing import reductions

from sdpg_megatron.errors import RolloutError, reason_of

FOLDER = Path("/dev/shm")
PREFIX = "sdpg-weights-"
HEADER = 64
READERS = 1 << 30


class SharedMemoryBuffer:
    """`memory`, uint8 [size], until `release`."""

    def __init__(self, size: int) -> None:
        """Raises `RolloutError` if /dev/shm is too small: a write beyond its end would kill this process."""
        self.size = size
        self.memory = torch.empty(0, dtype=torch.uint8)
        self._links: set[Path] = set()
        self._descriptor = -1
        self._file = FOLDER / f"{PREFIX}{secrets.token_hex(8)}"
        try:
            self.memory = self._map()
        except OSError as error:
            self.release()
            raise RolloutError(
                f"{FOLDER} has no room for a bucket of {size >> 20} MiB ({reason_of(error)}). Fix: enlarge it (Docker: "
                "--shm-size), lower rollout.sglang.bucket_mib, or use another rollout.sglang.transport"
            ) from error

    def _map(self) -> Tensor:
        # The lock marks the file as in use. The kernel drops it when this process ends in any way.
        self._descriptor = os.open(self._file, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        os.posix_fallocate(self._descriptor, 0, HEADER + self.size)
        content = mmap.mmap(self._descriptor, HEADER + self.size)
        struct.pack_into("i", content, 0, READERS)
        return torch.frombuffer(content, dtype=torch.uint8, offset=HEADER)

    def reduced(self, reader: int) -> tuple[Any, tuple[Any, ...]]:
        """Pickle form of the storage for reader number `reader`: a function and its arguments."""
        link = self._file.with_name(f"{self._file.name}-{reader}")
        with suppress(FileExistsError):
            link.hardlink_to(self._file)
        self._links.add(link)
        no_manager, name = b"", f"/{link.name}".encode()
        return reductions.rebuild_storage_filename, (torch.UntypedStorage, no_manager, name, self.size)

    def close_to_readers(self) -> None:
        """Remove the readers' links. Readers that have the memory open keep it."""
        for link in self._links:
            link.unlink(missing_ok=True)
        self._links.clear()

    def release(self) -> None:
        """Remove the file. The memory is freed when the last process that has it open closes it."""
        self.memory = torch.empty(0, dtype=torch.uint8)
        self.close_to_readers()
        self._file.unlink(missing_ok=True)
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class DoubleBuffer:
    """Two alternating buffers: one bucket is made while the previous one is read.

    They are kept between publishes, as new memory is several times slower to fill. A buffer that is too small is
    replaced.
    """

    def __init__(self) -> None:
        self.buffers: dict[int, SharedMemoryBuffer] = {}
        self._turn = 0

    def restart(self) -> None:
        """Begin with the first buffer again: its size fits the first bucket."""
        self._turn = 0

    def take(self, nbytes: int) -> SharedMemoryBuffer:
        """Return the buffer that was not taken last. Raises `RolloutError` as `SharedMemoryBuffer`."""
        turn, self._turn = self._turn, 1 - self._turn
        if turn not in self.buffers or self.buffers[turn].size < nbytes:
            if turn in self.buffers:
                self.buffers.pop(turn).release()
            self.buffers[turn] = SharedMemoryBuffer(nbytes)
        return self.buffers[turn]

    def holding(self, tensor: Tensor) -> SharedMemoryBuffer | None:
        """Return the buffer of a tensor's memory, if any."""
        place = tensor.untyped_storage().data_ptr()
        held = (buffer for buffer in self.buffers.values() if buffer.memory.untyped_storage().data_ptr() == place)
        return next(held, None)

    def release(self) -> None:
        """Free both buffers."""
        while self.buffers:
            self.buffers.popitem()[1].release()


def remove_leftovers() -> None:
    """Remove the buffers of processes that were killed: files without a lock."""
    for file in FOLDER.glob(f"{PREFIX}*"):
        with suppress(OSError):
            descriptor = os.open(file, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                file.unlink()
            finally:
                os.close(descriptor)
