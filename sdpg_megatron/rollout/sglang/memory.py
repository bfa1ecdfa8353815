"""Servers that share the trainer's devices: they give their memory back while it trains, and take it again afterwards.

    release: pause, wait until idle, give back all            the trainer moves in, trains, moves out
    resume:  take the memory of the weights                   its content is gone
    publish: weights arrive; then take the rest               keys and values of prompts are made anew

SGLang's scheduler ends itself where it is told to give memory back while anything runs, or to take what it has: a
server stays paused without memory, and what it has given back is kept with its `Member`.
Source: sglang.srt.managers.scheduler_components.weight_updater of SGLang 0.5.23.
"""

from __future__ import annotations

import asyncio

from sdpg_megatron.errors import ServerError
from sdpg_megatron.rollout.sglang.client import Client
from sdpg_megatron.rollout.sglang.pool import Pool
from sdpg_megatron.rollout.sglang.server_handle import ServerHandle

WEIGHTS = "weights"
MEMORY = frozenset({WEIGHTS, "kv_cache", "cuda_graph"})
"""SGLang's names for what a server can give back."""
IDLE_SECONDS = 30.0
"""In which a paused server has finished what it was doing."""


async def release(pool: Pool) -> None:
    """Have every server give its memory back. One that cannot is lost, and not started again before `resume`."""
    pool.hold_starts(True)
    await pool.settled()
    pool.expect(None)
    await asyncio.gather(*(_give_back(pool, handle) for handle in pool.targets() if not handle.released))
    await pool.ended()


async def _give_back(pool: Pool, handle: ServerHandle) -> None:
    try:
        await handle.client.pause()
        await handle.client.flush_cache(wait=IDLE_SECONDS)
        await handle.client.release_memory(sorted(MEMORY))
        handle.released = MEMORY
    except ServerError as error:
        pool.mark_lost(handle, f"could not give its memory back: {error}")


async def resume(pool: Pool) -> None:
    """Have servers take the memory of their weights; lost ones may be started again."""
    pool.hold_starts(False)
    await asyncio.gather(*(_take_weights(pool, handle) for handle in pool.targets() if WEIGHTS in handle.released))


async def _take_weights(pool: Pool, handle: ServerHandle) -> None:
    try:
        await handle.client.resume_memory([WEIGHTS])
        handle.released -= {WEIGHTS}
    except ServerError as error:
        pool.mark_lost(handle, f"could not take its memory again: {error}")


async def take_rest(pool: Pool, client: Client) -> None:
    """The server's weights are in place: have it take the rest. Raises `ServerError`."""
    for handle in pool.handles:
        if handle.client is client and handle.released:
            await client.resume_memory(sorted(handle.released))
            handle.released = frozenset()
