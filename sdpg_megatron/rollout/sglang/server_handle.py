"""The pool's record of one server."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from sdpg_megatron.rollout.sglang.client import Client
from sdpg_megatron.rollout.sglang.server import ServerProcess

LINE = 400
"""Characters of a log line quoted in an error: SGLang prints all its arguments in one line."""


class ServerState(Enum):
    STARTING = "starting"
    """Its process is up; it does not answer yet."""
    WAITING = "waiting for weights"
    """It answers, and does not have the current weights."""
    READY = "ready"
    """It has the current weights. Only READY servers get requests."""
    LOST = "lost"
    """Dead, stuck or misbehaving."""


@dataclass(eq=False, slots=True)
class ServerHandle:
    """A server, its state, and its requests."""

    url: str
    client: Client
    process: ServerProcess | None = None
    """None for a server at `urls`."""
    state: ServerState = ServerState.STARTING
    reason: str = ""
    """Reason of the last loss."""
    given_up: bool = False
    """Lost, without restarts left."""
    running: int = 0
    """Unanswered groups."""
    suspect: bool = False
    """A request failed; the server gets no other until it passes a health check."""
    released: frozenset[str] = frozenset()
    """SGLang's tags of its released memory."""
    requests: set[asyncio.Task[Any]] = field(default_factory=set)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    """Triggers a check by its monitor."""

    @property
    def answers(self) -> bool:
        return self.state in (ServerState.WAITING, ServerState.READY)

    @property
    def ended(self) -> bool:
        """True if this run started its process and the process is gone."""
        return self.process is not None and not self.process.alive()

    def log_tail(self) -> str:
        """Last lines of its log, shortened; empty for a server at `urls`."""
        lines = [] if self.process is None else self.process.log_tail().splitlines()
        return "\n".join(line[:LINE] for line in lines)
