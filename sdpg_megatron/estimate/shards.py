"""Parameters of each rank, and Megatron's buffers for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sdpg_megatron.architecture import Architecture
from sdpg_megatron.config import OptimizerConfig, ParallelConfig
from sdpg_megatron.errors import ConfigError
from sdpg_megatron.weights.map import Parameter, hf_shapes, weight_map

PARAMETER_UNIT, BUCKET_UNIT = 64, 128
"""Alignment of parameters, and of bucket ends, in Megatron's distributed optimizer."""
LEAST_BUCKET, BUCKET_PER_RANK = 40_000_000, 1_000_000
"""Elements of a bucket if communication overlaps and `optimizer.bucket_size` is null."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Sizes of the parallel groups."""

    world: int
    tensor: int
    pipeline: int
    chunks: int
    """Model chunks per pipeline stage."""
    context: int
    data: int
    expert: int
    expert_tensor: int

    @classmethod
    def of(cls, parallel: ParallelConfig, ranks: int | None = None) -> Grid:
        """Compute the sizes for a run of `ranks` ranks; None for the fewest of the layout. Raises `ConfigError`."""
        dense, experts = parallel.tensor * parallel.context, parallel.expert_ranks
        least = parallel.pipeline * math.lcm(dense, experts)
        world = least if ranks is None else ranks
        if world < 1 or world % least:
            raise ConfigError("--ranks", world, f"a multiple of {least}, the layout's ranks", f"use {least}")
        return cls(
            world=world,
            tensor=parallel.tensor,
            pipeline=parallel.pipeline,
            chunks=parallel.virtual_pipeline or 1,
            context=parallel.context,
            data=world // (parallel.pipeline * dense),
            expert=parallel.expert,
            expert_tensor=parallel.expert_tensor_size,
        )

    @property
    def copies(self) -> int:
        """Ranks with the same non-expert parameters, which share the optimizer state."""
        return self.data * self.context

    @property
    def expert_copies(self) -> int:
        """Ranks with the same experts."""
        return self.world // (self.pipeline * self.expert * self.expert_tensor)

    def describe(self) -> str:
        sizes = {"tensor": self.tensor, "pipeline": self.pipeline, "context": self.context, "data": self.data}
        if self.expert * self.expert_tensor > 1:
            sizes |= {"expert": self.expert, "expert-tensor": self.expert_tensor}
        return " x ".join(f"{name} {size}" for name, size in sizes.items())


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's part of a parameter."""

    numel: int
    expert: bool = False
    shared: bool = False
    """True for an embedding with a copy on another stage, which Megatron puts into a separate bucket."""


def count_parameters(arch: Architecture) -> int:
    """Number of parameters of the whole model, without padding; tied ones count once."""
    one, two = (
        sum(math.prod(shape) for shape in hf_shapes(replace(arch, num_layers=layers)).values()) for layers in (1, 2)
    )
    return one + (arch.num_layers - 1) * (two - one)


def count_active(arch: Architecture) -> int:
    """Number of parameters in a token's matrix products, without the embedding and the head."""
    layer = count_parameters(replace(arch, num_layers=2)) - count_parameters(replace(arch, num_layers=1))
    if arch.experts is not None:
        layer -= (arch.experts.count - arch.experts.per_token) * 3 * arch.hidden_size * arch.ffn_size
    return arch.num_layers * layer


def stage_shards(arch: Architecture, grid: Grid, stage: int) -> list[list[Shard]]:
    """Shards of each model chunk of a pipeline stage, in the model's order."""
    of_layer, (embedding, norm, output) = _parameters(arch, grid)
    layers = arch.num_layers // (grid.pipeline * grid.chunks)
    shared = arch.tied_embeddings and grid.pipeline > 1
    chunks = [of_layer * layers for _ in range(grid.chunks)]
    if stage == 0:
        chunks[0] = [replace(embedding, shared=shared), *chunks[0]]
    if stage == grid.pipeline - 1:
        own = not arch.tied_embeddings or grid.pipeline > 1
        chunks[-1] = [*chunks[-1], norm, *([replace(output, shared=shared)] if own else [])]
    return chunks


def _parameters(arch: Architecture, grid: Grid) -> tuple[list[Shard], tuple[Shard, Shard, Shard]]:
    """Shards of a layer, and of embedding, final norm and output matrix."""
    outside: list[Shard] = []
    layer: list[Shard] = []
    counted: set[int] = set()
    ordered = sorted(weight_map(replace(arch, num_layers=1)).items(), key=lambda item: _place(item[0]))
    for _, parameter in ordered:
        if id(parameter) in counted or not _held(parameter, grid):  # a parameter has several spellings
            continue
        counted.add(id(parameter))
        of_expert = parameter.expert is not None
        size = grid.expert_tensor if of_expert else grid.tensor
        shard = Shard(math.prod(parameter.local_shape(size)), expert=of_expert)
        (outside if parameter.layer is None else layer).append(shard)
    embedding, norm, output = outside
    return layer, (embedding, norm, output)


_ATTENTION = tuple(f"self_attention.{part}" for part in ("linear_proj", "linear_qkv", "q_layernorm", "k_layernorm"))
_ORDER = ("input_layernorm", *_ATTENTION, "pre_mlp_layernorm", "mlp")
"""Modules of a layer in Megatron's order of registration, in which buffers are laid out."""


def _place(name: str) -> int:
    """Sort key of a parameter; 0 outside of layers."""
    module = name.removeprefix("decoder.layers.0.")
    return next((place for place, prefix in enumerate(_ORDER) if module.startswith(prefix)), 0)


def _held(parameter: Parameter, grid: Grid) -> bool:
    experts = parameter.arch.experts
    return parameter.expert is None or experts is None or parameter.expert < experts.count // grid.expert


@dataclass(frozen=True, slots=True)
class ParamAndGradBuffer:
    """Buffer of parameters that the same ranks reduce and gather together."""

    numel: int
    """Elements, with Megatron's padding."""
    own: int
    """Elements for which one rank has the optimizer state."""
    ranks: int
    padded: bool
    """True if parameters are views of the buffer, False if each has separate memory."""


def buffers(
    shards: Sequence[Shard], grid: Grid, config: OptimizerConfig, *, first: bool, rank: int = 0, expert_rank: int = 0
) -> list[ParamAndGradBuffer]:
    """Buffers of a model chunk.

    Args:
        first: true for the first chunk of the first stage, the only one that Megatron splits into buckets.
        rank: rank for `ParamAndGradBuffer.own`, among those with the same parameters.
        expert_rank: the same, among those with the same experts.
    """
    found = []
    for expert, ranks, number in ((False, grid.copies, rank), (True, grid.expert_copies, expert_rank)):
        alike = [shard for shard in shards if shard.expert == expert]
        if not alike:
            continue
        if not config.distributed:
            numel = sum(shard.numel for shard in alike)
            found.append(ParamAndGradBuffer(numel, numel, ranks, padded=False))
            continue
        bucket = None
        if first and config.overlap_grad_reduce:
            bucket = config.bucket_size or max(LEAST_BUCKET, BUCKET_PER_RANK * ranks)
        found.append(_laid_out(alike, ranks, bucket, number))
    return found


def _laid_out(shards: Sequence[Shard], ranks: int, bucket: int | None, rank: int) -> ParamAndGradBuffer:
    """Megatron's layout: parameters from last to first, in buckets that ranks share equally."""
    unit = math.lcm(ranks, BUCKET_UNIT)
    start = own = 0
    spans: list[tuple[int, int]] = []

    def close(end: int) -> int:
        nonlocal start, own
        end = -(-end // unit) * unit
        part = (end - start) // ranks
        low, high = start + rank * part, start + (rank + 1) * part
        own += sum(max(0, min(last, high) - max(begin, low)) for begin, last in spans)
        spans.clear()
        start = end
        return end

    end = 0
    for shard in reversed(shards):
        begin = -(-end // PARAMETER_UNIT) * PARAMETER_UNIT
        if shard.shared and spans:
            begin = close(begin)
        end = begin + shard.numel
        spans.append((begin, end))
        if shard.shared or (bucket is not None and end - start >= bucket):
            end = close(end)
    if spans:
        end = close(end)
    return ParamAndGradBuffer(end, own, ranks, padded=True)
