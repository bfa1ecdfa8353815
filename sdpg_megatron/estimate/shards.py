"""Which parameters a rank holds, and the buffers that Megatron lays them out in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sdpg_megatron.architecture import Architecture
from sdpg_megatron.config import OptimizerConfig, ParallelConfig
from sdpg_megatron.errors import ConfigError
from sdpg_megatron.weights.map import Parameter, hf_shapes, weight_map

PARAMETER_UNIT, BUCKET_UNIT = 64, 128
"""Megatron's distributed optimizer begins parameters and ends buckets at multiples of these."""
LEAST_BUCKET, BUCKET_PER_RANK = 40_000_000, 1_000_000
"""Elements of a bucket where communication overlaps and `optimizer.bucket_size` is null."""


@dataclass(frozen=True, slots=True)
class Grid:
    """How many ranks share what."""

    world: int
    tensor: int
    pipeline: int
    chunks: int
    """Of the model, on each pipeline stage."""
    context: int
    data: int
    expert: int
    expert_tensor: int

    @classmethod
    def of(cls, parallel: ParallelConfig, ranks: int | None = None) -> Grid:
        """`ranks`: of the whole run; None for the fewest that the layout allows. Raises `ConfigError`."""
        dense, experts = parallel.tensor * parallel.context, parallel.expert_ranks
        least = parallel.pipeline * math.lcm(dense, experts)
        world = least if ranks is None else ranks
        if world < 1 or world % least:
            raise ConfigError("--ranks", world, f"a multiple of {least}, which the layout takes", f"use {least}")
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
        """Ranks that hold the same parameters, but for experts: they share the optimizer's state."""
        return self.data * self.context

    @property
    def expert_copies(self) -> int:
        """Ranks that hold the same experts."""
        return self.world // (self.pipeline * self.expert * self.expert_tensor)

    def describe(self) -> str:
        sizes = {"tensor": self.tensor, "pipeline": self.pipeline, "context": self.context, "data": self.data}
        if self.expert * self.expert_tensor > 1:
            sizes |= {"expert": self.expert, "expert-tensor": self.expert_tensor}
        return " x ".join(f"{name} {size}" for name, size in sizes.items())


@dataclass(frozen=True, slots=True)
class Shard:
    """This rank's part of a parameter."""

    numel: int
    expert: bool = False
    shared: bool = False
    """The embedding where another stage has a copy of it, which Megatron gives a bucket of its own."""


def count_parameters(arch: Architecture) -> int:
    """Of the whole model, without padding; tied ones once."""
    one, two = (
        sum(math.prod(shape) for shape in hf_shapes(replace(arch, num_layers=layers)).values()) for layers in (1, 2)
    )
    return one + (arch.num_layers - 1) * (two - one)


def count_active(arch: Architecture) -> int:
    """Of those that a token meets in a matrix product, without the embedding and the head."""
    layer = count_parameters(replace(arch, num_layers=2)) - count_parameters(replace(arch, num_layers=1))
    if arch.experts is not None:
        layer -= (arch.experts.count - arch.experts.per_token) * 3 * arch.hidden_size * arch.ffn_size
    return arch.num_layers * layer


def stage_shards(arch: Architecture, grid: Grid, stage: int) -> list[list[Shard]]:
    """What each model chunk of a pipeline stage holds on a rank, in the model's order."""
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
    """A layer's, and embedding, final norm and output matrix."""
    outside: list[Shard] = []
    layer: list[Shard] = []
    seen: set[int] = set()
    ordered = sorted(weight_map(replace(arch, num_layers=1)).items(), key=lambda item: _place(item[0]))
    for _, parameter in ordered:
        if id(parameter) in seen or not _held(parameter, grid):  # a parameter has several spellings
            continue
        seen.add(id(parameter))
        of_expert = parameter.expert is not None
        size = grid.expert_tensor if of_expert else grid.tensor
        shard = Shard(math.prod(parameter.local_shape(size)), expert=of_expert)
        (outside if parameter.layer is None else layer).append(shard)
    embedding, norm, output = outside
    return layer, (embedding, norm, output)


_ATTENTION = tuple(f"self_attention.{part}" for part in ("linear_proj", "linear_qkv", "q_layernorm", "k_layernorm"))
_ORDER = ("input_layernorm", *_ATTENTION, "pre_mlp_layernorm", "mlp")
"""Of a layer's modules, as Megatron registers them: it lays parameters out in this order."""


def _place(name: str) -> int:
    """What parameters are sorted by; outside of layers all are alike."""
    module = name.removeprefix("decoder.layers.0.")
    return next((place for place, prefix in enumerate(_ORDER) if module.startswith(prefix)), 0)


def _held(parameter: Parameter, grid: Grid) -> bool:
    experts = parameter.arch.experts
    return parameter.expert is None or experts is None or parameter.expert < experts.count // grid.expert


@dataclass(frozen=True, slots=True)
class ParamAndGradBuffer:
    """Parameters of one kind that are reduced and gathered together, by the ranks that hold the same."""

    numel: int
    """With Megatron's padding."""
    own: int
    """Elements whose optimizer state one of these ranks has."""
    ranks: int
    padded: bool
    """The parameters lie in the buffer; otherwise each has its own memory."""


def buffers(
    shards: Sequence[Shard], grid: Grid, config: OptimizerConfig, *, first: bool, rank: int = 0, expert_rank: int = 0
) -> list[ParamAndGradBuffer]:
    """The buffers of a model chunk.

    Args:
        first: it is the first chunk of the first stage, the only one that Megatron cuts into buckets.
        rank: whose share is `Buffer.own`: its number among those that hold the same parameters.
        expert_rank: likewise, the same experts.
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
    """Megatron's layout: parameters from last to first, cut into buckets that every rank has an equal part of."""
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
