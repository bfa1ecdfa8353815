"""From samples to the micro-batches of one optimizer step, cut over data- and context-parallel ranks.

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
    """One optimizer step's data: this rank's micro-batches, and what is known over all ranks."""

    micro_batches: list[MicroBatch]
    distill_scale: float
    """Weight of all response tokens over that of the gated ones; 1 where there is none to average over."""

    def with_micro_batches(self, micro_batches: list[MicroBatch]) -> StepBatch:
        """The same step after a pass has added to its micro-batches."""
        return replace(self, micro_batches=micro_batches)


def build_step(
    samples: Sequence[Sample],
    *,
    regularized: bool,
    limit: Limit,
    layout: PackingLayout,
    device: torch.device,
) -> StepBatch:
    """Plan one optimizer step and build this data-parallel rank's part of it.

    Args:
        samples: the whole step's, the same on every rank.
        regularized: the loss has a term for every token. Otherwise samples without advantage and with a closed gate
            give no gradient, and are left out.
        limit: of a micro-batch.
        layout: of the tensors, and this rank's place. All data-parallel ranks get the same number of micro-batches.
        device: where the tensors go.
    """
    kept = [replace(sample, unit=layout.unit) for sample in (samples if regularized else with_gradient(samples))]
    parts = plan(kept, layout.data_size, limit, alike=not layout.packed)[layout.data]
    return StepBatch(
        micro_batches=to_device([collate(part, layout) for part in parts], device),
        distill_scale=_weight(samples) / gated if (gated := _gated_weight(samples)) else 1.0,
    )


def with_corrections(
    batches: Sequence[MicroBatch], config: ObjectiveConfig, group: ProcessGroup | None = None
) -> list[MicroBatch]:
    """Add what each token's loss is multiplied by, to micro-batches that have the sampling weights' log-probs.

    Those of a pipeline stage that has no log-probs stay as they are: it computes no loss. Where responses are spread
    over context-parallel ranks, `group` is theirs, and all of them call this.
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


def _weight(samples: Sequence[Sample]) -> float:
    return sum(sample.weight * len(sample.response) for sample in samples)


def _gated_weight(samples: Sequence[Sample]) -> float:
    return sum(sample.weight * int(sample.gates.sum()) for sample in samples)
