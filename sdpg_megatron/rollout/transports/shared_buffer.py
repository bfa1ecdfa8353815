"""Memory that other processes of this machine open by name, through torch's own way of opening a storage by its file.

torch would make such memory itself, but by way of a helper process (torch_shm_manager) that lives as long as any reader
does, and with it the trainer's standard output stays open. The file is therefore made here; readers bring helpers of
their own. It is laid out as torch's readers expect: a counter of readers, the last of whom removes the file, and from
byte 64 on the content. The counter starts so high that no reader ever is the last. A reader's helper also removes what
the reader had open when it died: every reader gets a name of its own, a link to the file.
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
        """Raises `RolloutError` where there is not so much: a write beyond what is there would end this process."""
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
        # The lock says that the file is in use; the kernel gives it back when this process ends, however that happens.
        self._descriptor = os.open(self._file, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        os.posix_fallocate(self._descriptor, 0, HEADER + self.size)
        content = mmap.mmap(self._descriptor, HEADER + self.size)
        struct.pack_into("i", content, 0, READERS)
        return torch.frombuffer(content, dtype=torch.uint8, offset=HEADER)

    def reduced(self, reader: int) -> tuple[Any, tuple[Any, ...]]:
        """How a pickle for reader number `reader` says it: what is called, and with what, to get `memory`'s storage."""
        link = self._file.with_name(f"{self._file.name}-{reader}")
        with suppress(FileExistsError):
            link.hardlink_to(self._file)
        self._links.add(link)
        no_manager, name = b"", f"/{link.name}".encode()
        return reductions.rebuild_storage_filename, (torch.UntypedStorage, no_manager, name, self.size)

    def close_to_readers(self) -> None:
        """No reader so far can open it any more; those that have it open keep it."""
        for link in self._links:
            link.unlink(missing_ok=True)
        self._links.clear()

    def release(self) -> None:
        """Nobody can open it any more; the memory goes when the last who has it open lets go."""
        self.memory = torch.empty(0, dtype=torch.uint8)
        self.close_to_readers()
        self._file.unlink(missing_ok=True)
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def remove_leftovers() -> None:
    """Free segments of processes that were killed: files that nobody has locked."""
    for file in FOLDER.glob(f"{PREFIX}*"):
        with suppress(OSError):
            descriptor = os.open(file, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                file.unlink()
            finally:
                os.close(descriptor)
