"""No silent hang: where a phase takes too long, or a rank is silent, the job ends with every rank's place and stack.

A thread of each rank looks, so that it does not matter what the main thread waits for. docs/training.md says what the
ends of a job look like.
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
"""Exit code, 70, of a job that the watchdog has ended."""
BETWEEN = "between"
"""The phase of what is in none."""
_STDERR = 2


class Watchdog:
    """While entered, watches this rank, from before it meets the others; in `meeting`, with theirs, all ranks."""

    def __init__(self, config: WatchdogConfig) -> None:
        self._config = config
        environment = RankEnvironment.read()
        self._rank, self._world = environment.rank, environment.world_size
        self._interval = min(2.0, config.silence / 20)
        """Seconds between two looks."""
        self._clock = Clock(max(10 * self._interval, 2.0))
        self._at = "start", 0, self._clock.now()
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
        """While entered, ranks watch each other. Every rank enters it, once the process group is there."""
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
                self._thread.join()  # it ends this process; what is raised here is that others have ended
            self._ended = f"{type(error).__name__}: {str(error).strip()[:200]}"
            if isinstance(error, RuntimeError) and _in_collective(error):
                self._explain(error, heartbeats)
            raise
        finally:
            self._heartbeats = None
            heartbeats.close()

    @contextmanager
    def phase(self, phase: str) -> Iterator[None]:
        """While entered, the phase is under way; afterwards, none. One that an error ends stays: it is told then."""
        self.begin(phase)
        yield
        self.begin(BETWEEN)

    def begin(self, phase: str) -> None:
        self._at = phase, self._at[1] + 1, self._clock.now()

    def _state(self, sequence: int) -> RankStatus:
        phase, number, since = self._at
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
            # Code that holds Python's lock holds this thread up, too: then its stack is written by one that needs none.
            # That does no more: its clock counts the time in which the process was stopped.
            faulthandler.dump_traceback_later(self._config.silence, file=_STDERR)
            self._clock.tick()
            if reason := self._reason():
                self._end(reason)

    def _reason(self) -> str:
        """Why the job is to end; empty while it is not."""
        phase, _, since = self._at
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
        return f"no sign of life from {name_ranks(silent)} for {silence:g} s (watchdog.silence)" if silent else ""

    def _end(self, reason: str) -> None:
        """Tell the others, write what is known to standard error, and end this process."""
        self._ending.set()
        self._write(f"{reason}. The stacks of this rank's threads:")
        faulthandler.dump_traceback(file=_STDERR, all_threads=True)
        if (heartbeats := self._heartbeats) is not None:
            heartbeats.post(reason)
            time.sleep(6 * self._interval)  # ranks that were not read so far are seen to be silent
            self._write(self._picture(heartbeats, 3 * self._interval))
        self._exit()

    def _explain(self, error: BaseException, heartbeats: HeartbeatStore) -> None:
        """A collective has failed: say which rank is missing, if one is, and end; otherwise let the error go on."""
        heartbeats.read_everyone()
        silence = 4 * self._interval
        deadline = time.monotonic() + 10 * self._interval
        while time.monotonic() < deadline:
            time.sleep(self._interval)
            if heartbeats.silent(silence) or heartbeats.unanswered > silence:
                traceback.print_exception(error)
                self._write(f"a collective has failed in {self._at[0]}")
                self._write(self._picture(heartbeats, silence))
                self._exit()

    def _picture(self, heartbeats: HeartbeatStore, silence: float) -> str:
        """Who is missing; those who are silent for so long are. The first rank is where the store does not answer."""
        unanswered = {0: heartbeats.unanswered} if heartbeats.unanswered > silence else {}
        return describe(heartbeats.states(), heartbeats.silent(silence) | unanswered)

    def _exit(self) -> NoReturn:
        if self._rank == 0:
            time.sleep(4 * self._interval)  # the store may be this process's, and the others still read
        os._exit(HUNG)

    def _write(self, text: str) -> None:
        sys.stderr.write(f"watchdog, rank {self._rank} of {self._world}, {this_process()}: {text}\n")
        sys.stderr.flush()


def _in_collective(error: BaseException) -> bool:
    return any(COLLECTIVES in frame.filename for frame in traceback.extract_tb(error.__traceback__))
