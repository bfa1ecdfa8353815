"""Verifiers in processes of their own, so that whatever one does costs a sample its reward and never the run."""

from __future__ import annotations

import logging
import math
import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from numbers import Real
from queue import SimpleQueue

from sdpg_megatron.config import RewardConfig
from sdpg_megatron.errors import ConfigError
from sdpg_megatron.process import streams
from sdpg_megatron.records import Group, Prompt
from sdpg_megatron.rewards.base import Extracting, Verifier
from sdpg_megatron.rewards.load import FIELD, load_verifier

logger = logging.getLogger(__name__)

START_SECONDS = 300.0
"""Longest wait for a new process to import the verifier; no call's time-out runs meanwhile."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """On one response."""

    reward: float
    answer: str | None = None
    """None where it was not asked for, or the response gives none."""


Outcome = Verdict | str
"""A verdict, or what went wrong."""


@dataclass(frozen=True, slots=True)
class GroupRewards:
    """The verifier's word on one group."""

    rewards: tuple[float, ...]
    """One for each completion, in order; the failure reward where the call failed."""
    failures: int
    """Calls that raised, returned no finite number, ran out of time or ended their process."""
    answers: tuple[str | None, ...] | None = None
    """The answer of each completion, None for none; None for all where the verifier does not extract any."""


class VerifierPool:
    """Runs one verifier in `RewardConfig.workers` processes.

    A process is spawned, so a script that makes a pool needs the usual ``if __name__ == "__main__"``.
    """

    def __init__(self, config: RewardConfig) -> None:
        """Start the processes; they get ready while the caller goes on.

        Raises:
            ConfigError: the verifier cannot be loaded.
        """
        self._extracts = isinstance(load_verifier(config.verifier), Extracting)
        self._failure_reward = config.failure_reward
        self._workers = [_Worker(config.verifier, config.timeout) for _ in range(config.workers)]
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        for worker in self._workers:
            worker.start()
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(config.workers, thread_name_prefix="verifier")

    def score(self, groups: Sequence[Group], *, extract: bool = False) -> list[GroupRewards]:
        """Verify every completion of every group, in order.

        Args:
            extract: also ask which answer each gives, where the verifier knows; the time limit is for both together.

        Raises:
            ConfigError: a worker process could not load the verifier.
        """
        extract = extract and self._extracts
        outcomes = list(self._threads.map(partial(self._verify, extract=extract), groups))
        self._report(groups, outcomes)
        return [self._rewards(group, extract) for group in outcomes]

    def close(self) -> None:
        """End the processes. Closing twice is harmless."""
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.stop()

    def _rewards(self, outcomes: Sequence[Outcome], extract: bool) -> GroupRewards:
        failed = Verdict(self._failure_reward)
        verdicts = [failed if isinstance(outcome, str) else outcome for outcome in outcomes]
        return GroupRewards(
            rewards=tuple(verdict.reward for verdict in verdicts),
            failures=sum(isinstance(outcome, str) for outcome in outcomes),
            answers=tuple(verdict.answer for verdict in verdicts) if extract else None,
        )

    def _verify(self, group: Group, extract: bool) -> list[Outcome]:
        worker = self._idle.get()
        try:
            return worker.verify(group.prompt, [completion.text for completion in group.completions], extract)
        finally:
            self._idle.put(worker)

    def _report(self, groups: Sequence[Group], outcomes: Sequence[Sequence[Outcome]]) -> None:
        failures = [
            (group.prompt.uid, outcome)
            for group, group_outcomes in zip(groups, outcomes, strict=True)
            for outcome in group_outcomes
            if isinstance(outcome, str)
        ]
        if failures:
            calls = sum(map(len, outcomes))
            logger.warning("%d of %d verifier calls failed; the first, on %s: %s", len(failures), calls, *failures[0])


class _Worker:
    """One process that runs the verifier; replaced by another when a call hangs or ends it."""

    def __init__(self, spec: str, timeout: float) -> None:
        self._spec = spec
        self._timeout = timeout
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None
        self._ready = False

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        # A daemon, so that a trainer that dies without closing the pool is not kept waiting for it.
        self._process = context.Process(target=_serve, args=(theirs, self._spec), daemon=True)
        self._process.start()
        theirs.close()
        self._ready = False

    def stop(self) -> None:
        if self._process is not None and self._connection is not None:
            self._connection.close()
            self._process.kill()
            self._process.join()
            self._process.close()
        self._process = self._connection = None

    def verify(self, prompt: Prompt, responses: Sequence[str], extract: bool) -> list[Outcome]:
        """One outcome for each response. A call that ends the process leaves the rest to the next process."""
        outcomes: list[Outcome] = []
        while len(outcomes) < len(responses):
            outcomes.extend(self._verify_until_lost(prompt, responses[len(outcomes) :], extract))
        return outcomes

    def _verify_until_lost(self, prompt: Prompt, responses: Sequence[str], extract: bool) -> Iterator[Outcome]:
        """The outcomes, up to and with the one that cost the process."""
        connection = self._connected()
        try:
            connection.send((prompt, responses, extract))
            for _ in responses:
                if not connection.poll(self._timeout):
                    self.stop()
                    yield f"no result within {self._timeout:g} s"
                    return
                yield connection.recv()
        except (EOFError, OSError):
            self.stop()
            yield "the verifier ended its process"

    def _connected(self) -> Connection:
        """The connection to a process that has loaded the verifier."""
        if self._process is None or not self._process.is_alive():
            self.stop()
            self.start()
        assert self._connection is not None
        if not self._ready:
            try:
                self._ready = self._connection.poll(START_SECONDS) and self._connection.recv()
            except EOFError:
                self._ready = False
            if not self._ready:
                self.stop()
                expected = "a verifier that a process of its own can load"
                raise ConfigError(FIELD, self._spec, expected, "see that process's message above")
        return self._connection


def _serve(connection: Connection, spec: str) -> None:
    """The process: answer batches until the other side closes."""
    # Ctrl-C and a lost terminal reach the whole process group; the trainer decides when its verifiers end.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    streams.install(strict=False)  # a verifier that prints is not at fault where the terminal is gone
    verifier = load_verifier(spec)
    try:
        connection.send(True)
        while True:
            prompt, responses, extract = connection.recv()
            for response in responses:
                connection.send(_call(verifier, prompt, response, extract))
    except (EOFError, OSError):
        return


def _call(verifier: Verifier, prompt: Prompt, response: str, extract: bool) -> Outcome:
    try:
        reward: object = verifier(prompt, response)
        answer = verifier.extract(response) if extract and isinstance(verifier, Extracting) else None
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error}"
    if not isinstance(reward, Real) or not math.isfinite(reward):
        return f"returned {reward!r}, not a finite number"
    if not isinstance(answer, str | None):
        return f"extracted {answer!r}, not a text or None"
    return Verdict(float(reward), answer)
