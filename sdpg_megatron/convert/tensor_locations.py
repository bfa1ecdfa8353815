"""Where Megatron checkpoints keep the parameters of the weight maps, and which rows of them a Hugging Face tensor is.

The tensors of a checkpoint are whole: what the map says of a single tensor-parallel rank is true of them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from sdpg_megatron.architecture import Architecture
from sdpg_megatron.convert.torch_dist import Index
from sdpg_megatron.weights.map import VOCABULARY, Parameter, Shape, weight_map

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.local_experts\.(\d+)\.")
_GROUPED_EXPERT = re.compile(r"\.experts\.linear_fc\d\.weight\d+$")
_TRAINING_STATE = re.compile(r"^(optimizer|chained_\d+|teacher|rng_state|rerun_state_machine)\b")


class TensorLocation(NamedTuple):
    """A slice of a tensor in a checkpoint: over all layers, and for each over all experts."""

    key: str
    at: Index
    lead: Shape
    """Lengths of the dimensions that `at` is of."""


class Run(NamedTuple):
    """Rows of a Megatron parameter that are rows of a Hugging Face tensor, in order; zeros where there is none."""

    start: int
    length: int
    tensor: str | None
    tensor_start: int


@dataclass(frozen=True, slots=True)
class Stored:
    """A parameter of the map under all its spellings."""

    names: tuple[str, ...]
    parameter: Parameter
    experts: int
    """Of each layer, in the whole model."""

    @property
    def shape(self) -> Shape:
        """Of the parameter in a checkpoint; where it is a vocabulary, with at least so many rows."""
        return self.parameter.local_shape(1)

    @property
    def is_vocabulary(self) -> bool:
        """Its rows are padded, in a checkpoint to a number that depends on the run that wrote it."""
        return self.parameter.layout is VOCABULARY

    def runs(self) -> list[Run]:
        """Its rows in order."""
        pieces, names = self.parameter.pieces(0, 1), list(self.parameter.tensors)
        if self.parameter.layout.dim != 0:
            (piece,) = pieces  # all columns of one tensor
            assert piece.source is not None
            return [Run(0, self.shape[0], names[piece.source], 0)]
        found, start = [], 0
        for piece in pieces:
            found.append(Run(start, piece.length, None if piece.source is None else names[piece.source], piece.start))
            start += piece.length
        return found

    def canonical_place(self) -> TensorLocation:
        """Where megatron-core's models keep it, on whatever layout and with or without Transformer Engine."""
        return next(self.places())

    def places(self) -> Iterator[TensorLocation]:
        """Where it may be found, the usual place first."""
        names = [name for name in reversed(self.names) if not _GROUPED_EXPERT.search(name)]
        for by_layer in (True, False):
            for name in names:
                yield self._place(name, by_layer=by_layer)

    def _place(self, name: str, *, by_layer: bool) -> TensorLocation:
        at: Index = ()
        lead: Shape = ()
        if by_layer and (layer := _LAYER.match(name)):
            name = _LAYER.sub("decoder.layers.", name)
            at, lead = (int(layer[1]),), (self.parameter.arch.num_layers,)
        if expert := _EXPERT.search(name):
            name = _EXPERT.sub(".experts.experts.", name)
            at, lead = (*at, int(expert[1])), (*lead, self.experts)
        return TensorLocation(name, at, lead)


def stored_parameters(arch: Architecture) -> list[Stored]:
    """Every parameter that a checkpoint of the model has, in the map's order."""
    names: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    parameters: dict[tuple[str, ...], Parameter] = {}
    for name, parameter in weight_map(arch).items():
        if parameter.exported:
            names[tuple(parameter.tensors)].append(name)
            parameters[tuple(parameter.tensors)] = parameter
    experts = len({found[1] for found in map(_EXPERT.search, weight_map(arch)) if found})
    return [Stored(tuple(names[tensors]), parameter, experts) for tensors, parameter in parameters.items()]


def extra_states(stored: Collection[Stored]) -> list[str]:
    """Keys of what modules of models, local ones or Transformer Engine's, expect beside their parameters."""
    found: dict[str, None] = {}
    for one in stored:
        place = one.canonical_place()
        module, _, last = place.key.rpartition(".")
        if last != "weight" or module in ("embedding.word_embeddings", "output_layer"):
            continue
        at = ".".join(map(str, place.at or (0,))) + "_" + ".".join(map(str, place.lead or (1,)))
        found[f"{module}._extra_state/shard_{at}"] = None
        if module.endswith(".linear_qkv"):
            found[f"{module.removesuffix('linear_qkv')}core_attention._extra_state/shard_{at}"] = None
    return list(found)


def of_the_model(keys: Collection[str]) -> list[str]:
    """Those that are not of the optimizer or other training state."""
    return [key for key in keys if not _TRAINING_STATE.match(key)]
