"""One map per model family between Megatron parameters and Hugging Face tensors.

A rank's shard of a Megatron parameter is a sequence of *pieces*: slices of Hugging Face tensors, joined along one
dimension. Loading copies pieces from files into shards, and exporting copies them from shards into whole tensors: both
directions use the same declaration.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sdpg_megatron.architecture import Architecture
from sdpg_megatron.errors import WeightError, did_you_mean
from sdpg_megatron.weights.families import OUTPUT, Piece, ShardLayout, rules, sizes
from sdpg_megatron.weights.families import VOCABULARY as VOCABULARY

Shape = tuple[int, ...]

_NOT_PARAMETERS = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""Tensors of old checkpoints that are not weights."""


@dataclass(frozen=True, slots=True)
class ExpertShare:
    """A rank's experts of a layer, and its shard of each. By default the rank holds all experts whole."""

    rank: int = 0
    size: int = 1
    """Expert-parallel rank and size."""
    tensor_rank: int = 0
    tensor_size: int = 1
    """Tensor-parallel rank and size within an expert; they may differ from the other parameters'."""

    def owner(self, expert: int, count: int) -> int:
        """Expert-parallel rank that holds expert `expert` of `count`."""
        return expert // (count // self.size)


WHOLE_EXPERTS = ExpertShare()


@dataclass(frozen=True, slots=True)
class Parameter:
    """A Megatron parameter of one model."""

    arch: Architecture
    tensors: Mapping[str, Shape]
    """Its Hugging Face tensors, with their shapes."""
    layout: ShardLayout
    exported: bool
    layer: int | None
    """Global layer number; None for parameters outside the layers."""
    expert: int | None = None
    """Global expert number, sharded as in `ExpertShare`; None for all other parameters."""

    def pieces(self, rank: int, size: int) -> list[Piece]:
        """Pieces of tensor-parallel rank `rank` of `size` (for an expert: within it), in order along `layout.dim`."""
        if not self.layout.sharded:
            rank, size = 0, 1
        return self.layout.cut(self.arch, [shape[self.layout.dim] for shape in self.tensors.values()], rank, size)

    def local_shape(self, size: int) -> Shape:
        """Shape of a shard, the same on all of `size` tensor-parallel ranks."""
        shape = list(next(iter(self.tensors.values())))
        shape[self.layout.dim] = sum(piece.length for piece in self.pieces(0, size))
        return tuple(shape)


def weight_map(arch: Architecture) -> dict[str, Parameter]:
    """Every parameter of a Megatron model of this architecture under all its names, in canonical order."""
    lengths = sizes(arch)
    parameters: dict[str, Parameter] = {}
    for prefix, hf_prefix, layer, expert, rule in rules(arch):
        tensors = {
            hf_prefix + tensor.format(expert): tuple(lengths[dim] for dim in dims)
            for tensor, dims in rule.tensors.items()
        }
        parameter = Parameter(arch, tensors, rule.layout, rule.exported, layer, expert)
        parameters |= {prefix + name.format(expert): parameter for name in rule.megatron}
    return parameters


def hf_shapes(arch: Architecture) -> dict[str, Shape]:
    """Name and shape of every tensor of the Hugging Face model, without tied copies."""
    return {name: shape for parameter in weight_map(arch).values() for name, shape in parameter.tensors.items()}


def check_local(
    parameters: Mapping[str, Parameter],
    shapes: Mapping[str, Shape],
    tp_size: int,
    experts: ExpertShare = WHOLE_EXPERTS,
) -> None:
    """Check the names and shapes of the parameters of one or more ranks, and that each of their layers is complete.

    Args:
        experts: the experts that these ranks hold.

    Raises:
        WeightError: a parameter is not in the map, has another shape or is another rank's expert, or a layer lacks a
            parameter for a Hugging Face tensor.
    """
    for name, shape in shapes.items():
        if name not in parameters:
            raise WeightError(_unknown("Megatron parameter", name, parameters))
        parameter = parameters[name]
        if not _is_held(parameter, experts):
            raise WeightError(
                f"Megatron parameter {name!r} is on expert-parallel rank {experts.rank} of {experts.size}, which does "
                "not hold this expert. Fix: name experts by their number among all of the layer"
            )
        size = tp_size if parameter.expert is None else experts.tensor_size
        expected = parameter.local_shape(size)
        if tuple(shape) != expected:
            raise WeightError(
                f"Megatron parameter {name!r} has shape {list(shape)}, expected {list(expected)} on each of {size} "
                "tensor-parallel ranks. Fix: build the model from the same config.json, and pad its vocabulary to "
                "Architecture.padded_vocab"
            )
    layers = {parameters[name].layer for name in shapes} - {None}
    wanted = (p for p in parameters.values() if p.layer in layers and _is_held(p, experts))
    check_covered([tensor for parameter in wanted for tensor in parameter.tensors], parameters, shapes)


def _is_held(parameter: Parameter, share: ExpertShare) -> bool:
    if parameter.expert is None or parameter.arch.experts is None:
        return True
    return share.owner(parameter.expert, parameter.arch.experts.count) == share.rank


def check_covered(tensors: Iterable[str], parameters: Mapping[str, Parameter], names: Iterable[str]) -> None:
    """Check that the parameters `names` hold all of `tensors`. Raises `WeightError` naming the first tensor that is in
    none of them, and its parameter."""
    covered = {tensor for name in names for tensor in parameters[name].tensors}
    for tensor in tensors:
        if tensor not in covered:
            owner = next(name for name, parameter in parameters.items() if tensor in parameter.tensors)
            raise WeightError(
                f"Hugging Face tensor {tensor!r} has no place in this model, which lacks the Megatron parameter "
                f"{owner!r}. Fix: build the model with the features that its config.json asks for"
            )


def check_folder(arch: Architecture, found: Iterable[str], where: str) -> None:
    """Check that a Hugging Face checkpoint has exactly the model's tensors.

    Args:
        arch: the model's architecture.
        found: names of the checkpoint's tensors.
        where: name of the checkpoint in an error.

    Raises:
        WeightError: naming the first tensor that is missing or not in the map, and similar names.
    """
    expected = hf_shapes(arch)
    names = {name for name in found if not _NOT_PARAMETERS.fullmatch(name)}
    if arch.tied_embeddings:
        names -= set(OUTPUT.tensors)
    extra = sorted(names - set(expected))
    for name in expected:
        if name not in names:
            hint = did_you_mean(name, extra)
            raise WeightError(f"{where}: tensor {name!r} is missing{hint and '; ' + hint}")
    if extra:
        raise WeightError(f"{where}: {_unknown('tensor', extra[0], expected)}")


def _unknown(noun: str, name: str, known: Iterable[str]) -> str:
    hint = did_you_mean(name, known)
    return f"{noun} {name!r} is not in the map of this model{hint and '; ' + hint}"
