"""Connection between two machines' launchers: one JSON object per line, and heartbeats."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

HEARTBEAT_SECONDS = 1.0
"""Seconds between heartbeats."""
MAX_LINE_BYTES = 64 << 20
"""Largest line, in bytes."""


class Connection:
    """One end of a connection. `last_received` is the time of the last message, heartbeats included."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self.last_received = time.monotonic()

    @property
    def own_address(self) -> str:
        """This machine's address, as the other machine reaches it."""
        address: str = self._writer.get_extra_info("sockname")[0]
        return address

    @property
    def closed(self) -> bool:
        """True if the other end has closed the connection."""
        return self._reader.at_eof() or self._writer.is_closing()

    def send(self, **message: Any) -> None:
        """Send without waiting; on a broken link the message stays in a buffer."""
        if not self._writer.is_closing():
            self._writer.write(json.dumps(message).encode() + b"\n")

    async def receive(self, seconds: float | None = None) -> dict[str, Any] | None:
        """Next message that is not a heartbeat; None if the other end has closed.

        Raises:
            TimeoutError: no message within `seconds`.
        """
        async with asyncio.timeout(seconds):
            while True:
                try:
                    line = await self._reader.readline()
                except OSError:
                    return None
                if not line.endswith(b"\n"):
                    return None
                self.last_received = time.monotonic()
                message: dict[str, Any] = json.loads(line)
                if message:
                    return message

    async def send_heartbeats(self) -> None:
        """Send heartbeats until cancelled."""
        while True:
            self.send()
            await asyncio.sleep(HEARTBEAT_SECONDS)

    async def close(self, seconds: float = 1.0) -> None:
        """Flush the buffer, for at most `seconds`, and close."""
        try:
            async with asyncio.timeout(seconds):
                await self._writer.drain()
                self._writer.close()
                await self._writer.wait_closed()
        except (OSError, TimeoutError):
            self._writer.transport.abort()
