"""Joining statistics of column sets: any cut of the vocabulary says the same."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from sdpg_megatron.head.statistics import Terms, join, read, student_statistics, teacher_statistics

ROWS_G = torch.tensor([0, 2])


def terms(student_CV: Tensor, teacher_GV: Tensor, labels_C: Tensor, bounds: list[int]) -> Terms:
    """Measure each run of columns between bounds on its own, then join."""
    students, teachers = [], []
    for low, high in pairwise(bounds):
        shifted_CV = student_CV[:, low:high].clone()
        student_4C, weight_CV = student_statistics(shifted_CV, labels_C - low, entropy=True)
        students.append(student_4C)
        teachers.append(teacher_statistics(teacher_GV[:, low:high].clone(), shifted_CV[ROWS_G], weight_CV[ROWS_G]))
    return read(join(torch.stack(students), torch.stack(teachers), ROWS_G), ROWS_G)


@pytest.mark.parametrize("bounds", [[0, 9], [0, 4, 9], [0, 0, 3, 3, 8, 9, 9]])
def test_any_cut_of_the_columns(bounds: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    student_CV, teacher_GV = (10 * torch.randn(n, 9, generator=generator, dtype=torch.float64) for n in (3, 2))
    labels_C = torch.tensor([0, 4, 8])
    found = terms(student_CV, teacher_GV, labels_C, bounds)
    logp_CV, logq_GV = student_CV.log_softmax(1), teacher_GV.log_softmax(1)
    logp_GV = logp_CV[ROWS_G]
    assert_close(found.logprob_C, logp_CV[torch.arange(3), labels_C], rtol=1e-12, atol=1e-12)
    assert_close(found.entropy_C, -(logp_CV.exp() * logp_CV).sum(1), rtol=1e-12, atol=1e-12)
    assert_close(found.divergence_G, (logp_GV.exp() * (logp_GV - logq_GV)).sum(1), rtol=1e-12, atol=1e-12)


def test_a_shard_without_weight_contributes_nothing_whatever_its_teacher_says() -> None:
    """Within its own shard the student's third token has weight and the teacher's none; in the whole neither has."""
    student_CV = torch.tensor([[0.0, 1.0, -5000.0, -5001.0]], dtype=torch.float64).expand(3, 4)
    teacher_GV = torch.tensor([[1.0, 0.0, -torch.inf, -3.0]], dtype=torch.float64).expand(2, 4)
    labels_C = torch.zeros(3, dtype=torch.int64)
    whole = terms(student_CV, teacher_GV, labels_C, [0, 4])
    cut = terms(student_CV, teacher_GV, labels_C, [0, 2, 4])
    assert whole.divergence_G.isfinite().all()
    assert_close(cut.divergence_G, whole.divergence_G, rtol=1e-14, atol=1e-14)
