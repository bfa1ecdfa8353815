"""Transport protocol: one way to send buckets of weights to servers."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from sdpg_megatron.errors import ServerError
from sdpg_megatron.rollout.sglang.client import Client
from sdpg_megatron.weights import Bucket

T = TypeVar("T")

Failures = Mapping[Client, ServerError]
"""Servers that do not get the weights, with the reason."""

Send = Callable[[], Coroutine[Any, Any, Failures]]
"""Sends one bucket."""


class Transport(Protocol):
    """Serves one publish session at a time. A server that failed gets nothing more in its session.

    All methods but `allocate` and `pack` run in the event loop.
    """

    in_session: ClassVar[bool]
    """True if servers accept its weights only between `Client.begin_update` and `end_update`."""

    async def open(self, clients: Sequence[Client]) -> Failures:
        """Prepare to send to these servers, which are paused and, for `in_session`, begun."""
        ...

    def allocate(self, nbytes: int, device: torch.device) -> Tensor:
        """Allocate the next bucket's memory, uint8 [at least nbytes]; it is in use until the bucket was sent.

        Called in the thread of `pack`. Buckets are made by collectives, so this must not fail: `pack` raises instead.
        """
        ...

    def pack(self, bucket: Bucket) -> Send:
        """Prepare a bucket for sending. Called in the thread that makes the buckets, after the previous one was sent.

        The result holds the bucket or a copy, not both.

        Raises:
            RolloutError: this machine lacks memory for it.
        """
        ...

    async def finish(self) -> Failures:
        """Complete the transfer after the last bucket; on return the servers have the weights in place."""
        ...

    async def close(self) -> None:
        """End the session, successful or not, and free its resources."""
        ...

    async def dispose(self) -> None:
        """Free everything; no other session follows."""
        ...


def split(clients: Iterable[Client], results: Iterable[T | BaseException]) -> tuple[dict[Client, T], Failures]:
    """Sort gathered results into values and failures by server. Raises any error that is not a `ServerError`."""
    values: dict[Client, T] = {}
    failures: dict[Client, ServerError] = {}
    for client, result in zip(clients, results, strict=True):
        if isinstance(result, ServerError):
            failures[client] = result
        elif isinstance(result, BaseException):
            raise result
        else:
            values[client] = result
    return values, failures
