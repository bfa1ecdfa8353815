"""A connection between two machines' launchers: one JSON object a line, and signs of life."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

BEAT = 1.0
"""Seconds between signs of life."""
LIMIT = 64 << 20
"""Bytes of a line, at most."""


class Connection:
    """One end of it. `heard` is when the other end last said anything."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self.heard = time.monotonic()

    @property
    def own_address(self) -> str:
        """This machine's address, as the other reaches it."""
        address: str = self._writer.get_extra_info("sockname")[0]
        return address

    @property
    def gone(self) -> bool:
        """Whether the other end has hung up."""
        return self._reader.at_eof() or self._writer.is_closing()

    def say(self, **message: Any) -> None:
        """Send without waiting: where the link is cut it stays in a buffer."""
        if not self._writer.is_closing():
            self._writer.write(json.dumps(message).encode() + b"\n")

    async def hear(self, seconds: float | None = None) -> dict[str, Any] | None:
        """The next message that is no sign of life; None where the other end is gone.

        Raises:
            TimeoutError: there was none in `seconds`.
        """
        async with asyncio.timeout(seconds):
            while True:
                try:
                    connection = await self._reader.readline()
                except OSError:
                    return None
                if not connection.endswith(b"\n"):
                    return None
                self.heard = time.monotonic()
                message: dict[str, Any] = json.loads(connection)
                if message:
                    return message

    async def beat(self) -> None:
        """Give signs of life until cancelled."""
        while True:
            self.say()
            await asyncio.sleep(BEAT)

    async def close(self, seconds: float = 1.0) -> None:
        """Send what is in the buffer, if that is possible in `seconds`, and hang up."""
        try:
            async with asyncio.timeout(seconds):
                await self._writer.drain()
                self._writer.close()
                await self._writer.wait_closed()
        except (OSError, TimeoutError):
            self._writer.transport.abort()
