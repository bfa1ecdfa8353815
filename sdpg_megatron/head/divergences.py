"""Divergences of the student's p from the teacher's q: per-token values and gradient coefficients.

Symbols: see `tile`. With phi = d divergence / d p, the gradient in the student's logits over temperature is
``p_v (phi_v - sum p phi)``. `grad_coefficients` expresses it as row coefficients of `tile`.

Shapes: C rows, k top tokens, n = k + 1 outcomes, N extra numbers per row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

from sdpg_megatron.head.statistics import StudentSums, TeacherSums
from sdpg_megatron.head.tile import WeightedLogRatio


class Form(Enum):
    """Formula by which `rows_triton` computes a divergence's value and `GradCoefficients` in one kernel."""

    NONE = 0
    """No kernel formula: `value` and `grad_coefficients` are called instead."""
    REVERSE_KL = 1
    FORWARD_KL = 2
    JENSEN_SHANNON = 3
    SAMPLED_TOKEN = 4


@dataclass(frozen=True, slots=True)
class GradCoefficients:
    """Contribution of one term to `tile.RowCoefficients`, each float64 [C]; None for zero."""

    constant: Tensor
    label: Tensor | None = None
    student: Tensor | None = None
    teacher: Tensor | None = None
    teacher_weight: Tensor | None = None
    mixture: Tensor | None = None
    top_Ck: Tensor | None = None
    """float64 [C, k], added at the columns of the top tokens."""


class Divergence(Protocol):
    """A divergence computed per row from sums over the whole vocabulary."""

    @property
    def form(self) -> Form:
        """Kernel formula of `rows_triton` for `value` and `grad_coefficients`."""
        ...

    @property
    def weighted_log_ratio(self) -> WeightedLogRatio:
        """Definition of D (see `tile`) that it reads."""
        ...

    @property
    def top(self) -> int:
        """Number of the student's top tokens that it reads. If not 0, `extra_NC` is `TopTokens.packed`."""
        ...

    @property
    def student_mix(self) -> float | None:
        """The student's weight in the mixture M, or None. If set, `extra_NC` is KL(p || M) and KL(q || M)."""
        ...

    def value(self, student: StudentSums, teacher: TeacherSums, extra_NC: Tensor) -> Tensor:
        """Divergence in nats, float64 [C]."""
        ...

    def grad_coefficients(
        self, student: StudentSums, teacher: TeacherSums, extra_NC: Tensor, upstream_C: Tensor
    ) -> GradCoefficients:
        """Coefficients of the logit gradient for an upstream gradient, float64 [C]."""
        ...


@dataclass(frozen=True, slots=True)
class TopTokens:
    """The student's k largest logits, the teacher's logits of the same tokens, and their token ids."""

    student_Ck: Tensor
    teacher_Ck: Tensor
    token_Ck: Tensor

    def best(self, k: int, *, padded: bool = False) -> TopTokens:
        """Select the k largest per row in their present order; ties go to the first. All of them if there are fewer.

        The positions are counted with cumulative sums, so the host does not synchronize with the device.

        Args:
            padded: entries may be padding of `packed`, which ranks below tokens with logit -inf.
        """
        columns = self.student_Ck.shape[1]
        if columns <= k:
            return TopTokens(*(part_Cn.clone() for part_Cn in self._parts()))  # they may be views of a tile
        lowest = torch.finfo(self.student_Ck.dtype).min
        found_Cn = self.student_Ck.nan_to_num(nan=torch.inf, neginf=lowest)  # the sums report NaN later
        if padded:
            found_Cn.masked_fill_(self.token_Ck < 0, -torch.inf)
        least_C1 = found_Cn.topk(k, 1).values[:, -1:]
        above_Cn, equal_Cn = found_Cn > least_C1, found_Cn == least_C1
        room_C1 = k - above_Cn.sum(1, keepdim=True)
        kept_Cn = above_Cn | (equal_Cn & (equal_Cn.cumsum(1, dtype=torch.int32) <= room_C1))
        place_Cn = torch.where(kept_Cn, kept_Cn.cumsum(1) - 1, k)  # place k collects the dropped entries
        column_Cn = torch.arange(columns, device=place_Cn.device).expand_as(place_Cn)
        index_Ck = place_Cn.new_empty(place_Cn.shape[0], k + 1).scatter_(1, place_Cn, column_Cn)[:, :k]
        return TopTokens(*(part_Cn.gather(1, index_Ck) for part_Cn in self._parts()))

    def beside(self, other: TopTokens) -> TopTokens:
        """Concatenate the entries of both."""
        pairs = zip(self._parts(), other._parts(), strict=True)
        return TopTokens(*(torch.cat(pair, 1) for pair in pairs))

    def packed(self, k: int) -> Tensor:
        """Pack into float64 [3 k, C], padded with entries of weight 0. Token ids are exact in float64."""
        short = k - self.student_Ck.shape[1]
        fills = (-torch.inf, 0.0, -1.0)
        padded = (
            torch.nn.functional.pad(part_Ck.double(), (0, short), value=fill)
            for part_Ck, fill in zip(self._parts(), fills, strict=True)
        )
        return torch.cat([part_Ck.T for part_Ck in padded])

    @classmethod
    def unpacked(cls, packed_NC: Tensor) -> TopTokens:
        """Inverse of `packed`."""
        return cls(*(part_kC.T for part_kC in packed_NC.chunk(3)))

    @classmethod
    def of_ranks(cls, packed_RNC: Tensor) -> TopTokens:
        """Concatenate the `packed` entries of all ranks in rank order, including padding."""
        ranks, numbers, size = packed_RNC.shape
        parts_3CRk = packed_RNC.reshape(ranks, 3, numbers // 3, size).permute(1, 3, 0, 2)
        return cls(*parts_3CRk.flatten(2))

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.student_Ck, self.teacher_Ck, self.token_Ck


@dataclass(frozen=True, slots=True)
class ReverseKL:
    """KL(p || q) = D/S - ln S + ln U, with phi = log p - log q."""

    form = Form.REVERSE_KL
    weighted_log_ratio = WeightedLogRatio.STUDENT
    top = 0
    student_mix = None

    def value(self, student: StudentSums, teacher: TeacherSums, extra_NC: Tensor) -> Tensor:
        return teacher.weighted_log_ratio / student.sum - student.sum.log() + teacher.sum.log()

    def grad_coefficients(
        self, student: StudentSums, teacher: TeacherSums, extra_NC: Tensor, upstream_C: Tensor
    ) -> GradCoefficients:
        slope_C = upstream_C / student.sum
        return GradCoefficients(-slope_C * teacher.weighted_log_ratio / student.sum, student=slope_C, teacher=-slope_C)

    def over(self, logp_Cn: Tensor, logq_Cn: Tensor) -> tuple[Tensor, Tensor]:
        """Value [C] and phi [C, n] for the log-probs of n outcomes."""
        log_ratio_Cn = logp_Cn - logq_Cn
        return _mean(logp_Cn, log_ratio_Cn), log_ratio_Cn


@dataclass(frozen=True, slots=True)
class ForwardKL:
    """KL(q || p) = D/U - ln U + ln S, with phi = -q / p. Its gradient is p - q."""

    form = Form.FORWARD_KL
    weighted_log_ratio = WeightedLogRatio.TEACHER
    top = 0
    student_mix = None

    def value(self, student: StudentSums, teacher: TeacherSums, extra_NC: Tensor) -> Tensor:
        return teacher.weighted_log_ratio / teacher.sum - teacher.sum.log() + student.sum.log()

    def grad_coefficients(
        self, student: StudentSums, teacher: TeacherSums, extra_NC: Tensor, upstream_C: Tensor
    ) -> GradCoefficients:
        return GradCoefficients(upstream_C / student.sum, teacher_weight=upstream_C / teacher.sum)

    def over(self, logp_Cn: Tensor, logq_Cn: Tensor) -> tuple[Tensor, Tensor]:
        """Value [C] and phi [C, n] for the log-probs of n outcomes."""
        log_ratio_Cn = logq_Cn - logp_Cn
        return _mean(logq_Cn, log_ratio_Cn), -log_ratio_Cn.exp()


@dataclass(frozen=True, slots=True)
class JensenShannon:
    """beta KL(q || M) + (1 - beta) KL(p || M), M = (1 - beta) p + beta q, with phi = (1 - beta) (log p - log M).

    The generalized Jensen-Shannon divergence of arXiv 2306.13649. M needs normalized p and q, hence a second pass over
    the logits and a second collective.
    """

    beta: float = 0.5

    form = Form.JENSEN_SHANNON
    weighted_log_ratio = WeightedLogRatio.NONE
    top = 0

    def __post_init__(self) -> None:
        if not 0 < self.beta < 1:
            raise ValueError(
                f"beta: found {self.beta}, expected 0 < beta < 1. Fix: use ForwardKL or ReverseKL for 0 and 1"
            )

    @property
    def student_mix(self) -> float:
        return 1 - self.beta

    def value(self, student: StudentSums, teacher: TeacherSums, extra_NC: Tensor) -> Tensor:
        return self.student_mix * extra_NC[0] + self.beta * extra_NC[1]

    def grad_coefficients(
        self, student: StudentSums, teacher: TeacherSums, extra_NC: Tensor, upstream_C: Tensor
    ) -> GradCoefficients:
        slope_C = self.student_mix * upstream_C / student.sum
        return GradCoefficients(-slope_C * extra_NC[0], mixture=slope_C)

    def over(self, logp_Cn: Tensor, logq_Cn: Tensor) -> tuple[Tensor, Tensor]:
        """Value [C] and phi [C, n] for the log-probs of n outcomes."""
        logm_Cn = torch.logaddexp(logp_Cn + math.log(self.student_mix), logq_Cn + math.log(self.beta))
        value_C = self.student_mix * _mean(logp_Cn, logp_Cn - logm_Cn) + self.beta * _mean(logq_Cn, logq_Cn - logm_Cn)
        return value_C, self.student_mix * (logp_Cn - logm_Cn)


def _mean(logweight_Cn: Tensor, values_Cn: Tensor) -> Tensor:
    """Mean under a distribution. An outcome of weight 0 adds 0, even if its value is infinite."""
    weight_Cn = logweight_Cn.exp()
    return (weight_Cn * values_Cn).masked_fill(weight_Cn == 0, 0).sum(1)


@dataclass(frozen=True, slots=True)
class SampledToken:
    """log p(y) - log q(y) of the label y: a one-sample estimate of KL(p || q).

    Its gradient is ``(log p(y) - log q(y)) d log p(y)``, the one-sample estimate of the KL's gradient. The derivative
    of the value would be 0 in expectation.
    """

    form = Form.SAMPLED_TOKEN
    weighted_log_ratio = WeightedLogRatio.NONE
    top = 0
    student_mix = None

    def value(self, student: StudentSums, teacher: TeacherSums, extra_NC: Tensor) -> Tensor:
        return student.logprob - teacher.logprob

    def grad_coefficients(
        self, student: StudentSums, teacher: TeacherSums, extra_NC: Tensor, upstream_C: Tensor
    ) -> GradCoefficients:
        label_C = upstream_C * self.value(student, teacher, extra_NC)
        return GradCoefficients(-label_C / student.sum, label=label_C)


TAIL_FLOOR = 1e-7
"""Lower bound of the total probability of the tokens outside the top k. Smaller values vanish in float32 sums."""


@dataclass(frozen=True, slots=True)
class TopK:
    """Divergence over k + 1 outcomes: the student's top-k tokens plus one bucket for the rest (arXiv 2601.20802)."""

    k: int = 100
    over: ReverseKL | ForwardKL | JensenShannon = JensenShannon()

    form = Form.NONE
    weighted_log_ratio = WeightedLogRatio.NONE
    student_mix = None

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k: found {self.k}, expected 1 or more. Fix: 100 is usual")

    @property
    def top(self) -> int:
        return self.k

    def value(self, student: StudentSums, teacher: TeacherSums, extra_NC: Tensor) -> Tensor:
        return self.over.over(*self._outcomes(student, teacher, extra_NC))[0]

    def grad_coefficients(
        self, student: StudentSums, teacher: TeacherSums, extra_NC: Tensor, upstream_C: Tensor
    ) -> GradCoefficients:
        logp_Cn, logq_Cn = self._outcomes(student, teacher, extra_NC)
        slope_Cn = self.over.over(logp_Cn, logq_Cn)[1].nan_to_num(0.0)  # NaN where p and q are both 0
        floored_C = 1 - logp_Cn[:, :-1].exp().sum(1) < TAIL_FLOOR
        slope_Cn[:, -1].masked_fill_(floored_C, 0.0)  # the floor is a constant
        others_C = slope_Cn[:, -1] - _mean(logp_Cn, slope_Cn)
        apart_Ck = slope_Cn[:, :-1] - slope_Cn[:, -1:]
        return GradCoefficients(
            upstream_C * others_C / student.sum, top_Ck=upstream_C[:, None] * logp_Cn[:, :-1].exp() * apart_Ck
        )

    def _outcomes(self, student: StudentSums, teacher: TeacherSums, extra_NC: Tensor) -> tuple[Tensor, Tensor]:
        """log p and log q of the k + 1 outcomes."""
        tokens = TopTokens.unpacked(extra_NC)
        return _outcomes(tokens.student_Ck, student), _outcomes(tokens.teacher_Ck, teacher)


def _outcomes(logits_Ck: Tensor, sums: StudentSums | TeacherSums) -> Tensor:
    logp_Ck = logits_Ck - sums.max[:, None] - sums.sum.log()[:, None]
    tail_C1 = (1 - logp_Ck.exp().sum(1, keepdim=True)).clamp(min=TAIL_FLOOR)
    return torch.cat((logp_Ck, tail_C1.log()), 1)
