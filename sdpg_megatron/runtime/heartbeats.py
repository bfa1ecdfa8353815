"""Heartbeats: a thread of each rank publishes the rank's status to a store and reads the others'.

Works while main threads are blocked. The store is the one of the rendezvous: torchrun's, or rank 0's.
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
    """Monotonic seconds without the time in which this process was stopped, as by Ctrl-Z."""

    def __init__(self, longest: float) -> None:
        """`longest`: a gap between two ticks of more seconds counts as stopped."""
        self._longest = longest
        self._stopped = 0.0
        self._last = time.monotonic()

    def now(self) -> float:
        return time.monotonic() - self._stopped

    def tick(self) -> None:
        """Detect stops. Called periodically, always on the same thread."""
        now = time.monotonic()
        if now - self._last > self._longest:
            self._stopped += now - self._last
        self._last = now


class HeartbeatStore:
    """Published status of all ranks. Thread-safe; only `open` blocks."""

    def __init__(
        self, store: Any, ranks: ParallelState, clock: Clock, interval: float, own: Callable[[int], RankStatus]
    ) -> None:
        """Collective over all ranks.

        Args:
            own: returns this rank's status for the given `RankStatus.sequence`.
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
        self._publish()
        ranks.barrier()  # all ranks have published
        self._thread = threading.Thread(target=self._run, name="heartbeats", daemon=True)
        self._thread.start()

    @classmethod
    def open(
        cls, nonce: str, ranks: ParallelState, clock: Clock, interval: float, own: Callable[[int], RankStatus]
    ) -> HeartbeatStore:
        """Connect to the store, under the shared `nonce`. A separate connection: others may be blocked."""
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=CONNECT)
        return cls(PrefixStore(f"watchdog/{nonce}", store), ranks, clock, interval, own)

    @property
    def abort_reason(self) -> str:
        """Abort reason posted by any rank, the same on all ranks; empty while healthy."""
        return self._abort_reason

    def post(self, abort_reason: str) -> None:
        """Post an abort reason, unless another rank has posted one. From then on all ranks are read."""
        self._posted = abort_reason
        self.read_everyone()

    def read_everyone(self) -> None:
        """From now on read all ranks. By default rank 0 reads all, and the others read rank 0."""
        self._everyone = True
        self._wake.set()

    def states(self) -> dict[int, RankStatus]:
        """Last status of each rank that was read."""
        return {rank: state for rank, (state, _) in dict(self._seen).items()}

    def silent(self, seconds: float) -> dict[int, float]:
        """Ranks without a heartbeat for more than `seconds`, with the seconds since their last one.

        Empty while the store does not answer. Ranks that are done are left out.
        """
        now = min(self._clock.now(), self._answered)
        ages = {rank: now - since for rank, (state, since) in dict(self._seen).items() if state.ended != "done"}
        return {rank: age for rank, age in ages.items() if age > seconds and rank != self._rank}

    @property
    def unanswered(self) -> float:
        """Seconds since the store's last answer."""
        return self._clock.now() - self._answered

    def close(self) -> None:
        """Publish a last time, if the store answers, and end the thread."""
        self._closed.set()
        self._wake.set()
        self._thread.join(2 * self._interval)

    def _run(self) -> None:
        while not self._closed.is_set():
            with suppress(RuntimeError):  # visible in `unanswered`
                self._round()
            self._wake.wait(self._interval)
            self._wake.clear()
        with suppress(RuntimeError):
            self._publish()

    def _publish(self) -> None:
        self._sequence += 1
        self._store.set(str(self._rank), json.dumps(dataclasses.asdict(self._own(self._sequence))))

    def _round(self) -> None:
        self._publish()
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
