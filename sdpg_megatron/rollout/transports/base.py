"""What a transport is: one way for buckets of weights to reach servers."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from sdpg_megatron.errors import ServerError
from sdpg_megatron.rollout.sglang.client import Client
from sdpg_megatron.weights import Bucket

Failures = Mapping[Client, ServerError]
"""Servers that do not get the weights, with the reason."""

Send = Callable[[], Coroutine[Any, Any, Failures]]
"""Sends one bucket."""


class Transport(Protocol):
    """Used for one session after the other. A server that failed gets nothing more in its session.

    All but `room` and `pack` runs in the event loop.
    """

    in_session: ClassVar[bool]
    """Whether servers take what it sends only between `Client.begin_update` and `end_update`."""

    async def open(self, clients: Sequence[Client]) -> Failures:
        """Get ready to send to these servers, which are paused and, for `in_session`, begun."""
        ...

    def room(self, nbytes: int, device: torch.device) -> Tensor:
        """Memory in which the next bucket is made, uint8 [at least nbytes], of a kind that `pack` need not copy.
        Called in the same thread as `pack`; it may be used until the bucket was sent. To make a bucket is collective,
        so this is not the place to fail: what lacks here is said by `pack`.
        """
        ...

    def pack(self, bucket: Bucket) -> Send:
        """Bring a bucket into the form that it travels in. Called in the thread that makes the buckets, never before
        the previous bucket was sent. What it returns holds the bucket, or a copy; not both.

        Raises:
            RolloutError: this machine lacks room for it.
        """
        ...

    async def finish(self) -> Failures:
        """All buckets were sent: see to it that servers have them in place."""
        ...

    async def close(self) -> None:
        """The session is over, well or not: keep nothing that only a session needs."""
        ...

    async def dispose(self) -> None:
        """There will be no other session."""
        ...
