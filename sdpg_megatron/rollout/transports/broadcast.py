"""Weights by broadcast: one process group of this process and all ranks of all servers, kept between publishes."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from sdpg_megatron.errors import ServerError
from sdpg_megatron.rollout.sglang.client import Client
from sdpg_megatron.rollout.sglang.nccl import own_version
from sdpg_megatron.rollout.transports.attempt import AttemptResult, attempt, leave
from sdpg_megatron.rollout.transports.base import Failures, Send
from sdpg_megatron.rollout.transports.double_buffer import DoubleBuffer, Private
from sdpg_megatron.rollout.transports.flat import Flat, as_run
from sdpg_megatron.rollout.transports.weight_group import WeightGroup, address_towards
from sdpg_megatron.weights import Bucket, new_room

JOIN_SECONDS = 120.0
"""Bound of the time in which all ranks meet."""
PROBE = "model.layers.0.self_attn.rotary_emb.inv_freq"
"""A name under which SGLang's models take no weights: one number is sent under it through a new group. NCCL connects at
the first broadcast, so what keeps it from that shows before any weights are on their way."""
SHARE = 0.8
"""Of the time that a server's answer may take, until which a broadcast is given up: there must be time left in which
the others say that they are well."""


@dataclass(frozen=True, slots=True)
class ServerEndpoint:
    """A server's part of the group."""

    ranks: int
    start: object
    """Says which process it is: a server that was started again has no group."""
    device: str


class BroadcastTransport:
    """Rank 0 of a group that SGLang servers join (`/init_weights_update_group`).

    A bucket is one broadcast of its bytes, over NCCL where both sides' weights are on GPUs and over Gloo otherwise.
    When a server fails, the group breaks for all: the others form a new one and get the bucket again.
    """

    in_session: ClassVar[bool] = True

    def __init__(self, *, nonce: str, device: torch.device, address: str | None, seconds: float) -> None:
        """
        Args:
            nonce: unique to this process's transport; group names begin with it.
            device: where buckets come from.
            address: this machine's, as the servers reach it; None for the one that the route to them says.
            seconds: that a server has for its answer to one bucket.
        """
        self._nonce, self._device, self._address = nonce, device, address
        self._seconds = SHARE * seconds
        self._made = 0
        self._group: WeightGroup | None = None
        self._endpoints: dict[Client, ServerEndpoint] = {}
        self._nccl = False
        self._buffers = DoubleBuffer(Private)

    async def open(self, clients: Sequence[Client]) -> Failures:
        """See `Transport`. The group of the session before is used again where its members are the same processes."""
        self._buffers.restart()
        found = await asyncio.gather(*(_endpoint(client) for client in clients), return_exceptions=True)
        failures: dict[Client, ServerError] = {}
        endpoints: dict[Client, ServerEndpoint] = {}
        for client, endpoint in zip(clients, found, strict=True):
            if isinstance(endpoint, ServerEndpoint):
                endpoints[client] = endpoint
            elif isinstance(endpoint, ServerError):
                failures[client] = endpoint
            else:
                raise endpoint
        if self._group is None or not self._group.joined or endpoints != self._endpoints:
            await self._dissolve()
            failures |= await self._form(endpoints)
        return failures

    def room(self, nbytes: int, device: torch.device) -> Tensor:
        """See `Transport`."""
        return new_room(nbytes, device) if device.type == "cuda" else self._buffers.take(nbytes).memory

    def pack(self, bucket: Bucket) -> Send:
        """See `Transport`. A weight stream's bucket is sent from where it lies."""
        flat = as_run(bucket)
        if flat.run.is_cuda and not self._nccl:
            flat = Flat(flat.run.cpu(), flat.spans)
        if flat.run.is_cuda:
            # The broadcast is enqueued by another thread, on that thread's stream.
            torch.cuda.current_stream(flat.run.device).synchronize()
        return partial(self._send, flat)

    async def finish(self) -> Failures:
        """See `Transport`."""
        return {}

    async def close(self) -> None:
        """See `Transport`. The group stays, and so do the buffers."""

    async def dispose(self) -> None:
        """See `Transport`."""
        self._buffers.release()
        await self._dissolve()

    async def _send(self, flat: Flat) -> Failures:
        failures: dict[Client, ServerError] = {}
        while self._group is not None:
            clients = list(self._endpoints)
            result = await _broadcast(self._group, flat, clients, self._seconds)
            if result.well:
                break
            failures |= _blamed(result, clients)
            rest = {client: endpoint for client, endpoint in self._endpoints.items() if client not in failures}
            await self._dissolve()
            failures |= await self._form(rest)
            if not result.spoiled:
                break
        return failures

    async def _form(self, endpoints: Mapping[Client, ServerEndpoint]) -> Failures:
        """Make a group with as many of these servers as can be had."""
        failures: dict[Client, ServerError] = {}
        endpoints = dict(endpoints)
        while endpoints:
            self._nccl = self._device.type == "cuda" and all(
                endpoint.device == "cuda" for endpoint in endpoints.values()
            )
            self._made += 1
            group = WeightGroup(
                f"{self._nonce}-{self._made}",
                address=self._address or address_towards([client.url for client in endpoints]),
                size=1 + sum(endpoint.ranks for endpoint in endpoints.values()),
                backend="nccl" if self._nccl else "gloo",
            )
            seconds = min(JOIN_SECONDS, self._seconds)
            result = await attempt(group, _joins(group, endpoints), group.join(seconds), seconds)
            if result.well:
                probe = as_run([(PROBE, torch.zeros(1, device=self._device if self._nccl else "cpu"))])
                result = await _broadcast(group, probe, list(endpoints), seconds)
            if result.well:
                self._group, self._endpoints = group, endpoints
                break
            group.destroy()
            blamed = _blamed(result, list(endpoints))
            failures |= {client: _with_nccl(error) for client, error in blamed.items()} if self._nccl else blamed
            endpoints = {client: endpoint for client, endpoint in endpoints.items() if client not in failures}
        return failures

    async def _dissolve(self) -> None:
        group, endpoints = self._group, self._endpoints
        self._group, self._endpoints = None, {}
        if group is not None:
            group.destroy()
            await asyncio.gather(*(leave(client, group.name) for client in endpoints))


def _joins(group: WeightGroup, endpoints: Mapping[Client, ServerEndpoint]) -> dict[Client, Any]:
    joins, offset = {}, 1
    for client, endpoint in endpoints.items():
        joins[client] = client.join_group(
            address=group.address,
            port=group.port,
            rank_offset=offset,
            world_size=group.size,
            group=group.name,
            backend=group.backend,
        )
        offset += endpoint.ranks
    return joins


async def _broadcast(group: WeightGroup, flat: Flat, clients: Sequence[Client], seconds: float) -> AttemptResult:
    names = [span.name for span in flat.spans]
    dtypes = [span.dtype_name for span in flat.spans]
    shapes = [list(span.shape) for span in flat.spans]
    calls = {client: client.receive(names, dtypes, shapes, group.name) for client in clients}
    return await attempt(group, calls, group.broadcast(flat.run, seconds), seconds)


def _blamed(result: AttemptResult, clients: Sequence[Client]) -> Failures:
    """Servers that are out; all where it cannot be told whose fault it was, so that every failure leaves fewer."""
    if result.failed:
        return result.failed
    reason = (
        f"the weight group broke ({result.own}). Fix: see the server's log; where it persists, use another transport"
    )
    return {client: ServerError(client.url, "", reason) for client in clients}


def _with_nccl(error: ServerError) -> ServerError:
    """The error, with the version that the server needs: SGLang does not tell its own."""
    call, _, found = str(error).removeprefix(error.url).partition(": ")
    told = f"{found}; where its NCCL is not {own_version()}, the trainer's, use rollout.sglang.transport=shared or disk"
    return ServerError(error.url, call, told, retryable=error.retryable)


async def _endpoint(client: Client) -> ServerEndpoint:
    """What a server says of itself.

    Raises:
        ServerError: it does not answer, or SGLang cannot update it in this way.
    """
    info = await client.server_info()
    if int(info.get("dp_size", 1)) > 1 and not info.get("enable_dp_attention"):
        raise ServerError(client.url, "", "SGLang broadcasts to no data-parallel replicas. Fix: use the disk transport")
    if int(info.get("pp_size", 1)) > 1:
        raise ServerError(client.url, "", "SGLang broadcasts to one pipeline stage only. Fix: use the disk transport")
    return ServerEndpoint(int(info["tp_size"]), client.start_of(info), str(info.get("device", "cuda")))
