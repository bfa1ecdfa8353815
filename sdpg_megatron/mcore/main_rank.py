"""Run a function on the main rank and share its result or error with all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from sdpg_megatron.errors import SdpgError
from sdpg_megatron.mcore.parallel import ParallelState

T = TypeVar("T")


def on_main(ranks: ParallelState, act: Callable[[], T]) -> T:
    """Call `act` on the main rank only, and return its result on every rank. Collective over all ranks.

    Raises:
        SdpgError: on every rank, if `act` raised it. Any other error is raised on the main rank only.
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
