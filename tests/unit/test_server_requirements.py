"""What a server must be, what an engine is built from, and an engine on a server that takes no weights."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from aiohttp import web
from safetensors.torch import load_file
from transformers import AutoTokenizer

from sdpg_megatron.architecture import read_architecture
from sdpg_megatron.config import SGLangConfig
from sdpg_megatron.errors import ConfigError, RolloutError
from sdpg_megatron.records import Prompt
from sdpg_megatron.rollout.base import Abandoned, Sampling, WeightsWanted
from sdpg_megatron.rollout.sglang.build import Keys, ServedModel, make_processes
from sdpg_megatron.rollout.sglang.client import Client
from sdpg_megatron.rollout.sglang.engine import SGLangEngine
from sdpg_megatron.rollout.sglang.requirements import ServerRequirements
from tests.rollout.contract import stream
from tests.tiny import write_tiny_model

MODEL = {"model_type": "qwen3", "weight_version": "default", "preferred_sampling_params": None}
SERVER = {"model_path": "/on/another/machine", "max_req_input_len": 506, "device": "cuda", "tp_size": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("identity"), "qwen3", tied=True, seed=0, layers=2)


@pytest.fixture
def served(folder: Path) -> ServedModel:
    return ServedModel(
        folder=folder,
        tokenizer=AutoTokenizer.from_pretrained(folder),
        stop_ids=(2, 4),
        dtype="float32",
        device="cpu",
        prompt_tokens=100,
        response_tokens=100,
    )


def check(folder: Path, model: dict[str, Any], server: dict[str, Any], **changes: Any) -> None:
    async def answer(found: dict[str, Any]) -> dict[str, Any]:
        return found

    client = SimpleNamespace(
        url="http://server", model_info=lambda: answer(MODEL | model), server_info=lambda: answer(SERVER | server)
    )
    wanted = {"prompt_tokens": 200, "response_tokens": 310, "memory_saver": False, **changes}
    asyncio.run(ServerRequirements(architecture=read_architecture(folder), **wanted).check(cast(Client, client)))


@pytest.mark.parametrize(
    ("model", "server", "changes"),
    [
        ({}, {}, {}),
        ({}, {"enable_memory_saver": True}, {"memory_saver": True}),
        ({}, {"device": "cpu"}, {"memory_saver": True}),
        ({}, {"speculative_accept_threshold_single": 1.0, "preferred_sampling_params": None}, {}),
        ({}, {}, {"prompt_tokens": 505, "response_tokens": 5}),
    ],
)
def test_what_fits(folder: Path, model: dict[str, Any], server: dict[str, Any], changes: dict[str, Any]) -> None:
    check(folder, model, server, **changes)


@pytest.mark.parametrize(
    ("model", "server", "changes", "message"),
    [
        ({"model_type": "llama"}, {}, {}, "serves a llama model"),
        ({}, {"max_req_input_len": 505}, {}, "room for 509 tokens"),
        ({}, {}, {"prompt_tokens": 506, "response_tokens": 4}, "prompts of less than 506"),
        ({}, {}, {"memory_saver": True}, "--enable-memory-saver"),
        ({}, {"enable_deterministic_inference": True}, {}, "would be the same"),
        ({"preferred_sampling_params": {"top_k": 3}}, {}, {}, "--preferred-sampling-params"),
        ({}, {"preferred_sampling_params": {"min_p": 0.1}}, {}, "--preferred-sampling-params"),
        ({}, {"speculative_accept_threshold_acc": 0.8}, {}, "speculative_accept_threshold_acc is 0.8, .*with .* 1.0"),
        ({}, {"watermark_default_enabled": True}, {}, "watermark_default_enabled is True, which changes"),
    ],
)
def test_what_does_not_fit_is_named(
    folder: Path, model: dict[str, Any], server: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RolloutError, match=rf"^http://server: .*{message}"):
        check(folder, model, server, **changes)


def test_a_folder_that_can_be_read_is_compared(folder: Path, tmp_path: Path) -> None:
    check(folder, {}, {"model_path": str(folder)})
    other = write_tiny_model(tmp_path / "wide", "qwen3", tied=True, seed=0, layers=2, hidden=32)
    with pytest.raises(RolloutError, match="whose shape is not"):
        check(folder, {}, {"model_path": str(other)})
    (other / "config.json").write_text("{}")
    with pytest.raises(RolloutError, match="cannot be the model"):
        check(folder, {}, {"model_path": str(other)})


# From a configuration


def test_keys_come_from_the_environment_and_go_nowhere(
    served: ServedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SGLangConfig(api_key_variable="SOME_KEY", python="/no/python")
    monkeypatch.delenv("SOME_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"api_key_variable.*SOME_KEY.*export SOME_KEY"):
        Keys.read(config)
    monkeypatch.setenv("SOME_KEY", "s3cret")
    keys = Keys.read(config)
    assert keys.api == "s3cret" and keys.admin is None
    (process,) = make_processes(config, served, keys, run_dir=tmp_path, seed=0)
    assert "s3cret" not in repr(keys) + repr(vars(process)) + repr(config)


def test_servers_differ_in_seed_log_and_port(served: ServedModel, tmp_path: Path) -> None:
    processes = make_processes(SGLangConfig(servers=3), served, Keys(None, None), run_dir=tmp_path, seed=7)
    launches = [process.launch for process in processes]
    assert [launch.seed for launch in launches] == [7, 8, 9]
    assert [launch.log for launch in launches] == [tmp_path / "logs" / f"sglang-{i}.log" for i in range(3)]
    assert len({process.port for process in processes}) == 3


def test_one_that_follows_needs_to_know_where(served: ServedModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.sglang\.urls"):
        SGLangEngine(SGLangConfig(), served, run_dir=tmp_path, nonce="n", publishes=False)


# A server that answers, takes no weights, and makes no responses


class Stubborn:
    """Well, of the right model, unwilling to open a session of weight updates, and endlessly at work on a response."""

    def __init__(self) -> None:
        self.version = "default"
        self.posts: list[str] = []
        self.url = ""
        self._stop = threading.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        assert self._ready.wait(10)

    def close(self) -> None:
        self._stop.set()
        self._thread.join(10)

    async def _serve(self) -> None:
        async def get(request: web.Request) -> web.Response:
            return web.json_response(
                {"paths": {"/begin_weight_update": {}, "/end_weight_update": {}}, **MODEL, **SERVER, "device": "cpu"}
                | {"weight_version": self.version}
            )

        async def post(request: web.Request) -> web.Response:
            self.posts.append(request.path)
            while request.path == "/generate" and not self._stop.is_set():
                await asyncio.sleep(0.02)
            refused = request.path == "/begin_weight_update"
            return web.json_response({"success": not refused, "message": "not today"}, status=400 if refused else 200)

        app = web.Application()
        app.add_routes([web.get("/{path:.*}", get), web.post("/{path:.*}", post)])
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"
        self._ready.set()
        while not self._stop.is_set():
            await asyncio.sleep(0.02)
        await runner.cleanup()


@pytest.fixture
def stubborn() -> Iterator[Stubborn]:
    server = Stubborn()
    yield server
    server.close()


def test_publishes_that_reach_nobody_end_the_run(
    stubborn: Stubborn, served: ServedModel, folder: Path, tmp_path: Path
) -> None:
    config = SGLangConfig(urls=(stubborn.url,), transport="shared", attempts=2, start_timeout=10.0)
    engine = SGLangEngine(config, served, run_dir=tmp_path, nonce="n")
    weights = load_file(folder / "model.safetensors")
    try:
        engine.publish(1, stream(weights))
        with pytest.raises(WeightsWanted):
            engine.generate([Prompt("p", (5,), (), "")], Sampling(n=1, max_tokens=1))
        buckets = stream(weights)
        with pytest.raises(RolloutError, match=r"(?s)2 publishes in a row reached no server.*not today"):
            engine.publish(1, buckets)
        assert next(buckets, None) is None, "the stream is read to its end"
    finally:
        engine.close()
    assert stubborn.posts[-1] == "/continue_generation", "it is not left paused"
    assert "/generate" not in stubborn.posts


def test_a_generation_ends_when_it_is_to_stop(stubborn: Stubborn, served: ServedModel, tmp_path: Path) -> None:
    stubborn.version = "n-1"
    config = SGLangConfig(urls=(stubborn.url,), start_timeout=10.0)
    engine = SGLangEngine(config, served, run_dir=tmp_path, nonce="n", publishes=False)
    try:
        engine.follow(1)
        with pytest.raises(Abandoned):
            engine.generate([Prompt("p", (5,), (), "")], Sampling(1, 1), stop=lambda: "/generate" in stubborn.posts)
    finally:
        engine.close()
