"""Weights by broadcast: a process group of this process and all ranks of all servers, kept between publishes."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any, ClassVar

import torch
from torch import Tensor

from sdpg_megatron.errors import ServerError
from sdpg_megatron.rollout.sglang.client import Client
from sdpg_megatron.rollout.sglang.interpreter import own_version
from sdpg_megatron.rollout.transports.base import Failures, Send, split
from sdpg_megatron.rollout.transports.weight_group import WeightGroup, address_towards
from sdpg_megatron.weights import Bucket, allocate
from sdpg_megatron.weights.bucket import Scratch, TensorSpec

JOIN_SECONDS = 120.0
"""Time limit for all ranks to join."""
PROBE = "model.layers.0.self_attn.rotary_emb.inv_freq"
"""Name of a tensor that SGLang's models ignore: one number is sent under it through a new group. NCCL connects at the
first broadcast, so connection errors appear before any weights are sent."""
SHARE = 0.8
"""Share of a server's time limit after which a broadcast is given up; the healthy servers answer in the rest."""
GRACE = 1.0
"""Seconds after the first failure in which others of the same cause appear."""
SETTLE = 10.0
"""Seconds in which all members notice that the group is gone."""


@dataclass(frozen=True, slots=True)
class ServerEndpoint:
    """A server's membership in the group."""

    ranks: int
    start: object
    """Identifies the process: a restarted server has no group."""
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
            nonce: unique prefix of this transport's group names.
            device: device of the buckets.
            address: this machine's address for the servers; None for the address of the route to them.
            seconds: a server's time limit for one bucket.
        """
        self._nonce, self._device, self._address = nonce, device, address
        self._seconds = SHARE * seconds
        self._made = 0
        self._group: WeightGroup | None = None
        self._endpoints: dict[Client, ServerEndpoint] = {}
        self._nccl = False
        self._buffers = Scratch(), Scratch()
        self._turns = cycle(self._buffers)

    async def open(self, clients: Sequence[Client]) -> Failures:
        """See `Transport`. The previous session's group is reused if its members are the same processes."""
        self._turns = cycle(self._buffers)  # the first bucket's size fits the first buffer
        found = await asyncio.gather(*(_endpoint(client) for client in clients), return_exceptions=True)
        endpoints, failures = split(clients, found)
        if self._group is None or not self._group.joined or endpoints != self._endpoints:
            await self._dissolve()
            failures = {**failures, **await self._form(endpoints)}
        return failures

    def allocate(self, nbytes: int, device: torch.device) -> Tensor:
        """See `Transport`. On CPUs, two buffers alternate: one is sent while the other is filled."""
        return allocate(nbytes, device) if device.type == "cuda" else next(self._turns).allocate(nbytes, device)

    def pack(self, bucket: Bucket) -> Send:
        memory = bucket.memory if self._nccl else bucket.memory.cpu()
        if memory.is_cuda:
            # Another thread enqueues the broadcast, on its own stream.
            torch.cuda.current_stream(memory.device).synchronize()
        return partial(self._send, memory, bucket.specs)

    async def finish(self) -> Failures:
        return {}

    async def close(self) -> None:
        """See `Transport`. The group is kept."""

    async def dispose(self) -> None:
        self._buffers = Scratch(), Scratch()
        self._turns = cycle(self._buffers)
        await self._dissolve()

    async def _send(self, memory: Tensor, specs: Sequence[TensorSpec]) -> Failures:
        failures: dict[Client, ServerError] = {}
        while self._group is not None:
            clients = list(self._endpoints)
            result = await _broadcast(self._group, memory, specs, clients, self._seconds)
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
        """Form a group with as many of these servers as possible."""
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
                probe = Bucket.of([(PROBE, torch.zeros(1, device=self._device if self._nccl else "cpu"))])
                result = await _broadcast(group, probe.memory, probe.specs, list(endpoints), seconds)
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


async def _broadcast(
    group: WeightGroup, memory: Tensor, specs: Sequence[TensorSpec], clients: Sequence[Client], seconds: float
) -> AttemptResult:
    names = [spec.name for spec in specs]
    dtypes = [str(spec.dtype).removeprefix("torch.") for spec in specs]
    shapes = [spec.shape for spec in specs]
    calls = {client: client.receive(names, dtypes, shapes, group.name) for client in clients}
    return await attempt(group, calls, group.broadcast(memory, seconds), seconds)


def _blamed(result: AttemptResult, clients: Sequence[Client]) -> Failures:
    """Servers to drop; all if none is known to be at fault, so that retries end."""
    if result.failed:
        return result.failed
    reason = (
        f"the weight group broke ({result.own}). Fix: see the server's log; where it persists, use another transport"
    )
    return {client: ServerError(client.url, "", reason) for client in clients}


def _with_nccl(error: ServerError) -> ServerError:
    """Add the required NCCL version to an error, as servers do not report theirs."""
    call, _, found = str(error).removeprefix(error.url).partition(": ")
    told = f"{found}; where its NCCL is not {own_version()}, the trainer's, use rollout.sglang.transport=shared or disk"
    return ServerError(error.url, call, told, retryable=error.retryable)


async def _endpoint(client: Client) -> ServerEndpoint:
    """Ask a server for its endpoint. Raises `ServerError` if it does not answer, or if SGLang does not support
    broadcasts to it."""
    info = await client.server_info()
    if int(info.get("dp_size", 1)) > 1 and not info.get("enable_dp_attention"):
        raise ServerError(client.url, "", "SGLang broadcasts to no data-parallel replicas. Fix: use the disk transport")
    if int(info.get("pp_size", 1)) > 1:
        raise ServerError(client.url, "", "SGLang broadcasts to one pipeline stage only. Fix: use the disk transport")
    return ServerEndpoint(int(info["tp_size"]), client.start_of(info), str(info.get("device", "cuda")))


# --- an attempt of all servers together


@dataclass(frozen=True, slots=True)
class AttemptResult:
    """Failures of an attempt; empty after success."""

    failed: Mapping[Client, ServerError]
    """Servers at fault: gone, stuck, or refusing."""
    spoiled: frozenset[Client]
    """Servers that failed because of others."""
    own: BaseException | None
    """Error in this process."""

    @property
    def well(self) -> bool:
        return not self.failed and not self.spoiled and self.own is None


async def attempt(
    group: WeightGroup,
    calls: Mapping[Client, Coroutine[Any, Any, None]],
    own: Coroutine[Any, Any, None],
    seconds: float,
) -> AttemptResult:
    """Await the servers' calls and this process's part. After a failure or `seconds`, destroy the group, which ends the
    other members' waiting."""
    tasks = {client: asyncio.ensure_future(call) for client, call in calls.items()}
    mine = asyncio.ensure_future(own)
    try:
        everything = {mine, *tasks.values()}
        _, pending = await asyncio.wait(everything, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        if pending:
            await asyncio.wait(pending, timeout=GRACE)
        first = {client: error for client, task in tasks.items() if (error := _error(task))}
        if any(not task.done() or _error(task) for task in everything):
            await _break(group, mine, list(first))
            await asyncio.wait(tasks.values(), timeout=SETTLE)
        return _judge(tasks, first, _error(mine))
    except asyncio.CancelledError:
        group.destroy()
        raise
    finally:
        for task in (mine, *tasks.values()):
            task.cancel()
        await asyncio.gather(mine, *tasks.values(), return_exceptions=True)


async def _break(group: WeightGroup, mine: asyncio.Future[None], unwilling: Sequence[Client]) -> None:
    """Break the group. A Gloo broadcast ends when a receiver closes its connections, so refusing servers leave it."""
    await group.interrupt()
    await asyncio.gather(*(leave(client, group.name) for client in unwilling))
    await asyncio.wait({mine}, timeout=SETTLE)
    group.destroy()


async def leave(client: Client, name: str) -> None:
    """Have a server leave a group, ignoring errors."""
    with suppress(ServerError, asyncio.TimeoutError):
        async with asyncio.timeout(GRACE):
            await client.leave_group(name)


def _judge(
    tasks: Mapping[Client, asyncio.Future[None]], first: Mapping[Client, ServerError], own: BaseException | None
) -> AttemptResult:
    """Blame servers that are gone or did not answer; if there are none, those that failed before the break."""
    stuck = {
        client: ServerError(client.url, "", "did not answer while weights were sent", retryable=True)
        for client, task in tasks.items()
        if not task.done()
    }
    errors = {client: error for client, task in tasks.items() if task.done() and (error := _error(task))}
    gone = {client: error for client, error in errors.items() if error.__cause__ is not None}
    failed = {**stuck, **gone} or dict(first)
    return AttemptResult(failed, frozenset(errors) - frozenset(failed), own)


def _error(task: asyncio.Future[None]) -> Any:
    """Error of a task; None if it is running, cancelled or successful."""
    return task.exception() if task.done() and not task.cancelled() else None
