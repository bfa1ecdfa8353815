"""One thing that all servers of a group and this process do together, and what is to be known when it fails."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from sdpg_megatron.errors import ServerError
from sdpg_megatron.rollout.sglang.client import Client
from sdpg_megatron.rollout.transports.weight_group import WeightGroup

GRACE = 1.0
"""Seconds in which failures of one cause show, once the first has."""
SETTLE = 10.0
"""Seconds in which everyone notices that the group is gone."""


@dataclass(frozen=True, slots=True)
class AttemptResult:
    """Empty where all went well."""

    failed: Mapping[Client, ServerError]
    """Servers at fault: gone, stuck, or unwilling."""
    spoiled: frozenset[Client]
    """Servers that failed because others did."""
    own: BaseException | None
    """What went wrong in this process."""

    @property
    def well(self) -> bool:
        return not self.failed and not self.spoiled and self.own is None


async def attempt(
    group: WeightGroup,
    calls: Mapping[Client, Coroutine[Any, Any, None]],
    own: Coroutine[Any, Any, None],
    seconds: float,
) -> AttemptResult:
    """Await the servers' calls and this process's own part. Where any of them fails, or all take longer than
    `seconds`, the group is destroyed, so that nobody waits in it for the others."""
    tasks = {client: asyncio.ensure_future(call) for client, call in calls.items()}
    mine = asyncio.ensure_future(own)
    try:
        everything = {mine, *tasks.values()}
        _, pending = await asyncio.wait(everything, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        if pending:
            await asyncio.wait(pending, timeout=GRACE)
        first = {client: error for client, task in tasks.items() if (error := _error(task))}
        if any(not task.done() or _error(task) for task in everything):
            await _break(group, mine, list(first))
            await asyncio.wait(tasks.values(), timeout=SETTLE)
        return _judge(tasks, first, _error(mine))
    except asyncio.CancelledError:
        group.destroy()
        raise
    finally:
        for task in (mine, *tasks.values()):
            task.cancel()
        await asyncio.gather(mine, *tasks.values(), return_exceptions=True)


async def _break(group: WeightGroup, mine: asyncio.Future[None], unwilling: Sequence[Client]) -> None:
    """A Gloo broadcast ends when a receiver closes its connections: a server that takes no part is told to."""
    await group.interrupt()
    await asyncio.gather(*(leave(client, group.name) for client in unwilling))
    await asyncio.wait({mine}, timeout=SETTLE)
    group.destroy()


async def leave(client: Client, name: str) -> None:
    """Have a server forget a group, where it answers and has one."""
    with suppress(ServerError, asyncio.TimeoutError):
        async with asyncio.timeout(GRACE):
            await client.leave_group(name)


def _judge(
    tasks: Mapping[Client, asyncio.Future[None]], first: Mapping[Client, ServerError], own: BaseException | None
) -> AttemptResult:
    """Blame servers that are gone or never answered; where there are none, those that failed before the break."""
    stuck = {
        client: ServerError(client.url, "", "did not answer while weights were sent", retryable=True)
        for client, task in tasks.items()
        if not task.done()
    }
    errors = {client: error for client, task in tasks.items() if task.done() and (error := _error(task))}
    gone = {client: error for client, error in errors.items() if error.__cause__ is not None}
    failed = {**stuck, **gone} or dict(first)
    return AttemptResult(failed, frozenset(errors) - frozenset(failed), own)


def _error(task: asyncio.Future[None]) -> Any:
    """What a task failed with; None for one that is not done, or well."""
    return task.exception() if task.done() and not task.cancelled() else None
