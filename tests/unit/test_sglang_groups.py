"""The collecting of groups: which server is asked, how often, and what counts as an answer."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from sdpg_megatron.errors import RolloutError, ServerError
from sdpg_megatron.records import Group
from sdpg_megatron.rollout.base import WeightsWanted
from sdpg_megatron.rollout.sglang import groups
from sdpg_megatron.rollout.sglang.client import Client, Timeouts
from sdpg_megatron.rollout.sglang.server_handle import ServerState
from tests.sglang_fakes import (
    BOUND,
    QUICK,
    SAMPLING,
    STOP,
    WIRE,
    Answer,
    Misbehaving,
    collect,
    good,
    impatient,  # noqa: F401  # a fixture of all tests here
    never,
    opened,
    prompts,
    response,
    run,
    source,
    until,
    whole,
)

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
            pool.admit(pool.handles[0], WIRE)
            pool.admit(pool.handles[1], "run-2")
            await collect(pool, 6)
        assert len(ready.asked) == 6 and not waiting.asked

    run(test)


# Through a router, which here is one more misbehaving server: what stands behind it a client cannot tell


@asynccontextmanager
async def routing(answer: Answer) -> AsyncIterator[tuple[Misbehaving, Client]]:
    async with Misbehaving(answer).started() as router:
        client = Client(router.url, timeouts=Timeouts(generate=BOUND))
        yield router, client
        await client.close()


def test_a_router_is_asked_instead_of_the_servers() -> None:
    async def test() -> None:
        server = Misbehaving(good)
        async with opened(server) as pool, routing(good) as (router, client):
            found = await collect(pool, 6, router=client)
        assert [group.prompt.uid for group in found] == [prompt.uid for prompt in prompts(6)]
        assert sorted(router.asked) == [[i] for i in range(6)] and not server.asked

    run(test)


async def older(before: int, running: int) -> web.Response:
    return whole(version="run-2")


def test_a_routers_response_of_other_weights_is_traced_to_its_server() -> None:
    async def test() -> None:
        one, two = Misbehaving(good), Misbehaving(good)
        async with opened(one, two) as pool, routing(older) as (_, client):
            two.version = "run-2"
            with pytest.raises(WeightsWanted, match="run-2"):
                await collect(pool, 2, router=client)
            assert [handle.state for handle in pool.handles] == [ServerState.READY, ServerState.WAITING]

    run(test)


def test_a_router_with_a_server_that_the_run_does_not_have_is_an_error() -> None:
    async def test() -> None:
        async with opened(Misbehaving(good)) as pool, routing(older) as (_, client):
            with pytest.raises(RolloutError, match=r"no server of the run has.*rollout\.sglang\.urls"):
                await collect(pool, 2, router=client)

    run(test)


def test_what_a_router_has_is_asked_for_again_when_a_server_is_lost() -> None:
    async def test() -> None:
        async def first_hangs(before: int, running: int) -> web.Response:
            return await (never if before < 2 else good)(before, running)

        one, two = Misbehaving(good), Misbehaving(good)
        async with opened(one, two) as pool, routing(first_hangs) as (router, client):
            asking = asyncio.create_task(collect(pool, 2, router=client))
            await until(lambda: router.running == 2)
            pool.mark_lost(pool.handles[1], "a test")
            assert len(await asking) == 2

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
            assert pool.handles[0].state is ServerState.READY
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
            assert pool.handles[0].suspect
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
            assert pool.handles[0].state is ServerState.READY
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
        assert [completion.tokens.tolist() for completion in group.completions] == [[5, 6]] * 2

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
            assert pool.handles[0].state is ServerState.WAITING
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
            pool.admit(pool.handles[0], WIRE)
            assert pool.handles[0].state is ServerState.WAITING, "an old version must not do"

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


# Experts of a mixture


def with_experts(numbers: list[int] | None) -> Answer:
    """Two responses of two tokens to a prompt of one, from a model of two layers with two experts a token."""
    packed = None if numbers is None else base64.b64encode(np.array(numbers, dtype="<i4").tobytes()).decode()

    async def answer(before: int, running: int) -> web.Response:
        both = [response(), response()]
        for one in both if packed is not None else []:
            one["meta_info"]["routed_experts"] = packed
        return web.json_response(both)

    return answer


async def collect_experts(server: Misbehaving) -> list[Group]:
    async with opened(server) as pool:
        asking = replace(source(pool, QUICK), layers=2)
        return await asking.collect(prompts(1), replace(SAMPLING, experts=True), version=3)


def test_experts_come_token_by_token_and_layer_by_layer() -> None:
    async def test() -> None:
        (group,) = await collect_experts(Misbehaving(with_experts([0, 1, 2, 3, 4, 5, 6, 7])))
        for completion in group.completions:
            assert completion.experts is not None
            assert completion.experts.tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]

    run(test)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (None, "without its experts. Fix: start the server with --enable-return-routed-experts"),
        ([0, 1, 2], "12 bytes of experts for 2 tokens and 2 layers"),
        ([], "0 bytes of experts"),
    ],
)
def test_a_response_without_all_of_its_experts_is_refused(numbers: list[int] | None, message: str) -> None:
    async def test() -> None:
        with pytest.raises(ServerError, match=message):
            await collect_experts(Misbehaving(with_experts(numbers)))

    run(test)


def test_experts_are_asked_for_where_they_are_wanted() -> None:
    async def test() -> None:
        server = Misbehaving(with_experts([0] * 8))
        async with opened(server) as pool:
            asking = replace(source(pool, QUICK), layers=2)
            await asking.collect(prompts(1), replace(SAMPLING, experts=True), version=3)
            (group,) = await asking.collect(prompts(1), SAMPLING, version=3)
        assert [body.get("return_routed_experts") for body in server.bodies] == [True, None]
        assert len(group.completions) == SAMPLING.n

    run(test)


def test_no_default_of_a_server_is_left_to_apply() -> None:
    """SGLang overlays a request's parameters on its preferred ones: every one that shapes the samples is stated."""
    preferred = {"top_k": 20, "top_p": 0.8, "min_p": 0.1, "temperature": 0.6, "repetition_penalty": 1.1}
    preferred |= {"frequency_penalty": 0.5, "presence_penalty": 1.5, "logit_bias": {"5": -100.0}, "min_new_tokens": 2}
    preferred |= {"stop": ["\n"], "regex": "[0-9]+", "json_schema": "{}", "ebnf": "x", "ignore_eos": True}

    async def test() -> None:
        server = Misbehaving(good)
        async with opened(server) as pool:
            await collect(pool, 1)
        stated = server.bodies[0]["sampling_params"]
        applied = preferred | stated
        assert applied == stated
        assert (stated["top_k"], stated["min_p"], stated["repetition_penalty"], stated["top_p"]) == (-1, 0.0, 1.0, 1.0)

    run(test)
