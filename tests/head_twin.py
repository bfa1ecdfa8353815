"""The head written the obvious way: dense, float64, differentiated by autograd."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """Random inputs; the columns of `weight_VH` from `valid` on are padding."""

    hidden_TH: Tensor
    weight_VH: Tensor
    labels_T: Tensor
    teacher_GH: Tensor
    rows_G: Tensor
    valid: int
    upstream_3T: Tensor
    """Gradients of log-prob, entropy and divergence."""

    def to(self, dtype: torch.dtype) -> Problem:
        return Problem(
            self.hidden_TH.to(dtype),
            self.weight_VH.to(dtype),
            self.labels_T,
            self.teacher_GH.to(dtype),
            self.rows_G,
            self.valid,
            self.upstream_3T.to(dtype),
        )


def make_problem(
    rows: int = 11, columns: int = 24, valid: int = 21, hidden: int = 6, gated: int = 5, seed: int = 0
) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return Problem(
        hidden_TH=normal(rows, hidden),
        weight_VH=normal(columns, hidden) * 2 / hidden**0.5,  # logits of standard deviation 2
        labels_T=torch.randint(0, valid, (rows,), generator=generator),
        teacher_GH=normal(gated, hidden),
        rows_G=torch.randperm(rows, generator=generator)[:gated],
        valid=valid,
        upstream_3T=normal(3, rows),
    )


def dense_terms(problem: Problem, temperature: float = 1.0, teacher_temperature: float | None = None) -> list[Tensor]:
    """Log-prob, entropy and KL(student || teacher), each float64 [T]."""
    weight_VH = problem.weight_VH.double()[: problem.valid]
    logp_TV = torch.log_softmax(problem.hidden_TH.double() @ weight_VH.T / temperature, -1)
    with torch.no_grad():
        teacher_GV = problem.teacher_GH.double() @ weight_VH.T / (teacher_temperature or temperature)
        logq_GV = torch.log_softmax(teacher_GV, -1)
    divergence_T = torch.zeros_like(logp_TV[:, 0])
    student_GV = logp_TV[problem.rows_G]
    divergence_T = divergence_T.index_put((problem.rows_G,), (student_GV.exp() * (student_GV - logq_GV)).sum(-1))
    return [
        logp_TV.gather(1, problem.labels_T[:, None])[:, 0],
        -(logp_TV.exp() * logp_TV).sum(-1),
        divergence_T,
    ]


def dense_gradients(problem: Problem, weights_3: list[float], **temperatures: float) -> tuple[Tensor, Tensor]:
    """Gradients of ``sum_i weights_3[i] * (upstream_3T[i] . term_i)`` in the hidden rows and the whole matrix."""
    hidden_TH = problem.hidden_TH.double().clone().requires_grad_()
    weight_VH = problem.weight_VH.double().clone().requires_grad_()
    twin = Problem(
        hidden_TH, weight_VH, problem.labels_T, problem.teacher_GH, problem.rows_G, problem.valid, problem.upstream_3T
    )
    terms = dense_terms(twin, **temperatures)
    loss = sum(
        weight * (grad_T.double() * term_T).sum()
        for weight, grad_T, term_T in zip(weights_3, problem.upstream_3T, terms, strict=True)
    )
    assert isinstance(loss, Tensor)
    return torch.autograd.grad(loss, (hidden_TH, weight_VH))
