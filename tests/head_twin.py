"""The head written the obvious way (dense, float64, by autograd), and the package asked the same question.

Shapes: T rows, G those with a teacher, V columns, padding included, H hidden size, n outcomes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sdpg_megatron.head import (
    Divergence,
    ForwardKL,
    HeadOptions,
    HeadTerms,
    JensenShannon,
    ReverseKL,
    SampledToken,
    TeacherRows,
    TopK,
    VocabShard,
    head_loss,
    head_terms,
    logits_terms,
)

DIVERGENCES: dict[str, Divergence] = {
    "reverse_kl": ReverseKL(),
    "forward_kl": ForwardKL(),
    "jsd": JensenShannon(),
    "jsd_0.9": JensenShannon(0.9),
    "top3_reverse_kl": TopK(3, ReverseKL()),
    "top3_forward_kl": TopK(3, ForwardKL()),
    "top3_jsd": TopK(3, JensenShannon(0.3)),
    "sampled_token": SampledToken(),
}
WHOLE = ("reverse_kl", "forward_kl", "jsd", "jsd_0.9")
"""Those that are 0 for equal distributions alone."""
WAYS = ("terms", "recompute", "grad_in_forward", "logits")
"""`head_terms`, the two schedules of `head_loss`, and `logits_terms`."""
TAIL_FLOOR = 1e-7
"""What all tokens outside the top k count with at least."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A question with random inputs. Rows of the matrices from `valid` on are padding."""

    hidden_TH: Tensor
    weight_VH: Tensor
    labels_T: Tensor
    teacher_GH: Tensor
    rows_G: Tensor
    valid: int
    upstream_3T: Tensor
    """Gradients of log-prob, entropy and divergence. A term whose gradients are all 0 stays out of the loss."""
    teacher_weight_VH: Tensor | None = None
    divergence: Divergence = field(default_factory=ReverseKL)
    temperature: float = 1.0
    teacher_temperature: float | None = None

    def to(self, dtype: torch.dtype) -> Problem:
        changed = {
            name: value.to(dtype)
            for name, value in vars(self).items()
            if isinstance(value, Tensor) and value.is_floating_point()
        }
        return replace(self, **changed)

    def alone(self, term: int) -> Problem:
        """With a gradient of one term alone."""
        upstream_3T = torch.zeros_like(self.upstream_3T)
        upstream_3T[term] = self.upstream_3T[term]
        return replace(self, upstream_3T=upstream_3T)

    def padded(self, value: float) -> Problem:
        weight_VH = self.weight_VH.clone()
        weight_VH[self.valid :] = value
        return replace(self, weight_VH=weight_VH)

    def loss(self, terms: HeadTerms, at_C: Tensor) -> Tensor:
        """A `RowLoss`."""
        parts = (terms.logprob_T, terms.entropy_T, terms.divergence_T)
        used = [
            upstream_T[at_C] * part_T
            for upstream_T, part_T in zip(self.upstream_3T, parts, strict=True)
            if part_T is not None and bool(upstream_T.any())
        ]
        return torch.stack(used).sum(0) if used else 0 * terms.logprob_T


@dataclass(frozen=True)
class Answer:
    """Log-prob, entropy, divergence and the teacher's log-prob, and the gradients of the `Problem`'s loss."""

    terms_4T: Tensor
    hidden_grad_TH: Tensor
    weight_grad_VH: Tensor
    loss: Tensor

    def parts(self) -> dict[str, Tensor]:
        return vars(self)


def make_problem(
    rows: int = 11,
    columns: int = 24,
    valid: int = 21,
    hidden: int = 6,
    gated: int = 5,
    seed: int = 0,
    teacher_hidden: int | None = None,
    **question: Any,
) -> Problem:
    """`teacher_hidden`: hidden size of a teacher with a matrix of its own; None for the student's matrix."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def matrix(size: int) -> Tensor:
        return normal(columns, size) * 2 / size**0.5  # logits of standard deviation 2

    return Problem(
        hidden_TH=normal(rows, hidden),
        weight_VH=matrix(hidden),
        labels_T=torch.randint(0, valid, (rows,), generator=generator),
        teacher_GH=normal(gated, teacher_hidden or hidden),
        rows_G=torch.randperm(rows, generator=generator)[:gated],
        valid=valid,
        upstream_3T=normal(3, rows),
        teacher_weight_VH=matrix(teacher_hidden) if teacher_hidden else None,
        **question,
    )


def logits_problem(student_TV: Tensor, teacher_TV: Tensor, labels_T: Tensor, **question: Any) -> Problem:
    """A problem with the given logits: the matrix is the identity. Its loss is the sum of the three terms."""
    rows, columns = student_TV.shape
    return Problem(
        hidden_TH=student_TV,
        weight_VH=torch.eye(columns, dtype=student_TV.dtype),
        labels_T=labels_T,
        teacher_GH=teacher_TV,
        rows_G=torch.arange(rows),
        valid=columns,
        upstream_3T=torch.ones(3, rows, dtype=student_TV.dtype),
        **question,
    )


# --- the twin


def dense(problem: Problem) -> Answer:
    """The twin's answer, all in float64."""
    exact = problem.to(torch.float64)
    exact = replace(
        exact, hidden_TH=exact.hidden_TH.clone().requires_grad_(), weight_VH=exact.weight_VH.clone().requires_grad_()
    )
    weight_VH = exact.weight_VH[: problem.valid]
    return dense_of_logits(exact, exact.hidden_TH @ weight_VH.T, (exact.hidden_TH, exact.weight_VH))


def dense_of_logits(exact: Problem, logits_TV: Tensor, leaves: tuple[Tensor, Tensor]) -> Answer:
    """`logits_TV`: of the student, before temperature and without padding."""
    terms = dense_terms(exact, logits_TV)
    loss = exact.loss(terms, torch.arange(logits_TV.shape[0])).sum()
    return _answer(terms, loss, leaves)


def dense_terms(exact: Problem, logits_TV: Tensor | None = None) -> HeadTerms:
    """Terms of a float64 problem; from its hidden rows where no logits are given."""
    weight_VH = exact.weight_VH[: exact.valid]
    student_TV = exact.hidden_TH @ weight_VH.T if logits_TV is None else logits_TV
    logp_TV = torch.log_softmax(student_TV / exact.temperature, -1)
    with torch.no_grad():
        own_VH = exact.teacher_weight_VH
        teacher_VH = weight_VH if own_VH is None else own_VH[: exact.valid]
        teacher_GV = exact.teacher_GH @ teacher_VH.T / (exact.teacher_temperature or exact.temperature)
        logq_GV = torch.log_softmax(teacher_GV, -1)
    labels_G = exact.labels_T[exact.rows_G][:, None]
    divergence_G = dense_divergence(exact.divergence, logp_TV[exact.rows_G], logq_GV, labels_G)
    none_T = torch.zeros_like(logp_TV[:, 0])
    return HeadTerms(
        logp_TV.gather(1, exact.labels_T[:, None])[:, 0],
        -mean_under(logp_TV, logp_TV),
        none_T.index_put((exact.rows_G,), divergence_G),
        none_T.detach().index_put((exact.rows_G,), logq_GV.gather(1, labels_G)[:, 0]),
    )


def dense_divergence(divergence: Divergence, logp_GV: Tensor, logq_GV: Tensor, labels_G1: Tensor) -> Tensor:
    match divergence:
        case ReverseKL():
            return kl(logp_GV, logq_GV)
        case ForwardKL():
            return kl(logq_GV, logp_GV)
        case JensenShannon(beta):
            logm_GV = ((1 - beta) * logp_GV.exp() + beta * logq_GV.exp()).clamp(min=1e-300).log()
            return beta * kl(logq_GV, logm_GV) + (1 - beta) * kl(logp_GV, logm_GV)
        case SampledToken():
            logp_G = logp_GV.gather(1, labels_G1)[:, 0]
            gap_G = (logp_G - logq_GV.gather(1, labels_G1)[:, 0]).detach()
            return gap_G * (1 + logp_G - logp_G.detach())
        case TopK(k, over):
            top_Gk = logp_GV.detach().topk(min(k, logp_GV.shape[1]), 1).indices
            return dense_divergence(over, _outcomes(logp_GV, top_Gk), _outcomes(logq_GV, top_Gk), labels_G1)
    raise AssertionError(f"no twin of {divergence}")


def kl(logp_Gn: Tensor, logq_Gn: Tensor) -> Tensor:
    return mean_under(logp_Gn, logp_Gn) - mean_under(logp_Gn, logq_Gn)


def mean_under(logp_Gn: Tensor, value_Gn: Tensor) -> Tensor:
    """What has no weight contributes nothing, neither to the mean nor to its gradient."""
    weight_Gn = logp_Gn.exp()
    return (weight_Gn * value_Gn.masked_fill(weight_Gn == 0, 0)).sum(1)


def _outcomes(logp_GV: Tensor, top_Gk: Tensor) -> Tensor:
    rest_GV = logp_GV.exp().scatter(1, top_Gk, 0)
    return torch.cat((logp_GV.gather(1, top_Gk), rest_GV.sum(1, keepdim=True).clamp(min=TAIL_FLOOR).log()), 1)


# --- the package


def package(
    way: str, problem: Problem, *, vocab: VocabShard | None = None, weight_VH: Tensor | None = None, **options: Any
) -> Answer:
    """The package's answer. Over several ranks `vocab` and `weight_VH` are this rank's. `options`: of `HeadOptions`."""
    hidden_TH = problem.hidden_TH.clone().requires_grad_()
    own_VH = (problem.weight_VH if weight_VH is None else weight_VH).clone().requires_grad_()
    terms, loss = ask(way, replace(problem, hidden_TH=hidden_TH, weight_VH=own_VH), vocab=vocab, **options)
    return _answer(terms, loss, (hidden_TH, own_VH))


def ask(way: str, problem: Problem, *, vocab: VocabShard | None = None, **options: Any) -> tuple[HeadTerms, Tensor]:
    """Terms and loss, differentiable in the problem's own tensors; its matrix is this rank's shard."""
    hidden_TH, weight_VH, labels_T = problem.hidden_TH, problem.weight_VH, problem.labels_T
    vocab = vocab or VocabShard(0, problem.valid, None)
    teacher = teacher_of(problem, vocab)
    how = options_of(problem, **options)
    if way not in ("terms", "logits"):
        how = replace(how, schedule=way)
        loss, terms = head_loss(hidden_TH, weight_VH, labels_T, problem.loss, vocab=vocab, teacher=teacher, options=how)
        return terms, loss
    if way == "terms":
        terms = head_terms(hidden_TH, weight_VH, labels_T, vocab=vocab, teacher=teacher, options=how)
    else:
        teacher_VH = weight_VH if teacher.weight_VH is None else teacher.weight_VH
        terms = logits_terms(
            logits_of(hidden_TH, weight_VH, vocab),
            labels_T,
            vocab=vocab,
            teacher_GV=logits_of(teacher.hidden_GH, teacher_VH, vocab),
            rows_G=teacher.rows_G,
            options=how,
        )
    return terms, problem.loss(terms, torch.arange(labels_T.shape[0])).sum()


def options_of(problem: Problem, **options: Any) -> HeadOptions:
    """Sizes are small unless `options` say otherwise, so that several chunks of several tiles take part."""
    sizes = {"chunk_rows": 4, "tile_columns": 5}
    return HeadOptions(
        divergence=problem.divergence,
        temperature=problem.temperature,
        teacher_temperature=problem.teacher_temperature,
        **{**sizes, **options},
    )


def teacher_of(problem: Problem, vocab: VocabShard) -> TeacherRows:
    whole_VH = problem.teacher_weight_VH
    own_VH = None if whole_VH is None else whole_VH[vocab.start : vocab.start + problem.weight_VH.shape[0]]
    return TeacherRows(problem.teacher_GH, problem.rows_G, own_VH)


def logits_of(hidden_TH: Tensor, weight_VH: Tensor, vocab: VocabShard) -> Tensor:
    """Logits in the hidden rows' type; those of padding are what the matrix's padding holds."""
    tokens_VH = vocab.tokens(weight_VH)
    padding_V = weight_VH[tokens_VH.shape[0] :, 0]
    return torch.cat((hidden_TH @ tokens_VH.T, padding_V.expand(hidden_TH.shape[0], -1)), 1)


def _answer(terms: HeadTerms, loss: Tensor, leaves: tuple[Tensor, Tensor]) -> Answer:
    assert terms.divergence_T is not None and terms.teacher_logprob_T is not None
    terms_4T = torch.stack((terms.logprob_T, terms.entropy_T, terms.divergence_T, terms.teacher_logprob_T))
    return Answer(terms_4T.detach(), *torch.autograd.grad(loss, leaves), loss.detach())


def assert_answers(found: Answer, expected: Answer, *, rtol: float, atol: float) -> None:
    """Numbers within the tolerance, all of them finite; types may differ."""
    for name, part in found.parts().items():
        wanted = expected.parts()[name]
        torch.testing.assert_close(
            part.double(), wanted.double(), rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )
        assert part.isfinite().all(), name
