"""One rollout of slime on one rank: its sequences with gates, and the micro-batches of its training steps.

Shapes: N response tokens of a sample, A response tokens of all samples of this data-parallel rank, over all
context-parallel ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from sdpg_megatron.batching.collate import PackingLayout, collate
from sdpg_megatron.batching.samples import Sample
from sdpg_megatron.errors import DataError
from sdpg_megatron.plugins.batch import local_tokens
from sdpg_megatron.records import MicroBatch

if TYPE_CHECKING:
    from sdpg_megatron.records import TokenIds


@dataclass(frozen=True, slots=True, eq=False)
class SlimeRollout:
    """Samples of this data-parallel rank, in slime's order. All ranks of its replica have the same ones."""

    samples: list[Sample]
    """Without scalars and log-probs: slime's own tensors replace them."""
    weights: list[np.ndarray[Any, Any]]
    """[N] for each sample: loss weight of each token, up to a factor that all tokens share."""
    micro_batches: list[list[list[int]]]
    """Indices of the samples of each micro-batch, by step."""
    keys: list[int]
    """Identity of the tensor of each sample's tokens, which slime hands on to the loss function."""

    def collated(self, step: int, layout: PackingLayout, *, teacher: bool) -> list[MicroBatch]:
        """Micro-batches of a step, in host memory. `teacher`: False closes all gates."""

        def read(sample: Sample) -> Sample:
            return sample if teacher else replace(sample, gates=np.zeros_like(sample.gates))

        return [collate([read(self.samples[i]) for i in indices], layout) for indices in self.micro_batches[step]]

    def distill_scale(self, step: int, device: torch.device) -> float:
        """Weight of the step's response tokens divided by the weight of the gated ones; 1 without open gates.

        Collective over the data-parallel ranks.
        """
        here = [i for indices in self.micro_batches[step] for i in indices]
        gated = sum(float(self.weights[i][self.samples[i].gates].sum()) for i in here)
        totals = torch.tensor([sum(float(self.weights[i].sum()) for i in here), gated], device=device)
        dist.all_reduce(totals, group=parallel_state.get_data_parallel_group())
        weight, gated = totals.tolist()
        return weight / gated if gated else 1.0


def read_rollout(
    data: Mapping[str, Any],
    prompts: Sequence[TokenIds],
    layout: PackingLayout,
    *,
    distill_enabled: Callable[[float], bool],
    stop_ids: Sequence[int],
    per_token: bool,
    vocab_size: int,
) -> SlimeRollout:
    """Read slime's training data after it has computed the advantages. Collective over the replica's ranks.

    Args:
        data: slime's ``rollout_data``; not modified.
        prompts: the teacher's prompt of each sample; empty for none.
        distill_enabled: `Objective.distill_enabled`; it decides for each token by its advantage.
        stop_ids: tokens that are not distilled.
        per_token: ``--calculate-per-token-loss``.
        vocab_size: number of vocabulary columns with padding.

    Raises:
        DataError: images, or a token id beyond the vocabulary.
    """
    if data.get("multimodal_train_inputs") is not None:
        expected = "samples of text: the teacher's pass has no images"
        raise DataError("slime's samples", "multimodal_train_inputs", expected, "train on text only")
    lengths, totals = list(data["response_lengths"]), list(data["total_lengths"])
    tokens = _split(torch.cat(list(data["tokens"])).int(), totals)
    weights = [mask.astype(np.float32) for mask in _split(torch.cat(list(data["loss_masks"])), lengths)]
    if not per_token:
        sums = torch.as_tensor(data["rollout_mask_sums"]).tolist()
        weights = [x / max(1.0, total) for x, total in zip(weights, sums, strict=True)]
    gates = _split(_gates(whole_advantages(data, layout), distill_enabled), lengths)
    samples = []
    for prompt, sequence, length, weight, gate in zip(prompts, tokens, lengths, weights, gates, strict=True):
        if len(prompt) and prompt.max() >= vocab_size:
            found, expected = f"token id {prompt.max()}", f"ids below the padded vocabulary size {vocab_size}"
            raise DataError("teacher prompt", found, expected, "encode it with the model's tokenizer")
        response = sequence[len(sequence) - length :]
        samples.append(
            Sample(
                student_prompt=sequence[: len(sequence) - length],
                teacher_prompt=np.asarray(prompt, np.int32),
                response=response,
                logprobs=np.zeros(length, np.float32),
                advantage=0.0,
                gates=gate & (len(prompt) > 0) & (weight > 0) & ~np.isin(response, list(stop_ids)),
                weight=1.0,
            )
        )
    ends = [0, *itertools.accumulate(data["num_microbatches"])]
    steps = [data["micro_batch_indices"][first:end] for first, end in itertools.pairwise(ends)]
    return SlimeRollout(samples, weights, steps, [id(x) for x in data["tokens"]])


def _gates(advantages_A: Tensor, distill_enabled: Callable[[float], bool]) -> Tensor:
    """Decision for each token, bool [A]. Most tokens share their advantage with others."""
    values, index_A = np.unique(advantages_A.numpy(), return_inverse=True)
    return torch.tensor([distill_enabled(value) for value in values.tolist()], dtype=torch.bool)[index_A.reshape(-1)]


def whole_advantages(data: Mapping[str, Any], layout: PackingLayout) -> Tensor:
    """Advantage of every response token of this data-parallel rank's samples, float32 [A] in host memory.

    Collective: slime computes advantages on the last pipeline stage only, for the tokens of each context-parallel rank.
    """
    lengths, totals = list(data["response_lengths"]), list(data["total_lengths"])
    whole_A = torch.zeros(sum(lengths), device=data["tokens"][0].device)
    if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        prompts = [total - length for total, length in zip(totals, lengths, strict=True)]
        here_A = local_tokens(prompts, lengths, layout).to(whole_A.device)
        whole_A[here_A] = torch.cat(list(data["advantages"])).to(whole_A)
        if layout.context_size > 1:
            dist.all_reduce(whole_A, group=parallel_state.get_context_parallel_group())
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(whole_A, last, group=parallel_state.get_pipeline_model_parallel_group())
    return whole_A.cpu()


def _split(values: Tensor, lengths: Sequence[int]) -> list[np.ndarray[Any, Any]]:
    return np.split(values.cpu().numpy(), np.cumsum(lengths)[:-1])
