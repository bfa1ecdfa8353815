"""Megatron shards out as named, whole Hugging Face tensors, in buckets of bounded size.

Parameters travel one at a time in one canonical order: the shards of a parameter meet on the first tensor-parallel
rank of the pipeline stage that owns it, become whole tensors there, and go to the leader (stage 0, tensor-parallel
rank 0). Every whole tensor leaves its stage once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from sdpg_megatron.architecture import Architecture
from sdpg_megatron.errors import WeightError
from sdpg_megatron.weights.map import Parameter, Shape, check_covered, check_local, hf_shapes, weight_map

Bucket = Sequence[tuple[str, Tensor]]
"""Full tensors under their Hugging Face names: one piece of a weight stream."""


@dataclass(frozen=True, slots=True)
class _Item:
    """A parameter's turn in the stream."""

    name: str
    parameter: Parameter
    stage: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * sum(prod(shape) for shape in self.parameter.tensors.values())


@dataclass(frozen=True, slots=True)
class _Replica:
    """This rank's place among the ranks that hold one copy of the model. A group of None has this rank alone."""

    tp_group: dist.ProcessGroup | None
    pp_group: dist.ProcessGroup | None
    device: torch.device

    @property
    def tp_rank(self) -> int:
        return 0 if self.tp_group is None else self.tp_group.rank()

    @property
    def tp_size(self) -> int:
        return 1 if self.tp_group is None else self.tp_group.size()

    @property
    def stage(self) -> int:
        return 0 if self.pp_group is None else self.pp_group.rank()

    def over_stages(self, owned: dict[str, tuple[Shape, torch.dtype]]) -> list[dict[str, tuple[Shape, torch.dtype]]]:
        """What each pipeline stage owns, by stage."""
        if self.pp_group is None:
            return [owned]
        stages: list[dict[str, tuple[Shape, torch.dtype]]] = [{} for _ in range(self.pp_group.size())]
        dist.all_gather_object(stages, owned, group=self.pp_group)
        return stages


def stream(
    local_params: Mapping[str, Tensor],
    arch: Architecture,
    *,
    tp_group: dist.ProcessGroup | None = None,
    pp_group: dist.ProcessGroup | None = None,
    bucket_bytes: int = 256 * 2**20,
    dtype: torch.dtype | None = None,
) -> Iterator[Bucket]:
    """Stream the model's weights to the leader: pipeline stage 0, tensor-parallel rank 0.

    Every rank of one model replica iterates to the end, in step. The leader's buckets hold the tensors; those of the
    other ranks are empty, as many of them. The tensors are copies on the parameters' device, which neither an
    optimizer step nor the stream itself changes later; those of a bucket lie end to end in one piece of memory. A rank
    holds one bucket and one parameter at a time, as long as its consumer lets go of a bucket before it asks for the
    next.

    Args:
        local_params: the rank's parameters, all model chunks together, under their Megatron names with global layer
            numbers.
        arch: what the model is.
        tp_group: the tensor-parallel group; None for a single rank.
        pp_group: the pipeline group, in stage order; None for a single stage.
        bucket_bytes: bound of a bucket; a larger parameter has a bucket to itself.
        dtype: type of the tensors; None for each parameter's own.

    Yields:
        Buckets of (Hugging Face name, whole tensor), in canonical order, each tensor of the model exactly once.

    Raises:
        WeightError: on every rank, before anything is sent: a parameter is not in the map, has the wrong shape, is
            missing, or is owned by two stages.
    """
    place = _Replica(tp_group, pp_group, next(iter(local_params.values())).device)
    for items in _in_buckets(_plan(local_params, arch, place, dtype), bucket_bytes):
        yield _gather(items, local_params, place)


def _in_buckets(plan: Sequence[_Item], bucket_bytes: int) -> Iterator[list[_Item]]:
    bucket: list[_Item] = []
    held = 0
    for item in plan:
        if held and held + item.nbytes > bucket_bytes:
            yield bucket
            bucket, held = [], 0
        bucket.append(item)
        held += item.nbytes
    yield bucket


def _plan(
    local_params: Mapping[str, Tensor], arch: Architecture, place: _Replica, dtype: torch.dtype | None
) -> list[_Item]:
    """Who sends what, in canonical order; the same on every rank. Faults anywhere are raised everywhere."""
    parameters = weight_map(arch)
    stages = place.over_stages({name: (tuple(local.shape), local.dtype) for name, local in local_params.items()})
    items: dict[str, _Item] = {}
    owners: dict[str, str] = {}
    for stage, owned in enumerate(stages):
        check_local(parameters, {name: shape for name, (shape, _) in owned.items()}, place.tp_size)
        for name in (name for name in owned if parameters[name].exported):
            for tensor in parameters[name].tensors:
                owner = f"{name!r} of pipeline stage {stage}"
                if owners.setdefault(tensor, owner) != owner:
                    raise WeightError(f"Hugging Face tensor {tensor!r} is held twice: by {owners[tensor]} and {owner}")
            items[name] = _Item(name, parameters[name], stage, dtype or owned[name][1])
    check_covered(hf_shapes(arch), parameters, items)
    return [items[name] for name in parameters if name in items]


def _gather(items: Sequence[_Item], local_params: Mapping[str, Tensor], place: _Replica) -> Bucket:
    """Bring a bucket's whole tensors to the leader; nothing anywhere else."""
    leads = place.stage == 0 and place.tp_rank == 0
    bucket: list[tuple[str, Tensor]] = []
    for item, whole in zip(items, _room(items, place) if leads else [None] * len(items), strict=True):
        _fetch(item, local_params, place, whole)
        bucket += whole or []
    _let_go(place)
    return bucket


def _fetch(
    item: _Item, local_params: Mapping[str, Tensor], place: _Replica, whole: Sequence[tuple[str, Tensor]] | None
) -> None:
    """Fill `whole`, the leader's, with one parameter's tensors; elsewhere it is None."""
    if place.stage == item.stage:
        assembled = _assemble(item, local_params[item.name].detach(), place, whole)
        if place.stage:
            for _, tensor in assembled:
                dist.send(tensor, group=place.pp_group, group_dst=0)
    elif whole is not None:
        for _, tensor in whole:
            dist.recv(tensor, group=place.pp_group, group_src=item.stage)


def _assemble(
    item: _Item, local: Tensor, place: _Replica, whole: Sequence[tuple[str, Tensor]] | None
) -> Sequence[tuple[str, Tensor]]:
    """Join the owning stage's shards on its tensor-parallel rank 0, in `whole` if given; empty on its other ranks."""
    layout, size = item.parameter.layout, place.tp_size
    shards = [local]
    if layout.sharded and size > 1:
        local = local.to(item.dtype).contiguous()
        first = place.tp_rank == 0
        shards = [torch.empty_like(local) for _ in range(size)] if first else []
        dist.gather(local, shards if first else None, group=place.tp_group, group_dst=0)
    if place.tp_rank:
        return []
    whole = whole or _room([item], place)[0]
    for rank, shard in enumerate(shards):
        start = 0
        for piece in item.parameter.pieces(rank, size):
            if piece.source is not None:
                target = whole[piece.source][1].narrow(layout.dim, piece.start, piece.length)
                target.copy_(shard.narrow(layout.dim, start, piece.length))
            start += piece.length
    return whole


def _room(items: Sequence[_Item], place: _Replica) -> list[list[tuple[str, Tensor]]]:
    """Memory for the whole tensors of each item: one run of bytes without gaps, as process groups like to send it.

    Larger elements come first, so that each tensor begins at a multiple of its own.
    """
    run = torch.empty(sum(item.nbytes for item in items), dtype=torch.uint8, device=place.device)
    tensors: dict[str, Tensor] = {}
    end = 0
    for item in sorted(items, key=lambda item: -item.dtype.itemsize):
        for name, shape in item.parameter.tensors.items():
            start, end = end, end + prod(shape) * item.dtype.itemsize
            tensors[name] = run[start:end].view(item.dtype).view(shape)
    return [[(name, tensors[name]) for name in item.parameter.tensors] for item in items]


def _let_go(place: _Replica) -> None:
    """NCCL only enqueues: wait, or a stage that runs ahead of the leader keeps all that it has sent."""
    if place.device.type == "cuda":
        torch.cuda.current_stream(place.device).synchronize()
