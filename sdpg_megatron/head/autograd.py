"""Autograd functions of the head: two schedules from hidden rows, and one from given logits.

Shapes: see `chunked`. The head works on rows with a teacher first; `order_T` maps its rows to the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from sdpg_megatron.head.chunked import ChunkedHead
from sdpg_megatron.head.gradients import Gradients, restore
from sdpg_megatron.head.logits import Given, Products
from sdpg_megatron.head.options import HeadOptions
from sdpg_megatron.head.products import wide
from sdpg_megatron.head.rows import Upstream
from sdpg_megatron.head.shard import VocabShard

Terms = tuple[Tensor, Tensor, Tensor, Tensor]
"""log p(y), H, divergence and log q(y), each [T] in a `products.wide` type."""
ChunkLoss = Callable[[Terms, Tensor], Tensor]
"""(terms of a chunk, int64 [C] indices of the caller's rows) -> loss [C]."""


def head_of_rows(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    teacher_GH: Tensor,
    teacher_weight_VH: Tensor | None,
    labels_T: Tensor,
    order_T: Tensor | None,
    vocab: VocabShard,
    options: HeadOptions,
    *,
    held: bool = False,
) -> tuple[ChunkedHead, Tensor]:
    """Build the head for hidden rows in the caller's order; also return the rows in the head's order."""
    ordered_TH = hidden_TH if order_T is None else hidden_TH[order_T]
    tokens_VH = vocab.tokens(weight_VH)
    teacher_VH = tokens_VH if teacher_weight_VH is None else vocab.tokens(teacher_weight_VH)
    logits = Products(
        ordered_TH,
        tokens_VH,
        teacher_GH,
        teacher_VH,
        options.temperatures,
        held=held,
        shared=hidden_TH.is_cuda or bool(options.group_rows),
    )
    labels_T = labels_T if order_T is None else labels_T[order_T]
    return ChunkedHead(logits, labels_T, teacher_GH.shape[0], tokens_VH.shape[0], vocab, options), ordered_TH


def measure_terms(*inputs: Any) -> Terms:
    """Compute the terms without a graph. Arguments: see `head_of_rows`."""
    head, ordered_TH = head_of_rows(*inputs)
    return _terms(head, [head.measure(rows) for rows in head.chunks()], inputs[5], wide(ordered_TH.dtype))


def measure_squares(inputs: Sequence[Any], upstreams: Sequence[Upstream]) -> Tensor:
    """Squared L2 norm of each row's gradient in the logits, for each of K upstream gradients: float64 [K, T].

    Each upstream gradient computes the logits once more. Collective over the shard's group.

    Args:
        inputs: arguments of `head_of_rows`.
        upstreams: in the caller's row order.
    """
    head, ordered_TH = head_of_rows(*inputs)
    order_T, vocab = inputs[5], inputs[6]
    squares_KT = ordered_TH.new_zeros(len(upstreams), ordered_TH.shape[0], dtype=torch.float64)
    for rows in head.chunks():
        sums_NC = head.measure(rows)
        for number, upstream in enumerate(upstreams):
            coefficients = head.coefficients(sums_NC, _of_rows(upstream, rows, order_T))
            for columns in head.tiles:
                gradient_CV = head.gradient(rows, columns, coefficients)
                squares_KT[number, rows] += torch.linalg.vecdot(gradient_CV, gradient_CV)
    if vocab.ranks > 1 and squares_KT.numel():
        dist.all_reduce(squares_KT, group=vocab.group)
    return torch.stack([restore(squares_T, order_T) for squares_T in squares_KT])


def _terms(head: ChunkedHead, kept: Sequence[Tensor], order_T: Tensor | None, dtype: torch.dtype) -> Terms:
    terms_4T = head.labels_T.new_empty(4, len(head.labels_T), dtype=dtype)
    for rows, sums_NC in zip(head.chunks(), kept, strict=True):
        head.terms(sums_NC, terms_4T[:, rows])
    return _in_callers_order(terms_4T, order_T)


def _in_callers_order(terms_4T: Tensor, order_T: Tensor | None) -> Terms:
    ordered_4T = terms_4T if order_T is None else torch.empty_like(terms_4T).index_copy_(1, order_T, terms_4T)
    logprob_T, entropy_T, divergence_T, teacher_T = (term_T.clone() for term_T in ordered_4T)
    return logprob_T, entropy_T, divergence_T, teacher_T


class Recompute(torch.autograd.Function):
    """Arguments of `head_of_rows` -> `Terms`. Saves the inputs and N numbers per row for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        teacher_GH: Tensor,
        teacher_weight_VH: Tensor | None,
        labels_T: Tensor,
        order_T: Tensor | None,
        vocab: VocabShard,
        options: HeadOptions,
    ) -> Terms:
        tensors = hidden_TH, weight_VH, teacher_GH, teacher_weight_VH, labels_T, order_T
        head, _ = head_of_rows(*tensors, vocab, options)
        kept = [head.measure(rows) for rows in head.chunks()]
        ctx.save_for_backward(*tensors, *kept)
        ctx.vocab, ctx.options = vocab, options
        ctx.set_materialize_grads(False)
        terms = _terms(head, kept, order_T, wide(hidden_TH.dtype))
        ctx.mark_non_differentiable(terms[3])
        return terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_TH, weight_VH, teacher_GH, teacher_weight_VH, labels_T, order_T, *kept = ctx.saved_tensors
        tensors = hidden_TH, weight_VH, teacher_GH, teacher_weight_VH, labels_T, order_T
        head, ordered_TH = head_of_rows(*tensors, ctx.vocab, ctx.options)
        wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        gradients = Gradients(ordered_TH, weight_VH, ctx.vocab, ctx.options, wanted, deferred=False)
        for rows, sums_NC in zip(head.chunks(), kept, strict=True):
            head.logits.begin(rows)
            gradients.add_chunk(head, rows, sums_NC, _of_rows(upstream, rows, order_T))
        return *gradients.result(order_T), None, None, None, None, None, None


def _of_rows(upstream: Sequence[Tensor | None], rows: slice, order_T: Tensor | None) -> Upstream:
    at = rows if order_T is None else order_T[rows]
    logprob_C, entropy_C, divergence_C = (None if g_T is None else g_T[at] for g_T in upstream[:3])
    return logprob_C, entropy_C, divergence_C


class GradInForward(torch.autograd.Function):
    """Arguments of `head_of_rows` and a loss -> (loss summed over rows, *`Terms`). Only the sum is differentiable.

    The forward pass computes the gradients while a chunk's logits are in memory. The backward pass scales them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        teacher_GH: Tensor,
        teacher_weight_VH: Tensor | None,
        labels_T: Tensor,
        order_T: Tensor | None,
        vocab: VocabShard,
        options: HeadOptions,
        loss: ChunkLoss,
    ) -> tuple[Tensor, ...]:
        tensors = hidden_TH, weight_VH, teacher_GH, teacher_weight_VH, labels_T, order_T
        head, ordered_TH = head_of_rows(*tensors, vocab, options, held=True)
        wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        gradients = Gradients(ordered_TH, weight_VH, vocab, options, wanted, deferred=True)
        loss_sum = hidden_TH.new_zeros((), dtype=wide(hidden_TH.dtype))
        terms_4T = loss_sum.new_empty(4, len(labels_T))
        for rows in head.chunks():
            sums_NC = head.measure(rows)
            head.terms(sums_NC, terms_4T[:, rows])
            part, upstream = _differentiate(loss, terms_4T[:, rows], _caller_rows(rows, order_T, labels_T))
            loss_sum += part
            gradients.add_chunk(head, rows, sums_NC, upstream)
        del head  # free the logits before the weight gradient is allocated
        gradients.flush()
        gradients.wait()
        ctx.gradients, ctx.order_T = gradients, order_T
        terms = _in_callers_order(terms_4T, order_T)
        ctx.mark_non_differentiable(*terms)
        return loss_sum, *terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "head gradients: found a second backward pass, expected one. Fix: schedule=recompute for a retained "
                "graph"
            )
        gradients, ctx.gradients = ctx.gradients, None
        return *gradients.result(ctx.order_T, scale), None, None, None, None, None, None, None


def _caller_rows(rows: slice, order_T: Tensor | None, labels_T: Tensor) -> Tensor:
    """Indices of these rows in the caller's order, int64 [C]."""
    return torch.arange(rows.start, rows.stop, device=labels_T.device) if order_T is None else order_T[rows]


def _differentiate(loss: ChunkLoss, terms_4C: Tensor, at_C: Tensor) -> tuple[Tensor, Upstream]:
    """Loss of a chunk, and its gradients in log-prob, entropy and divergence."""
    with torch.enable_grad():
        logprob_C, entropy_C, divergence_C, teacher_C = (term_C.detach() for term_C in terms_4C)
        leaves = [term_C.requires_grad_() for term_C in (logprob_C, entropy_C, divergence_C)]
        total = loss((logprob_C, entropy_C, divergence_C, teacher_C), at_C).sum()
        if not total.requires_grad:
            return total, (None, None, None)
        grads = torch.autograd.grad(total, leaves, allow_unused=True)
    return total.detach(), (grads[0], grads[1], grads[2])


class OfLogits(torch.autograd.Function):
    """(student_TV, teacher_GV, labels_T, order_T, vocab, options) -> `Terms`. Saves the given logits, not copies."""

    @staticmethod
    def forward(
        ctx: Any,
        student_TV: Tensor,
        teacher_GV: Tensor,
        labels_T: Tensor,
        order_T: Tensor | None,
        vocab: VocabShard,
        options: HeadOptions,
    ) -> Terms:
        head = _head_of_logits(student_TV, teacher_GV, labels_T, order_T, vocab, options)
        kept = [head.measure(rows) for rows in head.chunks()]
        ctx.save_for_backward(student_TV, teacher_GV, labels_T, order_T, *kept)
        ctx.vocab, ctx.options = vocab, options
        ctx.set_materialize_grads(False)
        terms = _terms(head, kept, order_T, wide(student_TV.dtype))
        ctx.mark_non_differentiable(terms[3])
        return terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        student_TV, teacher_GV, labels_T, order_T, *kept = ctx.saved_tensors
        head = _head_of_logits(student_TV, teacher_GV, labels_T, order_T, ctx.vocab, ctx.options)
        gradient_TV = torch.zeros_like(student_TV)
        for rows, sums_NC in zip(head.chunks(), kept, strict=True):
            head.logits.begin(rows)
            coefficients = head.coefficients(sums_NC, _of_rows(upstream, rows, order_T))
            at_C = _caller_rows(rows, order_T, labels_T)
            for columns in head.tiles:
                part_CV = head.gradient(rows, columns, coefficients).to(student_TV.dtype)
                gradient_TV[:, columns].index_copy_(0, at_C, part_CV)
        return gradient_TV, None, None, None, None, None


def _head_of_logits(
    student_TV: Tensor,
    teacher_GV: Tensor,
    labels_T: Tensor,
    order_T: Tensor | None,
    vocab: VocabShard,
    options: HeadOptions,
) -> ChunkedHead:
    columns = vocab.tokens(student_TV.T).shape[0]
    logits = Given(student_TV, teacher_GV, order_T, options.temperatures)
    labels_T = labels_T if order_T is None else labels_T[order_T]
    return ChunkedHead(logits, labels_T, teacher_GV.shape[0], columns, vocab, options)
