"""Where ranks say what they are doing, and read what others do, whatever their main threads wait for.

A thread of each rank writes to a store and reads from it. The store is the one that the ranks met at: torchrun's, or
the first rank's.
"""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import PrefixStore, TCPStore

from sdpg_megatron.mcore.parallel import ParallelState
from sdpg_megatron.runtime.rank_status import RankStatus

ABORT_REASON = "charge"
CONNECT = timedelta(seconds=60)


class Clock:
    """Seconds in which this process ran: what it spent stopped, by Ctrl-Z for one, is nobody's fault."""

    def __init__(self, longest: float) -> None:
        """`longest`: seconds between two calls of `tick` from which on the process was stopped."""
        self._longest = longest
        self._stopped = 0.0
        self._last = time.monotonic()

    def now(self) -> float:
        return time.monotonic() - self._stopped

    def tick(self) -> None:
        """To be called again and again, always by the same thread."""
        now = time.monotonic()
        if now - self._last > self._longest:
            self._stopped += now - self._last
        self._last = now


class HeartbeatStore:
    """Threads may call everything; nothing blocks but `open`."""

    def __init__(
        self, store: Any, ranks: ParallelState, clock: Clock, interval: float, own: Callable[[int], RankStatus]
    ) -> None:
        """Every rank calls it.

        Args:
            own: what this rank is doing, with the given `RankStatus.sequence`.
            interval: seconds between two rounds.
        """
        self._store, self._rank, self._world, self._clock = store, ranks.rank, ranks.world, clock
        self._interval, self._own = interval, own
        self._sequence = 0
        self._seen: dict[int, tuple[RankStatus, float]] = {}
        self._answered = clock.now()
        self._posted = self._abort_reason = ""
        self._everyone = ranks.is_main
        self._wake, self._closed = threading.Event(), threading.Event()
        self._say()
        ranks.barrier()  # all are on the board
        self._thread = threading.Thread(target=self._run, name="board", daemon=True)
        self._thread.start()

    @classmethod
    def open(
        cls, nonce: str, ranks: ParallelState, clock: Clock, interval: float, own: Callable[[int], RankStatus]
    ) -> HeartbeatStore:
        """The board of these ranks, which share `nonce`. A connection of its own: another's may be waiting."""
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=CONNECT)
        return cls(PrefixStore(f"watchdog/{nonce}", store), ranks, clock, interval, own)

    @property
    def abort_reason(self) -> str:
        """Why the job is to end, where a rank has found that it is; the same on all that read it."""
        return self._abort_reason

    def post(self, abort_reason: str) -> None:
        """Say that the job is to end, unless another rank has. All ranks are read from now on."""
        self._posted = abort_reason
        self.read_everyone()

    def read_everyone(self) -> None:
        """From now on. Otherwise the first rank alone does, and the others read what it does."""
        self._everyone = True
        self._wake.set()

    def states(self) -> dict[int, RankStatus]:
        """As last read, by rank."""
        return {rank: state for rank, (state, _) in dict(self._seen).items()}

    def silent(self, seconds: float) -> dict[int, float]:
        """Ranks that have said nothing for so long, and for how long exactly; nobody where the board does not answer.

        Those that are done are not among them.
        """
        now = min(self._clock.now(), self._answered)
        ages = {rank: now - since for rank, (state, since) in dict(self._seen).items() if state.ended != "done"}
        return {rank: age for rank, age in ages.items() if age > seconds and rank != self._rank}

    @property
    def unanswered(self) -> float:
        """Seconds since the store has last answered."""
        return self._clock.now() - self._answered

    def close(self) -> None:
        """Say a last time what this rank does, if the store takes it."""
        self._closed.set()
        self._wake.set()
        self._thread.join(2 * self._interval)

    def _run(self) -> None:
        while not self._closed.is_set():
            with suppress(RuntimeError):  # `unanswered` tells
                self._round()
            self._wake.wait(self._interval)
            self._wake.clear()
        with suppress(RuntimeError):
            self._say()

    def _say(self) -> None:
        self._sequence += 1
        self._store.set(str(self._rank), json.dumps(dataclasses.asdict(self._own(self._sequence))))

    def _round(self) -> None:
        self._say()
        if self._posted:
            self._store.compare_set(ABORT_REASON, "", self._posted)
        wanted = range(self._world) if self._everyone else [0]
        read = self._store.multi_get([str(rank) for rank in wanted])
        abort_reason = self._store.get(ABORT_REASON).decode() if self._store.check([ABORT_REASON]) else ""
        self._answered = now = self._clock.now()
        for rank, text in zip(wanted, read, strict=True):
            state = RankStatus(**json.loads(text))
            before = self._seen.get(rank)
            if before is None or before[0].sequence != state.sequence:
                self._seen[rank] = state, now
        self._abort_reason = abort_reason
