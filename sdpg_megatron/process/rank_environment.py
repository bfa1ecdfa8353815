"""Rank, world size and rendezvous address, from the environment variables that torchrun sets."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from sdpg_megatron.errors import LaunchError

SLURM_FIX = (
    "under srun: export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID, and MASTER_ADDR and "
    "MASTER_PORT alike on all ranks"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankEnvironment:
    """One rank of a job. A process without these variables is a job of one rank."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Index among the ranks of this machine, and of its GPU."""
    local_world_size: int | None = None
    """Ranks on this machine; None if the launcher does not set it."""
    master_addr: str = ""
    """Host of rank 0's store, or of torchrun's; empty for a job of one rank."""
    master_port: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ) -> RankEnvironment:
        """Parse RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

        Raises:
            LaunchError: one of them is missing, not a number, or contradicts another.
        """
        rank, world_size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE", least=1)
        local_rank = _number(environment, "LOCAL_RANK")
        local_world_size = _number(environment, "LOCAL_WORLD_SIZE", least=1)
        if (world_size or 1) == 1 and not rank:
            return cls(local_rank=local_rank or 0, local_world_size=local_world_size)
        if rank is None or world_size is None:
            set_one, missing = ("RANK", "WORLD_SIZE") if world_size is None else ("WORLD_SIZE", "RANK")
            found = f"none, with {set_one}={environment[set_one]}"
            raise LaunchError(missing, found, "both or neither", _fix(environment))
        if rank >= world_size:
            expected = f"a number below WORLD_SIZE ({world_size})"
            raise LaunchError("RANK", str(rank), expected, f"number the ranks from 0 to {world_size - 1}")
        return cls(
            rank=rank,
            world_size=world_size,
            local_rank=local_rank or 0,
            local_world_size=local_world_size,
            master_addr=_master_addr(environment),
            master_port=_master_port(environment),
        )


def _number(environment: Mapping[str, str], name: str, *, least: int = 0) -> int | None:
    """Value of an environment variable; None if it is unset or empty."""
    if not (text := environment.get(name, "")):
        return None
    if not (text.isascii() and text.isdigit()) or int(text) < least:
        expected = f"a whole number of at least {least}"
        raise LaunchError(name, repr(text), expected, f"unset it, or start the ranks with torchrun; {SLURM_FIX}")
    return int(text)


def _master_addr(environment: Mapping[str, str]) -> str:
    address = environment.get("MASTER_ADDR", "").strip()
    if not address:
        expected = "the address of rank 0's machine"
        raise LaunchError("MASTER_ADDR", "none, with WORLD_SIZE over 1", expected, _fix(environment))
    return address


def _master_port(environment: Mapping[str, str]) -> int:
    port = _number(environment, "MASTER_PORT", least=1)
    if port is None:
        expected = "a free port of rank 0's machine"
        raise LaunchError("MASTER_PORT", "none, with WORLD_SIZE over 1", expected, _fix(environment))
    if port > 65535:
        raise LaunchError("MASTER_PORT", str(port), "a port from 1 to 65535", "choose another, the same on all ranks")
    return port


def _fix(environment: Mapping[str, str]) -> str:
    if "SLURM_PROCID" in environment:
        return SLURM_FIX
    fix = "start the ranks with torchrun or scripts/launch.sh, or export RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and "
    return f"{fix}MASTER_PORT for each of them; unset all of them for a single process"


def name_ranks(ranks: Collection[int]) -> str:
    """Format ranks as spans: ``rank 2``, ``ranks 0-3, 7``."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][-1] + 1:
            spans[-1][1:] = [rank]
        else:
            spans.append([rank])
    return ("ranks " if len(ranks) != 1 else "rank ") + ", ".join("-".join(map(str, span)) for span in spans)
