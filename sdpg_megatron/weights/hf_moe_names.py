"""Expert weights that transformers 5 keeps fused, as views under their checkpoint names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from torch import Tensor

_FAMILIES: Mapping[str, tuple[str, str, str, str]] = {
    "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
}
"""Names in checkpoints: of the block, and of an expert's gate, up and down projections."""
_BLOCK = re.compile(r"(.*)\.mlp\.(gate\.weight|experts\.gate_up_proj|experts\.down_proj)")
"""Names in transformers 5. Version 4 keeps experts apart, under checkpoint names."""


def as_saved(name: str, tensor: Tensor, model_type: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the checkpoint tensors that a parameter of the model holds.

    Args:
        tensor: all experts of a layer, [experts, 2 x columns, hidden] for gate and up, or [experts, hidden, columns]
            for down; any other tensor is yielded as it is.
    """
    match = _BLOCK.fullmatch(name)
    if match is None or model_type not in _FAMILIES:
        yield name, tensor
        return
    block, gate, up, down = _FAMILIES[model_type]
    prefix = f"{match[1]}.{block}"
    if match[2] == "gate.weight":
        yield f"{prefix}.gate.weight", tensor
        return
    for expert, weight in enumerate(tensor):
        fused = match[2] == "experts.gate_up_proj"
        for part, view in zip((gate, up), weight.chunk(2), strict=True) if fused else ((down, weight),):
            yield f"{prefix}.experts.{expert}.{part}.weight", view
