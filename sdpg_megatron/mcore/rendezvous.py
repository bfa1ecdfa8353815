"""Rendezvous: all ranks join one store within minutes, and those that do not come are named.

torch's own rendezvous says nothing while it waits, names nobody, and has one timeout with all collectives. Here every
rank writes an arrival into the store, and rank 0 answers all of them: complete, or what is missing or wrong.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, TypeVar

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from sdpg_megatron.errors import LaunchError
from sdpg_megatron.process.rank_environment import RankEnvironment, name_ranks

logger = logging.getLogger(__name__)
T = TypeVar("T")

POLL = 0.25
"""Seconds between two looks at the store."""
REPORT_AFTER, REPORT_EVERY = 15.0, 60.0
"""Seconds until a rank that waits says what for, and between two such messages."""
CONNECT = 20.0
"""Seconds for one connection, and for the handshake that follows."""
PACE = 5.0
"""Seconds between two handshakes: torch writes a page of warnings for each that fails."""
PATIENCE = 10.0
"""Seconds for a process that has the port, and is being ended, to be gone."""
SETTLE = 5.0
"""Seconds beyond a timeout: for torch to notice its own, and for other ranks to read what rank 0 has found."""
LISTED = 8
"""Processes that a message names."""
_calls = itertools.count()
COUNT, ANSWER, READ = "arrivals", "answer", "read"


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """One rank, as it presents itself."""

    rank: int
    world_size: int
    process: str
    device: str
    """The GPU that it takes, and on which machine; empty for the CPU."""

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.process})"


def rendezvous(environment: RankEnvironment, seconds: float, device: str = "") -> Store:
    """Join the store of a job of several ranks, and wait until all of them have.

    Args:
        environment: tells where the store is: rank 0's own, or that of torchrun's agent.
        seconds: until all ranks have to be there.
        device: see `Arrival.device`.

    Returns:
        An empty part of the store, for the process group.

    Raises:
        LaunchError: the store cannot be reached, ranks are missing, or ranks contradict each other; on all that came.
    """
    deadline = time.monotonic() + seconds
    whole = _connect(environment, deadline, seconds)
    # torchrun's agent keeps one store for all attempts, and for all calls of each.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = PrefixStore(f"rendezvous/{attempt}/{next(_calls)}", whole)
    own = Arrival(
        rank=environment.rank,
        world_size=environment.world_size,
        process=f"process {os.getpid()} on {socket.gethostname()}",
        device=device,
    )
    bound = max(deadline - time.monotonic(), 0.0) + 4 * SETTLE
    try:
        call(_RollCall(store, own, deadline, seconds).run, bound)
    except (RuntimeError, TimeoutError) as error:
        found = f"no answer from the store at {_where(environment)} ({_reason(error)})"
        raise LaunchError("rendezvous", found, "rank 0, until all ranks are there", "see what rank 0 said") from error
    return PrefixStore("group", store)


def call(act: Callable[[], T], seconds: float) -> T:
    """Call `act` on another thread: calls into torch may exceed their own timeouts.

    Raises:
        TimeoutError: it takes longer; the thread goes on, and does not keep the process from ending.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(act())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="rendezvous", daemon=True).start()
    return future.result(seconds)


# --- the store


def _connect(environment: RankEnvironment, deadline: float, seconds: float) -> TCPStore:
    """Open the store, or wait for it: names are unknown and ports closed until rank 0's machine is up."""
    hosts = environment.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    reporter = _Reporter()
    if hosts:
        _check_port(environment.master_port, min(deadline, time.monotonic() + PATIENCE))
    while True:
        pause = POLL
        try:
            # A plain connection first: torch warns at length of each that fails.
            address = environment.master_addr, environment.master_port
            if hosts:
                socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
            else:
                socket.create_connection(address, CONNECT).close()
            pause = PACE
            return _open(environment, hosts=hosts)
        except (OSError, RuntimeError) as error:  # OSError: also a timeout
            reason = _reason(error)
        if "Ping failed" in reason or "EADDRINUSE" in reason:
            raise _taken(environment.master_port, f"another program answers at {_where(environment)}")
        if time.monotonic() + pause > deadline:
            found = f"{_where(environment)} not reached in {seconds:g} s ({reason})"
            fix = (
                "start rank 0 as well; set MASTER_ADDR and MASTER_PORT alike on all ranks, to an address of its machine"
            )
            raise LaunchError("MASTER_ADDR", found, "rank 0, listening there", fix)
        reporter.say(f"rank {environment.rank} waits for rank 0 at {_where(environment)}: {reason}")
        time.sleep(pause)


def _open(environment: RankEnvironment, *, hosts: bool) -> TCPStore:
    limit = timedelta(seconds=CONNECT)
    arguments = environment.master_addr, environment.master_port, environment.world_size, hosts, limit
    return call(lambda: TCPStore(*arguments, wait_for_workers=False), CONNECT + SETTLE)


def _check_port(port: int, deadline: float) -> None:
    """Raises `LaunchError` where a process of this machine listens on rank 0's port, and goes on doing so."""
    while True:
        try:
            socket.create_server(("", port)).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise _taken(port, f"port {port} of this machine ({os.strerror(error.errno or 0)})") from error
        time.sleep(POLL)


def _taken(port: int, found: str) -> LaunchError:
    fix = "end what listens there (another run, or a second process with RANK=0), or choose another on all ranks"
    return LaunchError("MASTER_PORT", found, f"port {port} of rank 0's machine for rank 0 alone", fix)


# --- the roll call


class _RollCall:
    """One rank's part. Arrivals are numbered in the store; rank 0 reads them all and sets one answer."""

    def __init__(self, store: Store, own: Arrival, deadline: float, seconds: float) -> None:
        self._store, self._own = store, own
        self._deadline, self._seconds = deadline, seconds
        self._arrivals: dict[int, Arrival] = {}
        self._reporter = _Reporter()

    def run(self) -> None:
        """Raises `LaunchError`."""
        number = self._store.add(COUNT, 1)
        self._store.set(_key(number), json.dumps(asdict(self._own)))
        answer = self._find() if self._own.rank == 0 else self._wait()
        self._store.add(READ, 1)
        if answer["error"]:
            self._let_others_read()
            raise LaunchError.of_text(answer["error"])
        if number not in answer["accepted"]:
            self._read()
            accepted = (self._arrivals[accepted] for accepted in answer["accepted"])
            raise _repeated(next(arrival for arrival in accepted if arrival.rank == self._own.rank), self._own)

    def _find(self) -> dict[str, Any]:
        """Rank 0: the answer, which all others get."""
        while True:
            self._read()
            error = contradiction(list(self._arrivals.values()))
            if error is None and self._missing() and time.monotonic() > self._deadline:
                error = self._incomplete()
            if error is not None or not self._missing():
                answer = {"error": str(error or ""), "accepted": list(self._arrivals)}
                return _parse(self._store.compare_set(ANSWER, "", json.dumps(answer)))
            self._reporter.say(f"rank 0 waits for {name_ranks(self._missing())} of {self._own.world_size}")
            time.sleep(POLL)

    def _wait(self) -> dict[str, Any]:
        """Another rank: rank 0's answer."""
        while not self._store.check([ANSWER]):
            if time.monotonic() > self._deadline + SETTLE:
                self._read()
                return {"error": str(self._incomplete())}
            time.sleep(POLL)
        return _parse(self._store.get(ANSWER))

    def _read(self) -> None:
        for number in range(1, self._store.add(COUNT, 0) + 1):
            if number not in self._arrivals and self._store.check([_key(number)]):
                self._arrivals[number] = Arrival(**json.loads(self._store.get(_key(number))))

    def _missing(self) -> list[int]:
        return sorted(set(range(self._own.world_size)) - {arrival.rank for arrival in self._arrivals.values()})

    def _incomplete(self) -> LaunchError:
        there = sorted(self._arrivals.values(), key=lambda arrival: arrival.rank)
        more = f" and {len(there) - LISTED} more" if len(there) > LISTED else ""
        found = f"{', '.join(map(str, there[:LISTED]))}{more} after {self._seconds:g} s"
        expected = f"{name_ranks(self._missing())} of {self._own.world_size} as well"
        fix = "start them, or see why they ended; parallel.rendezvous_timeout bounds the wait"
        return LaunchError("rendezvous", found, expected, fix)

    def _let_others_read(self) -> None:
        """The store may end with this process."""
        deadline = time.monotonic() + SETTLE
        while self._own.rank == 0 and time.monotonic() < deadline:
            if self._store.add(READ, 0) >= self._store.add(COUNT, 0):
                return
            time.sleep(POLL)


def contradiction(arrivals: Sequence[Arrival]) -> LaunchError | None:
    """Error for the first two ranks that cannot belong to one job; None if there are none."""
    seen: dict[int, Arrival] = {}
    devices: dict[str, Arrival] = {}
    for arrival in arrivals:
        first = arrivals[0]
        if arrival.world_size != first.world_size:
            found = f"{first.world_size} on {first}, {arrival.world_size} on {arrival}"
            fix = "export the same number on all ranks; another run may use this MASTER_ADDR and MASTER_PORT"
            return LaunchError("WORLD_SIZE", found, "the same on all ranks", fix)
        if arrival.rank in seen:
            return _repeated(seen[arrival.rank], arrival)
        if arrival.device and arrival.device in devices:
            found = f"{arrival.device} for {devices[arrival.device]} and for {arrival}"
            fix = "export LOCAL_RANK, numbered from 0 on each machine; under srun it is $SLURM_LOCALID"
            return LaunchError("LOCAL_RANK", found, "a GPU for each rank", fix)
        seen[arrival.rank] = devices[arrival.device] = arrival
    return None


def _repeated(first: Arrival, second: Arrival) -> LaunchError:
    found = f"{first.rank} for {first.process} and for {second.process}"
    fix = "number the ranks from 0; another run may use this MASTER_ADDR and MASTER_PORT"
    return LaunchError("RANK", found, "a number of its own for each process", fix)


# --- small things


class _Reporter:
    """Log what this rank waits for, at intervals."""

    def __init__(self) -> None:
        self._due = time.monotonic() + REPORT_AFTER

    def say(self, what: str) -> None:
        if time.monotonic() > self._due:
            logger.warning("%s", what)
            self._due = time.monotonic() + REPORT_EVERY


def _key(number: int) -> str:
    return f"arrival/{number}"


def _parse(answer: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(answer)
    return found


def _where(environment: RankEnvironment) -> str:
    return f"{environment.master_addr} port {environment.master_port}"


def _reason(error: Exception) -> str:
    """The error's first line; torch adds its own stack."""
    return (getattr(error, "strerror", None) or str(error).strip() or "timed out").splitlines()[0][:200]
