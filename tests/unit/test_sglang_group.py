"""The group that broadcasts weights: how it is made, how it ends, and what a new one is tried with."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from sdpg_megatron.errors import ServerError
from sdpg_megatron.rollout.transports import broadcast as broadcast_module
from sdpg_megatron.rollout.transports.broadcast import PROBE, BroadcastTransport, _with_nccl
from sdpg_megatron.rollout.transports.weight_group import BLOCKING_WAIT, MARGIN, WeightGroup

# How it is made


class Work:
    def __init__(self, fault: Exception | None) -> None:
        self.fault = fault
        self.waits: list[timedelta | None] = []

    def wait(self, limit: timedelta | None = None) -> None:
        self.waits.append(limit)
        if self.fault is not None:
            raise self.fault


class Torch:
    """In place of torch's group: records what is done to it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fault: Exception | None = None) -> None:
        self.done: list[str] = []
        self.work = Work(fault)
        self.variable: str | None = None
        self.timeout = timedelta()
        monkeypatch.setattr(c10d, "_new_process_group_helper", self._make)
        monkeypatch.setattr(dist, "destroy_process_group", lambda group: self.done.append("destroy"))

    def _make(self, *given: Any, timeout: timedelta, **options: Any) -> tuple[Torch, None]:
        self.variable, self.timeout = os.environ.get(BLOCKING_WAIT), timeout
        return self, None

    def broadcast(self, tensors: Sequence[Tensor], options: Any) -> Work:
        return self.work

    def abort(self) -> None:
        self.done.append("abort")


def joined(backend: Literal["gloo", "nccl"], then: Callable[[WeightGroup], Any]) -> None:
    async def play() -> None:
        group = WeightGroup("g", address="127.0.0.1", size=2, backend=backend)
        await group.join(5.0)
        await then(group)

    asyncio.run(play())


async def nothing(group: WeightGroup) -> None:
    pass


@pytest.mark.parametrize("before", [None, "0"])
def test_errors_of_nccl_reach_who_waits_and_no_thread_of_torchs(
    before: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if before is None:
        monkeypatch.delenv(BLOCKING_WAIT, raising=False)
    else:
        monkeypatch.setenv(BLOCKING_WAIT, before)
    found = Torch(monkeypatch)
    joined("nccl", nothing)
    assert found.variable == "1" and os.environ.get(BLOCKING_WAIT) == before
    assert found.timeout == timedelta(seconds=5 + MARGIN)
    joined("gloo", nothing)
    assert found.variable == before and found.timeout == timedelta(seconds=5)


def test_a_broken_broadcast_is_an_error_here(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Torch(monkeypatch, fault=dist.DistBackendError("remote process exited"))

    async def send(group: WeightGroup) -> None:
        with pytest.raises(dist.DistBackendError, match="remote process exited"):
            await group.broadcast(torch.zeros(1), 2.0)

    joined("nccl", send)
    assert found.work.waits == [timedelta(seconds=2 + MARGIN)], "later than the bound of whoever sends"


def test_nobody_is_waited_for_at_the_end_of_an_nccl_group(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Torch(monkeypatch)

    async def end(group: WeightGroup) -> None:
        group.destroy()

    joined("nccl", end)
    joined("gloo", end)
    assert found.done == ["abort", "destroy", "destroy"]


# What a new one is tried with


class Group:
    """In place of `WeightGroup`."""

    made: list[Group] = []  # noqa: RUF012

    def __init__(self, name: str, *, address: str, size: int, backend: str) -> None:
        self.name, self.address, self.size, self.backend = name, address, size, backend
        self.port, self.joined = 1, True
        self.sent: list[Tensor] = []
        Group.made.append(self)

    async def join(self, seconds: float) -> None:
        pass

    async def broadcast(self, run: Tensor, seconds: float) -> None:
        self.sent.append(run)

    async def interrupt(self) -> None:
        pass

    def destroy(self) -> None:
        self.joined = False


class Server:
    """A client of a server that joins whatever it is asked to."""

    def __init__(self, url: str, fault: ServerError | None = None) -> None:
        self.url, self.fault = url, fault
        self.received: list[tuple[list[str], list[str], list[list[int]]]] = []

    async def server_info(self) -> dict[str, Any]:
        return {"tp_size": 1, "device": "cpu"}

    def start_of(self, info: object) -> object:
        return self.url

    async def join_group(self, **given: Any) -> None:
        pass

    async def leave_group(self, name: str) -> None:
        pass

    async def receive(self, names: Any, dtypes: Any, shapes: Any, group: str) -> None:
        self.received.append((names, dtypes, shapes))
        if self.fault is not None:
            raise self.fault


def open_sink(monkeypatch: pytest.MonkeyPatch, *servers: Server) -> tuple[Any, BroadcastTransport]:
    monkeypatch.setattr(broadcast_module, "WeightGroup", Group)
    monkeypatch.setattr(Group, "made", [])
    transport = BroadcastTransport(nonce="n", device=torch.device("cpu"), address="127.0.0.1", seconds=10.0)
    clients: Any = servers
    return asyncio.run(transport.open(clients)), transport


def test_one_number_goes_through_a_new_group(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = Server("http://one"), Server("http://two")
    failures, _ = open_sink(monkeypatch, one, two)
    (group,) = Group.made
    assert not failures and [run.numel() for run in group.sent] == [4]  # bytes
    assert one.received == two.received == [([PROBE], ["float32"], [(1,)])]


def test_a_server_that_nothing_reaches_is_out_before_weights_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    fault = ServerError("http://bad", "/update_weights_from_distributed", "status 400: NCCL error")
    good, bad = Server("http://good"), Server("http://bad", fault)
    failures, transport = open_sink(monkeypatch, good, bad)
    assert dict(failures) == {bad: fault}
    assert [group.size for group in Group.made] == [3, 2] and list(transport._endpoints) == [good]


def test_an_error_over_nccl_tells_the_version_that_a_server_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broadcast_module, "own_version", lambda: "2.28.9")
    fault = ServerError("http://bad", "/update", "status 400: invalid usage", retryable=True)
    expected = (
        "http://bad/update: status 400: invalid usage; where its NCCL is not 2.28.9, the trainer's, use "
        "rollout.sglang.transport=shared or disk"
    )
    assert str(_with_nccl(fault)) == expected and _with_nccl(fault).retryable
