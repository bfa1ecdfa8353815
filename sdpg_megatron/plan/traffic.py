"""Bytes that a rank sends in a rollout step, by what they are for. Sequences have their assumed mean lengths.

A ring of n ranks sends (n - 1) / n of a tensor for each gather or reduce-scatter, and twice that for an all-reduce.
"""

from __future__ import annotations

from dataclasses import dataclass

from sdpg_megatron.architecture import Architecture
from sdpg_megatron.config import RunConfig
from sdpg_megatron.plan.activations import BYTES
from sdpg_megatron.plan.load import Load
from sdpg_megatron.plan.memory import StageMemory
from sdpg_megatron.plan.shards import Grid, count_parameters

MACHINE = 8
"""Assumed GPUs of a machine."""


@dataclass(frozen=True, slots=True)
class Flow:
    """One kind of communication."""

    sent: float
    """Bytes that a rank sends in a step."""
    span: int
    """Ranks, counted without gaps, that the group reaches over: whether it stays within a machine."""

    @property
    def local(self) -> bool:
        return self.span <= MACHINE


def forward_tokens(config: RunConfig, load: Load) -> tuple[float, float]:
    """Tokens of a rollout step that pass forward alone, and that are trained on."""
    several = config.optimizer.minibatches > 1 or config.objective.correction != "none"
    reads = 2 if config.objective.contrast else 1
    alone = load.mean_student * (several + load.needs.reference) + load.mean_teacher * reads
    return alone, load.mean_student


def flows(arch: Architecture, config: RunConfig, grid: Grid, load: Load, stage: StageMemory) -> dict[str, Flow]:
    """What a rank of `stage` sends; kinds that the layout has none of are left out."""
    w, t, c, p = BYTES[config.model.dtype], grid.tensor, grid.context, grid.pipeline
    alone, trained = (tokens / (grid.data * c) for tokens in forward_tokens(config, load))
    layers = arch.num_layers / p
    row = arch.hidden_size * w
    forwards = alone + trained * (2 if config.model.recompute else 1)
    found = {"data": Flow(_reductions(config, stage, w), t * c * grid.data)}
    if t > 1:
        # Twice a layer in each direction; sequence parallelism gathers inputs once more for the weights' gradients.
        backward = 3 if config.parallel.sequence else 2
        of_layers = layers * row * (2 * forwards + backward * trained) * 2 * (t - 1) / t
        responses = load.mean_responses / (grid.data * c)
        found["tensor"] = Flow(of_layers + responses * arch.hidden_size * 4 * 2 * (t - 1) / t, t)
    if p > 1:
        crossings = grid.chunks * row / (t if config.parallel.sequence else 1)
        found["pipeline"] = Flow(crossings * (alone + 2 * trained), grid.world)
    if c > 1:
        pair = 2 * arch.num_kv_heads * arch.head_dim / t * w
        rows = load.gated * load.mean_responses / (grid.data * c) * row
        found["context"] = Flow(layers * pair * (c - 1) * (forwards + trained) + rows, t * c)
    if arch.experts is not None and grid.expert * grid.expert_tensor > 1:
        ranks = grid.expert * grid.expert_tensor
        one = arch.experts.per_token * row * grid.expert_tensor * (ranks - 1) / ranks / t
        found["expert"] = Flow(layers * 2 * one * (forwards + trained), max(t, ranks))
    found["publish"] = Flow(float(publish_bytes(arch, config)), MACHINE if _beside(config) else MACHINE + 1)
    return found


def _reductions(config: RunConfig, stage: StageMemory, w: int) -> float:
    """Gradients in float32 and, where the optimizer is sharded, new weights; for each mini-batch."""
    sharded = config.optimizer.distributed
    each = sum(b.numel * (4 + w if sharded else 8) * (b.ranks - 1) / b.ranks for b in stage.buffers)
    return config.optimizer.minibatches * each


def publish_bytes(arch: Architecture, config: RunConfig) -> int:
    """The whole model, once; the leader sends it."""
    return count_parameters(arch) * BYTES[config.rollout.sglang.dtype or config.model.dtype]


def _beside(config: RunConfig) -> bool:
    """Whether servers are on the trainer's machine, as far as the configuration says."""
    return config.rollout.engine == "hf" or not config.rollout.sglang.urls
