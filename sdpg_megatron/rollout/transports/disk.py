"""Weights through a folder that servers can read: the slowest way, and the one that needs nothing else."""

from __future__ import annotations

import asyncio
import queue
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from sdpg_megatron.errors import RolloutError, ServerError, reason_of
from sdpg_megatron.rollout.sglang.client import Client
from sdpg_megatron.rollout.transports.base import Failures, Send
from sdpg_megatron.weights import Bucket, new_room, write_folder


class DiskTransport:
    """Writes a Hugging Face folder, has the servers read it, and removes it."""

    in_session: ClassVar[bool] = False

    def __init__(self, *, folder: Path, source_folder: Path, shard_bytes: int) -> None:
        """
        Args:
            folder: one that nothing else uses and every server can read, under the same path.
            source_folder: Hugging Face folder with the model's configuration and tokenizer.
            shard_bytes: bound of one file, and of what is held beside a bucket.
        """
        self._folder = folder.resolve()
        self._source_folder = source_folder
        self._shard_bytes = shard_bytes
        self._clients: list[Client] = []
        self._feed: _Feed | None = None
        self._writer: asyncio.Future[None] | None = None

    @property
    def _target(self) -> Path:
        return self._folder / "weights"

    async def open(self, clients: Sequence[Client]) -> Failures:
        """See `Transport`. What a run that was killed left behind goes first."""
        await asyncio.to_thread(self._clear)
        self._clients = list(clients)
        self._feed = _Feed()
        self._writer = asyncio.ensure_future(asyncio.to_thread(self._write, self._feed))
        return {}

    def room(self, nbytes: int, device: torch.device) -> Tensor:
        """See `Transport`. The writer gathers buckets into files: each has memory of its own."""
        return new_room(nbytes, device)

    def pack(self, bucket: Bucket) -> Send:
        """See `Transport`."""
        return partial(self._send, bucket)

    async def finish(self) -> Failures:
        """See `Transport`. Here the servers read."""
        assert self._feed is not None and self._writer is not None, "not open"
        self._feed.end(whole=True)
        await self._writer
        loads = (client.load(str(self._target)) for client in self._clients)
        found = await asyncio.gather(*loads, return_exceptions=True)
        failures: dict[Client, ServerError] = {}
        for client, error in zip(self._clients, found, strict=True):
            if isinstance(error, ServerError):
                failures[client] = error
            elif error is not None:
                raise error
        return failures

    async def close(self) -> None:
        """See `Transport`."""
        feed, writer = self._feed, self._writer
        self._feed = self._writer = None
        if feed is not None and writer is not None:
            feed.end(whole=False)
            await asyncio.wait({writer})
            writer.exception()  # whoever sent has seen it
        await asyncio.to_thread(self._clear)

    async def dispose(self) -> None:
        """See `Transport`."""

    async def _send(self, bucket: Bucket) -> Failures:
        assert self._feed is not None and self._writer is not None, "not open"
        taken = self._feed.put(bucket)
        del bucket
        await asyncio.wait({taken, self._writer}, return_when=asyncio.FIRST_COMPLETED)
        if not taken.done():
            self._writer.result()  # raises
        return {}

    def _write(self, feed: _Feed) -> None:
        """In a thread of its own. Raises `RolloutError` where the folder cannot be written."""
        try:
            with suppress(_AbandonedError):
                write_folder(feed, self._target, source_folder=self._source_folder, shard_bytes=self._shard_bytes)
        except OSError as error:
            raise RolloutError(
                f"{self._folder}: cannot write weights for servers ({reason_of(error)}). Fix: set "
                "rollout.sglang.folder, or use another rollout.sglang.transport"
            ) from error

    def _clear(self) -> None:
        for leftover in (self._target, self._folder / ".weights.partial", self._folder / ".weights.old"):
            shutil.rmtree(leftover, ignore_errors=True)


class _AbandonedError(Exception):
    """The buckets end before their time."""


class _Feed:
    """Buckets on their way from the event loop to the thread that writes them, one at a time."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._slot: queue.SimpleQueue[tuple[Bucket, asyncio.Future[None]] | bool] = queue.SimpleQueue()

    def put(self, bucket: Bucket) -> asyncio.Future[None]:
        """The future is done when the bucket was used, and the next is wanted."""
        taken: asyncio.Future[None] = self._loop.create_future()
        self._slot.put((bucket, taken))
        return taken

    def end(self, *, whole: bool) -> None:
        self._slot.put(whole)

    def __iter__(self) -> Iterator[Bucket]:
        while True:
            found = self._slot.get()
            if found is True:
                return
            if found is False:
                raise _AbandonedError
            bucket, taken = found
            del found
            yield bucket
            del bucket
            self._loop.call_soon_threadsafe(_done, taken)


def _done(taken: asyncio.Future[None]) -> None:
    if not taken.done():
        taken.set_result(None)
