"""Answers of SGLang 0.5.15 and 0.5.23, as their sources make them, where the two differ."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from sdpg_megatron.rollout.sglang.client import Client, RankChecksums

PLACE = {"tp_rank": 1, "tp_size": 2, "dp_rank": 0, "dp_size": 1, "pp_rank": 0, "pp_size": 1, "rank": 1, "size": 2}
SUMS = {"model.norm.weight": "00f1"}


def client_of(answers: Mapping[str, Any], use: Callable[[Client], Any], **options: Any) -> Any:
    """Return what `use` returns for a client whose server gives these answers, by path."""

    async def answer(request: web.Request) -> web.Response:
        return web.json_response(answers[request.path])

    async def asked() -> Any:
        app = web.Application()
        app.router.add_route("*", "/{path}", answer)
        async with TestServer(app) as server:
            client = Client(str(server.make_url("")), **options)
            try:
                return await use(client)
            finally:
                await client.close()

    return asyncio.run(asked())


@pytest.mark.parametrize("place", [PLACE, [PLACE], [PLACE, {**PLACE, "tp_rank": 0}]])
def test_a_rank_states_its_place_once_or_for_each_model(place: object) -> None:
    rank = {"checksums": SUMS, "per_gpu_checksum": "9c", "parallelism_info": place}
    body = {"success": True, "message": "Success.", "ranks": [rank], "per_engine_checksum": "7d"}
    found = client_of({"/weights_checker": body}, lambda client: client.checksums())
    assert found == [RankChecksums(1, SUMS)]


@pytest.mark.parametrize(
    ("told", "starts", "kept"),
    [({"startup_time": 17.5}, None, True), ({"startup_time": 17.5}, 1, True), ({}, 1, True), ({}, None, False)],
)
def test_a_server_is_the_same_process_where_it_or_this_run_can_say_so(
    told: dict[str, float], starts: int | None, kept: bool
) -> None:
    async def twice(client: Client) -> bool:
        first, second = await client.server_info(), await client.server_info()
        return client.start_of(first) == client.start_of(second)

    answers = {"/server_info": {"tp_size": 1, "version": "0.5.15.post1", **told}}
    assert client_of(answers, twice, starts=None if starts is None else lambda: starts) is kept


def test_a_server_that_this_run_started_again_is_another_process() -> None:
    starts = iter([1, 2])

    async def twice(client: Client) -> bool:
        return client.start_of(await client.server_info()) == client.start_of(await client.server_info())

    assert not client_of({"/server_info": {"tp_size": 1}}, twice, starts=lambda: next(starts))
