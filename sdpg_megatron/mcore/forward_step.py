"""Forward step for Megatron's ``get_forward_backward_func()``.

Shapes: B sequences, S padded length (packed: B is 1 and S the number of tokens), H hidden size, T response tokens of a
micro-batch, C some of them, G those with a teacher, V this rank's columns of the vocabulary, P packed tokens of this
rank, D head size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.utils import unwrap_model
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from sdpg_megatron.head import HeadTerms, TeacherRows
from sdpg_megatron.mcore.attention import CausalAttention, PackedSequences
from sdpg_megatron.mcore.head import Head
from sdpg_megatron.mcore.output_layer import Handover, hidden_instead_of_logits
from sdpg_megatron.mcore.routing import as_padding_mask
from sdpg_megatron.objectives.base import Objective, StepContext, TokenMetric, TokenTerms
from sdpg_megatron.objectives.gradient_balance import gradient_squares, term_gradients
from sdpg_megatron.objectives.mismatch import mismatch
from sdpg_megatron.observe.metrics import Metric, Reduction
from sdpg_megatron.records import MicroBatch, SequenceBatch

NONFINITE = "train/nonfinite_tokens"
"""Metric: number of response tokens with non-finite terms or loss."""


def last_hidden(
    model: nn.Module, tokens_BS: Tensor, lengths: Sequence[int] | None = None, numbers_BS: Tensor | None = None
) -> Tensor:
    """Run a GPTModel chunk, wrapped or bare, without its output layer.

    Args:
        model: a chunk. If it is not the last of the model, its stage output [S, B, H] is returned.
        tokens_BS: int64; right-padded, or [1, S] packed sequences. Under sequence parallelism S must be a multiple of
            the tensor-parallel size.
        lengths: lengths of packed sequences over all context-parallel ranks (see `mcore.context_parallel`); None for
            padded sequences.
        numbers_BS: see `SequenceBatch.numbers_BS`.

    Returns:
        Last hidden states [B, S, H], after the final norm, complete on every tensor-parallel rank.

    Raises:
        ConfigError: the model's logits are not the plain product of these states and its output weight.
    """
    # GPTModel requires position ids, but rotary embeddings do not read them.
    positions_BS = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)
    (gpt,) = unwrap_model([model])
    more: dict[str, Any] = {}
    if lengths is not None:
        by_token = takes_angles_of_tokens(gpt)
        packed = more["packed_seq_params"] = PackedSequences.of(lengths, tokens_BS.device, cumulative=not by_token)
    if numbers_BS is not None:
        more["padding_mask"] = as_padding_mask(gpt, numbers_BS)
    handover: Handover | None = None
    with ExitStack() as stack:
        if gpt.post_process:
            handover = stack.enter_context(hidden_instead_of_logits(gpt))
        if lengths is not None and by_token:
            stack.enter_context(_angle_of_each_token(gpt.rotary_pos_emb, packed))
        hidden: Tensor = model(tokens_BS, positions_BS, None, **more)
    if handover is not None:
        handover.check(hidden)
    return hidden


def takes_angles_of_tokens(gpt: Any) -> bool:
    """True if the layers use `CausalAttention`, which does not read ``cu_seqlens_q``."""
    return any(isinstance(layer.self_attention.core_attention, CausalAttention) for layer in gpt.decoder.layers[:1])


@contextmanager
def _angle_of_each_token(rotary: Any, packed: PackedSequences) -> Iterator[None]:
    """Make megatron-core's rotary embedding return one angle per packed token of this rank, [P, 1, D].

    megatron-core's attention applies them unchanged if ``cu_seqlens_q`` is None.
    """

    def forward(max_seq_len: int, *_: Any, **__: Any) -> Tensor:
        angles_P11D: Tensor = rotary.get_emb(max_seq_len)
        return angles_P11D.squeeze(1).index_select(0, packed.positions_P)

    rotary.forward = forward
    try:
        yield
    finally:
        del rotary.forward


def hidden_states(model: nn.Module, batch: SequenceBatch) -> Tensor:
    """`last_hidden` of a batch."""
    return last_hidden(model, batch.tokens_BS, batch.lengths, batch.numbers_BS)


def rows(hidden_BSH: Tensor, batch: SequenceBatch) -> Tensor:
    """Hidden rows [T, H] that predict the response tokens of `batch`."""
    return hidden_BSH.flatten(0, 1).index_select(0, batch.rows_T)


@dataclass(frozen=True, slots=True)
class ForwardStep:
    """Forward step function of one optimizer step: ``forward_step(data_iterator, model) -> (hidden, loss_func)``.

    The model's config needs ``calculate_per_token_loss=True``. The loss function returns the weighted loss sum, the
    number of response tokens and the report. Megatron's `finalize_model_grads` divides the gradients by the global
    number of response tokens, so the result does not depend on the split into micro-batches or ranks.
    """

    objective: Objective
    context: StepContext
    head: Head
    teacher_matrix_VH: Tensor | None = None
    """This rank's shard of the teacher's output matrix; None: the model's output matrix."""
    context_group: ProcessGroup | None = None
    """Context-parallel group, for objectives that combine tokens of a response; None for one rank."""
    measure_gradient_ratio: bool = False
    """Also report the squared gradient norms of the loss terms, at the cost of a few more matrix products."""

    def __call__(self, data_iterator: Iterator[MicroBatch], model: nn.Module) -> tuple[Tensor, Any]:
        batch = next(data_iterator)
        return hidden_states(model, batch.student), functools.partial(self.loss, batch, model)

    def loss(self, batch: MicroBatch, model: nn.Module, hidden_BSH: Tensor) -> tuple[Tensor, Tensor, Report]:
        """Loss sum (scalar), number of response tokens (int scalar), and report; see `loss_and_metrics`."""
        loss_sum, metrics = self.loss_and_metrics(batch, model, hidden_BSH)
        count = torch.full((), batch.num_tokens, dtype=torch.int, device=loss_sum.device)
        return loss_sum, count, {name: reduce_tokens(metric) for name, metric in metrics.items()}

    def loss_and_metrics(
        self, batch: MicroBatch, model: nn.Module, hidden_BSH: Tensor
    ) -> tuple[Tensor, dict[str, TokenMetric]]:
        """Loss sum (scalar) and per-token metrics, for hosts with their own reports.

        If a token's terms or loss are not finite, the sum and its gradient are NaN. Without this, a non-finite loss
        could have a finite gradient.
        """
        teacher = self._teacher(batch.teacher_hidden_GH, batch.gated_rows_G, hidden_BSH)
        weights_T = batch.weights_T if batch.corrections_T is None else batch.weights_T * batch.corrections_T
        hidden_TH = rows(hidden_BSH, batch.student)

        def row_loss(terms: HeadTerms, at_C: Tensor) -> Tensor:
            given = token_terms(batch, terms, at_C, self.context_group)
            return self.objective.loss(given, self.context).loss_T * weights_T[at_C]

        whole = self.objective.reads_sequences
        loss_sum, head = self.head.loss(model, hidden_TH, batch.labels_T, teacher, row_loss, whole=whole)
        terms = token_terms(batch, head, slice(None), self.context_group)
        loss = self.objective.loss(terms, self.context)  # again, without a graph, for its metrics
        finite_T = all_finite(batch.old_logprobs_T, head.logprob_T, head.divergence_T, loss.loss_T * weights_T)
        # The gradient becomes NaN too, so a check of the gradient norm on any rank finds it.
        loss_sum = loss_sum * torch.where(finite_T.all(), 1.0, math.nan)
        metrics = {
            NONFINITE: TokenMetric(finite_T.logical_not(), reduction=Reduction.SUM),
            "train/loss": TokenMetric(loss.loss_T * weights_T),
            "train/entropy": TokenMetric(head.entropy_T),
            **mismatch(terms.old_logprob_T, batch.rollout_logprobs_T),
            **loss.metrics,
        }
        if batch.corrections_T is not None:
            metrics["rollout/correction"] = TokenMetric(batch.corrections_T)
        if self.measure_gradient_ratio:
            grads = term_gradients(self.objective, terms, self.context, weights_T)
            metrics |= gradient_squares(*self.head.gradient_squares(model, hidden_TH, batch.labels_T, teacher, grads))
        return loss_sum, metrics

    def _teacher(self, hidden_GH: Tensor | None, rows_G: Tensor, like: Tensor) -> TeacherRows | None:
        """Move the teacher's rows to the device of `like`. Rows of an early pass are in host memory."""
        if hidden_GH is None:
            return None
        return TeacherRows(hidden_GH.to(like.device, non_blocking=True), rows_G, self.teacher_matrix_VH)


def all_finite(*values: Tensor | None) -> Tensor:
    """True where all values are finite, bool [T]. None is skipped."""
    return torch.stack([values_T.detach().isfinite() for values_T in values if values_T is not None]).all(0)


def token_terms(
    batch: MicroBatch, head: HeadTerms, at: Tensor | slice, context_group: ProcessGroup | None = None
) -> TokenTerms:
    """Inputs of the objective for some response tokens of a micro-batch, from the earlier passes and the head."""
    old_T, reference_T, teacher_T = batch.old_logprobs_T, batch.reference_logprobs_T, batch.teacher_logprobs_T
    return TokenTerms(
        logprob_T=head.logprob_T,
        divergence_T=head.divergence_T,
        old_logprob_T=head.logprob_T.detach() if old_T is None else old_T[at],
        reference_logprob_T=None if reference_T is None else reference_T[at],
        advantage_T=batch.advantages_T[at],
        gate_T=batch.gates_T[at],
        entropy_T=head.entropy_T,
        teacher_logprob_T=head.teacher_logprob_T if teacher_T is None else teacher_T[at],
        any_open_gate=len(batch.gated_rows_G) > 0,
        sequence_T=batch.sequence_T[at],
        num_sequences=batch.student.count,
        context_group=context_group,
    )


@dataclass(frozen=True, slots=True)
class DeviceMetric:
    """A `Metric` on the device, so that reporting does not synchronize inside the schedule."""

    value: Tensor
    weight: Tensor | float
    """A Python number if all tokens count, as the host knows their number."""
    reduction: Reduction

    def read(self) -> Metric:
        """Synchronize with the device and read the metric. `read_reports` reads many metrics at once."""
        return Metric(float(self.value), self.reduction, float(self.weight))


Report = dict[str, DeviceMetric]


def read_reports(reports: Sequence[Report]) -> list[dict[str, Metric]]:
    """Read the metrics of several micro-batches, in one transfer from the device."""
    metrics = [metric for report in reports for metric in report.values()]
    on_device = [x for metric in metrics for x in (metric.value, metric.weight) if isinstance(x, Tensor)]
    numbers = iter(torch.stack(on_device).tolist() if on_device else [])

    def read(metric: DeviceMetric) -> Metric:
        value = next(numbers)
        return Metric(value, metric.reduction, next(numbers) if isinstance(metric.weight, Tensor) else metric.weight)

    return [{name: read(metric) for name, metric in report.items()} for report in reports]


_NEUTRAL = {Reduction.MEAN: 0.0, Reduction.SUM: 0.0, Reduction.MAX: -math.inf, Reduction.MIN: math.inf}


def reduce_tokens(metric: TokenMetric) -> DeviceMetric:
    """Reduce the per-token values of a micro-batch. Without tokens, the result is the neutral element."""
    values_T, neutral = metric.values_T.detach().float(), _NEUTRAL[metric.reduction]
    weight: Tensor | float = float(values_T.numel())
    if metric.mask_T is not None:
        values_T = values_T.where(metric.mask_T, neutral)  # indexing by the mask would synchronize with the device
        weight = metric.mask_T.sum().float()
    match metric.reduction:
        case Reduction.MEAN:
            value = values_T.sum() / (weight.clamp(min=1) if isinstance(weight, Tensor) else max(weight, 1.0))
        case Reduction.SUM:
            value = values_T.sum()
        case Reduction.MAX:
            value = values_T.max() if values_T.numel() else values_T.new_full((), neutral)
        case Reduction.MIN:
            value = values_T.min() if values_T.numel() else values_T.new_full((), neutral)
    return DeviceMetric(value, weight, metric.reduction)
