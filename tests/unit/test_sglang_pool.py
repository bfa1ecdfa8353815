"""The pool of servers: who is well, who has the weights, who is given up and comes back."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import web

from sdpg_megatron.errors import RolloutError
from sdpg_megatron.rollout.base import Abandoned, WeightsWanted
from sdpg_megatron.rollout.sglang.client import Client
from sdpg_megatron.rollout.sglang.event_loop import unless
from sdpg_megatron.rollout.sglang.server_handle import ServerState
from tests.sglang_fakes import (
    BOUND,
    QUICK,
    WIRE,
    FakeProcess,
    Misbehaving,
    collect,
    good,
    impatient,  # noqa: F401  # a fixture of all tests here
    never,
    opened,
    run,
    until,
    whole,
)


def test_one_that_follows_asks_the_servers_what_they_have() -> None:
    async def test() -> None:
        current, old = Misbehaving(good), Misbehaving(good)
        old.version = "run-2"
        async with opened(current, old, publishes=False, admit=False) as pool:
            await collect(pool, 4)
            assert [handle.state for handle in pool.handles] == [ServerState.READY, ServerState.WAITING]
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
            assert pool.handles[0].state is ServerState.LOST
            assert "health" in pool.handles[0].reason
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
            assert server.looks == looks and pool.handles[0].state is ServerState.READY
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
            assert pool.handles[0].state is ServerState.READY
        assert len(server.asked) == 1

    run(test)


def test_a_dead_process_is_started_anew_and_waits_for_weights() -> None:
    async def test() -> None:
        server, process = Misbehaving(good), FakeProcess()
        async with opened(server, processes=[process]) as pool:
            (handle,) = pool.handles
            server.well = False
            process.up = False
            await until(lambda: handle.state is ServerState.STARTING)
            assert process.starts == 2
            asked = asyncio.create_task(collect(pool, 2))
            await asyncio.sleep(0.3)
            assert not asked.done(), "a server on its way up is waited for"
            server.well = True
            with pytest.raises(WeightsWanted):
                await asked
            pool.admit(handle, WIRE)
            assert len(await collect(pool, 2)) == 2
            process.up = False
            await until(lambda: handle.given_up)  # the one restart is used up
            assert process.starts == 2

    run(test)


def test_one_that_follows_goes_on_where_its_only_server_comes_back_with_the_weights() -> None:
    async def test() -> None:
        server = Misbehaving(good)
        async with opened(server, publishes=False) as pool:
            server.well = False
            pool.mark_lost(pool.handles[0], "a test")
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
            await until(lambda: pool.handles[0].state is ServerState.LOST)
            await asyncio.sleep(0.3)
            assert process.starts == 1
            pool.hold_starts(False)
            await until(lambda: pool.handles[0].state is ServerState.WAITING)
            assert process.starts == 2

    run(test)


def test_a_server_of_someone_else_is_taken_back_when_it_answers_again() -> None:
    async def test() -> None:
        flaky, fine = Misbehaving(never), Misbehaving(good)
        async with opened(flaky, fine) as pool:
            flaky.hangs = True
            await collect(pool, 4)
            assert pool.handles[0].state is ServerState.LOST
            flaky.hangs = False
            await until(lambda: pool.handles[0].state is ServerState.WAITING)
            assert len(pool.targets()) == 2, "it gets weights at the next publish"

    run(test)


def test_one_that_follows_leaves_lost_servers_alone_between_its_calls() -> None:
    """The publisher may have paused them, or have their memory: a look at their health would end them."""

    async def test() -> None:
        lost, fine = Misbehaving(good), Misbehaving(good)
        async with opened(lost, fine, publishes=False) as pool:
            lost.well = False
            pool.mark_lost(pool.handles[0], "a test")
            await collect(pool, 4)
            await asyncio.sleep(0.2)  # a look may have been under way
            looks = lost.looks
            lost.well = True
            await asyncio.sleep(0.5)
            assert lost.looks == looks and pool.handles[0].state is ServerState.LOST

            async def slow(before: int, running: int) -> web.Response:
                await asyncio.sleep(0.5)
                return whole()

            fine.answer = slow
            await collect(pool, 1)
            assert pool.handles[0].state is ServerState.READY

    run(test)


def test_without_any_server_waiting_is_bounded() -> None:
    async def test() -> None:
        server, config = Misbehaving(good), QUICK.model_copy(update={"start_timeout": 0.5})
        async with opened(server, config=config) as pool:
            pool.mark_lost(pool.handles[0], "a test")
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
            pool.mark_lost(pool.handles[0], "a test")
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
            assert pool.handles[0].running == 0 and not pool.handles[0].requests

    run(test)


def test_what_is_to_stop_leaves_nothing_running() -> None:
    async def test() -> None:
        server = Misbehaving(never)
        async with opened(server) as pool:
            with pytest.raises(Abandoned):
                await unless(lambda: server.running == 5, collect(pool, 5))
            assert pool.handles[0].running == 0 and not pool.handles[0].requests
            await until(lambda: server.running == 0)
            server.answer = good
            assert len(await unless(lambda: False, collect(pool, 5))) == 5

    run(test)


# Publishing and releasing


def test_a_publish_waits_for_a_server_that_may_come_back() -> None:
    async def test() -> None:
        server, process = Misbehaving(good), FakeProcess()
        async with opened(server, processes=[process]) as pool:
            assert await pool.reachable() == list(pool.handles)
            server.well = process.up = False
            await until(lambda: not pool.targets())
            waiting = asyncio.create_task(pool.reachable())
            await asyncio.sleep(0.2)
            assert not waiting.done()
            server.well = True
            assert await waiting == list(pool.handles)

    run(test)


def test_a_publish_does_not_wait_for_servers_that_are_given_up() -> None:
    async def test() -> None:
        server, process = Misbehaving(good), FakeProcess()
        async with opened(server, processes=[process], config=QUICK.model_copy(update={"restarts": 0})) as pool:
            process.up = False
            await until(lambda: pool.handles[0].given_up)
            assert await pool.reachable() == []

    run(test)


def test_memory_is_free_when_a_lost_server_has_ended() -> None:
    """A server that is given up is ended by its keeper, a little later."""

    async def test() -> None:
        server, process = Misbehaving(good), FakeProcess()
        async with opened(server, processes=[process]) as pool:
            pool.hold_starts(True)
            pool.mark_lost(pool.handles[0], "a test")
            assert process.up
            await pool.ended()
            assert not process.up

    run(test)
