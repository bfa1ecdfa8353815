"""Join the statistics of rows over disjoint sets of columns: tiles of a shard, then shards of the vocabulary.

Symbols: see `tile`. Shapes: C rows, R disjoint sets of columns, P distributions (student, or student and teacher),
K = 4 P statistics: (m, S, B, y) of the student, (n, U, D, x) of the teacher; N numbers per row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from sdpg_megatron.head.tile import WeightedLogRatio

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""torch 2.13 renamed `all_gather_into_tensor` to `all_gather_single`."""
NUM_STUDENT_SUMS, NUM_SUMS_WITH_TEACHER = 4, 8
"""Number of statistics of a row without and with a teacher."""


@dataclass(frozen=True, slots=True)
class StudentSums:
    """m, S, B, y and ln S of rows over the whole vocabulary, each float64 [C]."""

    max: Tensor
    sum: Tensor
    weighted_logit_sum: Tensor
    label: Tensor
    log_sum: Tensor

    @classmethod
    def of(cls, sums_KC: Tensor) -> StudentSums:
        return cls(*sums_KC[:NUM_STUDENT_SUMS].unbind(0), *sums_KC[1:2].log())

    @property
    def logprob(self) -> Tensor:
        """log p(y) = y - m - ln S."""
        return self.label - self.max - self.log_sum

    @property
    def entropy(self) -> Tensor:
        """H = ln S - B / S."""
        return self.log_sum - self.weighted_logit_sum / self.sum


@dataclass(frozen=True, slots=True)
class TeacherSums:
    """n, U, D, x and ln U of rows over the whole vocabulary, each float64 [C]."""

    max: Tensor
    sum: Tensor
    weighted_log_ratio: Tensor
    label: Tensor
    log_sum: Tensor

    @classmethod
    def of(cls, sums_KC: Tensor) -> TeacherSums:
        return cls(
            *sums_KC[NUM_STUDENT_SUMS:NUM_SUMS_WITH_TEACHER].unbind(0),
            *sums_KC[NUM_STUDENT_SUMS + 1 : NUM_STUDENT_SUMS + 2].log(),
        )

    @property
    def logprob(self) -> Tensor:
        """log q(y) = x - n - ln U."""
        return self.label - self.max - self.log_sum


def join(parts_RKC: Tensor, weighted_log_ratio: WeightedLogRatio) -> Tensor:
    """Rescale statistics to their common maxima and add them: [K, C]. A single set of columns is returned unchanged."""
    if parts_RKC.shape[0] == 1:
        return parts_RKC[0]
    ranks, kinds, size = parts_RKC.shape
    max_RPC, sum_RPC, moment_RPC, label_RPC = parts_RKC.reshape(
        ranks, kinds // NUM_STUDENT_SUMS, NUM_STUDENT_SUMS, size
    ).unbind(2)
    max_PC = max_RPC.amax(0)
    shift_RPC = max_RPC - max_PC
    scale_RPC = shift_RPC.exp()
    joined_4PC = [max_PC, (scale_RPC * sum_RPC).sum(0), torch.empty_like(max_PC), label_RPC.amax(0)]
    joined_4PC[2][0] = (scale_RPC[:, 0] * (moment_RPC[:, 0] + sum_RPC[:, 0] * shift_RPC[:, 0])).sum(0)
    if max_RPC.shape[1] == 2:
        joined_4PC[2][1] = _join_log_ratio(sum_RPC, moment_RPC[:, 1], shift_RPC, scale_RPC, weighted_log_ratio)
    return torch.stack(joined_4PC, 1).flatten(0, 1)


def _join_log_ratio(
    sum_RPC: Tensor, log_ratio_RC: Tensor, shift_RPC: Tensor, scale_RPC: Tensor, weighted_log_ratio: WeightedLogRatio
) -> Tensor:
    """D over all sets of columns. A set whose weights all underflow adds 0, even if its D is infinite."""
    if weighted_log_ratio is WeightedLogRatio.NONE:
        return log_ratio_RC.sum(0)
    weighs, other = (0, 1) if weighted_log_ratio is WeightedLogRatio.STUDENT else (1, 0)
    apart_RC = shift_RPC[:, weighs] - shift_RPC[:, other]
    moved_RC = scale_RPC[:, weighs] * (log_ratio_RC + sum_RPC[:, weighs] * apart_RC)
    return moved_RC.masked_fill(scale_RPC[:, weighs] == 0, 0).sum(0)


def gather(packed_NC: Tensor, group: ProcessGroup | None) -> Tensor:
    """Gather the numbers of all ranks in rank order: [R, N, C], bit-identical on all ranks. One collective."""
    if group is None or group.size() == 1:
        return packed_NC[None]
    gathered = packed_NC.new_empty(group.size() * packed_NC.numel())
    _all_gather(gathered, packed_NC.contiguous().view(-1), group=group)
    return gathered.view(group.size(), *packed_NC.shape)
