"""Process group for weights: rank 0 is this process, the others are ranks of servers.

It is independent of `torch.distributed`'s default group. Everything that may wait for another process runs in a thread
with a time limit.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store, TCPStore
from torch.distributed import distributed_c10d as c10d

T = TypeVar("T")
BLOCKING_WAIT = "TORCH_NCCL_BLOCKING_WAIT"
"""Set while an NCCL group is made, so that waiting for a broadcast raises its errors. By default the group's watchdog
thread ends the process; with TORCH_NCCL_ASYNC_ERROR_HANDLING=0, the default group's monitor does so minutes later. With
this variable the group has no watchdog.
Source: ProcessGroupNCCL.cpp of torch 2.11: its constructor, Watchdog::runLoop and HeartbeatMonitor::runLoop."""
MARGIN = 30.0
"""Seconds of NCCL's timeout beyond the caller's: the caller aborts the group first, and assigns the fault."""


class WeightGroup:
    """Rank 0's side of a group: joined once, used for many broadcasts, destroyed once."""

    def __init__(self, name: str, *, address: str, size: int, backend: Literal["gloo", "nccl"]) -> None:
        """Open the rendezvous store at a free port.

        Args:
            name: unique among the groups of this process and of its servers.
            address: this machine's address for the servers.
            size: number of ranks, including this one.
        """
        self.name, self.address, self.size, self.backend = name, address, size, backend
        # Closing the rendezvous store ends all waiting on this rank's connection to it, and in the servers.
        meeting = TCPStore(address, 0, is_master=True, wait_for_workers=False)
        self.port: int = meeting.port
        self._meeting: Store | None = meeting
        self._group: dist.ProcessGroup | None = None

    @property
    def joined(self) -> bool:
        """True after `join` and before `destroy`."""
        return self._group is not None

    async def join(self, seconds: float) -> None:
        """Rendezvous with the other ranks. Raises torch's error if they do not join in time."""
        self._group = await in_thread(lambda: self._join(timedelta(seconds=seconds)))

    def _join(self, limit: timedelta) -> dist.ProcessGroup:
        """Source: sglang.srt.utils.common.init_custom_process_group of SGLang 0.5.23."""
        store = TCPStore(self.address, self.port, is_master=False, wait_for_workers=False, timeout=limit)
        nccl = self.backend == "nccl"
        with variables(**({BLOCKING_WAIT: "1"} if nccl else {})):
            found = c10d._new_process_group_helper(
                self.size,
                0,
                [],
                c10d.Backend(self.backend),
                c10d.PrefixStore(self.name, store),
                group_name=self.name,  # type: ignore[arg-type]
                timeout=limit + timedelta(seconds=MARGIN) if nccl else limit,
            )
        group: dist.ProcessGroup = found[0]
        c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(self.size)}
        return group

    async def broadcast(self, run: Tensor, seconds: float) -> None:
        """Broadcast from this rank and wait for completion. Raises torch's errors."""
        group = self._group
        assert group is not None, "not joined"

        def send() -> None:
            options = dist.BroadcastOptions()
            options.rootRank = 0
            options.timeout = timedelta(seconds=seconds)
            if run.is_cuda:
                torch.cuda.set_device(run.device)
            work = group.broadcast([run], options)
            if self.backend == "nccl":
                work.wait(timedelta(seconds=seconds + MARGIN))
            else:
                work.wait()
            if run.is_cuda:
                torch.cuda.current_stream(run.device).synchronize()

        await in_thread(send)

    async def interrupt(self) -> None:
        """End this process's waiting in the group; NCCL only, as Gloo cannot."""
        self._meeting = None
        if self._group is not None and self.backend == "nccl":
            await in_thread(self._group.abort)

    def destroy(self) -> None:
        """Close all connections, which ends the other ranks' waiting. No broadcast may be running."""
        group, self._group, self._meeting = self._group, None, None
        if group is not None:
            if self.backend == "nccl":
                group.abort()  # destroying alone would wait for the other ranks, which may be gone
            with suppress(ValueError):  # `torch.distributed` was shut down before
                dist.destroy_process_group(group)


@contextmanager
def variables(**values: str) -> Iterator[None]:
    """Set environment variables inside the context."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


async def in_thread(work: Callable[[], T]) -> T:
    """Run a blocking call in a daemon thread. It continues if the caller is cancelled."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(set_outcome: Callable[[Any], None], outcome: Any) -> None:
        if not future.done():
            set_outcome(outcome)

    def run() -> None:
        try:
            outcome: Any = work()
            how: Callable[[Any], None] = future.set_result
        except Exception as error:
            outcome, how = error, future.set_exception
        with suppress(RuntimeError):  # the loop was closed
            loop.call_soon_threadsafe(settle, how, outcome)

    threading.Thread(target=run, name="weight-group", daemon=True).start()
    return await future


def address_towards(urls: Sequence[str]) -> str:
    """This machine's address for the servers; the loopback if all of them are on this machine."""
    hosts = [urlsplit(url).hostname or "localhost" for url in urls]
    for host in hosts:
        with socket.socket(_family(host), socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing; selects the route
            found: str = probe.getsockname()[0]
        if not ipaddress.ip_address(found.partition("%")[0]).is_loopback:
            return found
    return "127.0.0.1"


def _family(host: str) -> socket.AddressFamily:
    return socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0][0]
