"""How the launchers of a run know of each other while it runs: signs of life, how each ended, and who is to stop.

Machine 0 is in touch with all others, and passes on what they say. torchrun does none of this: where a machine is gone,
or the link to it, its ranks would wait in a collective until `parallel.timeout`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sdpg_megatron.launch.connection import Connection
from sdpg_megatron.launch.rendezvous import LaunchPlan
from sdpg_megatron.process.signals import STOPPED

WELL = (0, STOPPED)
"""Exit codes of a machine whose ranks ended as they should."""
FAILED_GRACE = 15.0
"""Seconds that ranks get to end by themselves, and to say why, when those of another machine have failed."""
WELL_GRACE = 300.0
"""Likewise when those of another machine have ended well, and these are to follow."""


@dataclass(slots=True)
class Liveness:
    """This machine's view of the others."""

    node: int
    plan: LaunchPlan
    connections: Mapping[int, Connection]
    lost_seconds: float
    ended: dict[int, int] = field(default_factory=dict)
    """Exit codes of the machines that have ended."""
    lost: dict[int, str] = field(default_factory=dict)
    """Machines that are out of reach, and what of them is known."""
    asked: int | None = None
    """The first signal that a machine without ranks has got: it asks the run to stop."""
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)
    _since: float | None = None

    def start(self) -> None:
        for node, connection in self.connections.items():
            connection.heard = time.monotonic()
            self._tasks += [asyncio.create_task(connection.beat()), asyncio.create_task(self._listen(node, connection))]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def end(self, code: int) -> None:
        """Tell the others how this machine ended."""
        self._note_end(self.node, code)

    def stop(self, number: int) -> None:
        """Tell machine 0 of a signal that asks the run to stop."""
        for connection in self.connections.values():
            connection.say(stop=number)

    def verdict(self) -> tuple[str, int] | None:
        """Why this machine's ranks have to end now, and the exit code; None while they need not."""
        for node, connection in self.connections.items():
            if node not in self.ended and node not in self.lost:
                silence = time.monotonic() - connection.heard
                if silence > self.lost_seconds:
                    what = f"has not been heard of for {silence:.0f} s: it hangs, or the link to it is cut"
                    self._note_lost(node, what)
        for node, what in self.lost.items():
            return f"{self.plan.machines[node]} {what}", 1
        for node, code in self.ended.items():
            if node != self.node and (code not in WELL or node in self.plan.trainers):
                self._since = self._since or time.monotonic()
                if time.monotonic() - self._since > (WELL_GRACE if code in WELL else FAILED_GRACE):
                    return f"{self.plan.machines[node]} ended with exit code {code}", code if code in WELL else 1
        return None

    def trainers_code(self) -> int | None:
        """How the machines with ranks ended, together; None while one of them goes on."""
        codes = [self.ended.get(node) for node in self.plan.trainers]
        if bad := [code for code in codes if code not in (None, *WELL)]:
            return bad[0]
        return None if None in codes else max(code or 0 for code in codes)

    @property
    def complete(self) -> bool:
        """Whether all machines that this one is in touch with have ended, or are lost."""
        return all(node in self.ended or node in self.lost for node in self.connections)

    async def _listen(self, node: int, connection: Connection) -> None:
        while (message := await connection.hear()) is not None:
            if "ended" in message:
                self._note_end(*message["ended"])
            elif "lost" in message:
                self._note_lost(*message["lost"])
            elif "stop" in message:
                self.asked = self.asked or message["stop"]
        if node not in self.ended:
            self._note_lost(node, "is gone: its launcher, or the machine, ended without a word")

    def _note_end(self, node: int, code: int) -> None:
        self.ended[node] = code
        if self.node in (0, node):
            self._pass_on(node, ended=[node, code])

    def _note_lost(self, node: int, what: str) -> None:
        if node not in self.lost:
            self.lost[node] = what
            if self.node == 0:
                self._pass_on(node, lost=[node, what])

    def _pass_on(self, node: int, **message: Any) -> None:
        """To all but the one that it is about."""
        for other, connection in self.connections.items():
            if other != node:
                connection.say(**message)
