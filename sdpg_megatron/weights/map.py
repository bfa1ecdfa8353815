"""One map per model family between Megatron parameters and Hugging Face tensors.

A rank's shard of a Megatron parameter is a row of *pieces*: slices of Hugging Face tensors, laid end to end along one
dimension. The pieces are all that is declared. Loading copies them from files into the shard, exporting copies them
from the shards back into whole tensors, so the two directions cannot disagree.
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
"""Tensors of old checkpoints that hold no weights."""


@dataclass(frozen=True, slots=True)
class ExpertShare:
    """A rank's experts of a layer, and its part of each. The defaults are for a rank that holds all of them whole."""

    rank: int = 0
    size: int = 1
    """Expert-parallel: who holds which experts."""
    tensor_rank: int = 0
    tensor_size: int = 1
    """Tensor-parallel within an expert; may differ from that of the other parameters."""

    def owner(self, expert: int, count: int) -> int:
        """The expert-parallel rank that holds expert `expert` of `count`."""
        return expert // (count // self.size)


WHOLE_EXPERTS = ExpertShare()


@dataclass(frozen=True, slots=True)
class Parameter:
    """A Megatron parameter of one model, under its name with the global numbers of layer and expert."""

    arch: Architecture
    tensors: Mapping[str, Shape]
    """The Hugging Face tensors that it is made of, with their shapes."""
    layout: ShardLayout
    exported: bool
    layer: int | None
    """Global layer number; None outside the layers."""
    expert: int | None = None
    """Global number of the expert, of which `ExpertShare` says who holds it and how it is cut; None for all else."""

    def pieces(self, rank: int, size: int) -> list[Piece]:
        """What tensor-parallel rank `rank` of `size` holds, in order along `layout.dim`.

        Of an expert's parameter, the tensor-parallel ranks are those within the expert.
        """
        if not self.layout.sharded:
            rank, size = 0, 1
        return self.layout.cut(self.arch, [shape[self.layout.dim] for shape in self.tensors.values()], rank, size)

    def local_shape(self, size: int) -> Shape:
        """Shape of a rank's shard; it is the same on all of `size` tensor-parallel ranks."""
        shape = list(next(iter(self.tensors.values())))
        shape[self.layout.dim] = sum(piece.length for piece in self.pieces(0, size))
        return tuple(shape)


def weight_map(arch: Architecture) -> dict[str, Parameter]:
    """Every parameter that a Megatron model of this architecture can have, in canonical order, under all spellings."""
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
    """Name and shape of every tensor of the Hugging Face model, tied copies left out."""
    return {name: shape for parameter in weight_map(arch).values() for name, shape in parameter.tensors.items()}


def check_local(
    parameters: Mapping[str, Parameter],
    shapes: Mapping[str, Shape],
    tp_size: int,
    experts: ExpertShare = WHOLE_EXPERTS,
) -> None:
    """Check the names and shapes of parameters that one or more ranks own, and that no layer among them lacks one.

    `experts`: those that these ranks hold.

    Raises:
        WeightError: a parameter is not in the map, has another shape or is another rank's expert, or a Hugging Face
            tensor of a layer that is there would not be loaded.
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
    """Check that the parameters `names` hold every one of `tensors`.

    Raises:
        WeightError: naming the first one that none of them holds, and the parameter that would.
    """
    covered = {tensor for name in names for tensor in parameters[name].tensors}
    for tensor in tensors:
        if tensor not in covered:
            owner = next(name for name, parameter in parameters.items() if tensor in parameter.tensors)
            raise WeightError(
                f"Hugging Face tensor {tensor!r} has no place in this model, which lacks the Megatron parameter "
                f"{owner!r}. Fix: build the model with the features that its config.json asks for"
            )


def check_folder(arch: Architecture, found: Iterable[str], where: str) -> None:
    """Check that a Hugging Face checkpoint has the model's tensors and no others.

    Args:
        arch: what the model is.
        found: names of the checkpoint's tensors.
        where: what to call the checkpoint in an error.

    Raises:
        WeightError: naming the first tensor that is missing or not in the map, and the ones most like it.
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
