"""Keys and slices of Megatron checkpoints for the parameters of the weight maps, and their Hugging Face tensors.

A checkpoint's tensors are unsharded, so the weight map of tensor-parallel size 1 applies.
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
    """Slice of a checkpoint's tensor, which spans all layers and, for experts, all experts."""

    key: str
    indices: Index
    lead: Shape
    """Sizes of the dimensions that `indices` select from."""


class Run(NamedTuple):
    """Consecutive rows of a Megatron parameter that are rows of one Hugging Face tensor, or zeros if it is None."""

    start: int
    length: int
    tensor: str | None
    tensor_start: int


@dataclass(frozen=True, slots=True)
class Stored:
    """Parameter of a weight map, with all its spellings."""

    names: tuple[str, ...]
    parameter: Parameter
    experts: int
    """Experts per layer of the whole model."""

    @property
    def shape(self) -> Shape:
        """Shape of the parameter in a checkpoint; a vocabulary's may have more rows."""
        return self.parameter.local_shape(1)

    @property
    def is_vocabulary(self) -> bool:
        """True if its rows are padded, to a number that depends on the run that wrote the checkpoint."""
        return self.parameter.layout is VOCABULARY

    def runs(self) -> list[Run]:
        """Its rows in order, as runs of Hugging Face tensors."""
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

    def canonical_location(self) -> TensorLocation:
        """Location in megatron-core's checkpoints, for all layouts, with and without Transformer Engine."""
        return next(self.locations())

    def locations(self) -> Iterator[TensorLocation]:
        """Possible locations, the canonical one first."""
        names = [name for name in reversed(self.names) if not _GROUPED_EXPERT.search(name)]
        for by_layer in (True, False):
            for name in names:
                yield self._location(name, by_layer=by_layer)

    def _location(self, name: str, *, by_layer: bool) -> TensorLocation:
        indices: Index = ()
        lead: Shape = ()
        if by_layer and (layer := _LAYER.match(name)):
            name = _LAYER.sub("decoder.layers.", name)
            indices, lead = (int(layer[1]),), (self.parameter.arch.num_layers,)
        if expert := _EXPERT.search(name):
            name = _EXPERT.sub(".experts.experts.", name)
            indices, lead = (*indices, int(expert[1])), (*lead, self.experts)
        return TensorLocation(name, indices, lead)


def stored_parameters(arch: Architecture) -> list[Stored]:
    """All parameters in a checkpoint of the model, in the weight map's order."""
    names: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    parameters: dict[tuple[str, ...], Parameter] = {}
    for name, parameter in weight_map(arch).items():
        if parameter.exported:
            names[tuple(parameter.tensors)].append(name)
            parameters[tuple(parameter.tensors)] = parameter
    experts = len({found[1] for found in map(_EXPERT.search, weight_map(arch)) if found})
    return [Stored(tuple(names[tensors]), parameter, experts) for tensors, parameter in parameters.items()]


def extra_states(stored: Collection[Stored]) -> list[str]:
    """Keys of the extra states that modules (local or Transformer Engine's) expect in addition to parameters."""
    found: dict[str, None] = {}
    for one in stored:
        location = one.canonical_location()
        module, _, last = location.key.rpartition(".")
        if last != "weight" or module in ("embedding.word_embeddings", "output_layer"):
            continue
        shard = ".".join(map(str, location.indices or (0,))) + "_" + ".".join(map(str, location.lead or (1,)))
        found[f"{module}._extra_state/shard_{shard}"] = None
        if module.endswith(".linear_qkv"):
            found[f"{module.removesuffix('linear_qkv')}core_attention._extra_state/shard_{shard}"] = None
    return list(found)


def model_keys(keys: Collection[str]) -> list[str]:
    """Keys that do not belong to the optimizer or other training state."""
    return [key for key in keys if not _TRAINING_STATE.match(key)]
