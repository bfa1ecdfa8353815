"""Ranks that meet, and those that do not: threads stand for ranks, over real stores."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from torch._C._distributed_c10d import Store, TCPStore

from sdpg_megatron.errors import LaunchError
from sdpg_megatron.mcore import rendezvous as module
from sdpg_megatron.mcore.rendezvous import Arrival, contradiction, rendezvous
from sdpg_megatron.process.rank_environment import RankEnvironment

HERE = "127.0.0.1"
SOON, LATE = 0.5, 30.0
"""Seconds: for what does not happen, and for what does."""


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_calls", itertools.repeat(0))  # as in processes of their own
    for name, seconds in {"POLL": 0.05, "PACE": 0.2, "PATIENCE": 0.3, "SETTLE": 1.0}.items():
        monkeypatch.setattr(module, name, seconds)
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def port() -> int:
    with socket.create_server((HERE, 0)) as found:
        number: int = found.getsockname()[1]
        return number


def rank(number: int, port: int, world_size: int = 2, address: str = HERE) -> RankEnvironment:
    return RankEnvironment(rank=number, world_size=world_size, master_addr=address, master_port=port)


def meet(*ranks: RankEnvironment, seconds: float = LATE, device: str = "") -> list[Store | LaunchError]:
    """What each rank gets."""

    def come(environment: RankEnvironment) -> Store | LaunchError:
        try:
            return rendezvous(environment, seconds, device and f"{device} {environment.rank // 2}")
        except LaunchError as error:
            return error

    with ThreadPoolExecutor(len(ranks)) as threads:
        return list(threads.map(come, ranks))


def test_ranks_that_all_come_share_a_store(port: int) -> None:
    stores = meet(*(rank(number, port, 3) for number in (2, 0, 1)))
    assert all(isinstance(store, Store) for store in stores), stores
    first, *_, last = stores
    assert isinstance(first, Store) and isinstance(last, Store)
    first.set("key", "value")
    assert last.get("key") == b"value"


def test_ranks_meet_at_the_store_of_an_agent(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under torchrun, once for each attempt."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    agent = TCPStore(HERE, port, None, True, timedelta(seconds=LATE), wait_for_workers=False)
    for attempt in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        found = meet(rank(0, port), rank(1, port))
        assert all(isinstance(store, Store) for store in found), found
    del agent


def test_ranks_that_do_not_come_are_named_on_all_that_came(port: int) -> None:
    found = meet(rank(0, port, 5), rank(3, port, 5), seconds=SOON)
    assert str(found[0]) == str(found[1])
    message = r"rendezvous: found rank 0 \(process \d+ on \S+\), rank 3 \(.*\) after 0\.5 s, expected ranks 1-2, 4 of 5"
    with pytest.raises(LaunchError, match=message):
        raise found[0]  # type: ignore[misc]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (
            HERE,
            r"found 127\.0\.0\.1 port \d+ not reached in 0.5 s \(Connection refused\), expected rank 0",
        ),
        (
            "nowhere.invalid",
            r"found nowhere\.invalid port \d+ not reached in 0.5 s \(.*(known|resolution)",
        ),
    ],
)
def test_a_rank_0_that_is_not_there_is_named(port: int, address: str, message: str) -> None:
    (found,) = meet(rank(1, port, address=address), seconds=SOON)
    with pytest.raises(LaunchError, match=f"^MASTER_ADDR: {message}"):
        raise found  # type: ignore[misc]


def test_rank_0_knows_its_own_address(port: int) -> None:
    (found,) = meet(rank(0, port, address="nowhere.invalid"), seconds=SOON)
    assert isinstance(found, LaunchError) and "nowhere.invalid" in str(found)


def test_an_agent_without_rank_0_is_no_reason_to_wait_longer(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    agent = TCPStore(HERE, port, None, True, timedelta(seconds=LATE), wait_for_workers=False)
    found = meet(rank(1, port, 3), rank(2, port, 3), seconds=SOON)
    assert all("expected rank 0 of 3 as well" in str(error) for error in found)
    del agent


def test_a_port_that_another_program_has_is_named_by_rank_0(port: int) -> None:
    with socket.create_server(("", port)):
        (found,) = meet(rank(0, port))
    assert str(found).startswith(f"MASTER_PORT: found port {port} of this machine (Address already in use)"), found


@pytest.fixture
def program(port: int) -> Iterator[Any]:
    """A program of another kind that answers, closes or says nothing."""
    with socket.create_server((HERE, port)) as server:
        kept: list[socket.socket] = []
        how: list[str] = []

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                kept.append(connection)
                if how[0] == "answers" and connection.recv(64):
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                if how[0] == "closes":
                    connection.close()

        threading.Thread(target=serve, daemon=True).start()
        yield how.append
        for connection in kept:
            connection.close()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("answers", "MASTER_PORT: found another program at 127.0.0.1 port "),
        ("closes", "not reached in 0.5 s ("),
        ("is silent", "not reached in 0.5 s (timed out)"),
    ],
)
def test_a_program_of_another_kind_is_not_waited_for_without_bound(
    program: Any, port: int, how: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CONNECT", 0.5)
    if how != "is silent":
        monkeypatch.setattr(module, "SETTLE", LATE)
    program(how)
    started = time.monotonic()
    (found,) = meet(rank(1, port), seconds=SOON)
    assert message in str(found)
    assert time.monotonic() - started < LATE


@pytest.mark.parametrize(
    ("ranks", "device", "message"),
    [
        ([(0, 2), (1, 3)], "", "WORLD_SIZE: found "),
        ([(0, 3), (1, 3), (1, 3)], "", "RANK: found 1 for process "),
        ([(0, 3), (1, 3), (2, 3)], "GPU", "LOCAL_RANK: found GPU 0 for rank "),
    ],
)
def test_ranks_that_contradict_each_other_are_named_on_all_of_them(
    port: int, ranks: list[tuple[int, int]], device: str, message: str
) -> None:
    found = meet(*(rank(number, port, world_size) for number, world_size in ranks), device=device)
    assert len({str(error) for error in found}) == 1, found
    assert str(found[0]).startswith(message)


def test_one_that_comes_when_all_are_there_is_turned_away(port: int) -> None:
    first, second = meet(rank(0, port), rank(1, port))
    assert isinstance(first, Store) and isinstance(second, Store)
    (late,) = meet(rank(1, port))
    assert str(late).startswith("RANK: found 1 for process ")


def test_ranks_without_a_contradiction_may_still_be_few() -> None:
    few = [Arrival(rank=n, world_size=9, process=f"process {n}", device="") for n in (4, 2)]
    assert contradiction(few) is None and contradiction([]) is None
