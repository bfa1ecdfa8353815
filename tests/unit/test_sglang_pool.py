"""The pool of servers and the collecting of groups, against servers that misbehave on demand.

A real server cannot be made to show these faults at a chosen moment; what one does by itself, tests/sglang has.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, cast

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from sdpg_megatron.config import SGLangConfig
from sdpg_megatron.errors import RolloutError, ServerError
from sdpg_megatron.records import Group, Prompt
from sdpg_megatron.rollout.base import Sampling, WeightsWanted
from sdpg_megatron.rollout.sglang import groups
from sdpg_megatron.rollout.sglang import pool as pool_module
from sdpg_megatron.rollout.sglang.client import Client, Timeouts
from sdpg_megatron.rollout.sglang.groups import GroupSource
from sdpg_megatron.rollout.sglang.member import Member, State
from sdpg_megatron.rollout.sglang.pool import Pool
from sdpg_megatron.rollout.sglang.server import ServerProcess

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
        self.asked.append(json.loads(await request.text())["input_ids"])
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


def source(pool: Pool, config: SGLangConfig) -> GroupSource:
    return GroupSource(
        pool=pool, stop_ids=(STOP,), tokenizer=Tokenizer(), attempts=config.attempts, concurrency=config.concurrency
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
        members = []
        for server, process in zip(servers, processes or [None] * len(servers), strict=True):
            await server.server.start_server()
            stack.push_async_callback(server.server.close)
            timeouts = Timeouts(control=1.0, generate=BOUND, health=config.health_timeout)
            client = Client(server.url, timeouts=timeouts)
            members.append(Member(server.url, client, cast(ServerProcess | None, process)))
        pool = Pool(members, config, publishes=publishes, check=check)
        stack.push_async_callback(pool.close)
        await pool.start()
        pool.expect(WIRE)
        if admit:
            for member in pool.members:
                pool.admit(member, WIRE)
        yield pool


async def collect(pool: Pool, count: int, config: SGLangConfig = QUICK) -> list[Group]:
    return await source(pool, config).collect(prompts(count), SAMPLING, version=3)


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


# Routing


def test_groups_go_where_least_is_running() -> None:
    async def test() -> None:
        one, two = Misbehaving(good), Misbehaving(good)
        async with opened(one, two) as pool:
            found = await collect(pool, 20)
        assert [group.prompt.uid for group in found] == [prompt.uid for prompt in prompts(20)]
        assert sorted(one.asked + two.asked) == [[i] for i in range(20)], "each prompt once"
        assert max(one.most, two.most) == QUICK.concurrency / 2

    run(test)


def test_a_server_gets_no_more_than_it_may_have() -> None:
    async def test() -> None:
        server, config = Misbehaving(good), QUICK.model_copy(update={"concurrency": 3})
        async with opened(server, config=config) as pool:
            # As many are asked for as if there were two servers: the pool itself must hold them back.
            asking = source(pool, QUICK)
            await asking.collect(prompts(12), SAMPLING, version=3)
        assert server.most == 3

    run(test)


def test_only_servers_with_the_current_weights_are_asked() -> None:
    async def test() -> None:
        ready, waiting = Misbehaving(good), Misbehaving(good)
        async with opened(ready, waiting, admit=False) as pool:
            pool.admit(pool.members[0], WIRE)
            pool.admit(pool.members[1], "run-2")
            await collect(pool, 6)
        assert len(ready.asked) == 6 and not waiting.asked

    run(test)


# Faults of one request


def test_a_failed_request_is_asked_for_again() -> None:
    async def test() -> None:
        async def fails_once(before: int, running: int) -> web.Response:
            return web.Response(status=500, text="out of luck") if before == 1 else whole()

        server = Misbehaving(fails_once)
        # The next look would come too late: it must be made at once.
        async with opened(server, config=QUICK.model_copy(update={"health_interval": 2 * BOUND})) as pool:
            looks = server.looks
            found = await collect(pool, 4)
            assert pool.members[0].state is State.READY
        assert [len(group.completions) for group in found] == [2] * 4
        assert len(server.asked) == 5
        assert server.looks > looks, "it must show that it is well before it gets more"

    run(test)


def test_the_second_try_is_made_elsewhere() -> None:
    async def test() -> None:
        async def fails(before: int, running: int) -> web.Response:
            return web.Response(status=500)

        bad, fine = Misbehaving(fails), Misbehaving(good)
        async with opened(bad, fine, config=QUICK.model_copy(update={"health_timeout": 5.0})) as pool:
            bad.hangs = True  # it cannot clear itself of the doubt
            found = await collect(pool, 6)
            assert pool.members[0].doubted
        assert len(found) == 6 and len(bad.asked) <= QUICK.concurrency / 2

    run(test)


def test_attempts_are_bounded() -> None:
    async def test() -> None:
        async def fails(before: int, running: int) -> web.Response:
            return web.Response(status=500, text="out of luck")

        server = Misbehaving(fails)
        async with opened(server) as pool:
            with pytest.raises(RolloutError, match=r"test:0: .* 3 attempts; .*out of luck"):
                await collect(pool, 1)
        assert len(server.asked) == 3

    run(test)


def test_a_request_that_is_itself_at_fault_is_an_error_at_once() -> None:
    async def test() -> None:
        async def refuses(before: int, running: int) -> web.Response:
            return web.Response(status=400, text="the input is longer than the context")

        server = Misbehaving(refuses)
        async with opened(server) as pool:
            with pytest.raises(ServerError, match="longer than the context"):
                await collect(pool, 1)
            assert pool.members[0].state is State.READY
        assert len(server.asked) == 1

    run(test)


def test_a_group_with_an_aborted_response_is_asked_for_whole() -> None:
    async def test() -> None:
        async def aborts_once(before: int, running: int) -> web.Response:
            return whole(kind="abort", tokens=(5,)) if before == 0 else whole()

        server = Misbehaving(aborts_once)
        async with opened(server) as pool:
            (group,) = await collect(pool, 1)
        assert len(server.asked) == 2
        assert [completion.tokens for completion in group.completions] == [(5, 6)] * 2

    run(test)


@pytest.mark.parametrize(
    ("ending", "message"),
    [
        ({"tokens": (5,)}, "1 of 2 tokens"),
        ({"kind": "stop"}, "without any of"),
        ({"kind": "stop", "tokens": ()}, "without any of"),
    ],
)
def test_a_cut_response_is_an_error(ending: dict[str, Any], message: str) -> None:
    async def test() -> None:
        async def cuts(before: int, running: int) -> web.Response:
            return whole(**ending)

        async with opened(Misbehaving(cuts)) as pool:
            with pytest.raises(RolloutError, match=message):
                await collect(pool, 1)

    run(test)


def test_waits_between_attempts_double_and_stay_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "BACKOFF", 0.5)
    for attempt, bound in [(1, 0.5), (2, 1.0), (3, 2.0), (6, 10.0), (40, 10.0)]:
        waits = [groups._backoff(attempt) for _ in range(50)]
        assert bound / 2 <= min(waits) < max(waits) <= bound


# Weights


def test_a_response_of_other_weights_is_never_taken() -> None:
    async def test() -> None:
        async def stale(before: int, running: int) -> web.Response:
            return whole(version="run-2") if before == 3 else whole()

        config = QUICK.model_copy(update={"concurrency": 1})
        async with opened(Misbehaving(stale), config=config) as pool:
            with pytest.raises(WeightsWanted) as wanted:
                await collect(pool, 6, config)
            assert pool.members[0].state is State.WAITING
        assert {place: group.prompt.uid for place, group in wanted.value.done.items()} == {
            place: f"test:{place}" for place in range(3)
        }

    run(test)


def test_where_nobody_has_the_weights_they_are_wanted() -> None:
    async def test() -> None:
        server = Misbehaving(good)
        async with opened(server) as pool:
            pool.expect("run-4")
            with pytest.raises(WeightsWanted) as wanted:
                await collect(pool, 2)
            assert wanted.value.done == {} and not server.asked
            pool.admit(pool.members[0], WIRE)
            assert pool.members[0].state is State.WAITING, "an old version must not do"

    run(test)


def test_one_that_follows_asks_the_servers_what_they_have() -> None:
    async def test() -> None:
        current, old = Misbehaving(good), Misbehaving(good)
        old.version = "run-2"
        async with opened(current, old, publishes=False, admit=False) as pool:
            await collect(pool, 4)
            assert [member.state for member in pool.members] == [State.READY, State.WAITING]
            assert len(current.asked) == 4
            old.version = WIRE
            current.answer = never
            waiting = asyncio.create_task(collect(pool, 10))
            await until(lambda: len(old.asked) > 0)  # it is found while responses are generated
            waiting.cancel()

    run(test)


# Lost servers


def test_a_hanging_server_is_fenced_and_its_requests_go_elsewhere() -> None:
    async def test() -> None:
        stuck, fine = Misbehaving(never), Misbehaving(good)
        async with opened(stuck, fine) as pool:
            stuck.hangs = True
            started = asyncio.get_running_loop().time()
            found = await collect(pool, 8)
            seconds = asyncio.get_running_loop().time() - started
            assert pool.members[0].state is State.LOST
            assert "health" in pool.members[0].reason
            await until(lambda: stuck.running == 0)
        assert [group.prompt.uid for group in found] == [f"test:{i}" for i in range(8)]
        assert len(stuck.asked) == 4
        assert seconds < 4 * QUICK.health_misses * (QUICK.health_interval + QUICK.health_timeout) + 1

    run(test)


def test_health_is_looked_at_only_while_responses_are_generated() -> None:
    async def test() -> None:
        server = Misbehaving(good)
        async with opened(server) as pool:
            looks = server.looks
            server.hangs = True
            await asyncio.sleep(0.5)
            assert server.looks == looks and pool.members[0].state is State.READY
            server.hangs = False

            async def slow(before: int, running: int) -> web.Response:
                await asyncio.sleep(0.5)
                return whole()

            server.answer = slow
            await collect(pool, 1)
            assert server.looks > looks

    run(test)


def test_missed_looks_count_only_in_a_row() -> None:
    async def test() -> None:
        async def slow(before: int, running: int) -> web.Response:
            first = server.looks
            async with asyncio.timeout(BOUND / 2):
                while server.looks < first + 9:
                    server.well = (server.looks - first) % 3 == 2  # two are missed, one is not
                    await asyncio.sleep(0.01)
            server.well = True
            return whole()

        server = Misbehaving(slow)
        async with opened(server, config=QUICK.model_copy(update={"health_misses": 3})) as pool:
            await collect(pool, 1)
            assert pool.members[0].state is State.READY
        assert len(server.asked) == 1

    run(test)


def test_a_dead_process_is_started_anew_and_waits_for_weights() -> None:
    async def test() -> None:
        server, process = Misbehaving(good), FakeProcess()
        async with opened(server, processes=[process]) as pool:
            (member,) = pool.members
            server.well = False
            process.up = False
            await until(lambda: member.state is State.STARTING)
            assert process.starts == 2
            asked = asyncio.create_task(collect(pool, 2))
            await asyncio.sleep(0.3)
            assert not asked.done(), "a server on its way up is waited for"
            server.well = True
            with pytest.raises(WeightsWanted):
                await asked
            pool.admit(member, WIRE)
            assert len(await collect(pool, 2)) == 2
            process.up = False
            await until(lambda: member.given_up)  # the one restart is used up
            assert process.starts == 2

    run(test)


def test_one_that_follows_goes_on_where_its_only_server_comes_back_with_the_weights() -> None:
    async def test() -> None:
        server = Misbehaving(good)
        async with opened(server, publishes=False) as pool:
            server.well = False
            pool.fence(pool.members[0], "a test")
            asked = asyncio.create_task(collect(pool, 2))
            await asyncio.sleep(0.2)
            server.well = True
            assert len(await asked) == 2

    run(test)


def test_when_restarts_are_used_up_the_log_speaks() -> None:
    async def test() -> None:
        server, process = Misbehaving(never), FakeProcess()
        async with opened(server, processes=[process], config=QUICK.model_copy(update={"restarts": 0})) as pool:
            asked = asyncio.create_task(collect(pool, 2))
            await until(lambda: server.running == 2)
            process.up = False
            with pytest.raises(RolloutError, match=r"(?s)no server is left.*process ended.*the last words"):
                await asked
        assert process.starts == 1

    run(test)


def test_no_server_is_started_while_the_trainer_has_the_memory() -> None:
    async def test() -> None:
        server, process = Misbehaving(good), FakeProcess()
        async with opened(server, processes=[process]) as pool:
            pool.hold_starts(True)
            process.up = False
            await until(lambda: pool.members[0].state is State.LOST)
            await asyncio.sleep(0.3)
            assert process.starts == 1
            pool.hold_starts(False)
            await until(lambda: pool.members[0].state is State.WAITING)
            assert process.starts == 2

    run(test)


def test_a_server_of_someone_else_is_taken_back_when_it_answers_again() -> None:
    async def test() -> None:
        flaky, fine = Misbehaving(never), Misbehaving(good)
        async with opened(flaky, fine) as pool:
            flaky.hangs = True
            await collect(pool, 4)
            assert pool.members[0].state is State.LOST
            flaky.hangs = False
            await until(lambda: pool.members[0].state is State.WAITING)
            assert len(pool.targets()) == 2, "it gets weights at the next publish"

    run(test)


def test_one_that_follows_leaves_lost_servers_alone_between_its_calls() -> None:
    """The publisher may have paused them, or have their memory: a look at their health would end them."""

    async def test() -> None:
        lost, fine = Misbehaving(good), Misbehaving(good)
        async with opened(lost, fine, publishes=False) as pool:
            lost.well = False
            pool.fence(pool.members[0], "a test")
            await collect(pool, 4)
            await asyncio.sleep(0.2)  # a look may have been under way
            looks = lost.looks
            lost.well = True
            await asyncio.sleep(0.5)
            assert lost.looks == looks and pool.members[0].state is State.LOST

            async def slow(before: int, running: int) -> web.Response:
                await asyncio.sleep(0.5)
                return whole()

            fine.answer = slow
            await collect(pool, 1)
            assert pool.members[0].state is State.READY

    run(test)


def test_without_any_server_waiting_is_bounded() -> None:
    async def test() -> None:
        server, config = Misbehaving(good), QUICK.model_copy(update={"start_timeout": 0.5})
        async with opened(server, config=config) as pool:
            pool.fence(pool.members[0], "a test")
            server.well = False
            with pytest.raises(RolloutError, match=r"within 0\.5 s"):
                await collect(pool, 1, config)

    run(test)


# Coming up


def test_a_server_that_is_something_else_is_refused() -> None:
    async def test() -> None:
        async def refuse(client: Client) -> None:
            raise RolloutError(f"{client.url}: another model")

        with pytest.raises(RolloutError, match="another model"):
            async with opened(Misbehaving(good), check=refuse):
                pass

    run(test)


def test_a_server_that_never_answers_is_an_error_in_time() -> None:
    async def test() -> None:
        server = Misbehaving(good)
        server.hangs = True
        with pytest.raises(RolloutError, match=r"within 0\.5 s"):
            async with opened(server, config=QUICK.model_copy(update={"start_timeout": 0.5})):
                pass

    run(test)


def test_a_server_that_ends_while_it_starts_is_an_error_with_its_log() -> None:
    async def test() -> None:
        class Dies(FakeProcess):
            def alive(self) -> bool:
                return False

        server = Misbehaving(good)
        server.well = False
        with pytest.raises(RolloutError, match=r"(?s)ended while it started.*the last words"):
            async with opened(server, processes=[Dies()]):
                pass

    run(test)


def test_a_server_that_a_killed_run_left_paused_goes_on() -> None:
    """Only the publisher may do that: to the others a pause means that it publishes."""

    async def test() -> None:
        server = Misbehaving(good)
        server.paused = True
        with pytest.raises(RolloutError, match=r"within 0\.5 s"):
            async with opened(server, config=QUICK.model_copy(update={"start_timeout": 0.5}), publishes=False):
                pass
        server = Misbehaving(good)
        server.paused = True
        async with opened(server) as pool:
            assert len(await collect(pool, 2)) == 2

    run(test)


def test_a_fault_of_the_pool_itself_is_raised_where_it_is_waited_for() -> None:
    async def test() -> None:
        checks: list[Client] = []

        async def breaks(client: Client) -> None:
            checks.append(client)
            if len(checks) > 1:
                raise ZeroDivisionError

        async with opened(Misbehaving(good), check=breaks) as pool:
            pool.fence(pool.members[0], "a test")
            with pytest.raises(ZeroDivisionError):
                await collect(pool, 1)

    run(test)


# Being interrupted


def test_what_is_cancelled_leaves_nothing_running() -> None:
    async def test() -> None:
        server = Misbehaving(never)
        async with opened(server) as pool:
            asked = asyncio.create_task(collect(pool, 5))
            await until(lambda: server.running == 5)
            asked.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asked
            await until(lambda: server.running == 0)
            assert pool.members[0].running == 0 and not pool.members[0].requests

    run(test)


def test_progress_counts_finished_groups() -> None:
    async def test() -> None:
        seen: list[tuple[int, int]] = []
        async with opened(Misbehaving(good)) as pool:
            await source(pool, QUICK).collect(prompts(3), SAMPLING, 3, lambda *counts: seen.append(counts))
        assert seen == [(1, 3), (2, 3), (3, 3)]

    run(test)


@pytest.mark.parametrize("first", [0.05, 0.15])
def test_a_request_that_is_cancelled_when_its_time_is_up_is_cancelled(first: float) -> None:
    """Where both come while the loop is busy, neither swallows the other: whoever waits for the end would go on."""

    async def test() -> None:
        server = Misbehaving(never)
        await server.server.start_server()
        client = Client(server.url, timeouts=Timeouts(generate=0.3))
        request = asyncio.create_task(client.generate([1], SAMPLING, [STOP]))
        await until(lambda: server.running == 1)
        asyncio.get_running_loop().call_later(first, request.cancel)
        time.sleep(0.5)
        with pytest.raises(asyncio.CancelledError):
            await request
        await client.close()
        await server.server.close()

    run(test)
