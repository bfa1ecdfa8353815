"""Forward-only passes over the training's pipeline schedule: teacher hidden rows, and log-probs of sampled tokens.

Shapes: T response tokens of a micro-batch, G rows with an open gate, H hidden size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from sdpg_megatron.mcore.context_parallel import exchange
from sdpg_megatron.mcore.forward_step import hidden_states, rows
from sdpg_megatron.mcore.head import Head
from sdpg_megatron.records import MicroBatch, SequenceBatch


def run_schedule(
    chunks: Sequence[nn.Module],
    forward_step: Callable[..., Any],
    batches: Sequence[MicroBatch],
    *,
    forward_only: bool = False,
    collect: bool = False,
) -> list[Any]:
    """Run micro-batches through Megatron's schedule. Returns one result per micro-batch on the last stage, else []."""
    fed = full_rounds(chunks, batches)
    size, length = fed[0].student.tokens_BS.shape  # with pipeline stages, each micro-batch sends its shape
    results: list[Any] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(fed) for _ in chunks],
        model=list(chunks),
        num_microbatches=len(fed),
        micro_batch_size=size,
        seq_length=length,
        forward_only=forward_only,
        collect_non_loss_data=collect,
    )
    return results[: len(batches)]


def full_rounds(chunks: Sequence[nn.Module], batches: Sequence[MicroBatch]) -> list[MicroBatch]:
    """The micro-batches that `run_schedule` runs: the interleaved schedule needs full rounds.

    Micro-batches without response tokens pad the last round.
    """
    rounds = parallel_state.get_pipeline_model_parallel_world_size() if len(chunks) > 1 else 1
    return [*batches, *[batches[0].emptied()] * (-len(batches) % rounds)]


@torch.no_grad()
def teacher_hidden(chunks: Sequence[nn.Module], batches: Sequence[MicroBatch]) -> list[Tensor | None]:
    """Last hidden states of the teacher at response rows with an open gate: [G, H] per micro-batch, on the last stage.

    Only these are kept: H numbers per token instead of V / TP logits. The head computes the teacher's distribution from
    them, tile by tile. None for micro-batches without an open gate, and on other stages. The pass runs in eval mode,
    without dropout.
    """

    def forward(data: Iterator[MicroBatch], model: nn.Module) -> tuple[Tensor, Any]:
        sequences = next(data).student
        return hidden_states(model, sequences), _Collect(lambda hidden: rows(hidden, sequences))

    with_teacher = [dataclasses.replace(batch, student=batch.teacher) for batch in batches if batch.teacher is not None]
    fillers = [batches[0].emptied()] * (_most(len(with_teacher)) - len(with_teacher))
    found = iter(_collect(chunks, forward, [*with_teacher, *fillers]))
    return [None if batch.teacher is None else _to_student_ranks(next(found), batch.teacher) for batch in batches]


def _to_student_ranks(rows_GH: Tensor | None, read: SequenceBatch) -> Tensor | None:
    """Send the teacher's rows to the context-parallel ranks that have the same response tokens for the student.

    The prompts differ in length, so a response token can be on another rank in the teacher's layout.
    """
    if rows_GH is None or read.route is None:
        return rows_GH
    return exchange(rows_GH, read.route, parallel_state.get_context_parallel_group())


@torch.no_grad()
def teacher_logprobs(chunks: Sequence[nn.Module], batches: Sequence[MicroBatch], head: Head) -> list[Tensor | None]:
    """log q(y_t) of the response tokens under the teacher: [T] per micro-batch, on the last stage; 0 at closed gates.

    Runs `teacher_hidden`, then the head with the model's current output matrix. None as for `teacher_hidden`.
    """

    def scattered(batch: MicroBatch, hidden_GH: Tensor) -> Tensor:
        at_G = batch.gated_rows_G
        logprob_G = head.teacher_logprobs(chunks[-1], hidden_GH, batch.labels_T[at_G])
        return logprob_G.new_zeros(batch.num_tokens).index_copy_(0, at_G, logprob_G)

    rows = zip(batches, teacher_hidden(chunks, batches), strict=True)
    return [None if hidden_GH is None else scattered(batch, hidden_GH) for batch, hidden_GH in rows]


@torch.no_grad()
def logprobs(chunks: Sequence[nn.Module], batches: Sequence[MicroBatch], head: Head) -> list[Tensor | None]:
    """log pi(y_t) of the response tokens under the model's current weights: [T] per micro-batch, on the last stage.

    None on other stages. The pass runs in eval mode, without dropout.
    """

    def forward(data: Iterator[MicroBatch], model: nn.Module) -> tuple[Tensor, Any]:
        batch = next(data)

        def collect(hidden_BSH: Tensor) -> Tensor:
            return head.logprobs(model, rows(hidden_BSH, batch.student), batch.labels_T)

        return hidden_states(model, batch.student), _Collect(collect)

    return _collect(chunks, forward, batches)


@dataclass(frozen=True, slots=True)
class _Collect:
    """Loss function of a forward-only pass, called by Megatron with ``non_loss_data=True``."""

    collect: Callable[[Tensor], Tensor]

    def __call__(self, hidden_BSH: Tensor, non_loss_data: bool) -> Tensor:
        return self.collect(hidden_BSH)


def _collect(
    chunks: Sequence[nn.Module], forward: Callable[..., Any], batches: Sequence[MicroBatch]
) -> list[Tensor | None]:
    """Run a forward-only pass. Returns one result per micro-batch on the last stage, Nones on other stages."""
    if not batches:
        return []
    with _eval_mode(chunks):
        return run_schedule(chunks, forward, batches, forward_only=True, collect=True) or [None] * len(batches)


@contextmanager
def _eval_mode(chunks: Sequence[nn.Module]) -> Iterator[None]:
    """Put the chunks in eval mode, and restore the mode of every module on exit."""
    training = [module for chunk in chunks for module in chunk.modules() if module.training]
    for chunk in chunks:
        chunk.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _most(count: int) -> int:
    """Maximum count over the ranks that share experts, which must run the same number of micro-batches. Collective."""
    group = parallel_state.get_expert_tensor_and_model_parallel_group()
    if group.size() <= parallel_state.get_tensor_model_parallel_world_size():
        return count
    counts = [count] * group.size()
    dist.all_gather_object(counts, count, group=group)
    return max(counts)
