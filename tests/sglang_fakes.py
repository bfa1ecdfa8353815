"""Servers that misbehave on demand, and a pool on them.

A real server cannot be made to show these faults at a chosen moment; what one does by itself, tests/sglang has.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, cast

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from sdpg_megatron.config import SGLangConfig
from sdpg_megatron.records import Group, Prompt
from sdpg_megatron.rollout.base import Sampling
from sdpg_megatron.rollout.sglang import groups
from sdpg_megatron.rollout.sglang import pool as pool_module
from sdpg_megatron.rollout.sglang.client import Client, Timeouts
from sdpg_megatron.rollout.sglang.groups import GroupSource
from sdpg_megatron.rollout.sglang.pool import Pool
from sdpg_megatron.rollout.sglang.server import ServerProcess
from sdpg_megatron.rollout.sglang.server_handle import ServerHandle

WIRE, STOP = "run-3", 9
QUICK = SGLangConfig(
    start_timeout=3.0, health_interval=0.1, health_timeout=0.3, health_misses=2, attempts=3, restarts=1, concurrency=8
)
BOUND = 20.0
"""Seconds that any of these tests may take."""
SAMPLING = Sampling(n=2, max_tokens=2)
Answer = Callable[[int, int], Awaitable[web.Response]]
"""Makes the answer to a group: given how many groups were asked for before, and how many run now."""


def response(*, version: str = WIRE, kind: str = "length", tokens: Sequence[int] = (5, 6)) -> dict[str, Any]:
    meta = {
        "output_token_logprobs": [[-0.5, token, None] for token in tokens],
        "weight_version": version,
        "finish_reason": {"type": kind},
    }
    return {"output_ids": list(tokens), "meta_info": meta}


def whole(**changes: Any) -> web.Response:
    return web.json_response([response(), response(**changes)])


class Misbehaving:
    """An HTTP server with the few endpoints that a pool uses."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.well = True
        self.hangs = False
        self.paused = False
        self.version = WIRE
        self.looks = 0
        self.asked: list[list[int]] = []
        self.bodies: list[dict[str, Any]] = []
        self.running = 0
        self.most = 0
        app = web.Application()
        app.add_routes(
            [
                web.get("/health", self._health),
                web.get("/model_info", self._model_info),
                web.post("/generate", self._generate),
                web.post("/continue_generation", self._resume),
            ]
        )
        self.server = TestServer(app)

    @property
    def url(self) -> str:
        return str(self.server.make_url("")).rstrip("/")

    @asynccontextmanager
    async def started(self) -> AsyncIterator[Misbehaving]:
        await self.server.start_server()
        yield self
        await self.server.close()

    async def _health(self, request: web.Request) -> web.Response:
        self.looks += 1
        if self.hangs:
            await asyncio.sleep(BOUND)
        return web.Response(status=200 if self.well and not self.paused else 503)

    async def _resume(self, request: web.Request) -> web.Response:
        self.paused = False
        return web.json_response({})

    async def _model_info(self, request: web.Request) -> web.Response:
        return web.json_response({"weight_version": self.version})

    async def _generate(self, request: web.Request) -> web.Response:
        self.bodies.append(json.loads(await request.text()))
        self.asked.append(self.bodies[-1]["input_ids"])
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            return await self.answer(len(self.asked) - 1, self.running)
        finally:
            self.running -= 1


class FakeProcess:
    """A process that dies when a test says so, and can be started again."""

    def __init__(self) -> None:
        self.up = False
        self.starts = 0

    def start(self) -> None:
        self.up = True
        self.starts += 1

    def stop(self, grace: float = 10.0) -> None:
        self.up = False

    def alive(self) -> bool:
        return self.up

    def log_tail(self, lines: int = 20) -> str:
        return "the last words"


async def good(before: int, running: int) -> web.Response:
    await asyncio.sleep(0.01)
    return whole()


async def never(before: int, running: int) -> web.Response:
    await asyncio.sleep(BOUND)
    return whole()


async def no_check(client: Client) -> None:
    pass


def prompts(count: int) -> list[Prompt]:
    return [Prompt(f"test:{i}", (i,), (), answer="") for i in range(count)]


class Tokenizer:
    def decode(self, tokens: Sequence[int], **options: Any) -> str:
        return " ".join(map(str, tokens))


def source(pool: Pool, config: SGLangConfig, router: Client | None = None) -> GroupSource:
    return GroupSource(
        pool=pool,
        stop_ids=(STOP,),
        tokenizer=Tokenizer(),
        attempts=config.attempts,
        concurrency=config.concurrency,
        router=router,
    )


@asynccontextmanager
async def opened(
    *servers: Misbehaving,
    config: SGLangConfig = QUICK,
    processes: Sequence[FakeProcess | None] = (),
    publishes: bool = True,
    check: Callable[[Client], Awaitable[None]] = no_check,
    admit: bool = True,
) -> AsyncIterator[Pool]:
    """A pool on these servers, all of them with the current weights."""
    async with AsyncExitStack() as stack:
        handles = []
        for server, process in zip(servers, processes or [None] * len(servers), strict=True):
            await stack.enter_async_context(server.started())
            timeouts = Timeouts(control=1.0, generate=BOUND, health=config.health_timeout)
            client = Client(server.url, timeouts=timeouts)
            handles.append(ServerHandle(server.url, client, cast(ServerProcess | None, process)))
        pool = Pool(handles, config, publishes=publishes, check=check)
        stack.push_async_callback(pool.close)
        await pool.start()
        pool.expect(WIRE)
        if admit:
            for handle in pool.handles:
                pool.admit(handle, WIRE)
        yield pool


async def collect(pool: Pool, count: int, config: SGLangConfig = QUICK, router: Client | None = None) -> list[Group]:
    return await source(pool, config, router).collect(prompts(count), SAMPLING, version=3)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(BOUND / 2):
        while not condition():
            await asyncio.sleep(0.01)


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(BOUND):
            await test()

    asyncio.run(bounded())


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "BACKOFF", 0.02)
    monkeypatch.setattr(pool_module, "POLL", 0.05)
