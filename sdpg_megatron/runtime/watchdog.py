"""Watchdog: ends the job if a phase exceeds its bound or a rank is silent, and reports each rank's position and stack.

It runs on a thread of each rank, so blocked main threads do not matter. Behavior: docs/training.md.
"""

from __future__ import annotations

import faulthandler
import os
import secrets
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import NoReturn

from sdpg_megatron.config import WatchdogConfig
from sdpg_megatron.mcore.parallel import ParallelState
from sdpg_megatron.process.rank_environment import RankEnvironment, name_ranks
from sdpg_megatron.runtime.heartbeats import Clock, HeartbeatStore
from sdpg_megatron.runtime.rank_status import COLLECTIVES, RankStatus, describe, locate_main_thread, this_process

HUNG = os.EX_SOFTWARE
"""Exit code, 70, of a job that the watchdog ended."""
BETWEEN = "between"
"""Phase outside of all others."""
_STDERR = 2


class Watchdog:
    """While entered, watches this rank; inside `monitor_ranks`, all ranks watch each other."""

    def __init__(self, config: WatchdogConfig) -> None:
        self._config = config
        environment = RankEnvironment.read()
        self._rank, self._world = environment.rank, environment.world_size
        self._interval = min(2.0, config.silence / 20)
        """Seconds between two checks."""
        self._clock = Clock(max(10 * self._interval, 2.0))
        self._current = "start", 0, self._clock.now()
        self._ended = ""
        self._heartbeats: HeartbeatStore | None = None
        self._closed, self._ending = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._config.enabled:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(2 * self._interval)
        faulthandler.cancel_dump_traceback_later()

    @contextmanager
    def monitor_ranks(self, ranks: ParallelState) -> Iterator[None]:
        """Let ranks watch each other. Collective; needs the process group."""
        nonce = ranks.gather_all(secrets.token_hex(4))[0]
        if not self._config.enabled or ranks.world == 1 or "MASTER_ADDR" not in os.environ:
            yield
            return
        heartbeats = self._heartbeats = HeartbeatStore.open(nonce, ranks, self._clock, self._interval, self._state)
        try:
            yield
            self._ended = "done"
        except BaseException as error:
            if self._ending.is_set():
                self._thread.join()  # it ends this process; this error only follows from other ranks' ends
            self._ended = f"{type(error).__name__}: {str(error).strip()[:200]}"
            if isinstance(error, RuntimeError) and _in_collective(error):
                self._explain(error, heartbeats)
            raise
        finally:
            self._heartbeats = None
            heartbeats.close()

    @contextmanager
    def phase(self, phase: str) -> Iterator[None]:
        """Mark a phase while entered. A phase that an error ends stays marked, for the report."""
        self.begin(phase)
        yield
        self.begin(BETWEEN)

    def begin(self, phase: str) -> None:
        self._current = phase, self._current[1] + 1, self._clock.now()

    def _state(self, sequence: int) -> RankStatus:
        phase, number, since = self._current
        place, waits = locate_main_thread()
        seconds = self._clock.now() - since
        return RankStatus(
            sequence=sequence,
            phase=phase,
            number=number,
            seconds=seconds,
            place=place,
            waits=waits,
            process=this_process(),
            ended=self._ended,
        )

    def _run(self) -> None:
        while not self._closed.wait(self._interval):
            # Code that holds the GIL blocks this thread too. faulthandler's timer thread needs no GIL and writes the
            # stack. It does not end the process, as its clock includes the time in which the process was stopped.
            faulthandler.dump_traceback_later(self._config.silence, file=_STDERR)
            self._clock.tick()
            if reason := self._reason():
                self._end(reason)

    def _reason(self) -> str:
        """Reason to end the job; empty while healthy."""
        phase, _, since = self._current
        limit: float | None = getattr(self._config, phase)
        seconds, silence = self._clock.now() - since, self._config.silence
        if limit is not None and seconds > limit:
            return f"{phase} has taken {seconds:.0f} s on rank {self._rank}, watchdog.{phase} allows {limit:g} s"
        if (heartbeats := self._heartbeats) is None:
            return ""
        if heartbeats.abort_reason:
            return heartbeats.abort_reason
        if heartbeats.unanswered > silence:
            return f"the first rank's machine has not answered for {silence:g} s (watchdog.silence): rank 0 is missing"
        silent = heartbeats.silent(silence)
        return f"no heartbeat from {name_ranks(silent)} for {silence:g} s (watchdog.silence)" if silent else ""

    def _end(self, reason: str) -> None:
        """Post the reason, write the report to standard error, and end this process."""
        self._ending.set()
        self._write(f"{reason}. The stacks of this rank's threads:")
        faulthandler.dump_traceback(file=_STDERR, all_threads=True)
        if (heartbeats := self._heartbeats) is not None:
            heartbeats.post(reason)
            time.sleep(6 * self._interval)  # until ranks that were not read before are known to be silent
            self._write(self._report(heartbeats, 3 * self._interval))
        self._exit()

    def _explain(self, error: BaseException, heartbeats: HeartbeatStore) -> None:
        """After a failed collective: report and end if a rank is missing, else return so that the error is raised."""
        heartbeats.read_everyone()
        silence = 4 * self._interval
        deadline = time.monotonic() + 10 * self._interval
        while time.monotonic() < deadline:
            time.sleep(self._interval)
            if heartbeats.silent(silence) or heartbeats.unanswered > silence:
                traceback.print_exception(error)
                self._write(f"a collective has failed in {self._current[0]}")
                self._write(self._report(heartbeats, silence))
                self._exit()

    def _report(self, heartbeats: HeartbeatStore, silence: float) -> str:
        """Describe all ranks. Those silent for more seconds count as missing; rank 0 too if the store is silent."""
        unanswered = {0: heartbeats.unanswered} if heartbeats.unanswered > silence else {}
        return describe(heartbeats.states(), heartbeats.silent(silence) | unanswered)

    def _exit(self) -> NoReturn:
        if self._rank == 0:
            time.sleep(4 * self._interval)  # this process may host the store, which the others still read
        os._exit(HUNG)

    def _write(self, text: str) -> None:
        sys.stderr.write(f"watchdog, rank {self._rank} of {self._world}, {this_process()}: {text}\n")
        sys.stderr.flush()


def _in_collective(error: BaseException) -> bool:
    return any(COLLECTIVES in frame.filename for frame in traceback.extract_tb(error.__traceback__))
