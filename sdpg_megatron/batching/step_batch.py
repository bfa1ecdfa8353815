"""Build the micro-batches of one optimizer step, sharded over data- and context-parallel ranks.

Every rank holds all samples and computes the same plan, so denominators are global without a collective.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.distributed import ProcessGroup

from sdpg_megatron.batching.collate import PackingLayout, collate
from sdpg_megatron.batching.micro_batches import Limit, plan
from sdpg_megatron.batching.samples import Sample, with_gradient
from sdpg_megatron.config import ObjectiveConfig
from sdpg_megatron.mcore.transfer import to_device
from sdpg_megatron.objectives.mismatch import correction
from sdpg_megatron.records import MicroBatch


@dataclass(frozen=True, slots=True)
class StepBatch:
    """Data of one optimizer step: this rank's micro-batches, and totals over all ranks."""

    micro_batches: list[MicroBatch]
    distill_scale: float
    """Weight of all response tokens divided by the weight of the gated ones; 1 if no gate is open."""

    def with_micro_batches(self, micro_batches: list[MicroBatch]) -> StepBatch:
        """Replace the micro-batches, after a pass has added tensors."""
        return replace(self, micro_batches=micro_batches)


def build_step(
    samples: Sequence[Sample],
    *,
    regularized: bool,
    limit: Limit,
    layout: PackingLayout,
    device: torch.device,
) -> StepBatch:
    """Plan one optimizer step and build this rank's micro-batches, the same number on all data-parallel ranks.

    Args:
        samples: all samples of the step, the same on every rank.
        regularized: True if the loss has a term for every token. Otherwise samples without an advantage and with
            closed gates give no gradient and are dropped.
    """
    weight = sum(sample.weight * len(sample.response) for sample in samples)
    gated_weight = sum(sample.weight * int(sample.gates.sum()) for sample in samples)
    kept = [replace(sample, unit=layout.unit) for sample in (samples if regularized else with_gradient(samples))]
    parts = plan(kept, layout.data_size, limit, alike=not layout.packed)[layout.data]
    return StepBatch(
        micro_batches=to_device([collate(part, layout) for part in parts], device),
        distill_scale=weight / gated_weight if gated_weight else 1.0,
    )


def with_corrections(
    batches: Sequence[MicroBatch], config: ObjectiveConfig, group: ProcessGroup | None = None
) -> list[MicroBatch]:
    """Add importance weights that correct for the rollout engine's log-probs to micro-batches with old log-probs.

    Micro-batches without old log-probs are unchanged: their pipeline stage computes no loss. Under context parallelism
    `group` is the context-parallel group, and all its ranks call this.
    """

    def corrected(batch: MicroBatch) -> MicroBatch:
        if batch.old_logprobs_T is None:
            return batch
        weights_T = correction(
            batch.old_logprobs_T,
            batch.rollout_logprobs_T,
            config,
            sequence_T=batch.sequence_T,
            sequences=batch.student.count,
            group=group,
        )
        return replace(batch, corrections_T=weights_T)

    return [corrected(batch) for batch in batches]
