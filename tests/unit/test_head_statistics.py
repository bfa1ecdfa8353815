"""Joining statistics of column sets: any cut of the vocabulary says the same."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from sdpg_megatron.head import tile
from sdpg_megatron.head.statistics import (
    NUM_STUDENT_SUMS,
    NUM_SUMS_WITH_TEACHER,
    StudentSums,
    TeacherSums,
    gather,
    join,
)
from sdpg_megatron.head.tile import WeightedLogRatio

EXACT = {"rtol": 1e-12, "atol": 1e-12}
CUTS = [[0, 9], [0, 4, 9], [0, 0, 3, 3, 8, 9, 9], [*range(10)]]

both_weights = pytest.mark.parametrize("weighted_log_ratio", [WeightedLogRatio.STUDENT, WeightedLogRatio.TEACHER])
cuts = pytest.mark.parametrize("bounds", CUTS)


def sums(
    student_CV: Tensor,
    teacher_CV: Tensor | None,
    labels_C: Tensor,
    bounds: list[int],
    weighted_log_ratio: WeightedLogRatio,
) -> Tensor:
    """Measure each run of columns between bounds on its own, then join."""
    parts = [
        tile.measure(
            student_CV[:, low:high],
            None if teacher_CV is None else teacher_CV[:, low:high],
            labels_C - low,
            weighted_log_ratio,
            masked=True,
        )
        for low, high in pairwise(bounds)
    ]
    return join(torch.stack(parts), weighted_log_ratio)


def random_logits(seed: int = 0, scale: float = 10.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student_CV, teacher_CV = scale * torch.randn(2, 3, 9, generator=generator, dtype=torch.float64)
    return student_CV, teacher_CV, torch.tensor([0, 4, 8])


@both_weights
@cuts
def test_any_cut_of_the_columns(bounds: list[int], weighted_log_ratio: WeightedLogRatio) -> None:
    student_CV, teacher_CV, labels_C = random_logits()
    found_KC = sums(student_CV, teacher_CV, labels_C, bounds, weighted_log_ratio)
    assert found_KC.shape == (NUM_SUMS_WITH_TEACHER, 3) and found_KC.dtype == torch.float64
    student, teacher = StudentSums.of(found_KC), TeacherSums.of(found_KC)
    logp_CV, logq_CV = student_CV.log_softmax(1), teacher_CV.log_softmax(1)
    every_C = torch.arange(3)
    assert_close(student.logprob, logp_CV[every_C, labels_C], **EXACT)
    assert_close(student.entropy, -(logp_CV.exp() * logp_CV).sum(1), **EXACT)
    assert_close(teacher.logprob, logq_CV[every_C, labels_C], **EXACT)
    # D is of log-weights: what they lack to log-probs is a constant of the row.
    if weighted_log_ratio is WeightedLogRatio.STUDENT:
        kl_C = teacher.weighted_log_ratio / student.sum - student.sum.log() + teacher.sum.log()
        assert_close(kl_C, (logp_CV.exp() * (logp_CV - logq_CV)).sum(1), **EXACT)
    else:
        kl_C = teacher.weighted_log_ratio / teacher.sum - teacher.sum.log() + student.sum.log()
        assert_close(kl_C, (logq_CV.exp() * (logq_CV - logp_CV)).sum(1), **EXACT)


@cuts
def test_a_student_alone_has_the_same_sums(bounds: list[int]) -> None:
    student_CV, teacher_CV, labels_C = random_logits()
    alone_KC = sums(student_CV, None, labels_C, bounds, WeightedLogRatio.NONE)
    assert alone_KC.shape == (NUM_STUDENT_SUMS, 3)
    assert torch.equal(
        alone_KC, sums(student_CV, teacher_CV, labels_C, bounds, WeightedLogRatio.STUDENT)[:NUM_STUDENT_SUMS]
    )


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    st.integers(0, 2**20),
    st.sampled_from([1.0, 30.0, 3000.0]),
    st.lists(st.integers(0, 9), max_size=8).map(lambda inner: [0, *sorted(inner), 9]),
    st.sampled_from([WeightedLogRatio.STUDENT, WeightedLogRatio.TEACHER]),
)
def test_joining_is_the_same_in_any_steps(
    seed: int, scale: float, bounds: list[int], weighted_log_ratio: WeightedLogRatio
) -> None:
    """Also of what was joined before, as tiles are and then shards."""
    student_CV, teacher_CV, labels_C = random_logits(seed, scale)
    whole_KC = sums(student_CV, teacher_CV, labels_C, [0, 9], weighted_log_ratio)
    middle = len(bounds) // 2
    halves = [
        sums(student_CV, teacher_CV, labels_C, part, weighted_log_ratio)
        for part in (bounds[: middle + 1], [*bounds[middle:], 9])
    ]
    for found_KC in (
        sums(student_CV, teacher_CV, labels_C, bounds, weighted_log_ratio),
        join(torch.stack(halves), weighted_log_ratio),
    ):
        assert_close(found_KC, whole_KC, rtol=1e-11, atol=1e-11)


@both_weights
def test_columns_without_weight_contribute_nothing_whatever_the_other_side_says(
    weighted_log_ratio: WeightedLogRatio,
) -> None:
    """Within its own columns the third token has weight and the other side's none; in the whole neither has."""
    one_CV = torch.tensor([[0.0, 1.0, -5000.0, -5001.0]], dtype=torch.float64)
    other_CV = torch.tensor([[1.0, 0.0, -torch.inf, -3.0]], dtype=torch.float64)
    student_CV, teacher_CV = (
        (one_CV, other_CV) if weighted_log_ratio is WeightedLogRatio.STUDENT else (other_CV, one_CV)
    )
    labels_C = torch.zeros(1, dtype=torch.int64)
    whole_KC = sums(student_CV, teacher_CV, labels_C, [0, 4], weighted_log_ratio)
    cut_KC = sums(student_CV, teacher_CV, labels_C, [0, 2, 4], weighted_log_ratio)
    assert whole_KC.isfinite().all()
    assert_close(cut_KC, whole_KC, rtol=1e-14, atol=1e-14)


@both_weights
def test_a_weight_that_the_other_side_lacks_makes_the_gap_infinite(weighted_log_ratio: WeightedLogRatio) -> None:
    one_CV = torch.tensor([[0.0, 1.0, -3.0, 2.0]], dtype=torch.float64)
    other_CV = torch.tensor([[1.0, 0.0, -torch.inf, -3.0]], dtype=torch.float64)
    student_CV, teacher_CV = (
        (one_CV, other_CV) if weighted_log_ratio is WeightedLogRatio.STUDENT else (other_CV, one_CV)
    )
    for bounds in ([0, 4], [0, 2, 4], [0, 2, 3, 4], [0, 0, 1, 2, 3, 4]):
        found_KC = sums(student_CV, teacher_CV, torch.zeros(1, dtype=torch.int64), bounds, weighted_log_ratio)
        others_KC = torch.cat((found_KC[: NUM_SUMS_WITH_TEACHER - 2], found_KC[NUM_SUMS_WITH_TEACHER - 1 :]))
        assert found_KC[NUM_SUMS_WITH_TEACHER - 2] == torch.inf and others_KC.isfinite().all()


def test_nobody_else_is_asked_without_a_group() -> None:
    packed_NC = torch.randn(5, 3)
    assert torch.equal(gather(packed_NC, None), packed_NC[None])
