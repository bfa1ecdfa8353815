"""Weights through a folder that servers read: the slowest transport, without other requirements."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from sdpg_megatron.errors import RolloutError, reason_of
from sdpg_megatron.rollout.sglang.client import Client
from sdpg_megatron.rollout.sglang.event_loop import Threads
from sdpg_megatron.rollout.transports.base import Failures, Send, split
from sdpg_megatron.weights import Bucket, FolderWriter, allocate


class DiskTransport:
    """Writes a Hugging Face folder, has the servers load it, and removes it."""

    in_session: ClassVar[bool] = False

    def __init__(self, *, folder: Path, source_folder: Path, shard_bytes: int) -> None:
        """
        Args:
            folder: folder for this transport alone, visible to every server under the same path.
            source_folder: Hugging Face folder with the model's configuration and tokenizer.
            shard_bytes: bound of one file, and of the memory held beside a bucket.
        """
        self._folder = folder.resolve()
        self._target = self._folder / "weights"
        self._source_folder = source_folder
        self._shard_bytes = shard_bytes
        self._clients: list[Client] = []
        self._threads = Threads()
        self._writer: FolderWriter | None = None

    async def open(self, clients: Sequence[Client]) -> Failures:
        """See `Transport`. Removes the files of a run that was killed."""
        self._clients = list(clients)

        def start() -> None:
            self._clear()
            self._writer = FolderWriter(self._target, source_folder=self._source_folder, shard_bytes=self._shard_bytes)

        await self._write(start)
        return {}

    def allocate(self, nbytes: int, device: torch.device) -> Tensor:
        """See `Transport`. Each bucket has new memory, as the writer keeps tensors until their file is full."""
        return allocate(nbytes, device)

    def pack(self, bucket: Bucket) -> Send:
        return partial(self._send, bucket)

    async def finish(self) -> Failures:
        """See `Transport`. The servers load the folder here."""
        assert self._writer is not None, "not open"
        await self._write(self._writer.finish)
        loads = (client.load(str(self._target)) for client in self._clients)
        return split(self._clients, await asyncio.gather(*loads, return_exceptions=True))[1]

    async def close(self) -> None:
        await self._threads.join()
        self._writer = None
        await asyncio.to_thread(self._clear)

    async def dispose(self) -> None:
        """See `Transport`."""

    async def _send(self, bucket: Bucket) -> Failures:
        assert self._writer is not None, "not open"
        await self._write(partial(self._writer.add, bucket))
        return {}

    async def _write(self, work: Callable[[], None]) -> None:
        """Run in a thread. Raises `RolloutError` where the folder cannot be written."""
        try:
            await self._threads.run(work)
        except OSError as error:
            raise RolloutError(
                f"{self._folder}: cannot write weights for servers ({reason_of(error)}). Fix: set "
                "rollout.sglang.folder, or use another rollout.sglang.transport"
            ) from error

    def _clear(self) -> None:
        for leftover in (self._target, self._folder / ".weights.partial", self._folder / ".weights.old"):
            shutil.rmtree(leftover, ignore_errors=True)
