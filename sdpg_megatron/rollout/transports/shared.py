"""Weights in memory shared with servers on this machine: on CPUs a file of /dev/shm, on GPUs CUDA IPC.

SGLang reads a base64 pickle for each of its ranks with an unpickler that allows few globals: torch's functions that
open shared memory, and `types.SimpleNamespace`, which describes the tensors here.
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
from itertools import count, islice
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
from sdpg_megatron.rollout.transports.base import Failures, Send, split
from sdpg_megatron.rollout.transports.shared_buffer import DoubleBuffer, SharedMemoryBuffer, remove_leftovers
from sdpg_megatron.weights import Bucket, allocate
from sdpg_megatron.weights.bucket import TensorSpec

DEVICE_ARGUMENT = 6
"""Index of the storage's device in the arguments of torch's `rebuild_cuda_tensor`."""


class SharedMemoryTransport:
    """Shares each bucket's memory with all servers, which read it at the same time."""

    in_session: ClassVar[bool] = True

    def __init__(self) -> None:
        self._numbers = count()
        self._readers: dict[Client, Sequence[int]] = {}
        """Reader numbers of each server's ranks, unused in earlier sessions."""
        self._buffers = DoubleBuffer()

    async def open(self, clients: Sequence[Client]) -> Failures:
        """See `Transport`. A server on another machine is refused, as it would exit when it finds no such memory."""
        remove_leftovers()
        self._buffers.restart()
        found = await asyncio.gather(*(_ranks(client) for client in clients), return_exceptions=True)
        ranks, failures = split(clients, found)
        self._readers = {client: list(islice(self._numbers, size)) for client, size in ranks.items()}
        return failures

    def allocate(self, nbytes: int, device: torch.device) -> Tensor:
        """See `Transport`. If /dev/shm is full, the bucket is made in other memory and `pack` raises."""
        if device.type != "cuda":
            with suppress(RolloutError):
                return self._buffers.take(nbytes).memory
        return allocate(nbytes, device)

    def pack(self, bucket: Bucket) -> Send:
        """See `Transport`. Servers read GPU memory and this transport's buffers in place; other memory is copied."""
        memory, buffer = bucket.memory, None
        if memory.is_cuda:
            torch.cuda.current_stream(memory.device).synchronize()
        elif (buffer := self._buffers.holding(memory)) is None:
            buffer = self._buffers.take(memory.nbytes)
            memory = buffer.memory[: memory.nbytes].copy_(memory)
        return partial(self._send, memory, bucket.specs, buffer)

    async def finish(self) -> Failures:
        return {}

    async def close(self) -> None:
        """See `Transport`. The buffers are kept for the next session."""
        for buffer in self._buffers.buffers.values():
            buffer.close_to_readers()
        self._readers = {}
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()  # of the buckets: a colocated server now takes its memory back

    async def dispose(self) -> None:
        self._buffers.release()

    async def _send(self, memory: Tensor, specs: Sequence[TensorSpec], buffer: SharedMemoryBuffer | None) -> Failures:
        calls = (
            client.take([_handle(memory, specs, buffer, reader) for reader in readers], "flattened_bucket")
            for client, readers in self._readers.items()
        )
        failures = split(list(self._readers), await asyncio.gather(*calls, return_exceptions=True))[1]
        self._readers = {client: readers for client, readers in self._readers.items() if client not in failures}
        return failures


class _Pickler(ForkingPickler):
    """Pickles a buffer's storage by name, independent of `torch.multiprocessing`'s sharing strategy."""

    def __init__(self, file: io.BytesIO, buffer: SharedMemoryBuffer | None, reader: int) -> None:
        super().__init__(file)
        self._buffer, self._reader = buffer, reader

    def reducer_override(self, found: Any) -> Any:
        if isinstance(found, torch.UntypedStorage) and self._buffer is not None:
            return self._buffer.reduced(self._reader)
        if isinstance(found, Tensor) and found.is_cuda:
            rebuild, arguments = reductions.reduce_tensor(found)  # type: ignore[no-untyped-call]
            # Device numbers may differ between processes; SGLang also accepts UUIDs.
            name = str(torch.cuda.get_device_properties(found.device).uuid)
            return rebuild, (*arguments[:DEVICE_ARGUMENT], name, *arguments[DEVICE_ARGUMENT + 1 :])
        return NotImplemented


def _handle(memory: Tensor, specs: Sequence[TensorSpec], buffer: SharedMemoryBuffer | None, reader: int) -> str:
    """Base64 pickle that lets one process, reader number `reader`, read the bytes once."""
    metadata = [
        SimpleNamespace(
            name=spec.name,
            shape=torch.Size(spec.shape),
            dtype=spec.dtype,
            start_idx=spec.start,
            end_idx=spec.end,
            numel=spec.nbytes,
        )
        for spec in specs
    ]
    content: Mapping[str, object] = {"flattened_tensor": memory, "metadata": metadata}
    file = io.BytesIO()
    _Pickler(file, buffer, reader).dump(content)
    return base64.b64encode(file.getvalue()).decode("ascii")


async def _ranks(client: Client) -> int:
    """Number of tensor-parallel ranks of a server on this machine. Raises `ServerError` if it is on another machine,
    does not answer, or if SGLang does not support shared memory for it."""
    if not await _is_here(client.url):
        raise ServerError(client.url, "", "is on another machine and shares no memory. Fix: use another transport")
    info = await client.server_info()
    if int(info.get("dp_size", 1)) > 1 and not info.get("enable_dp_attention"):
        raise ServerError(client.url, "", "SGLang shares with no data-parallel replicas. Fix: use the disk transport")
    return int(info["tp_size"])


async def _is_here(url: str) -> bool:
    """True if the host is this machine."""
    host = urlsplit(url).hostname or "localhost"
    own = {address.address.partition("%")[0] for found in psutil.net_if_addrs().values() for address in found}
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None)
    except OSError:
        return False
    addresses = [str(entry[4][0]) for entry in found]
    return all(address.startswith("127.") or address in own for address in addresses)
