"""The engine on a real server: what every engine must do, and what only one with servers does."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from sdpg_megatron.config import SGLangConfig
from sdpg_megatron.errors import RolloutError, ServerError, WeightError
from sdpg_megatron.records import Prompt
from sdpg_megatron.rollout.base import RolloutEngine, Sampling, SharedEngine, WeightsWanted
from sdpg_megatron.rollout.sglang.client import Client
from sdpg_megatron.rollout.sglang.engine import ServedModel, SGLangEngine
from tests.rollout.contract import EngineContract, MakeEngine, assert_same, prompts_of, stream, versions
from tests.sglang.conftest import Running
from tests.sglang.served import served_model
from tests.tiny import write_tiny_model

Open = Callable[..., SGLangEngine]


@pytest.fixture(scope="session")
def served(model: Path) -> ServedModel:
    return served_model(model, prompt_tokens=200, response_tokens=200)


@pytest.fixture(scope="session")
def open_engine(server: Running, served: ServedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    """Makes engines that attach to the shared server; those that a test leaves open are closed at the end."""
    opened: list[SGLangEngine] = []

    def attach(*, model: ServedModel = served, publishes: bool = True, nonce: str = "engine", **changes: Any) -> Any:
        config = SGLangConfig(urls=(server.url,), start_timeout=60.0, health_timeout=10.0, transport="shared")
        config = config.model_copy(update=changes)
        run_dir = tmp_path_factory.mktemp("run")
        opened.append(SGLangEngine(config, model, run_dir=run_dir, nonce=nonce, publishes=publishes))
        return opened[-1]

    yield attach
    for engine in opened:
        engine.close()


@pytest.fixture(scope="session")
def reused(open_engine: Open) -> Callable[[], SGLangEngine]:
    """Gives one engine again and again, or a new one where a test closed it: to attach takes a second."""
    engines: list[SGLangEngine] = []

    def give() -> SGLangEngine:
        if not engines or engines[-1].closed:
            engines.append(open_engine())
        return engines[-1]

    return give


class TestSGLangEngine(EngineContract):
    unseeded = "SGLang seeds requests only in its deterministic mode, where all responses of a group are the same"

    @pytest.fixture
    def model_folder(self, model: Path) -> Path:
        return model

    @pytest.fixture
    def make_engine(self, open_engine: Open) -> MakeEngine:
        return open_engine

    @pytest.fixture
    def engine(self, reused: Callable[[], SGLangEngine], weights: dict[str, Tensor]) -> RolloutEngine:
        """The one engine, serving version 1."""
        engine = reused()
        engine.publish(1, stream(weights))
        return engine


# Several engines on one server


@pytest.fixture(scope="session")
def trained(model: Path) -> dict[str, Tensor]:
    """The weights to publish."""
    return load_file(model / "model.safetensors")


@pytest.fixture
def questions(served: ServedModel) -> list[Prompt]:
    return prompts_of(served.tokenizer, "1 + 2?", "What is 3?", "4")


SHORT = Sampling(n=2, max_tokens=3)


def test_it_is_an_engine_that_others_can_share(reused: Callable[[], SGLangEngine]) -> None:
    assert isinstance(reused(), SharedEngine)


def test_one_that_follows_takes_only_what_the_other_published(
    open_engine: Open, reused: Callable[[], SGLangEngine], trained: dict[str, Tensor], questions: list[Prompt]
) -> None:
    publisher, follower = reused(), open_engine(publishes=False)
    publisher.publish(1, stream(trained))
    follower.follow(4)  # the loop says so before the other is done
    with pytest.raises(WeightsWanted):
        follower.generate(questions, SHORT)
    publisher.publish(4, stream(trained))
    assert versions(follower.generate(questions, SHORT)) == versions(publisher.generate(questions, SHORT)) == {4}


def test_the_same_version_of_another_run_is_not_taken(
    open_engine: Open, reused: Callable[[], SGLangEngine], trained: dict[str, Tensor], questions: list[Prompt]
) -> None:
    """Nor are the weights that another run publishes under this engine's feet."""
    mine, other = reused(), open_engine(nonce="other")
    other.publish(1, stream(trained))
    mine.publish(1, stream(trained))
    mine.generate(questions, SHORT)
    other.publish(1, stream(trained))
    with pytest.raises(WeightsWanted) as wanted:
        mine.generate(questions, SHORT)
    assert wanted.value.done == {}
    mine.publish(1, stream(trained))
    assert versions(mine.generate(questions, SHORT)) == {1}


def test_a_server_that_a_killed_run_left_in_a_publish_is_used(
    open_engine: Open, server: Running, trained: dict[str, Tensor], questions: list[Prompt]
) -> None:
    async def break_off() -> None:
        client = Client(server.url)
        await client.pause()
        await client.begin_update()
        await client.close()

    asyncio.run(break_off())
    engine = open_engine()
    engine.publish(1, stream(trained))
    assert versions(engine.generate(questions, SHORT)) == {1}


# Weights and memory


def test_servers_are_shown_to_hold_the_weights(reused: Callable[[], SGLangEngine], trained: dict[str, Tensor]) -> None:
    engine, name = reused(), "model.layers.1.mlp.up_proj.weight"
    engine.publish(2, stream(trained))
    engine.verify(2, stream(trained))
    changed = {**trained, name: trained[name].clone()}
    changed[name][3, 5] += 1e-3
    buckets = stream(changed)
    with pytest.raises(WeightError, match=r"layers\.1\.mlp\.gate_up_proj"):
        engine.verify(2, buckets)
    assert next(buckets, None) is None, "the stream is read to its end"


def test_memory_goes_to_the_trainer_and_comes_back(
    reused: Callable[[], SGLangEngine], trained: dict[str, Tensor], questions: list[Prompt]
) -> None:
    """On a CPU no memory moves, but SGLang ends itself all the same where the order of the calls is wrong."""
    engine, greedy = reused(), Sampling(n=1, max_tokens=4, temperature=0)
    engine.publish(1, stream(trained))
    before = engine.generate(questions, greedy)
    for version in (2, 3):
        engine.release()
        engine.release()
        with pytest.raises(RolloutError, match="publish first"):
            engine.generate(questions, greedy)
        engine.resume()
        engine.resume()
        engine.publish(version, stream(trained))
        assert engine.weight_version == version
        assert_same(before, engine.generate(questions, greedy))


# Being interrupted


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Shells have what they run in the background ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_gets_through_and_leaves_the_engine_usable(
    interruptible: None, reused: Callable[[], SGLangEngine], trained: dict[str, Tensor], questions: list[Prompt]
) -> None:
    engine = reused()
    engine.publish(1, stream(trained))
    times: list[float] = []

    def interrupt() -> None:
        times.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(1.0, interrupt)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        engine.generate(questions * 40, Sampling(n=8, max_tokens=200))  # would take minutes
    assert time.monotonic() - times[0] < 20.0
    assert versions(engine.generate(questions, SHORT)) == {1}


# What cannot work is said at once


def test_a_prompt_beyond_the_context_is_an_error_at_once(
    reused: Callable[[], SGLangEngine], trained: dict[str, Tensor]
) -> None:
    engine = reused()
    engine.publish(1, stream(trained))
    with pytest.raises(ServerError, match="context"):
        engine.generate([Prompt("long", (5,) * 600, (), "")], SHORT)


def test_another_model_is_refused(open_engine: Open, served: ServedModel, tmp_path: Path) -> None:
    deeper = write_tiny_model(tmp_path / "deeper", "qwen3", tied=False, seed=0, layers=6)
    with pytest.raises(RolloutError, match="not that of the model that the run trains"):
        open_engine(model=replace(served, folder=deeper))
    llama = write_tiny_model(tmp_path / "llama", "llama", tied=False, seed=0)
    with pytest.raises(RolloutError, match=r"serves a qwen3 model .*trains a llama"):
        open_engine(model=replace(served, folder=llama))


def test_room_for_prompt_and_response_is_held_to_the_last_token(open_engine: Open, served: ServedModel) -> None:
    """510 of 512 positions, as a response that just fits shows: SGLang cuts the next longer one without a word."""
    room = replace(served, prompt_tokens=200, response_tokens=310)
    engine = open_engine(model=room)
    engine.publish(1, stream(load_file(served.folder / "model.safetensors")))
    prompt = Prompt("fits", (5,) * 200, (), "")
    (group,) = engine.generate([prompt], Sampling(n=1, max_tokens=310, temperature=0))
    assert len(group.completions[0].tokens) == 310
    with pytest.raises(RolloutError, match="cut at 310 of 311"):
        engine.generate([prompt], Sampling(n=1, max_tokens=311, temperature=0))
    with pytest.raises(RolloutError, match=r"room for 510 tokens .*needs 511.*max_prompt_tokens"):
        open_engine(model=replace(room, response_tokens=311))


def test_an_address_where_nobody_is_gives_one_error_in_time(open_engine: Open) -> None:
    started = time.monotonic()
    with pytest.raises(RolloutError, match=r"http://127\.0\.0\.1:9: no healthy server answered within 1 s"):
        open_engine(urls=("http://127.0.0.1:9",), start_timeout=1.0)
    assert time.monotonic() - started < 5.0


# Through a router


@pytest.fixture(scope="module")
def router(server: Running, sglang_python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of an sglang-router that has the server."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        ports = [found.getsockname()[1] for found in sockets]
    command = [sglang_python, "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--worker-urls", server.url]
    command += ["--health-check-endpoint", "/model_info"]
    command += ["--port", str(ports[0]), "--prometheus-port", str(ports[1])]
    log = tmp_path_factory.mktemp("router") / "log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 60.0
    while "Activated 1 worker" not in log.read_text():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    yield f"http://127.0.0.1:{ports[0]}"
    process.terminate()
    process.wait(timeout=30)


def test_responses_through_a_router_are_the_servers(
    open_engine: Open, router: str, trained: dict[str, Tensor], questions: list[Prompt]
) -> None:
    engine, greedy = open_engine(), Sampling(n=1, max_tokens=4, temperature=0)
    routed = open_engine(router=router, attempts=2)
    engine.publish(1, stream(trained))
    expected = engine.generate(questions, greedy)
    routed.publish(2, stream(trained))
    assert_same(routed.generate(questions, greedy), expected)
    groups = routed.generate(questions, SHORT)
    assert versions(groups) == {2} and all(len(group.completions) == SHORT.n for group in groups)
    engine.publish(3, stream(trained))
    with pytest.raises(WeightsWanted, match=f"{router}/generate: a response of weights engine-3"):
        routed.generate(questions, SHORT)
    with pytest.raises(RolloutError, match="no group was finished between 2 publishes"):
        routed.generate(questions, SHORT)


def test_a_router_that_does_not_answer_is_an_error(open_engine: Open) -> None:
    with pytest.raises(RolloutError, match=r"http://127\.0\.0\.1:9: no router answers"):
        open_engine(router="http://127.0.0.1:9")
