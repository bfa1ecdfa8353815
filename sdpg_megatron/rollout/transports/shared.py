"""Weights in memory that servers on this machine share with this process: on CPUs a file of /dev/shm, on GPUs CUDA IPC.

SGLang reads a base64 pickle for each of its ranks, by an unpickler that knows few globals: torch's own functions that
open shared memory, and `types.SimpleNamespace`, which here describes where tensors lie.
Source: sglang.srt.utils.common.SafeUnpickler, sglang.srt.utils.patch_torch and
sglang.srt.model_executor.model_runner_components.weight_updater of SGLang 0.5.23.
"""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import count
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from typing import Any, ClassVar
from urllib.parse import urlsplit

import psutil
import torch
from torch import Tensor
from torch.multiprocessing import reductions

from sdpg_megatron.errors import RolloutError, ServerError
from sdpg_megatron.rollout.sglang.client import Client
from sdpg_megatron.rollout.transports.base import Failures, Send
from sdpg_megatron.rollout.transports.double_buffer import DoubleBuffer
from sdpg_megatron.rollout.transports.flat import Flat, as_run, copy_to, find_run, size_of
from sdpg_megatron.rollout.transports.shared_buffer import SharedMemoryBuffer, remove_leftovers
from sdpg_megatron.weights import Bucket, new_room

DEVICE_ARGUMENT = 6
"""Place of the storage's device among the arguments of torch's `rebuild_cuda_tensor`."""


class SharedMemoryTransport:
    """A bucket lies in memory that all servers read at the same time."""

    in_session: ClassVar[bool] = True

    def __init__(self) -> None:
        self._numbers = count()
        self._readers: dict[Client, list[int]] = {}
        """Of each server's ranks: numbers that no reader of an earlier session had."""
        self._segments = DoubleBuffer(SharedMemoryBuffer)

    async def open(self, clients: Sequence[Client]) -> Failures:
        """See `Transport`. A server elsewhere would end itself when it finds no such memory: it is refused here."""
        remove_leftovers()
        self._segments.restart()
        found = await asyncio.gather(*(_ranks(client) for client in clients), return_exceptions=True)
        failures: dict[Client, ServerError] = {}
        self._readers = {}
        for client, ranks in zip(clients, found, strict=True):
            if isinstance(ranks, int):
                self._readers[client] = [next(self._numbers) for _ in range(ranks)]
            elif isinstance(ranks, ServerError):
                failures[client] = ranks
            else:
                raise ranks
        return failures

    def room(self, nbytes: int, device: torch.device) -> Tensor:
        """See `Transport`. Where there is no room to share, `pack` says so: the making of a bucket is collective."""
        if device.type != "cuda":
            with suppress(RolloutError):
                return self._segments.take(nbytes).memory
        return new_room(nbytes, device)

    def pack(self, bucket: Bucket) -> Send:
        """See `Transport`. The servers read the bucket where it is, on a GPU or in a segment; otherwise a copy."""
        if bucket[0][1].is_cuda:
            flat = as_run(bucket)
            torch.cuda.current_stream(flat.run.device).synchronize()
            return partial(self._send, flat, None)
        found = find_run(bucket)
        shared_buffer = self._segments.holding(found.run) if found else None
        if found is None or shared_buffer is None:
            shared_buffer = self._segments.take(size_of(bucket))
            found = copy_to(shared_buffer.memory, bucket)
        return partial(self._send, found, shared_buffer)

    async def finish(self) -> Failures:
        """See `Transport`."""
        return {}

    async def close(self) -> None:
        """See `Transport`. The segments stay, for the next session."""
        self._segments.each(SharedMemoryBuffer.close_to_readers)
        self._readers = {}
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()  # of the buckets: a colocated server takes its memory back now

    async def dispose(self) -> None:
        """See `Transport`."""
        self._segments.release()

    async def _send(self, flat: Flat, shared_buffer: SharedMemoryBuffer | None) -> Failures:
        handles = {
            client: [_handle(flat, shared_buffer, reader) for reader in readers]
            for client, readers in self._readers.items()
        }
        found = await asyncio.gather(
            *(client.take(texts, "flattened_bucket") for client, texts in handles.items()), return_exceptions=True
        )
        failures: dict[Client, ServerError] = {}
        for client, error in zip(handles, found, strict=True):
            if isinstance(error, ServerError):
                failures[client] = error
                del self._readers[client]
            elif error is not None:
                raise error
        return failures


class _Pickler(ForkingPickler):
    """Pickles a segment's storage by name, whatever `torch.multiprocessing`'s sharing strategy is."""

    def __init__(self, file: io.BytesIO, shared_buffer: SharedMemoryBuffer | None, reader: int) -> None:
        super().__init__(file)
        self._segment, self._reader = shared_buffer, reader

    def reducer_override(self, found: Any) -> Any:
        if isinstance(found, torch.UntypedStorage) and self._segment is not None:
            return self._segment.reduced(self._reader)
        if isinstance(found, Tensor) and found.is_cuda:
            rebuild, arguments = reductions.reduce_tensor(found)  # type: ignore[no-untyped-call]
            # Processes may number devices differently; SGLang takes their names as well.
            name = str(torch.cuda.get_device_properties(found.device).uuid)
            return rebuild, (*arguments[:DEVICE_ARGUMENT], name, *arguments[DEVICE_ARGUMENT + 1 :])
        return NotImplemented


def _handle(flat: Flat, shared_buffer: SharedMemoryBuffer | None, reader: int) -> str:
    """What lets one process, reader number `reader`, read the bytes once: base64."""
    spans = [
        SimpleNamespace(
            name=span.name,
            shape=span.shape,
            dtype=span.dtype,
            start_idx=span.start,
            end_idx=span.end,
            numel=span.end - span.start,
        )
        for span in flat.spans
    ]
    content: Mapping[str, object] = {"flattened_tensor": flat.run, "metadata": spans}
    file = io.BytesIO()
    _Pickler(file, shared_buffer, reader).dump(content)
    return base64.b64encode(file.getvalue()).decode("ascii")


async def _ranks(client: Client) -> int:
    """Tensor-parallel ranks of a server on this machine.

    Raises:
        ServerError: it is elsewhere, does not answer, or SGLang cannot update it in this way.
    """
    if not await _is_here(client.url):
        raise ServerError(client.url, "", "is on another machine and shares no memory. Fix: use another transport")
    info = await client.server_info()
    if int(info.get("dp_size", 1)) > 1 and not info.get("enable_dp_attention"):
        raise ServerError(client.url, "", "SGLang shares with no data-parallel replicas. Fix: use the disk transport")
    return int(info["tp_size"])


async def _is_here(url: str) -> bool:
    """Whether the host is this machine."""
    host = urlsplit(url).hostname or "localhost"
    own = {address.address.partition("%")[0] for found in psutil.net_if_addrs().values() for address in found}
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None)
    except OSError:
        return False
    addresses = [str(entry[4][0]) for entry in found]
    return all(address.startswith("127.") or address in own for address in addresses)
