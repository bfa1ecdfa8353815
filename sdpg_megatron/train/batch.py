"""From scored groups to the micro-batches of one optimizer step, cut over data-parallel ranks.

Every rank holds all groups and computes the same plan, so denominators are global without a collective.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sdpg_megatron.config import ObjectiveConfig
from sdpg_megatron.objectives.aggregation import sequence_weights
from sdpg_megatron.objectives.mismatch import correction
from sdpg_megatron.records import MicroBatch, ScoredGroup, SequenceBatch

if TYPE_CHECKING:
    from sdpg_megatron.records import Routing


@dataclass(frozen=True, slots=True)
class Sample:
    """One response as a training sequence."""

    student_prompt: tuple[int, ...]
    teacher_prompt: tuple[int, ...]
    """Empty where there is none; then every gate is closed."""
    response: tuple[int, ...]
    logprobs: tuple[float, ...]
    advantage: float
    gates: tuple[bool, ...]
    """At which response tokens the teacher counts."""
    weight: float
    """Loss weight of each of its tokens."""
    contrast_prompt: tuple[int, ...] = ()
    """With a wrong hint; empty where nobody reads one."""
    experts: Routing | None = field(default=None, compare=False, repr=False)
    """Of every token of the student's prompt and the response but the last; None for the router's choice."""

    @property
    def gate(self) -> bool:
        """It needs the teacher."""
        return any(self.gates)

    @property
    def cost(self) -> int:
        """Tokens that the step has to process for it: the teacher's count where the gate is open."""
        prompts = (self.student_prompt, *((self.teacher_prompt, self.contrast_prompt) if self.gate else ()))
        return sum(len(prompt) + len(self.response) for prompt in prompts if prompt)


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One optimizer step's data: this rank's micro-batches, and what is known over all ranks."""

    micro_batches: list[MicroBatch]
    distill_scale: float
    """Weight of all response tokens over that of the gated ones; 1 where there is none to average over."""

    def with_micro_batches(self, micro_batches: list[MicroBatch]) -> StepBatch:
        """The same step after a pass has added to its micro-batches."""
        return replace(self, micro_batches=micro_batches)


def nobody(advantage: float) -> bool:
    """`make_samples`' `taught` for a step without a teacher."""
    return False


def make_samples(
    groups: Sequence[ScoredGroup],
    config: ObjectiveConfig,
    *,
    taught: Callable[[float], bool],
    outcome: bool = True,
    stop_ids: Sequence[int] = (),
) -> list[Sample]:
    """Flatten groups, with gates and aggregation weights over the whole step.

    Args:
        taught: `Objective.taught`, or `nobody`.
        outcome: the loss reads advantages; otherwise the samples have none.
        stop_ids: tokens that the teacher may be kept from, see `ObjectiveConfig.distill_stop_tokens`.
    """
    undistilled = frozenset[int]() if config.distill_stop_tokens else frozenset(stop_ids)
    lengths = [len(c.tokens) for scored in groups for c in scored.group.completions]
    group_ids = [number for number, scored in enumerate(groups) for _ in scored.group.completions]
    weights = iter(sequence_weights(lengths, group_ids, config.aggregation))
    samples = []
    for scored in groups:
        for number, (completion, advantage) in enumerate(zip(scored.group.completions, scored.advantages, strict=True)):
            teacher_prompt = scored.teacher_prompt(number)
            read = teacher_prompt is not None and taught(advantage)
            samples.append(
                Sample(
                    student_prompt=scored.group.prompt.student_tokens,
                    teacher_prompt=teacher_prompt or (),
                    response=completion.tokens,
                    logprobs=completion.logprobs,
                    advantage=advantage if outcome else 0.0,
                    gates=tuple(read and token not in undistilled for token in completion.tokens),
                    weight=next(weights),
                    contrast_prompt=scored.group.prompt.contrast_tokens if config.contrast else (),
                    experts=completion.experts,
                )
            )
    return samples


def build_step(
    samples: Sequence[Sample],
    *,
    regularized: bool,
    micro_batch_size: int,
    data_rank: int,
    data_size: int,
    length_multiple: int,
    device: torch.device,
) -> StepBatch:
    """Plan one optimizer step and build this data-parallel rank's part of it.

    Args:
        samples: the whole step's, the same on every rank.
        regularized: the loss has a term for every token. Otherwise samples without advantage and with a closed gate
            give no gradient, and are left out.
        micro_batch_size: sequences of a micro-batch, at most.
        data_rank, data_size: this rank among the data-parallel ones. All get the same number of micro-batches.
        length_multiple: padded lengths are multiples of it (the tensor-parallel size under sequence parallelism).
        device: where the tensors go.
    """
    kept = samples if regularized else with_gradient(samples)
    shares = balance(kept, data_size)
    count = -(-max(1, *(len(share) for share in shares)) // micro_batch_size)
    mine = sorted(shares[data_rank], key=lambda sample: sample.cost)  # like with like: less padding
    parts = [mine[len(mine) * i // count : len(mine) * (i + 1) // count] for i in range(count)]
    return StepBatch(
        micro_batches=[collate(part, length_multiple).to(device) for part in parts],
        distill_scale=_weight(samples) / gated if (gated := _gated_weight(samples)) else 1.0,
    )


def with_gradient(samples: Sequence[Sample]) -> list[Sample]:
    """The samples that the outcome or the distillation term learns from.

    Their weights shrink by their share of the tokens: the sum is divided by the number of tokens that are left.
    """
    kept = [sample for sample in samples if sample.gate or sample.advantage]
    share = sum(len(s.response) for s in kept) / max(1, sum(len(s.response) for s in samples))
    return [replace(sample, weight=sample.weight * share) for sample in kept]


def with_corrections(batches: Sequence[MicroBatch], config: ObjectiveConfig) -> list[MicroBatch]:
    """Add what each token's loss is multiplied by, to micro-batches that have the sampling weights' log-probs.

    Those of a pipeline stage that has no log-probs stay as they are: it computes no loss.
    """
    return [
        batch
        if batch.old_logprobs_T is None
        else replace(
            batch,
            corrections_T=correction(batch.old_logprobs_T, batch.rollout_logprobs_T, batch.sequence_T, config),
        )
        for batch in batches
    ]


def _weight(samples: Sequence[Sample]) -> float:
    return sum(sample.weight * len(sample.response) for sample in samples)


def _gated_weight(samples: Sequence[Sample]) -> float:
    return sum(sample.weight * sum(sample.gates) for sample in samples)


def balance(samples: Sequence[Sample], size: int) -> list[list[Sample]]:
    """Deal samples to `size` ranks: the costliest first, each to the least loaded rank that has room left."""
    room = -(-len(samples) // size)
    shares: list[list[Sample]] = [[] for _ in range(size)]
    loads = [(0, rank) for rank in range(size)]
    for sample in sorted(samples, key=lambda sample: -sample.cost):
        load, rank = heapq.heappop(loads)
        shares[rank].append(sample)
        if len(shares[rank]) < room:
            heapq.heappush(loads, (load + sample.cost, rank))
    return shares


def collate(samples: Sequence[Sample], length_multiple: int) -> MicroBatch:
    """Pad samples into a micro-batch; no samples make one that contributes nothing."""
    gated = [sample for sample in samples if sample.gate]
    misled = [sample for sample in gated if sample.contrast_prompt]
    assert not misled or len(misled) == len(gated), "either every taught response has a wrong hint or none has"
    gates_T = torch.tensor([float(gate) for s in samples for gate in s.gates])
    student = _pad([(s.student_prompt, s.response, (True,) * len(s.response)) for s in samples], length_multiple)
    batch = MicroBatch(
        student=replace(student, experts_BSLK=_experts(samples, student.tokens_BS.shape[1])),
        teacher=_pad([(s.teacher_prompt, s.response, s.gates) for s in gated], length_multiple) if gated else None,
        contrast=_pad([(s.contrast_prompt, s.response, s.gates) for s in misled], length_multiple) if misled else None,
        gated_rows_G=gates_T.nonzero().squeeze(1),
        labels_T=torch.tensor([t for s in samples for t in s.response], dtype=torch.int64),
        advantages_T=_per_token(samples, [s.advantage for s in samples]),
        gates_T=gates_T,
        weights_T=_per_token(samples, [s.weight for s in samples]),
        rollout_logprobs_T=torch.tensor([x for s in samples for x in s.logprobs], dtype=torch.float32),
    )
    assert batch.rollout_logprobs_T.shape == batch.labels_T.shape, "a log-prob for each response token"
    return batch


def _per_token(samples: Sequence[Sample], values: Sequence[float]) -> Tensor:
    lengths = torch.tensor([len(sample.response) for sample in samples], dtype=torch.int64)
    return torch.tensor(values, dtype=torch.float32).repeat_interleave(lengths)


def _experts(samples: Sequence[Sample], width: int) -> Tensor | None:
    """int16 [B, S, layers, experts of a token]; see `SequenceBatch.experts_BSLK`."""
    recorded = [sample.experts for sample in samples if sample.experts is not None]
    if not recorded:
        return None
    experts_BSLK = torch.full((len(samples), width, *recorded[0].shape[1:]), -1, dtype=torch.int16)
    for b, sample in enumerate(samples):
        if sample.experts is not None:
            experts_BSLK[b, : len(sample.experts)] = torch.from_numpy(sample.experts.astype("int16"))
    return experts_BSLK


def _pad(
    sequences: Sequence[tuple[tuple[int, ...], tuple[int, ...], tuple[bool, ...]]], length_multiple: int
) -> SequenceBatch:
    """Right-pad prompt + response, and mark the positions that predict those response tokens which are asked for."""
    lengths = [len(prompt) + len(response) for prompt, response, _ in sequences] or [0]
    width = -(-max(1, *lengths) // length_multiple) * length_multiple
    tokens_BS = torch.zeros(len(lengths), width, dtype=torch.int64)
    rows: list[int] = []
    for b, (prompt, response, asked) in enumerate(sequences):
        tokens_BS[b, : len(prompt) + len(response)] = torch.tensor(prompt + response)
        first = b * width + len(prompt) - 1
        rows.extend(first + i for i, wanted in enumerate(asked) if wanted)
    return SequenceBatch(tokens_BS, torch.tensor(rows, dtype=torch.int64), torch.tensor(lengths))
