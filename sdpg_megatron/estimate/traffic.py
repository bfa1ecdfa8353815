"""Bytes that a rank sends in a rollout step, by kind and phase, at assumed mean lengths.

A ring of n ranks sends (n - 1) / n of a tensor for each gather or reduce-scatter, and twice that for an all-reduce.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sdpg_megatron.architecture import Architecture
from sdpg_megatron.config import RunConfig
from sdpg_megatron.estimate.activations import BYTES
from sdpg_megatron.estimate.gpus import MACHINE
from sdpg_megatron.estimate.load import Load
from sdpg_megatron.estimate.memory import StageMemory
from sdpg_megatron.estimate.shards import Grid, count_parameters


@dataclass(frozen=True, slots=True)
class Flow:
    """One kind of communication."""

    sent: Mapping[str, float]
    """Bytes that a rank sends in each phase of a step."""
    span: int
    """Number of consecutive ranks that the group spans; decides if it stays within a machine."""

    @property
    def local(self) -> bool:
        return self.span <= MACHINE


def flows(
    arch: Architecture, config: RunConfig, grid: Grid, load: Load, stages: Sequence[StageMemory]
) -> dict[str, Flow]:
    """Bytes that a rank of the largest of the pipeline `stages` sends, by kind, for kinds that the layout has."""
    w, t, c, p = BYTES[config.model.dtype], grid.tensor, grid.context, grid.pipeline
    forward_only, trained = (tokens / (grid.data * c) for tokens in (load.mean_forward_only, load.mean_student))
    layers = arch.num_layers / p
    row = arch.hidden_size * w
    forward = trained * (2 if config.model.recompute else 1)
    largest = max(stages, key=lambda stage: stage.numel)
    found = {"data": Flow({"update": _reductions(config, largest, w)}, t * c * grid.data)}
    if t > 1:
        # After attention and after a dense feed-forward network, in each direction; experts have separate groups.
        # Sequence parallelism gathers inputs once more for the weight gradients.
        one = layers * row * (1 if arch.experts else 2) * 2 * (t - 1) / t
        backward = (1.5 if config.parallel.sequence else 1) * trained
        head = load.mean_responses / (grid.data * c) * arch.hidden_size * 4 * 2 * (t - 1) / t
        found["tensor"] = Flow({"passes": one * forward_only, "update": one * (forward + backward) + head}, t)
    if p > 1:
        one = grid.chunks * row / (t if config.parallel.sequence else 1)
        found["pipeline"] = Flow({"passes": one * forward_only, "update": one * 2 * trained}, grid.world)
    if c > 1:
        one = layers * 2 * arch.num_kv_heads * arch.head_dim / t * w * (c - 1)
        rows = load.gated * load.mean_responses / (grid.data * c) * row
        found["context"] = Flow({"passes": one * forward_only + rows, "update": one * (forward + trained)}, t * c)
    ranks = 1 if arch.experts is None else grid.expert * grid.expert_tensor
    if arch.experts is not None and ranks > 1:
        one = layers * 2 * arch.experts.per_token * row * grid.expert_tensor * (ranks - 1) / ranks / t
        found["expert"] = Flow({"passes": one * forward_only, "update": one * (forward + trained)}, max(t, ranks))
    if gathered := _gathered(arch, config, stages):
        found["gather"] = Flow({"publish": gathered}, grid.world if p > 1 else max(t, ranks))
    found["publish"] = Flow({"publish": float(publish_bytes(arch, config))}, _reach(config, grid))
    return found


def _reductions(config: RunConfig, stage: StageMemory, w: int) -> float:
    """Gradients in float32 and, with a sharded optimizer, new weights, for all mini-batches."""
    sharded = config.optimizer.distributed
    each = sum(b.numel * (4 + w if sharded else 8) * (b.ranks - 1) / b.ranks for b in stage.buffers)
    return config.optimizer.minibatches * each


def _gathered(arch: Architecture, config: RunConfig, stages: Sequence[StageMemory]) -> float:
    """Bytes gathered to the first ranks of the stages, then to the leader."""
    whole = publish_bytes(arch, config)
    there = sum(stage.numel for stage in stages) * _published_width(config)
    return max(0, whole - there) + whole * (len(stages) - 1) / len(stages)


def publish_bytes(arch: Architecture, config: RunConfig) -> int:
    """Bytes of the whole model, which the leader sends once."""
    return count_parameters(arch) * _published_width(config)


def _published_width(config: RunConfig) -> int:
    return BYTES[config.rollout.sglang.dtype or config.model.dtype]


def server_gpus(config: RunConfig) -> int:
    """Number of GPUs of the servers that the run starts beside the trainer's; servers given by URL are not counted."""
    served = config.rollout.sglang
    if config.rollout.engine == "hf" or served.colocated or served.urls:
        return 0
    return served.servers * served.tensor * served.data


def _reach(config: RunConfig, grid: Grid) -> int:
    """Span of a publish: colocated servers are on the leader's machine, others after all ranks or elsewhere."""
    if config.rollout.engine == "hf" or config.rollout.sglang.colocated:
        return 1
    return MACHINE + 1 if config.rollout.sglang.urls else grid.world + server_gpus(config)
