"""One server as the pool sees it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from sdpg_megatron.rollout.sglang.client import Client
from sdpg_megatron.rollout.sglang.server import ServerProcess

LINE = 400
"""Characters of a line of a server's log that an error shows: SGLang prints all its arguments in one."""


class ServerState(Enum):
    STARTING = "starting"
    """Its process is up; it does not answer yet."""
    WAITING = "waiting for weights"
    """It answers, and does not have the current weights."""
    READY = "ready"
    """It has the current weights. Only such a server gets requests."""
    LOST = "lost"
    """Dead, stuck or misbehaving."""


@dataclass(eq=False, slots=True)
class ServerHandle:
    """A server, what the pool knows of it, and what runs there."""

    url: str
    client: Client
    process: ServerProcess | None = None
    """None for a server that someone else started."""
    state: ServerState = ServerState.STARTING
    reason: str = ""
    """Why it was lost last."""
    given_up: bool = False
    """Lost for good: there are no restarts left."""
    running: int = 0
    """Groups asked of it and not yet answered."""
    suspect: bool = False
    """A request failed there; it gets no other before it has answered a look at its health."""
    released: frozenset[str] = frozenset()
    """What it has given back of its memory, by SGLang's tags."""
    requests: set[asyncio.Task[Any]] = field(default_factory=set)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    """Has its keeper look at once."""

    @property
    def answers(self) -> bool:
        return self.state in (ServerState.WAITING, ServerState.READY)

    @property
    def ended(self) -> bool:
        """Whether the run started its process, and that is gone."""
        return self.process is not None and not self.process.alive()

    def log_tail(self) -> str:
        """The last lines of its log, none of them too long; nothing for a server that someone else started."""
        lines = [] if self.process is None else self.process.log_tail().splitlines()
        return "\n".join(line[:LINE] for line in lines)
