"""Liveness of a run's launchers: heartbeats, exit codes and stop requests.

Machine 0 is connected to all others and relays their messages. torchrun has no such monitor: if a machine or its link
fails, the other ranks wait in a collective until `parallel.timeout`.
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

CLEAN_EXITS = (0, STOPPED)
"""Exit codes of a machine with ranks that ended normally."""
FAILED_GRACE = 15.0
"""Seconds for ranks to end by themselves, and to report the error, after another machine's ranks have failed."""
CLEAN_GRACE = 300.0
"""Seconds for ranks to end by themselves after another machine's ranks have ended normally."""


@dataclass(slots=True)
class Liveness:
    """State of the other machines, as this machine knows it."""

    node: int
    plan: LaunchPlan
    connections: Mapping[int, Connection]
    lost_seconds: float
    ended: dict[int, int] = field(default_factory=dict)
    """Exit codes of the machines that have ended."""
    lost: dict[int, str] = field(default_factory=dict)
    """Machines that are unreachable, with the reason."""
    stop_signal: int | None = None
    """First signal of a machine without ranks: a request to stop the run."""
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)
    _since: float | None = None

    def start(self) -> None:
        for node, connection in self.connections.items():
            connection.last_received = time.monotonic()
            self._tasks += [
                asyncio.create_task(connection.send_heartbeats()),
                asyncio.create_task(self._listen(node, connection)),
            ]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def end(self, code: int) -> None:
        """Report this machine's exit code to the others."""
        self._note_end(self.node, code)

    def stop(self, number: int) -> None:
        """Forward a stop signal to machine 0."""
        for connection in self.connections.values():
            connection.send(stop=number)

    def abort_reason(self) -> tuple[str, int] | None:
        """Reason why this machine's ranks have to end now, and the exit code; None while they need not."""
        for node, connection in self.connections.items():
            if node not in self.ended and node not in self.lost:
                silence = time.monotonic() - connection.last_received
                if silence > self.lost_seconds:
                    reason = f"has sent no heartbeat for {silence:.0f} s: it hangs, or the link to it is cut"
                    self._note_lost(node, reason)
        for node, reason in self.lost.items():
            return f"{self.plan.machines[node]} {reason}", 1
        for node, code in self.ended.items():
            if node != self.node and (code not in CLEAN_EXITS or node in self.plan.trainers):
                self._since = self._since or time.monotonic()
                if time.monotonic() - self._since > (CLEAN_GRACE if code in CLEAN_EXITS else FAILED_GRACE):
                    return f"{self.plan.machines[node]} ended with exit code {code}", code if code in CLEAN_EXITS else 1
        return None

    def trainers_code(self) -> int | None:
        """Joint exit code of the machines with ranks; None while one of them still runs."""
        codes = [self.ended.get(node) for node in self.plan.trainers]
        if bad := [code for code in codes if code not in (None, *CLEAN_EXITS)]:
            return bad[0]
        return None if None in codes else max(code or 0 for code in codes)

    @property
    def complete(self) -> bool:
        """True if all connected machines have ended or are lost."""
        return all(node in self.ended or node in self.lost for node in self.connections)

    async def _listen(self, node: int, connection: Connection) -> None:
        while (message := await connection.receive()) is not None:
            if "ended" in message:
                self._note_end(*message["ended"])
            elif "lost" in message:
                self._note_lost(*message["lost"])
            elif "stop" in message:
                self.stop_signal = self.stop_signal or message["stop"]
        if node not in self.ended:
            self._note_lost(node, "closed its connection: its launcher, or the machine, ended without an exit code")

    def _note_end(self, node: int, code: int) -> None:
        self.ended[node] = code
        if self.node in (0, node):
            self._pass_on(node, ended=[node, code])

    def _note_lost(self, node: int, reason: str) -> None:
        if node not in self.lost:
            self.lost[node] = reason
            if self.node == 0:
                self._pass_on(node, lost=[node, reason])

    def _pass_on(self, node: int, **message: Any) -> None:
        """Send to all machines except `node`."""
        for other, connection in self.connections.items():
            if other != node:
                connection.send(**message)
