"""Weights that transformers keeps joined, as views under the names that they have in checkpoints."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import Tensor


class _Names(NamedTuple):
    """A family's names of a layer's experts in checkpoints."""

    block: str
    gate: str
    up: str
    down: str


_FAMILIES: Mapping[str, _Names] = {
    "qwen3_moe": _Names("mlp", "gate_proj", "up_proj", "down_proj"),
    "mixtral": _Names("block_sparse_moe", "w1", "w3", "w2"),
}
_BLOCK = re.compile(r"(.*)\.mlp\.(gate\.weight|experts\.gate_up_proj|experts\.down_proj)")
"""In transformers 5. Version 4 has experts one by one, under the names of checkpoints."""


def as_saved(name: str, tensor: Tensor, model_type: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint that a parameter of the model holds.

    Args:
        tensor: all of a layer's experts, [experts, 2 x columns, hidden] of gate and up, or [experts, hidden, columns];
            or anything else, which is itself.
    """
    names, match = _FAMILIES.get(model_type), _BLOCK.fullmatch(name)
    if names is None or match is None:
        yield name, tensor
        return
    block = f"{match[1]}.{names.block}"
    match match[2]:
        case "gate.weight":
            yield f"{block}.gate.weight", tensor
        case "experts.gate_up_proj":
            for expert, pair in enumerate(tensor):
                for part, half in zip((names.gate, names.up), pair.chunk(2), strict=True):
                    yield f"{block}.experts.{expert}.{part}.weight", half
        case _:
            for expert, down in enumerate(tensor):
                yield f"{block}.experts.{expert}.{names.down}.weight", down
