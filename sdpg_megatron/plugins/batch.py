"""A host's sequences as a `MicroBatch`.

Shapes: T response tokens of a micro-batch on this rank, A response tokens of some sequences over all context-parallel
ranks, P packed tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sdpg_megatron.batching.collate import PackingLayout, collate
from sdpg_megatron.batching.samples import Sample
from sdpg_megatron.mcore.context_parallel import shards
from sdpg_megatron.records import MicroBatch

PER_TOKEN = {
    "advantages_T",
    "gates_T",
    "weights_T",
    "rollout_logprobs_T",
    "old_logprobs_T",
    "reference_logprobs_T",
    "teacher_logprobs_T",
    "corrections_T",
}
"""Fields of `MicroBatch` that a host may give per token."""


def host_batch(samples: Sequence[Sample], layout: PackingLayout, **tokens: Tensor | None) -> MicroBatch:
    """Build a micro-batch from a host's sequences, with the host's own per-token tensors.

    The rows of `student` also index the host's own packed or padded tokens, if these are in the same order and, under
    context parallelism, in Megatron's zigzag layout. Padding after the last sequence does not matter.

    Args:
        samples: sequences in the host's order. Their scalars apply where `tokens` gives nothing.
        layout: the host's layout on this rank.
        tokens: fields of `PER_TOKEN`, each [T] for this rank's response tokens, sequence by sequence. For tensors over
            all context-parallel ranks, `local_tokens` selects them.

    Raises:
        ValueError: an unknown field, or a tensor that has not one value for each response token.
    """
    return with_tokens(collate(samples, layout), **tokens)


def with_tokens(batch: MicroBatch, **tokens: Tensor | None) -> MicroBatch:
    """Replace per-token tensors of a micro-batch by a host's. None leaves the batch's own.

    Args:
        tokens: fields of `PER_TOKEN`, each [T] for this rank's response tokens, sequence by sequence.

    Raises:
        ValueError: an unknown field, or a tensor that has not one value for each response token.
    """
    for name, values in tokens.items():
        if name not in PER_TOKEN:
            raise ValueError(f"{name}: expected one of {', '.join(sorted(PER_TOKEN))}")
        if values is not None and values.shape != (batch.num_tokens,):
            raise ValueError(f"{name}: found shape {tuple(values.shape)}, expected ({batch.num_tokens},)")
    given: dict[str, Any] = {name: values for name, values in tokens.items() if values is not None}
    return replace(batch, **given)


def local_tokens(prompts: Sequence[int], responses: Sequence[int], layout: PackingLayout) -> Tensor:
    """Mask of the response tokens that this context-parallel rank predicts, bool [A].

    Args:
        prompts, responses: lengths of each sequence's prompt and response; A is the sum of `responses`.
        layout: packed.
    """
    if layout.context_size == 1 or not responses:
        return torch.ones(sum(responses), dtype=torch.bool)
    lengths = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    spans = [-(-length // layout.unit) * layout.unit for length in lengths]
    rank_P, _ = shards(spans, layout.context_size)
    firsts = itertools.accumulate(spans[:-1], initial=0)
    # A token is predicted at the position before it.
    rows = [
        torch.arange(first + prompt - 1, first + length - 1)
        for first, prompt, length in zip(firsts, prompts, lengths, strict=True)
    ]
    return rank_P[torch.cat(rows)] == layout.context


def token_weights(reducer: Callable[[Tensor], Tensor], count: int, device: torch.device | None = None) -> Tensor:
    """Weight of each token in a host's linear reducer, float32 [count]: the gradient of its result.

    Args:
        reducer: maps one value per token to a scalar, such as slime's ``sum_of_sample_mean``.
    """
    with torch.enable_grad():
        ones_T = torch.ones(count, device=device, requires_grad=True)
        total = reducer(ones_T)
        if not isinstance(total, Tensor) or not total.requires_grad:  # no sequence at all
            return ones_T.new_zeros(count)
        (weights_T,) = torch.autograd.grad(total, ones_T)
    return weights_T
