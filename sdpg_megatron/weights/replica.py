"""Placement of one model copy's parameters over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from sdpg_megatron.weights.map import ExpertShare, Parameter, Shape

T = TypeVar("T")
Owned = dict[str, tuple[Shape, torch.dtype]]
"""Shape and type of a rank's parameters, by name."""


@dataclass(frozen=True, slots=True)
class Replica:
    """This rank's place in the ranks of one model copy. A group of None means this rank alone.

    A stage's tensor-parallel group and its expert group have the same first rank. An expert group may span several
    tensor-parallel groups; only the first of these sends.
    """

    tp_group: dist.ProcessGroup | None
    pp_group: dist.ProcessGroup | None
    expert_group: dist.ProcessGroup | None
    expert_tensor: int
    device: torch.device

    @property
    def tp_rank(self) -> int:
        return 0 if self.tp_group is None else self.tp_group.rank()

    @property
    def tp_size(self) -> int:
        return 1 if self.tp_group is None else self.tp_group.size()

    @property
    def expert_rank(self) -> int:
        return 0 if self.expert_group is None else self.expert_group.rank()

    @property
    def expert_size(self) -> int:
        return 1 if self.expert_group is None else self.expert_group.size()

    @property
    def stage(self) -> int:
        return 0 if self.pp_group is None else self.pp_group.rank()

    @property
    def is_first(self) -> bool:
        """True on the rank that gathers the stage's shards."""
        return self.tp_rank == 0 and self.expert_rank == 0

    @property
    def leads(self) -> bool:
        return self.stage == 0 and self.is_first

    def share(self, position: int) -> ExpertShare:
        """The experts of one rank of the expert group."""
        tensor = self.expert_tensor
        return ExpertShare(position // tensor, self.expert_size // tensor, position % tensor, tensor)

    def gather_group(self, parameter: Parameter) -> tuple[dist.ProcessGroup | None, int, range]:
        """(group, this rank in it, ranks that hold the parameter's shards); no ranks if this one takes no part."""
        if parameter.expert is None:
            concerned = self.expert_rank < self.tp_size
            holders = range(self.tp_size if parameter.layout.sharded else 1)
            return self.tp_group, self.tp_rank, holders if concerned else range(0)
        assert parameter.arch.experts is not None
        first = self.expert_tensor * self.share(0).owner(parameter.expert, parameter.arch.experts.count)
        concerned = self.tp_rank < self.expert_size
        holders = range(first, first + self.expert_tensor)
        return self.expert_group, self.expert_rank, holders if concerned else range(0)

    def wait(self) -> None:
        """Synchronize. NCCL only enqueues: a stage ahead of the leader would keep all that it has sent."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def gather(self, owned: Owned) -> list[list[Owned]]:
        """The parameters of each rank of the expert group, by pipeline stage."""
        stages = _gather(owned, self.pp_group)
        return [list(stage) for stage in zip(*_gather(stages, self.expert_group), strict=True)]


def _gather(value: T, group: dist.ProcessGroup | None) -> list[T]:
    if group is None:
        return [value]
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values
