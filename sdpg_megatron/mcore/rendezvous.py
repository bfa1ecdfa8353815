"""Rendezvous: all ranks join one store within a timeout; errors name the missing or conflicting ranks.

torch's rendezvous logs nothing while it waits, does not name missing ranks, and shares its timeout with collectives.
Here every rank writes an arrival to the store. Rank 0 checks the arrivals and publishes one answer: complete, or an
error.
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
"""Seconds between polls of the store."""
REPORT_AFTER, REPORT_EVERY = 15.0, 60.0
"""Seconds until a waiting rank logs what it waits for, and between later messages."""
CONNECT = 20.0
"""Timeout in seconds of a connection, and of the handshake after it."""
PACE = 5.0
"""Seconds between handshakes: torch logs a page of warnings for each that fails."""
PATIENCE = 10.0
"""Seconds to wait for an ending process to release the port."""
SETTLE = 5.0
"""Seconds beyond a timeout: for torch's own timeout to trigger, and for other ranks to read rank 0's answer."""
LISTED = 8
"""Maximum number of processes in a message."""
_calls = itertools.count()
COUNT, ANSWER, READ = "arrivals", "answer", "read"


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A rank's entry in the store."""

    rank: int
    world_size: int
    process: str
    device: str
    """GPU of the rank and its machine; empty for the CPU."""

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.process})"


def rendezvous(environment: RankEnvironment, seconds: float, device: str = "") -> Store:
    """Join the store of a job with several ranks, and wait for all of them.

    Args:
        environment: has the address of the store, which rank 0 or torchrun's agent hosts.
        seconds: timeout for all ranks to arrive.
        device: see `Arrival.device`.

    Returns:
        An empty prefix of the store, for the process group.

    Raises:
        LaunchError: on all ranks that arrived: the store cannot be reached, or ranks are missing or in conflict.
    """
    deadline = time.monotonic() + seconds
    whole = _connect(environment, deadline, seconds)
    # torchrun's agent keeps one store for all attempts, and this function may be called several times per attempt.
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
        raise LaunchError(
            "rendezvous", found, "rank 0 to serve it until all ranks arrived", "see rank 0's log"
        ) from error
    return PrefixStore("group", store)


def call(act: Callable[[], T], seconds: float) -> T:
    """Call `act` on a daemon thread with a timeout, because torch calls may exceed their own timeouts.

    Raises:
        TimeoutError: `act` did not return in time. Its thread keeps running, but does not block the process's exit.
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
    """Open the store, with retries: its host name may not resolve and its port may be closed until rank 0 is up."""
    hosts = environment.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    reporter = _Reporter()
    if hosts:
        _check_port(environment.master_port, min(deadline, time.monotonic() + PATIENCE))
    while True:
        pause = POLL
        try:
            # A plain connection first, because torch logs long warnings for each failed one.
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
            raise _taken(environment.master_port, f"another program at {_where(environment)}")
        if time.monotonic() + pause > deadline:
            found = f"{_where(environment)} not reached in {seconds:g} s ({reason})"
            fix = (
                "start rank 0; set the same MASTER_ADDR and MASTER_PORT on all ranks, to an address of rank 0's machine"
            )
            raise LaunchError("MASTER_ADDR", found, "rank 0 listening there", fix)
        reporter.log(f"rank {environment.rank} waits for rank 0 at {_where(environment)}: {reason}")
        time.sleep(pause)


def _open(environment: RankEnvironment, *, hosts: bool) -> TCPStore:
    limit = timedelta(seconds=CONNECT)
    arguments = environment.master_addr, environment.master_port, environment.world_size, hosts, limit
    return call(lambda: TCPStore(*arguments, wait_for_workers=False), CONNECT + SETTLE)


def _check_port(port: int, deadline: float) -> None:
    """Raise `LaunchError` if a process of this machine still listens on rank 0's port at `deadline`."""
    while True:
        try:
            socket.create_server(("", port)).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise _taken(port, f"port {port} of this machine ({os.strerror(error.errno or 0)})") from error
        time.sleep(POLL)


def _taken(port: int, found: str) -> LaunchError:
    fix = "end the process on it (another run, or a second process with RANK=0), or set another port on all ranks"
    return LaunchError("MASTER_PORT", found, f"port {port} of rank 0's machine free for rank 0", fix)


# --- the roll call


class _RollCall:
    """A rank's part in the rendezvous. Arrivals are numbered in the store; rank 0 reads all and sets one answer."""

    def __init__(self, store: Store, own: Arrival, deadline: float, seconds: float) -> None:
        self._store, self._own = store, own
        self._deadline, self._seconds = deadline, seconds
        self._arrivals: dict[int, Arrival] = {}
        self._reporter = _Reporter()

    def run(self) -> None:
        """Register this rank and wait for rank 0's answer. Raises `LaunchError`."""
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
        """On rank 0: wait until all ranks arrived, one conflicts or the timeout passes; publish the answer."""
        while True:
            self._read()
            error = contradiction(list(self._arrivals.values()))
            if error is None and self._missing() and time.monotonic() > self._deadline:
                error = self._incomplete()
            if error is not None or not self._missing():
                answer = {"error": str(error or ""), "accepted": list(self._arrivals)}
                return _parse(self._store.compare_set(ANSWER, "", json.dumps(answer)))
            self._reporter.log(f"rank 0 waits for {name_ranks(self._missing())} of {self._own.world_size}")
            time.sleep(POLL)

    def _wait(self) -> dict[str, Any]:
        """On other ranks: wait for rank 0's answer."""
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
        fix = "start them, or check why they ended; parallel.rendezvous_timeout sets the timeout"
        return LaunchError("rendezvous", found, expected, fix)

    def _let_others_read(self) -> None:
        """On rank 0: wait until all ranks have read the answer, because the store may end with this process."""
        deadline = time.monotonic() + SETTLE
        while self._own.rank == 0 and time.monotonic() < deadline:
            if self._store.add(READ, 0) >= self._store.add(COUNT, 0):
                return
            time.sleep(POLL)


def contradiction(arrivals: Sequence[Arrival]) -> LaunchError | None:
    """Error for the first two arrivals that cannot belong to one job; None if there are none."""
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
    return LaunchError("RANK", found, "a different number for each process", fix)


class _Reporter:
    """Logs a message at most at intervals, beginning after `REPORT_AFTER` seconds."""

    def __init__(self) -> None:
        self._due = time.monotonic() + REPORT_AFTER

    def log(self, message: str) -> None:
        if time.monotonic() > self._due:
            logger.warning("%s", message)
            self._due = time.monotonic() + REPORT_EVERY


def _key(number: int) -> str:
    return f"arrival/{number}"


def _parse(answer: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(answer)
    return found


def _where(environment: RankEnvironment) -> str:
    return f"{environment.master_addr} port {environment.master_port}"


def _reason(error: Exception) -> str:
    """First line of the error's message; torch appends a stack."""
    return (getattr(error, "strerror", None) or str(error).strip() or "timed out").splitlines()[0][:200]
