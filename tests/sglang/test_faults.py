"""What a run makes of real servers that are killed, or hang.

The tests are one story and run in the order in which they stand: they share an engine with two servers, and one that a
test kills comes back in the next.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from sdpg_megatron.config import SGLangConfig
from sdpg_megatron.records import Group, Prompt
from sdpg_megatron.rollout.base import Sampling, WeightsWanted
from sdpg_megatron.rollout.sglang.engine import SGLangEngine
from sdpg_megatron.rollout.sglang.server_handle import ServerHandle
from sdpg_megatron.rollout.sglang.server_handle import ServerState as State
from tests.rollout.contract import completions, prompts_of, stream, versions
from tests.sglang.conftest import CPU_ARGUMENTS, START_LIMIT, handles, wait_until_gone
from tests.sglang.served import served_model

HEALTH = {"health_interval": 0.5, "health_timeout": 8.0, "health_misses": 2}
FENCED = 2 * (0.5 + 8.0) + 5.0
"""Seconds after which a hanging server is given up: as many looks as may be missed, and some for a busy machine."""
SAMPLING = Sampling(n=3, max_tokens=100)
COUNT = 24


class Trigger:
    """Does something once, when so many groups are finished."""

    def __init__(self) -> None:
        self.action: Callable[[], None] | None = None
        self.after = 0

    def __call__(self, done: int, total: int) -> None:
        if self.action is not None and done >= self.after:
            action, self.action = self.action, None
            action()

    def set(self, after: int, action: Callable[[], None]) -> None:
        self.after, self.action = after, action


@pytest.fixture(scope="module")
def trigger() -> Trigger:
    return Trigger()


@pytest.fixture(scope="module")
def trained(model: Path) -> dict[str, Tensor]:
    return load_file(model / "model.safetensors")


@pytest.fixture(scope="module")
def questions(model: Path) -> list[Prompt]:
    return prompts_of(AutoTokenizer.from_pretrained(model), *(f"What is {i}?" for i in range(COUNT)))


@pytest.fixture(scope="module")
def engine(
    model: Path,
    trained: dict[str, Tensor],
    trigger: Trigger,
    sglang_python: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[SGLangEngine]:
    """Two servers of its own, with version 1. Nothing is left of them afterwards."""
    config = SGLangConfig(
        servers=2,
        python=sglang_python,
        start_timeout=START_LIMIT,
        restarts=4,
        concurrency=4,
        arguments=CPU_ARGUMENTS,
        **HEALTH,
    )
    served = served_model(model, prompt_tokens=100, response_tokens=100)
    engine = SGLangEngine(config, served, run_dir=tmp_path_factory.mktemp("run"), nonce="faults", on_progress=trigger)
    engine.publish(1, stream(trained))
    yield engine
    deadline = time.monotonic() + 30.0
    while any(handle.process is None or handle.process.pid is None for handle in servers(engine)):
        assert time.monotonic() < deadline, "a lost server was not started anew"
        time.sleep(0.05)
    sessions = [session_of(handle) for handle in servers(engine)]
    engine.close()
    for session in sessions:
        wait_until_gone(session)


def servers(engine: SGLangEngine) -> Sequence[ServerHandle]:
    return engine._pool.handles


def session_of(handle: ServerHandle) -> int:
    assert handle.process is not None and handle.process.pid is not None
    return handle.process.pid


def kill(handle: ServerHandle) -> None:
    """As the kernel does when memory runs out: the server itself, without a word to anyone."""
    guard = psutil.Process(session_of(handle))
    (server,) = guard.children()
    server.kill()


def hang(handle: ServerHandle) -> None:
    """The process that computes stands still; the one that speaks HTTP goes on."""
    schedulers = [process for process in handles(session_of(handle)) if "scheduler" in " ".join(process.cmdline())]
    assert schedulers
    for process in schedulers:
        process.send_signal(signal.SIGSTOP)


def wait_for(handle: ServerHandle, state: State) -> None:
    deadline = time.monotonic() + START_LIMIT
    while handle.state is not state:
        assert time.monotonic() < deadline, f"{handle.state} after {START_LIMIT:g} s: {handle.reason}"
        time.sleep(0.1)


def assert_whole(groups: Sequence[Group], questions: Sequence[Prompt], version: int) -> None:
    """One group for each prompt, in order, all of it from this version's weights."""
    assert [group.prompt for group in groups] == list(questions)
    assert all(len(group.completions) == SAMPLING.n for group in groups)
    assert versions(groups) == {version}
    assert all(c.finish_reason in ("stop", "length") for _, c in completions(groups))


def test_when_a_server_is_killed_the_other_takes_over(
    engine: SGLangEngine, trigger: Trigger, questions: list[Prompt]
) -> None:
    victim, other = servers(engine)
    trigger.set(2, lambda: kill(victim))
    groups = engine.generate(questions, SAMPLING)
    assert trigger.action is None
    assert_whole(groups, questions, 1)
    assert victim.state in (State.LOST, State.STARTING) and victim.reason
    assert other.state is State.READY


def test_when_the_last_server_hangs_the_weights_are_wanted_and_nothing_is_lost(
    engine: SGLangEngine, trigger: Trigger, questions: list[Prompt], trained: dict[str, Tensor]
) -> None:
    """The one that was killed is on its way up meanwhile, with the weights of its folder: it must not answer."""
    back, victim = servers(engine)
    trigger.set(3, lambda: hang(victim))
    with pytest.raises(WeightsWanted) as wanted:
        engine.generate(questions, SAMPLING)
    assert "health" in victim.reason
    assert back.state is State.WAITING
    done = wanted.value.done
    assert 3 <= len(done) < COUNT
    engine.publish(1, stream(trained))
    assert back.state is State.READY
    rest = [place for place in range(COUNT) if place not in done]
    found = engine.generate([questions[place] for place in rest], SAMPLING)
    whole = {**done, **dict(zip(rest, found, strict=True))}
    assert_whole([whole[place] for place in range(COUNT)], questions, 1)


def test_servers_that_were_started_anew_get_weights_and_serve(
    engine: SGLangEngine, questions: list[Prompt], trained: dict[str, Tensor], trigger: Trigger
) -> None:
    for handle in servers(engine):
        if handle.state is not State.READY:
            wait_for(handle, State.WAITING)
    engine.publish(2, stream(trained))
    assert [handle.state for handle in servers(engine)] == [State.READY] * 2
    engine.verify(2, stream(trained))
    running: list[list[int]] = []
    trigger.set(1, lambda: running.append([handle.running for handle in servers(engine)]))
    assert_whole(engine.generate(questions, SAMPLING), questions, 2)
    assert all(running[0]), "both are asked"


def test_a_hanging_server_is_given_up_in_time(
    engine: SGLangEngine, trigger: Trigger, questions: list[Prompt], caplog: pytest.LogCaptureFixture
) -> None:
    """Afterwards the engine is closed while the server is on its way up again."""
    victim, other = servers(engine)
    times: list[float] = []

    def stop() -> None:
        times.append(time.time())
        hang(victim)

    trigger.set(2, stop)
    groups = engine.generate(questions, SAMPLING)
    (lost,) = (record.created for record in caplog.records if "is lost" in record.message)
    assert lost - times[0] < FENCED
    assert_whole(groups, questions, 2)
    assert victim.state in (State.LOST, State.STARTING) and "health" in victim.reason
    assert other.state is State.READY
