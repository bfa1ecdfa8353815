"""Run verifiers in separate processes. A call that raises, hangs or ends its process gets the failure reward."""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import signal
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from queue import SimpleQueue

import psutil

from sdpg_megatron.config import RewardConfig
from sdpg_megatron.errors import ConfigError
from sdpg_megatron.process import streams
from sdpg_megatron.records import Group, Prompt
from sdpg_megatron.rewards.base import Extracting, Verifier
from sdpg_megatron.rewards.conventions import RETURNED, RewardTypeError, as_reward
from sdpg_megatron.rewards.load import FIELD, find_verifier, load_verifier

logger = logging.getLogger(__name__)

START_SECONDS = 300.0
"""Time limit for a new process to import the verifier. It does not count towards the timeout of a call."""
FORMS = ("{}", "\\boxed{{{}}}", "Answer: {}", "<answer>{}</answer>", "#### {}")
"""Formats of an answer that verifiers may expect."""
LONGEST = 500
"""Maximum length in characters of an error message."""


@dataclass(frozen=True, slots=True)
class VerifierResult:
    """Result on one response."""

    reward: float
    answer: str | None = None
    """Extracted answer; None if it was not requested, or the response gives none."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Failed verifier call."""

    text: str
    wrong_type: bool = False
    """True if the return value has a type that cannot be a reward."""


Outcome = VerifierResult | Failure


@dataclass(frozen=True, slots=True)
class GroupRewards:
    """Verifier results of one group."""

    rewards: tuple[float, ...]
    """Reward of each completion, in order; the failure reward if the call failed."""
    failures: int
    """Number of calls that raised, returned no finite number, timed out or ended their process."""
    answers: tuple[str | None, ...] | None = None
    """Extracted answer of each completion, None for none. None if answers were not extracted."""
    errors: tuple[str | None, ...] = field(default=(), compare=False)
    """Error message of each completion's call, None for successful ones. Empty if no call failed."""


@dataclass(frozen=True, slots=True)
class VerifierCheck:
    """Result of a verifier call on a sample prompt."""

    verifier: str
    uid: str
    response: str
    """Reference answer of the prompt, in one of `FORMS`."""
    reward: float | None
    """None if the call failed."""
    error: str | None
    unrewarded: bool = False
    """True if the reference answer got no reward above 0 and `reward.failure_reward` in any of `FORMS`."""

    def __str__(self) -> str:
        outcome = f"gave {self.reward:g} to" if self.reward is not None else "failed on"
        text = f"{FIELD} {self.verifier} {outcome} the response {self.response!r} to {self.uid}"
        if self.unrewarded:
            text += ", which is the reference answer, and no more to it in a box or after 'Answer:'; check the verifier"
        return f"{text}: {self.error}" if self.error is not None else text


def check_verifier(config: RewardConfig, prompt: Prompt) -> VerifierCheck:
    """Check the configured verifier in a separate process, as in training; see `VerifierPool.check`."""
    pool = VerifierPool(config.model_copy(update={"workers": 1}))
    try:
        return pool.check(prompt)
    finally:
        pool.close()


class VerifierPool:
    """Runs a verifier in `RewardConfig.workers` processes.

    Processes are spawned, so a script that creates a pool needs ``if __name__ == "__main__"``.
    """

    def __init__(self, config: RewardConfig) -> None:
        """Start the processes, without waiting for them.

        Raises:
            ConfigError: the verifier cannot be found, or its signature matches no convention.
        """
        self._spec = config.verifier
        self._extracts = find_verifier(config.verifier).extracts
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
            extract: also extract answers, if the verifier supports it. The timeout covers both.

        Raises:
            ConfigError: a worker process could not load the verifier.
        """
        extract = extract and self._extracts
        prompts = [group.prompt for group in groups]
        responses = [[completion.text for completion in group.completions] for group in groups]
        outcomes = list(self._threads.map(partial(self._verify, extract=extract), prompts, responses))
        self._report(groups, outcomes)
        return [self._rewards(group, extract) for group in outcomes]

    def check(self, prompt: Prompt) -> VerifierCheck:
        """Call the verifier with the reference answer as response, in each of `FORMS` until one is rewarded.

        A failed call is reported, because calls on other responses may succeed. A return value of the wrong type is an
        error.

        Raises:
            ConfigError: the verifier cannot be loaded in a separate process, or returned a value of the wrong type.
        """
        response, text = prompt.answer_text, isinstance(prompt.answer, str)
        checks = [self._check(prompt, response)]
        for form in FORMS[1:] if text else ():
            if checks[-1].error is not None or self._is_rewarded(checks[-1]):
                break
            checks.append(self._check(prompt, form.format(response)))
        last = checks[-1]
        if last.error is not None or self._is_rewarded(last):
            return last
        return replace(checks[0], unrewarded=text)

    def _is_rewarded(self, check: VerifierCheck) -> bool:
        return check.reward is not None and check.reward > max(0.0, self._failure_reward)

    def _check(self, prompt: Prompt, response: str) -> VerifierCheck:
        (outcome,) = self._verify(prompt, [response], extract=self._extracts)
        if isinstance(outcome, VerifierResult):
            return VerifierCheck(self._spec, prompt.uid, response, outcome.reward, None)
        if outcome.wrong_type:
            found = f"{self._spec}, which {outcome.text.partition(', not ')[0]}"
            raise ConfigError(FIELD, found, f"a verifier that returns {RETURNED}", "correct what it returns")
        return VerifierCheck(self._spec, prompt.uid, response, None, outcome.text)

    def close(self) -> None:
        """End the processes. May be called twice."""
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.stop()

    def _rewards(self, outcomes: Sequence[Outcome], extract: bool) -> GroupRewards:
        failed = VerifierResult(self._failure_reward)
        verdicts = [failed if isinstance(outcome, Failure) else outcome for outcome in outcomes]
        errors = tuple(outcome.text if isinstance(outcome, Failure) else None for outcome in outcomes)
        failures = sum(error is not None for error in errors)
        return GroupRewards(
            rewards=tuple(verdict.reward for verdict in verdicts),
            failures=failures,
            answers=tuple(verdict.answer for verdict in verdicts) if extract else None,
            errors=errors if failures else (),
        )

    def _verify(self, prompt: Prompt, responses: Sequence[str], extract: bool) -> list[Outcome]:
        worker = self._idle.get()
        try:
            return worker.verify(prompt, responses, extract)
        finally:
            self._idle.put(worker)

    def _report(self, groups: Sequence[Group], outcomes: Sequence[Sequence[Outcome]]) -> None:
        failures = [
            (group.prompt.uid, outcome.text)
            for group, group_outcomes in zip(groups, outcomes, strict=True)
            for outcome in group_outcomes
            if isinstance(outcome, Failure)
        ]
        if failures:
            calls = sum(map(len, outcomes))
            logger.warning("%d of %d verifier calls failed; the first, on %s: %s", len(failures), calls, *failures[0])


class _Worker:
    """One verifier process, replaced when a call hangs or ends it."""

    def __init__(self, spec: str, timeout: float) -> None:
        self._spec = spec
        self._timeout = timeout
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None
        self._ready = False

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, child_end = context.Pipe()
        # Daemonic processes cannot start processes, which verifiers that run programs need. multiprocessing waits for
        # other processes at exit, so they are ended before, in case the pool was not closed.
        self._process = context.Process(target=_serve, args=(child_end, self._spec), daemon=False)
        self._process.start()
        child_end.close()
        self._ready = False
        atexit.register(self.stop)

    def stop(self) -> None:
        """End the process and the processes that the verifier started in it."""
        atexit.unregister(self.stop)
        if self._process is not None and self._connection is not None:
            self._connection.close()
            _kill_with_descendants(self._process)
            self._process.join()
            self._process.close()
        self._process = self._connection = None

    def verify(self, prompt: Prompt, responses: Sequence[str], extract: bool) -> list[Outcome]:
        """Verify each response. If a call ends the process, the next process continues."""
        outcomes: list[Outcome] = []
        while len(outcomes) < len(responses):
            outcomes.extend(self._verify_until_lost(prompt, responses[len(outcomes) :], extract))
        return outcomes

    def _verify_until_lost(self, prompt: Prompt, responses: Sequence[str], extract: bool) -> Iterator[Outcome]:
        """Yield outcomes up to and including the one that ended the process."""
        connection = self._connected()
        try:
            connection.send((prompt, responses, extract))
            for _ in responses:
                if not connection.poll(self._timeout):
                    self.stop()
                    yield Failure(f"no result within {self._timeout:g} s")
                    return
                yield connection.recv()
        except (EOFError, OSError):
            self.stop()
            yield Failure("the verifier ended its process")

    def _connected(self) -> Connection:
        """Connection to a process that has loaded the verifier, started if necessary."""
        if self._process is None or not self._process.is_alive():
            self.stop()
            self.start()
        assert self._connection is not None
        if not self._ready:
            try:
                answer = self._connection.recv() if self._connection.poll(START_SECONDS) else None
            except EOFError:
                answer = None
            if answer is not True:
                self.stop()
                if isinstance(answer, ConfigError):
                    raise answer
                expected = "a verifier that a separate process can load"
                raise ConfigError(FIELD, self._spec, expected, "see that process's message above")
            self._ready = True
        return self._connection


def _kill_with_descendants(process: BaseProcess) -> None:
    family: list[psutil.Process] = []
    if process.is_alive():  # otherwise the pid may belong to another process by now
        with suppress(psutil.Error):
            family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for descendant in family:
        with suppress(psutil.Error):
            descendant.kill()


def _serve(connection: Connection, spec: str) -> None:
    """Main function of a verifier process: serve requests until the connection closes."""
    # Ctrl-C and SIGHUP reach the whole process group; the trainer decides when its verifiers end.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    streams.install(strict=False)  # a verifier that prints must not fail when the terminal is gone
    try:
        verifier = load_verifier(spec)
    except ConfigError as error:
        connection.send(error)
        return
    with suppress(EOFError, OSError):
        connection.send(True)
        while True:
            prompt, responses, extract = connection.recv()
            for response in responses:
                connection.send(_call(verifier, prompt, response, extract))
    for child in multiprocessing.active_children():  # the trainer has ended; Python would wait for them
        child.kill()


def _call(verifier: Verifier, prompt: Prompt, response: str, extract: bool) -> Outcome:
    try:
        reward = as_reward(verifier(prompt, response))
        answer = verifier.extract(response) if extract and isinstance(verifier, Extracting) else None
    except RewardTypeError as error:
        return Failure(str(error), wrong_type=True)
    except (Exception, SystemExit) as error:
        return Failure(_describe(error))
    if not isinstance(answer, str | None):
        return Failure(f"extracted {answer!r}, not a str or None")
    return VerifierResult(reward, answer)


def _describe(error: BaseException) -> str:
    """Last line of a traceback with the location in the verifier's code."""
    frames = [frame.f_code.co_filename + f":{line}" for frame, line in traceback.walk_tb(error.__traceback__)]
    location = next((f" ({frame})" for frame in reversed(frames) if not frame.startswith(_REWARDS_FOLDER)), "")
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return f"{text if len(text) <= LONGEST else text[:LONGEST] + '...'}{location}"


_REWARDS_FOLDER = os.path.dirname(__file__) + os.sep
