"""Statistics of rows over several sets of columns become one: tiles of a shard, then shards of the vocabulary.

The symbols are those of `tile`. Shapes: C rows, R disjoint sets of columns, K = 4 statistics (m, S, B, y), or 8 with a
teacher (n, U, x, D).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from sdpg_megatron.head.tile import Gap

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""torch 2.13 gave the older of the two this name."""
STUDENT, TAUGHT = 4, 8
"""Statistics of a row without and with a teacher."""


@dataclass(frozen=True, slots=True)
class StudentSums:
    """m, S, B and y of some rows over the whole vocabulary, each float64 [C], and what follows from them at once."""

    max: Tensor
    sum: Tensor
    spread: Tensor
    label: Tensor

    @classmethod
    def of(cls, sums_KC: Tensor) -> StudentSums:
        return cls(*sums_KC[:STUDENT].unbind(0))

    @property
    def logprob(self) -> Tensor:
        """log p(y) = y - m - ln S."""
        return self.label - self.max - self.sum.log()

    @property
    def entropy(self) -> Tensor:
        """H = ln S - B / S."""
        return self.sum.log() - self.spread / self.sum


@dataclass(frozen=True, slots=True)
class TeacherSums:
    """n, U, x and D, likewise."""

    max: Tensor
    sum: Tensor
    label: Tensor
    gap: Tensor

    @classmethod
    def of(cls, sums_KC: Tensor) -> TeacherSums:
        return cls(*sums_KC[STUDENT:TAUGHT].unbind(0))

    @property
    def logprob(self) -> Tensor:
        """log q(y) = x - n - ln U."""
        return self.label - self.max - self.sum.log()


def join(parts_RKC: Tensor, gap: Gap) -> Tensor:
    """Bring statistics to their common maxima and add them up: [K, C]."""
    max_RC, sum_RC, spread_RC, label_RC = parts_RKC[:, :STUDENT].unbind(1)
    max_C = max_RC.amax(0)
    shift_RC = max_RC - max_C
    scale_RC = shift_RC.exp()
    joined = [
        max_C,
        (scale_RC * sum_RC).sum(0),
        (scale_RC * (spread_RC + sum_RC * shift_RC)).sum(0),
        label_RC.amax(0),
    ]
    if parts_RKC.shape[1] > STUDENT:
        top_RC, drawn_RC, chosen_RC, gap_RC = parts_RKC[:, STUDENT:].unbind(1)
        top_C = top_RC.amax(0)
        lower_RC = top_RC - top_C
        joined += [top_C, (lower_RC.exp() * drawn_RC).sum(0), chosen_RC.amax(0)]
        match gap:
            case Gap.STUDENT:
                joined.append(_moved(gap_RC + sum_RC * (shift_RC - lower_RC), scale_RC))
            case Gap.TEACHER:
                joined.append(_moved(gap_RC + drawn_RC * (lower_RC - shift_RC), lower_RC.exp()))
            case Gap.NONE:
                joined.append(gap_RC.sum(0))
    return torch.stack(joined)


def _moved(gap_RC: Tensor, scale_RC: Tensor) -> Tensor:
    # A set of columns whose weights all vanish beside another's adds 0, even if its own gap is infinite.
    return (scale_RC * gap_RC).masked_fill(scale_RC == 0, 0).sum(0)


def gather(packed_NC: Tensor, group: ProcessGroup | None) -> Tensor:
    """Every rank's rows of numbers, in rank order: [R, N, C]. One collective; each rank then sees the same bits."""
    if group is None or group.size() == 1:
        return packed_NC[None]
    gathered = packed_NC.new_empty(group.size() * packed_NC.numel())
    _all_gather(gathered, packed_NC.contiguous().view(-1), group=group)
    return gathered.view(group.size(), *packed_NC.shape)
