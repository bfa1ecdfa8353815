"""Stream of a model's weights: Megatron shards to whole Hugging Face tensors, in buckets of bounded size.

Parameters are sent one at a time in canonical order. The first rank of a parameter's pipeline stage gathers its shards,
joins them into whole tensors, and sends these once to the leader, the first rank of stage 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sdpg_megatron.architecture import Architecture
from sdpg_megatron.errors import WeightError
from sdpg_megatron.weights.bucket import Allocate, Bucket, Scratch, TensorSpec, allocate, in_buckets
from sdpg_megatron.weights.map import ExpertShare, Parameter, Shape, check_covered, check_local, hf_shapes, weight_map

T = TypeVar("T")
Owned = dict[str, tuple[Shape, torch.dtype]]
"""Shape and type of a rank's parameters, by name."""
Tensors = list[Tensor]
"""A parameter's whole Hugging Face tensors, in the order of its map entry."""


@dataclass(frozen=True, slots=True)
class _Item:
    """A parameter of the stream and the pipeline stage that owns it."""

    name: str
    parameter: Parameter
    stage: int
    dtype: torch.dtype

    @property
    def specs(self) -> list[TensorSpec]:
        return [TensorSpec(name, self.dtype, shape) for name, shape in self.parameter.tensors.items()]

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs)


class WeightStream(Iterator[Bucket]):
    """Iterates over the model's weights in buckets on the leader, the first rank of pipeline stage 0.

    Collective: every rank of one model replica, including all tensor-parallel groups of its experts, iterates to the
    end. The other ranks get the same number of empty buckets. The tensors are copies on the parameters' device: later
    optimizer steps do not change them. A rank holds one bucket and one parameter at a time if its consumer releases a
    bucket before it requests the next.
    """

    allocate: Allocate
    """Allocates the memory of the leader's buckets. A consumer may replace it before the first bucket."""

    def __init__(
        self,
        local_params: Mapping[str, Tensor],
        arch: Architecture,
        *,
        tp_group: dist.ProcessGroup | None = None,
        pp_group: dist.ProcessGroup | None = None,
        expert_group: dist.ProcessGroup | None = None,
        expert_tensor: int = 1,
        bucket_bytes: int = 256 * 2**20,
        dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            local_params: the rank's parameters of all model chunks, under their Megatron names with global layer and
                expert numbers.
            arch: the model's architecture.
            tp_group: the tensor-parallel group; None for a single rank.
            pp_group: the pipeline group, in stage order; None for a single stage.
            expert_group: the stage's ranks of one copy of its experts, ranks of one expert adjacent; ignored for a
                dense model. None for a single rank.
            expert_tensor: number of ranks per expert.
            bucket_bytes: bound of a bucket; a larger parameter has a bucket to itself.
            dtype: type of the tensors; None for each parameter's type.
        """
        self.allocate = allocate
        self._params, self._arch = local_params, arch
        group = expert_group if arch.experts else None
        device = next(iter(local_params.values())).device
        self._place = Replica(tp_group, pp_group, group, expert_tensor if group else 1, device)
        self._bucket_bytes, self._dtype = bucket_bytes, dtype
        self._shards, self._joined = Scratch(), Scratch()
        self._buckets = self._make()

    def __next__(self) -> Bucket:
        """Next bucket in canonical order; each tensor of the model is in one bucket.

        Raises:
            WeightError: a parameter is not in the map, has the wrong shape, is missing, or is on two stages. Raised on
                every rank before anything is sent.
        """
        return next(self._buckets)

    def _make(self) -> Iterator[Bucket]:
        for items in in_buckets(_plan(self._params, self._arch, self._place, self._dtype), self._bucket_bytes):
            yield self._gather(items)

    def _gather(self, items: Sequence[_Item]) -> Bucket:
        """Gather a bucket's whole tensors on the leader; return an empty bucket on the other ranks."""
        place = self._place
        specs = (spec for item in items if place.leads for spec in item.specs)
        bucket = Bucket(specs, place.device, self.allocate)
        tensors = dict(bucket)
        for item in items:
            self._fetch(item, [tensors[name] for name in item.parameter.tensors] if place.leads else None)
        place.wait()
        return bucket

    def _fetch(self, item: _Item, whole: Tensors | None) -> None:
        """Gather one parameter's tensors into `whole` on the leader; `whole` is None on the other ranks."""
        place = self._place
        if place.stage == item.stage:
            assembled = self._assemble(item, whole)
            if place.stage:
                _exchange(dist.isend, ((0, tensor) for tensor in assembled), place.pp_group)
        elif whole is not None:
            _exchange(dist.irecv, ((item.stage, tensor) for tensor in whole), place.pp_group)

    def _assemble(self, item: _Item, whole: Tensors | None) -> Tensors:
        """Join the stage's shards on its first rank, in `whole` if given; return nothing on its other ranks."""
        place, parameter = self._place, item.parameter
        group, rank, holders = place.gather_group(parameter)
        if not place.is_first:
            if rank in holders:
                local = self._params[item.name].detach()
                _exchange(dist.isend, [(0, local.to(item.dtype).contiguous())], group)
            return []
        if whole is None:
            tensors = dict(Bucket(item.specs, place.device, self._joined.allocate))
            whole = [tensors[name] for name in parameter.tensors]
        others = [holder for holder in holders if holder]
        shape = parameter.local_shape(len(holders))
        size = len(others) * prod(shape) * item.dtype.itemsize
        memory = self._shards.allocate(size, place.device)[:size]
        shards = dict(zip(others, memory.view(item.dtype).view(len(others), *shape), strict=True))
        _exchange(dist.irecv, shards.items(), group)
        for number, holder in enumerate(holders):
            shard = shards[holder] if holder else self._params[item.name].detach()
            _put(item, shard, whole, number, len(holders))
        return whole


def _exchange(
    operation: Callable[..., object], parts: Iterable[tuple[int, Tensor]], group: dist.ProcessGroup | None
) -> None:
    """Send tensors to these ranks of the group, or receive them, in one batch: NCCL then needs no pairwise groups."""
    batch = [dist.P2POp(operation, tensor, group=group, group_peer=rank) for rank, tensor in parts]
    for work in dist.batch_isend_irecv(batch) if batch else []:
        work.wait()


def _plan(
    local_params: Mapping[str, Tensor], arch: Architecture, place: Replica, dtype: torch.dtype | None
) -> list[_Item]:
    """Parameters in canonical order with their owners, the same on every rank. A fault on any rank is raised on all."""
    parameters = weight_map(arch)
    stages = place.gather({name: (tuple(local.shape), local.dtype) for name, local in local_params.items()})
    items: dict[str, _Item] = {}
    owners: dict[str, str] = {}
    for stage, ranks in enumerate(stages):
        for position, rank in enumerate(ranks):
            shapes = {name: shape for name, (shape, _) in rank.items()}
            check_local(parameters, shapes, place.tp_size, place.share(position))
        owned = {name: found for rank in ranks for name, found in rank.items()}
        for name in (name for name in owned if parameters[name].exported):
            for tensor in parameters[name].tensors:
                owner = f"{name!r} of pipeline stage {stage}"
                if owners.setdefault(tensor, owner) != owner:
                    raise WeightError(f"Hugging Face tensor {tensor!r} is held twice: by {owners[tensor]} and {owner}")
            items[name] = _Item(name, parameters[name], stage, dtype or owned[name][1])
    check_covered(hf_shapes(arch), parameters, items)
    return [items[name] for name in parameters if name in items]


def _put(item: _Item, shard: Tensor, whole: Tensors, rank: int, size: int) -> None:
    """Copy a tensor-parallel rank's shard into the whole tensors."""
    dim, start = item.parameter.layout.dim, 0
    for piece in item.parameter.pieces(rank, size):
        if piece.source is not None:
            target = whole[piece.source].narrow(dim, piece.start, piece.length)
            target.copy_(shard.narrow(dim, start, piece.length))
        start += piece.length


# --- placement


@dataclass(frozen=True, slots=True)
class Replica:
    """This rank's place in the ranks of one model copy. A group of None means this rank alone.

    A stage's tensor-parallel group and its expert group have the same first rank. An expert group may span several
    tensor-parallel groups; only the first of these sends.
    """

    tp_group: dist.ProcessGroup | None
    pp_group: dist.ProcessGroup | None
    expert_group: dist.ProcessGroup | None
    expert_tensor: int
    device: torch.device

    @property
    def tp_rank(self) -> int:
        return 0 if self.tp_group is None else self.tp_group.rank()

    @property
    def tp_size(self) -> int:
        return 1 if self.tp_group is None else self.tp_group.size()

    @property
    def expert_rank(self) -> int:
        return 0 if self.expert_group is None else self.expert_group.rank()

    @property
    def expert_size(self) -> int:
        return 1 if self.expert_group is None else self.expert_group.size()

    @property
    def stage(self) -> int:
        return 0 if self.pp_group is None else self.pp_group.rank()

    @property
    def is_first(self) -> bool:
        """True on the rank that gathers the stage's shards."""
        return self.tp_rank == 0 and self.expert_rank == 0

    @property
    def leads(self) -> bool:
        return self.stage == 0 and self.is_first

    def share(self, position: int) -> ExpertShare:
        """The experts of one rank of the expert group."""
        tensor = self.expert_tensor
        return ExpertShare(position // tensor, self.expert_size // tensor, position % tensor, tensor)

    def gather_group(self, parameter: Parameter) -> tuple[dist.ProcessGroup | None, int, range]:
        """(group, this rank in it, ranks that hold the parameter's shards); no ranks if this one takes no part."""
        if parameter.expert is None:
            concerned = self.expert_rank < self.tp_size
            holders = range(self.tp_size if parameter.layout.sharded else 1)
            return self.tp_group, self.tp_rank, holders if concerned else range(0)
        assert parameter.arch.experts is not None
        first = self.expert_tensor * self.share(0).owner(parameter.expert, parameter.arch.experts.count)
        concerned = self.tp_rank < self.expert_size
        holders = range(first, first + self.expert_tensor)
        return self.expert_group, self.expert_rank, holders if concerned else range(0)

    def wait(self) -> None:
        """Synchronize. NCCL only enqueues: a stage ahead of the leader would keep all that it has sent."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def gather(self, owned: Owned) -> list[list[Owned]]:
        """The parameters of each rank of the expert group, by pipeline stage."""
        stages = _gather(owned, self.pp_group)
        return [list(stage) for stage in zip(*_gather(stages, self.expert_group), strict=True)]


def _gather(value: T, group: dist.ProcessGroup | None) -> list[T]:
    if group is None:
        return [value]
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values
