"""Status of the ranks, and detection of the ranks that block the others."""

from __future__ import annotations

import itertools
import os
import socket
import sys
import threading
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from sdpg_megatron.process.rank_environment import name_ranks

PACKAGE = str(Path(__file__).parents[1])
INTERPOSED = ("__torch_function__",)
"""Functions that wrap others; they do not identify a call."""
COLLECTIVES = os.path.join("torch", "distributed")


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStatus:
    """Status that a rank published."""

    sequence: int
    """Number of the heartbeat."""
    phase: str
    number: int
    """Phases entered so far. All ranks enter the same phases."""
    seconds: float
    """Seconds in the phase."""
    place: str
    """Position of the main thread in the code."""
    waits: bool
    """True in a collective."""
    process: str
    ended: str = ""
    """Empty while the rank runs, else "done" or its error."""


def locate_main_thread() -> tuple[str, bool]:
    """Position of this process's main thread in the code, and True if it is in a collective."""
    innermost = sys._current_frames().get(threading.main_thread().ident or 0)
    frames = [frame for frame in _outwards(innermost) if frame.f_code.co_name not in INTERPOSED]
    own = next((f for f in frames if f.f_code.co_filename.startswith(PACKAGE)), None)
    shown = list(dict.fromkeys(f for f in (own, *frames[:1]) if f is not None))
    return ", in ".join(map(_show, shown)), any(COLLECTIVES in f.f_code.co_filename for f in frames)


def _outwards(frame: FrameType | None) -> Iterable[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _show(frame: FrameType) -> str:
    return f"{frame.f_code.co_qualname} ({os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno})"


def this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def find_missing(states: Mapping[int, RankStatus], silent: Collection[int]) -> list[int]:
    """Ranks that the others wait for; empty if undetermined.

    These are the silent ranks; if there are none, the ranks that have not reached the phase of the others; if there are
    none, the ranks outside of collectives while others are in one.
    """
    if silent:
        return sorted(silent)
    last = max(state.number for state in states.values())
    if behind := [rank for rank, state in states.items() if state.number < last]:
        return sorted(behind)
    busy = [rank for rank, state in states.items() if not state.waits and not state.ended]
    return sorted(busy) if len(busy) < len(states) else []


def describe(states: Mapping[int, RankStatus], silent: Mapping[int, float]) -> str:
    """Format a line for the missing ranks, one for each of them, and one for each position of other ranks.

    Args:
        silent: ranks without a heartbeat, with the seconds since their last one.
    """
    if not states:
        return "nothing is known of the ranks"
    silent = {rank: seconds for rank, seconds in silent.items() if rank in states}
    missing = find_missing(states, silent)
    lines = [f"missing: {name_ranks(missing)}" if missing else "missing: undetermined, all ranks are at the same point"]
    for rank in missing:
        quiet = f"; silent for {silent[rank]:.0f} s, last known status" if rank in silent else ""
        lines.append(f"  rank {rank} ({states[rank].process}{quiet}): {_doing(states[rank])}")
    others = sorted(states.keys() - set(missing), key=lambda rank: (_doing(states[rank]), rank))
    for doing, alike in itertools.groupby(others, lambda rank: _doing(states[rank])):
        lines.append(f"  {name_ranks(list(alike))}: {doing}")
    return "\n".join(lines)


def _doing(state: RankStatus) -> str:
    if state.ended:
        return f"ended in {state.phase}: {state.ended}"
    how = "in a collective" if state.waits else "in no collective"
    return f"{state.phase} for {state.seconds:.0f} s, {how}: {state.place}"
