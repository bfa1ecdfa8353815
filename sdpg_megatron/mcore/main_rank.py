"""What the main rank does for all of them, such as writing a file: all learn what came of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from sdpg_megatron.errors import SdpgError
from sdpg_megatron.mcore.parallel import ParallelState

T = TypeVar("T")


def on_main(ranks: ParallelState, act: Callable[[], T]) -> T:
    """What `act` returns or raises on the main rank, on every rank. It is called there alone; every rank calls this.

    Raises:
        SdpgError: what `act` raised. Any other error stays with the main rank, which it ends.
    """
    answer: T | SdpgError | None = None
    if ranks.is_main:
        try:
            answer = act()
        except SdpgError as error:
            answer = error
    shared = ranks.gather_all(answer)[0]
    if isinstance(shared, SdpgError):
        raise shared
    return shared  # type: ignore[return-value]  # None only where `act` returned it
