"""What the rest of the package knows of the head.

Shapes: T response tokens, G the rows among them with a teacher, V this rank's columns of the vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sdpg_megatron.errors import NumericsError
from sdpg_megatron.head.chunked import ChunkedHead, ChunkedLogits, HeadPlan, token_terms
from sdpg_megatron.head.shard import VocabShard


@dataclass(frozen=True, slots=True)
class TeacherRows:
    """The teacher's last hidden states where a divergence is wanted. Other rows have divergence 0, at no cost."""

    hidden_GH: Tensor
    """Before the output layer, in any float type."""
    rows_G: Tensor
    """int64 [G]: the row in T of each, distinct, in any order."""


@dataclass(frozen=True, slots=True)
class HeadTerms:
    """Per-token quantities in nats: float32, or float64 for float64 inputs."""

    logprob_T: Tensor
    """log p(label)."""
    entropy_T: Tensor
    divergence_T: Tensor | None
    """KL(student || teacher) over the whole vocabulary; None where no teacher was given."""


def head_terms(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    labels_T: Tensor,
    *,
    vocab: VocabShard,
    temperature: float = 1.0,
    teacher: TeacherRows | None = None,
    teacher_temperature: float | None = None,
    chunk_rows: int = 256,
    reduce_hidden_grad: bool = True,
) -> HeadTerms:
    """Log-prob, entropy and divergence of each row, differentiable in `hidden_TH` and `weight_VH`.

    A collective over `vocab.group`: all its ranks give the same rows, labels and options, and get the same bits. The
    number of gathers follows from T alone, hence zero rows need none. The teacher gives no gradient, neither to
    `hidden_TH` nor to `weight_VH`, though both distributions come from that matrix.

    Args:
        hidden_TH: student's last hidden states, equal on all ranks of the group.
        weight_VH: this rank's rows of the output matrix, padding included.
        labels_T: int64, columns of the whole vocabulary.
        vocab: which columns `weight_VH` holds.
        temperature: divides the student's logits.
        teacher: where a divergence is wanted.
        teacher_temperature: divides the teacher's logits; the student's temperature where None.
        chunk_rows: rows of logits held at a time.
        reduce_hidden_grad: sum the gradient of `hidden_TH` over the group. Otherwise it is this shard's part and the
            caller sums, as sequence parallelism does with its reduce-scatter.

    Raises:
        NumericsError: a term is not finite: a broken hidden state, a label outside the vocabulary, or a token that the
            student can produce and the teacher cannot. Names the first such row; all ranks of the group raise alike.
    """
    plan = HeadPlan(
        vocab=vocab,
        temperature=temperature,
        teacher_temperature=temperature if teacher_temperature is None else teacher_temperature,
        chunk_rows=chunk_rows,
        reduce_hidden_grad=reduce_hidden_grad,
    )
    given = teacher or _no_teacher(hidden_TH)
    logprob_T, entropy_T, divergence_T = ChunkedHead.apply(  # type: ignore[no-untyped-call]  # torch leaves it untyped
        hidden_TH, weight_VH, labels_T, given.hidden_GH.detach(), given.rows_G, plan
    )
    _check_finite(labels_T, {"log-prob": logprob_T, "entropy": entropy_T, "divergence": divergence_T})
    return HeadTerms(logprob_T, entropy_T, divergence_T if teacher else None)


@torch.no_grad()
def head_logprobs(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    labels_T: Tensor,
    *,
    vocab: VocabShard,
    temperature: float = 1.0,
    chunk_rows: int = 256,
) -> Tensor:
    """`head_terms(...).logprob_T` without gradient and at less cost: one product and no entropy. Raises alike."""
    plan = HeadPlan(vocab=vocab, temperature=temperature, teacher_temperature=temperature, chunk_rows=chunk_rows)
    none = _no_teacher(hidden_TH)
    logits = ChunkedLogits(hidden_TH, weight_VH, labels_T, none.hidden_GH, none.rows_G, plan)
    logprob_T, _, _ = token_terms(logits.measure(entropy=False), none.rows_G, logits.dtype)
    _check_finite(labels_T, {"log-prob": logprob_T})
    return logprob_T


def _no_teacher(hidden_TH: Tensor) -> TeacherRows:
    return TeacherRows(hidden_TH.detach()[:0], torch.empty(0, dtype=torch.int64, device=hidden_TH.device))


def _check_finite(labels_T: Tensor, terms: Mapping[str, Tensor]) -> None:
    finite_T = torch.stack(list(terms.values())).detach().isfinite().all(0)
    if bool(finite_T.all()):
        return
    row = int(finite_T.logical_not().nonzero()[0])
    found = ", ".join(f"{name} {float(values_T[row])}" for name, values_T in terms.items())
    raise NumericsError(
        f"token row {row} of {finite_T.numel()}: found {found} at label {int(labels_T[row])}, expected finite values. "
        "Fix: look for non-finite hidden states or weights, a label outside the vocabulary, or (divergence alone) a "
        "token to which the teacher gives probability 0 and the student does not"
    )
