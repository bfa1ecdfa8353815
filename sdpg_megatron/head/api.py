"""Public interface of the head.

Shapes: T rows (response tokens), G rows with a teacher, V this rank's columns of the vocabulary, H hidden size,
C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sdpg_megatron.errors import NumericsError
from sdpg_megatron.head.autograd import GradInForward, OfLogits, Recompute, Terms, measure_squares, measure_terms
from sdpg_megatron.head.options import HeadOptions
from sdpg_megatron.head.shard import VocabShard


@dataclass(frozen=True, slots=True)
class TeacherRows:
    """The teacher's last hidden states, for the rows with a divergence. Other rows have divergence 0, at no cost."""

    hidden_GH: Tensor
    """Input of the output layer, any float type."""
    rows_G: Tensor
    """int64 [G]: index in T of each row; distinct, in any order."""
    weight_VH: Tensor | None = None
    """The teacher's output matrix, sharded like the student's; any hidden size. None: the student's matrix."""


@dataclass(frozen=True, slots=True)
class HeadTerms:
    """Per-token terms in nats: float32, or float64 for float64 inputs."""

    logprob_T: Tensor
    """log p(label)."""
    entropy_T: Tensor
    divergence_T: Tensor | None = None
    """Divergence of the student from the teacher; 0 on rows without a teacher. None if no teacher was given."""
    teacher_logprob_T: Tensor | None = None
    """log q(label), without gradient; 0 on rows without a teacher. None if no teacher was given."""

    def detached(self) -> HeadTerms:
        divergence_T = None if self.divergence_T is None else self.divergence_T.detach()
        return HeadTerms(self.logprob_T.detach(), self.entropy_T.detach(), divergence_T, self.teacher_logprob_T)


RowLoss = Callable[[HeadTerms, Tensor], Tensor]
"""(terms of C rows, int64 [C] indices of these rows in T) -> loss [C]. A row's loss depends only on its own terms."""


def head_terms(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    labels_T: Tensor,
    *,
    vocab: VocabShard,
    teacher: TeacherRows | None = None,
    options: HeadOptions | None = None,
) -> HeadTerms:
    """Log-prob, entropy and divergence of each row, differentiable in `hidden_TH` and `weight_VH`.

    Collective over `vocab.group`: all its ranks pass the same rows, labels and options, and get bit-identical results.
    The number of gathers depends only on T and G; zero rows need none. The teacher contributes no gradient to
    `hidden_TH` or `weight_VH`, even if it uses the same matrix. The backward pass recomputes the logits; `head_loss`
    can avoid that.

    Args:
        hidden_TH: the student's last hidden states, equal on all ranks of the group.
        weight_VH: this rank's rows of the output matrix, including padding.
        labels_T: int64, columns of the whole vocabulary.
        vocab: the columns that `weight_VH` holds.
        teacher: hidden states of the rows that get a divergence.

    Raises:
        NumericsError: a term is not finite: a non-finite hidden state, a label outside the vocabulary, or a token to
            which the teacher gives probability 0 and the student does not. Names the first such row; all ranks of the
            group raise it. Not raised with ``options.raises=False``.
    """
    options = replace(options or HeadOptions(), schedule="recompute").sized(weight_VH)
    inputs = _inputs(hidden_TH, weight_VH, labels_T, vocab, teacher, options)
    return _named(Recompute.apply(*inputs), labels_T, teacher is not None, options)  # type: ignore[no-untyped-call]


def head_loss(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    labels_T: Tensor,
    loss: RowLoss,
    *,
    vocab: VocabShard,
    teacher: TeacherRows | None = None,
    options: HeadOptions | None = None,
) -> tuple[Tensor, HeadTerms]:
    """Sum of a per-row loss, differentiable in `hidden_TH` and `weight_VH`, and the detached terms.

    Other arguments, gradients and errors: see `head_terms`.

    Args:
        loss: maps terms to per-row losses. All other tensors that it reads are treated as constants. Called once per
            chunk with "grad_in_forward", once for all rows with "recompute".
    """
    options = options or HeadOptions()
    if options.schedule == "recompute" or not torch.is_grad_enabled():
        terms = head_terms(hidden_TH, weight_VH, labels_T, vocab=vocab, teacher=teacher, options=options)
        every_T = torch.arange(labels_T.shape[0], device=labels_T.device)
        return loss(terms, every_T).sum(), terms.detached()
    has_teacher = teacher is not None

    def of_chunk(terms: Terms, at_C: Tensor) -> Tensor:
        return loss(HeadTerms(*terms) if has_teacher else HeadTerms(*terms[:2]), at_C)

    inputs = _inputs(hidden_TH, weight_VH, labels_T, vocab, teacher, options.sized(weight_VH))
    loss_sum, *found = GradInForward.apply(*inputs, of_chunk)  # type: ignore[no-untyped-call]
    return loss_sum, _named(found, labels_T, has_teacher, options)


@torch.no_grad()
def head_logprobs(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    labels_T: Tensor,
    *,
    vocab: VocabShard,
    options: HeadOptions | None = None,
) -> Tensor:
    """``head_terms(...).logprob_T`` without a graph, for one matrix product. Raises the same errors."""
    options = replace(options or HeadOptions(), schedule="recompute").sized(weight_VH)
    found = measure_terms(*_inputs(hidden_TH, weight_VH, labels_T, vocab, None, options))
    return _named(found, labels_T, False, options).logprob_T


@torch.no_grad()
def head_gradient_squares(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    labels_T: Tensor,
    *,
    logprob_grad_T: Tensor,
    divergence_grad_T: Tensor,
    vocab: VocabShard,
    teacher: TeacherRows | None = None,
    options: HeadOptions | None = None,
) -> tuple[Tensor, Tensor]:
    """Squared norms of the loss gradient in each row's logits, through the log-prob and through the divergence.

    Both are squared L2 norms over the whole vocabulary, float64 [T], of the gradient in the logits before temperature.
    Costs about three times the products of `head_logprobs`. Collective over `vocab.group`.

    Args:
        logprob_grad_T, divergence_grad_T: gradients of the loss in these terms.
    """
    options = replace(options or HeadOptions(), schedule="recompute").sized(weight_VH)
    inputs = _inputs(hidden_TH, weight_VH, labels_T, vocab, teacher, options)
    by_logprob_T, by_divergence_T = measure_squares(
        inputs, [(logprob_grad_T, None, None), (None, None, divergence_grad_T)]
    )
    return by_logprob_T, by_divergence_T


def logits_terms(
    logits_TV: Tensor,
    labels_T: Tensor,
    *,
    vocab: VocabShard,
    teacher_GV: Tensor | None = None,
    rows_G: Tensor | None = None,
    options: HeadOptions | None = None,
) -> HeadTerms:
    """`head_terms` from existing logits, differentiable in `logits_TV`; the backward pass has no collective.

    A logit of -inf marks a token with probability 0. No tensor of the logits' size is allocated except their gradient.

    Args:
        logits_TV: this rank's columns, including padding, before temperature.
        vocab: the columns that `logits_TV` holds.
        teacher_GV: the teacher's logits for the rows `rows_G`, or for all rows if that is None.

    Raises:
        NumericsError: see `head_terms`.
    """
    options = replace(options or HeadOptions(), schedule="recompute").sized(logits_TV.T)
    order_T = None
    if teacher_GV is not None and rows_G is not None:
        order_T = _teacher_first(rows_G, labels_T.shape[0])
    given_GV = logits_TV.detach()[:0] if teacher_GV is None else teacher_GV.detach()
    found = OfLogits.apply(logits_TV, given_GV, labels_T, order_T, vocab, options)  # type: ignore[no-untyped-call]
    return _named(found, labels_T, teacher_GV is not None, options)


def _inputs(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    labels_T: Tensor,
    vocab: VocabShard,
    teacher: TeacherRows | None,
    options: HeadOptions,
) -> tuple[Tensor | VocabShard | HeadOptions | None, ...]:
    """Arguments of `autograd.head_of_rows`."""
    if teacher is None:
        return hidden_TH, weight_VH, hidden_TH.detach()[:0], None, labels_T, None, vocab, options
    own_VH = None if teacher.weight_VH is None else teacher.weight_VH.detach()
    teacher_GH = teacher.hidden_GH.detach().to((weight_VH if own_VH is None else own_VH).dtype)
    order_T = _teacher_first(teacher.rows_G, labels_T.shape[0])
    return hidden_TH, weight_VH, teacher_GH, own_VH, labels_T, order_T, vocab, options


def _teacher_first(rows_G: Tensor, total: int) -> Tensor:
    """Row order, int64 [T]: rows with a teacher in their given order, then the others in ascending order."""
    has_teacher_T = torch.zeros(total, dtype=torch.bool, device=rows_G.device).index_fill_(0, rows_G, True)
    # A stable sort instead of nonzero(), which would synchronize with the device to learn the number of rows.
    return torch.cat((rows_G, has_teacher_T.to(torch.uint8).argsort(stable=True)[: total - rows_G.shape[0]]))


def _named(terms: Sequence[Tensor], labels_T: Tensor, has_teacher: bool, options: HeadOptions) -> HeadTerms:
    logprob_T, entropy_T, divergence_T, teacher_logprob_T = terms
    if options.raises:
        _check_finite(labels_T, {"log-prob": logprob_T, "entropy": entropy_T, "divergence": divergence_T})
    return (
        HeadTerms(logprob_T, entropy_T, divergence_T, teacher_logprob_T)
        if has_teacher
        else HeadTerms(logprob_T, entropy_T)
    )


def _check_finite(labels_T: Tensor, terms: Mapping[str, Tensor]) -> None:
    finite_T = torch.stack(list(terms.values())).detach().isfinite().all(0)
    if bool(finite_T.all()):
        return
    row = int(finite_T.logical_not().nonzero()[0])
    found = ", ".join(f"{name} {float(values_T[row].detach())}" for name, values_T in terms.items())
    raise NumericsError(
        f"token row {row} of {finite_T.numel()}: found {found} at label {int(labels_T[row])}, expected finite values. "
        "Fix: look for non-finite hidden states or weights, a label outside the vocabulary, or (divergence only) a "
        "token to which the teacher gives probability 0 and the student does not"
    )
