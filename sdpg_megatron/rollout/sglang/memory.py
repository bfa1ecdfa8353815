"""Memory of servers that share the trainer's devices: released for training, allocated again for the rollout.

    release: pause, wait until idle, release all             the trainer loads its state, trains, offloads it
    resume:  allocate the weights' memory                     without content
    publish: send the weights, then allocate the rest         the KV cache is empty

SGLang's scheduler exits if memory is released while requests run, or allocated twice. A server without memory therefore
stays paused, and its `ServerHandle` records the released parts.
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
"""SGLang's tags of releasable memory."""
IDLE_SECONDS = 30.0
"""Time for a paused server to become idle."""


async def release(pool: Pool) -> None:
    """Release the memory of every server. A server that fails is lost, and restarted only after `resume`."""
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
    """Allocate the weights' memory on the servers, and allow restarts of lost ones."""
    pool.hold_starts(False)
    await asyncio.gather(*(_take_weights(pool, handle) for handle in pool.targets() if WEIGHTS in handle.released))


async def _take_weights(pool: Pool, handle: ServerHandle) -> None:
    try:
        await handle.client.resume_memory([WEIGHTS])
        handle.released -= {WEIGHTS}
    except ServerError as error:
        pool.mark_lost(handle, f"could not take its memory again: {error}")


async def take_rest(pool: Pool, client: Client) -> None:
    """Allocate the rest of a server's memory once its weights are in place. Raises `ServerError`."""
    for handle in pool.handles:
        if handle.client is client and handle.released:
            await client.resume_memory(sorted(handle.released))
            handle.released = frozenset()
