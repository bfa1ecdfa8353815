"""Implementations of one step of the output head for `head.py`: this project's and others'.

Every contestant gets the same `Problem` and returns an `Outcome`: the log-prob of each label and KL(student || teacher)
over the whole vocabulary, reduced to ``mean(-advantage * log-prob + 0.1 * KL)`` and differentiated in the student's
hidden rows and in the vocabulary matrix. The teacher contributes no gradient, although it shares the matrix.

The baselines reimplement the computation of public projects, without their code. If there was a choice, the cheaper
option for the baseline was taken; the docstrings name these choices.

Shapes: T rows, C rows of a chunk, V this rank's columns of the vocabulary, H hidden size.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from sdpg_megatron.head import HeadOptions, HeadTerms, TeacherRows, VocabShard, head_loss

KL_WEIGHT = 0.1
NEMO_RL_CHUNK = 1024
"""Rows of a chunk in NeMo-RL's documentation of the full-vocabulary divergence."""
FLOOR_BYTES = 4 << 30
"""Limit in bytes of the logits of `matmul_floor` at a time."""
SEED = 20260604
SEED_BLOCK = 8192
"""Columns per random seed, so that any shard can be created without the whole matrix, equal for every split."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Inputs of a head step. The loss is differentiated in the leaves `hidden_TH` and `weight_VH`."""

    hidden_TH: Tensor
    weight_VH: Tensor
    labels_T: Tensor
    """int64, columns of the whole vocabulary."""
    teacher_TH: Tensor
    advantage_T: Tensor
    """float32."""
    vocab: VocabShard


@dataclass(frozen=True, slots=True)
class Outcome:
    """Results of a step; None for those that a contestant does not compute."""

    hidden_grad_TH: Tensor
    """Summed over the ranks, except in `matmul_floor`."""
    weight_grad_VH: Tensor
    loss: Tensor | None = None
    logprob_T: Tensor | None = None
    divergence_T: Tensor | None = None


Step = Callable[[], Outcome]


@dataclass(frozen=True, slots=True)
class Contestant:
    """An implementation of a step."""

    prepare: Callable[[Problem], Step]
    """Allocates memory that the step reuses; not timed, but included in the measured memory."""
    missing: Callable[[torch.device, int], str | None] = lambda device, tp: None
    """(device, tensor-parallel ranks) -> reason for which it cannot run there; None if it can."""
    note: str | None = None
    """Note for the readers of its figures."""


def weight_rows(start: int, stop: int, hidden: int, dtype: torch.dtype) -> Tensor:
    """Rows ``start`` to ``stop`` of the vocabulary matrix. Logits of unit-variance hidden rows have std 2."""
    weight_VH = torch.empty(stop - start, hidden, dtype=dtype)
    for block in range(start // SEED_BLOCK, -(-stop // SEED_BLOCK)):
        first = block * SEED_BLOCK
        generator = torch.Generator().manual_seed(SEED + 1 + block)
        rows_VH = torch.randn(SEED_BLOCK, hidden, generator=generator).mul_(2 / hidden**0.5)
        low, high = max(start, first), min(stop, first + SEED_BLOCK)
        weight_VH[low - start : high - start] = rows_VH[low - first : high - first]
    return weight_VH


def make_problem(
    rows: int, hidden: int, vocab: VocabShard, columns: int, dtype: torch.dtype, device: torch.device
) -> Problem:
    """Create a problem with the same values in every run and for every split.

    The teacher's rows are the student's plus noise, so that KL is a fraction of a nat, as between two contexts.

    Args:
        columns: vocabulary columns of this rank.
    """
    generator = torch.Generator().manual_seed(SEED)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    hidden_TH = normal(rows, hidden)
    teacher_TH = 0.9 * hidden_TH + (1 - 0.9**2) ** 0.5 * normal(rows, hidden)
    labels_T = torch.randint(0, vocab.valid, (rows,), generator=generator)
    advantage_T = normal(rows)
    weight_VH = weight_rows(vocab.start, vocab.start + columns, hidden, dtype)
    return Problem(
        hidden_TH=hidden_TH.to(device, dtype).requires_grad_(),
        weight_VH=weight_VH.to(device).requires_grad_(),
        labels_T=labels_T.to(device),
        teacher_TH=teacher_TH.to(device, dtype),
        advantage_T=advantage_T.to(device),
        vocab=vocab,
    )


def differentiate(problem: Problem, logprob_T: Tensor, divergence_T: Tensor) -> Outcome:
    """Compute the loss of a step's terms and its gradients."""
    loss = (-(problem.advantage_T * logprob_T) + KL_WEIGHT * divergence_T).mean()
    return gradients(problem, loss, logprob_T, divergence_T)


def gradients(problem: Problem, loss: Tensor, logprob_T: Tensor | None, divergence_T: Tensor | None) -> Outcome:
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    hidden_grad_TH, weight_grad_VH = problem.hidden_TH.grad, problem.weight_VH.grad
    assert hidden_grad_TH is not None and weight_grad_VH is not None, "both are leaves of every loss here"
    problem.hidden_TH.grad = problem.weight_VH.grad = None
    detached = (None if part is None else part.detach() for part in (loss, logprob_T, divergence_T))
    return Outcome(hidden_grad_TH, weight_grad_VH, *detached)


# --- this project


def ours(problem: Problem, options: HeadOptions) -> Outcome:
    """`sdpg_megatron.head`."""

    def loss(terms: HeadTerms, rows_C: Tensor) -> Tensor:
        assert terms.divergence_T is not None, "a teacher was given"
        loss_C = -(problem.advantage_T[rows_C] * terms.logprob_T) + KL_WEIGHT * terms.divergence_T
        return loss_C / problem.labels_T.numel()

    rows_T = torch.arange(problem.labels_T.numel(), device=problem.labels_T.device)
    loss_sum, terms = head_loss(
        problem.hidden_TH,
        problem.weight_VH,
        problem.labels_T,
        loss=loss,
        vocab=problem.vocab,
        teacher=TeacherRows(problem.teacher_TH, rows_T),
        options=options,
    )
    return gradients(problem, loss_sum, terms.logprob_T, terms.divergence_T)


# --- in plain torch


class Replicate(torch.autograd.Function):
    """Identity for values that are equal on all ranks. The backward pass sums the gradients of the ranks' columns."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return values.view_as(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return all_reduce(gradient, ctx.group), None


class RankSum(torch.autograd.Function):
    """Sum over ranks. All ranks have the same loss of the sum, so the backward pass is the identity."""

    @staticmethod
    def forward(ctx: Any, part_T: Tensor, group: ProcessGroup) -> Tensor:
        return all_reduce(part_T.clone(), group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, None]:
        return grad_T, None


def all_reduce(values: Tensor, group: ProcessGroup | None, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """All-reduce in place; no-op without a group."""
    if group is not None:
        dist.all_reduce(values, op, group)
    return values


def replicate(values: Tensor, group: ProcessGroup | None) -> Tensor:
    """`Replicate`; no-op without a group."""
    if group is None:
        return values
    same: Tensor = Replicate.apply(values, group)  # type: ignore[no-untyped-call]
    return same


def rank_sum(part_T: Tensor, group: ProcessGroup | None) -> Tensor:
    """`RankSum`; no-op without a group."""
    if group is None:
        return part_T
    sum_T: Tensor = RankSum.apply(part_T, group)  # type: ignore[no-untyped-call]
    return sum_T


def wide(values: Tensor) -> Tensor:
    """Cast to float32, unless already float32 or float64."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def log_softmax(logits_TV: Tensor, group: ProcessGroup | None) -> Tensor:
    """Log-softmax over the columns of all ranks, differentiable."""
    if group is None:
        return torch.log_softmax(logits_TV, 1)
    max_T = all_reduce(logits_TV.detach().amax(1), group, dist.ReduceOp.MAX)
    shifted_TV = logits_TV - max_T[:, None]
    return shifted_TV - replicate(rank_sum(shifted_TV.exp().sum(1), group), group).log()[:, None]


def local_labels(labels_T: Tensor, vocab: VocabShard, columns: int) -> tuple[Tensor, Tensor]:
    """Mask [T] of labels among this rank's columns, and labels clamped to a valid column [T, 1]."""
    column_T = labels_T - vocab.start
    return (column_T >= 0) & (column_T < columns), column_T.clamp(0, columns - 1)[:, None]


def at_labels(logp_TV: Tensor, labels_T: Tensor, vocab: VocabShard) -> Tensor:
    """Entries of the labels from the ranks that have them."""
    owned_T, column_T1 = local_labels(labels_T, vocab, logp_TV.shape[1])
    return rank_sum(logp_TV.gather(1, column_T1)[:, 0] * owned_T, vocab.group)


def naive(problem: Problem) -> Outcome:
    """Both logits in memory in float32, log-softmax, autograd. Several ranks all-reduce numbers per row."""
    group = problem.vocab.group
    logp_TV = log_softmax(wide(replicate(problem.hidden_TH, group) @ problem.weight_VH.T), group)
    with torch.no_grad():
        logq_TV = log_softmax(wide(problem.teacher_TH @ problem.weight_VH.T), group)
    divergence_T = rank_sum((logp_TV.exp() * (logp_TV - logq_TV)).sum(1), group)
    return differentiate(problem, at_labels(logp_TV, problem.labels_T, problem.vocab), divergence_T)


def public_sdpg(problem: Problem, narrow: torch.dtype = torch.bfloat16) -> Outcome:
    """As in ``DataParallelPPOActor._compute_kl_distill_micro_batch`` of github.com/lauyikfung/SDPG (commit f71329ee).

    Both logits are in `narrow`, the type of its mixed precision. The teacher's log-softmax is in float32, because it is
    computed under autocast, which uses float32 for log-softmax on CUDA. The student's is computed outside, in `narrow`.
    KL and entropy are one checkpointed function, recomputed in the backward pass.

    Choices: products are in the type of the inputs, for the same cost as in other contestants. The clamp of KL at 20 is
    omitted, since no row reaches it.
    """
    logits_TV = (problem.hidden_TH @ problem.weight_VH.T).to(narrow)
    with torch.no_grad():
        logq_TV = torch.log_softmax(wide((problem.teacher_TH @ problem.weight_VH.T).to(narrow)), 1)
    logprob_T = torch.log_softmax(logits_TV, 1).gather(1, problem.labels_T[:, None])[:, 0]
    divergence_T, _ = checkpoint(_divergence_and_entropy, logits_TV, logq_TV, use_reentrant=False)
    return differentiate(problem, wide(logprob_T), wide(divergence_T))


def _divergence_and_entropy(logits_TV: Tensor, logq_TV: Tensor) -> tuple[Tensor, Tensor]:
    logp_TV = torch.log_softmax(logits_TV, 1)
    p_TV = logp_TV.exp()
    entropy_T = -(p_TV * logp_TV).sum(1)
    return (p_TV * (logp_TV - logq_TV)).sum(1), entropy_T


# --- NeMo-RL


class ChunkedLogits(torch.autograd.Function):
    """(student logits_TV, labels_T, vocab) -> log-prob [T] of the labels, a chunk of rows at a time.

    The logits are saved, and the backward pass recomputes their log-softmax. The gradient has their type.
    """

    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, labels_T: Tensor, vocab: VocabShard) -> Tensor:
        ctx.save_for_backward(logits_TV, labels_T)
        ctx.vocab = vocab
        parts = [
            at_labels(log_softmax(wide(logits_TV[rows]), vocab.group), labels_T[rows], vocab)
            for rows in chunks(logits_TV.shape[0], NEMO_RL_CHUNK)
        ]
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, None, None]:
        logits_TV, labels_T = ctx.saved_tensors
        vocab: VocabShard = ctx.vocab
        gradient_TV = torch.empty_like(logits_TV)
        for rows in chunks(logits_TV.shape[0], NEMO_RL_CHUNK):
            gradient_CV = log_softmax(wide(logits_TV[rows]), vocab.group).exp_().neg_()
            owned_C, column_C1 = local_labels(labels_T[rows], vocab, logits_TV.shape[1])
            gradient_CV.scatter_add_(1, column_C1, owned_C[:, None].to(gradient_CV.dtype))
            gradient_TV[rows] = gradient_CV.mul_(grad_T[rows, None])
        return gradient_TV, None, None


class ChunkedReverseKL(torch.autograd.Function):
    """(student logits_TV, teacher logits_TV, vocab) -> KL [T], by chunks. The gradient is at least float32."""

    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, teacher_TV: Tensor, vocab: VocabShard) -> Tensor:
        ctx.save_for_backward(logits_TV, teacher_TV)
        ctx.vocab = vocab
        parts = [
            ChunkedReverseKL.chunk(logits_TV[rows], teacher_TV[rows], vocab)[2]
            for rows in chunks(logits_TV.shape[0], NEMO_RL_CHUNK)
        ]
        return torch.cat(parts)

    @staticmethod
    def chunk(logits_CV: Tensor, teacher_CV: Tensor, vocab: VocabShard) -> tuple[Tensor, Tensor, Tensor]:
        """p [C, V], log p - log q [C, V] and KL [C]."""
        logp_CV = log_softmax(wide(logits_CV), vocab.group)
        log_ratio_CV = logp_CV - log_softmax(wide(teacher_CV), vocab.group)
        p_CV = logp_CV.exp()
        return p_CV, log_ratio_CV, rank_sum((p_CV * log_ratio_CV).sum(1), vocab.group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, None, None]:
        logits_TV, teacher_TV = ctx.saved_tensors
        gradient_TV = torch.empty_like(logits_TV, dtype=wide(logits_TV[:0]).dtype)
        for rows in chunks(logits_TV.shape[0], NEMO_RL_CHUNK):
            p_CV, log_ratio_CV, divergence_C = ChunkedReverseKL.chunk(logits_TV[rows], teacher_TV[rows], ctx.vocab)
            gradient_TV[rows] = p_CV.mul_(log_ratio_CV - divergence_C[:, None]).mul_(grad_T[rows, None])
        return gradient_TV, None, None


def chunks(rows: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, rows, size))


def nemo_rl(problem: Problem) -> Outcome:
    """As in ``nemo_rl/distributed/model_utils.py`` of NVIDIA-NeMo/RL (pull request 3978, September 2026).

    Its full-vocabulary on-policy distillation receives hidden rows of the teacher. It computes both logits completely,
    in the type of the inputs, then ``ChunkedDistributedReverseKLToFixedLogits`` and, for log-probs,
    ``ChunkedDistributedLogprob``. Both save the logits and process them again, chunk by chunk, in the backward pass.

    Choices: the label's column is marked by a scatter instead of an int64 one-hot of the whole chunk, and the log-prob
    is chunked too, which is optional in the original.
    """
    logits_TV = replicate(problem.hidden_TH, problem.vocab.group) @ problem.weight_VH.T
    with torch.no_grad():
        teacher_TV = problem.teacher_TH @ problem.weight_VH.T
    divergence_T = ChunkedReverseKL.apply(logits_TV, teacher_TV, problem.vocab)  # type: ignore[no-untyped-call]
    logprob_T = ChunkedLogits.apply(logits_TV, problem.labels_T, problem.vocab)  # type: ignore[no-untyped-call]
    return differentiate(problem, logprob_T, divergence_T)


# --- Liger, and only the products


def liger(problem: Problem) -> Outcome:
    """Liger-Kernel's fused linear JSD: only the divergence.

    `beta` 1 is KL(student || teacher): in its ``ops/jsd.py`` X is the student's log-softmax, and the kernel then sums
    ``e^X (X - Y)``. The teacher's matrix is a separate argument without gradient, so only the student contributes to
    the gradient, as in this project, although both are the same matrix. The loss is a mean over rows.
    """
    from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction  # type: ignore[import-not-found,unused-ignore]

    matrix_VH = problem.weight_VH
    mean = LigerFusedLinearJSDFunction.apply(
        problem.hidden_TH, matrix_VH, problem.teacher_TH, matrix_VH.detach(), None, 1.0, -100, 1.0
    )
    return gradients(problem, KL_WEIGHT * mean, None, None)


def liger_chunked(problem: Problem) -> Outcome:
    """Liger-Kernel's chunked distillation loss with JSD: compiled plain torch for chunks of 1024 rows.

    `beta` as in `liger`. Its cross-entropy has weight 0 and is not computed.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # type: ignore[import-not-found,unused-ignore]

    matrix_VH = problem.weight_VH
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=KL_WEIGHT, beta=1.0)
    mean = loss(problem.hidden_TH, matrix_VH, problem.teacher_TH, matrix_VH.detach(), problem.labels_T)
    return gradients(problem, mean, None, None)


def prepare_floor(problem: Problem, buffer_bytes: int = FLOOR_BYTES) -> Step:
    """Only the four products: logits of teacher and student, then dh and dW with the student's logits as gradient.

    Outputs are allocated here, with one buffer for both logits. There is no reduction over ranks.
    """
    hidden_TH, weight_VH = problem.hidden_TH.detach(), problem.weight_VH.detach()
    columns = weight_VH.shape[0]
    size = min(hidden_TH.shape[0], max(1, buffer_bytes // (columns * weight_VH.element_size())))
    logits_CV = weight_VH.new_zeros(size, columns)
    outcome = Outcome(torch.zeros_like(hidden_TH), torch.zeros_like(weight_VH))

    def step() -> Outcome:
        for rows in chunks(hidden_TH.shape[0], size):
            hidden_CH = hidden_TH[rows]
            part_CV = logits_CV[: hidden_CH.shape[0]]
            torch.mm(problem.teacher_TH[rows], weight_VH.T, out=part_CV)
            torch.mm(hidden_CH, weight_VH.T, out=part_CV)
            torch.mm(part_CV, weight_VH, out=outcome.hidden_grad_TH[rows])
            # beta 0: the first chunk overwrites the result of the last step.
            outcome.weight_grad_VH.addmm_(part_CV.T, hidden_CH, beta=float(rows.start > 0))
        return outcome

    return step


def _repeat(step: Callable[[Problem], Outcome]) -> Callable[[Problem], Step]:
    """`Contestant.prepare` of a step without buffers."""
    return lambda problem: partial(step, problem)


def _no_tp(project: str) -> Callable[[torch.device, int], str | None]:
    return lambda device, tp: f"{project} splits no vocabulary over ranks" if tp > 1 else None


def _no_liger(device: torch.device, tp: int) -> str | None:
    if tp > 1:
        return "Liger-Kernel splits no vocabulary over ranks"
    if device.type == "cpu":
        return "its kernels are Triton's and need a GPU (--device cuda)"
    if importlib.util.find_spec("liger_kernel") is None:
        return "Liger-Kernel is not installed: pip install liger-kernel"
    return None


DIVERGENCE_ALONE = "the divergence alone: it has no log-prob of labels, nor KL by row"

CONTESTANTS = {
    "ours/recompute": Contestant(_repeat(partial(ours, options=HeadOptions(schedule="recompute")))),
    "ours/grad_in_forward": Contestant(_repeat(partial(ours, options=HeadOptions(schedule="grad_in_forward")))),
    "naive": Contestant(_repeat(naive)),
    "public_sdpg": Contestant(
        _repeat(public_sdpg), _no_tp("public SDPG (FSDP)"), "log-softmax in bfloat16 whatever the dtype, as there"
    ),
    "nemo_rl": Contestant(_repeat(nemo_rl)),
    "liger": Contestant(_repeat(liger), _no_liger, DIVERGENCE_ALONE),
    "liger_chunked": Contestant(_repeat(liger_chunked), _no_liger, DIVERGENCE_ALONE + "; logits in the inputs' type"),
    "matmul_floor": Contestant(prepare_floor, note="the four products alone; its logits buffer is its peak"),
}
"""By name, in the order of the table."""
