"""Safetensors files written row by row: the library's own writer takes tensors that are there whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from sdpg_megatron.weights.load import DTYPES
from sdpg_megatron.weights.map import Shape

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_safetensors(
    path: Path, tensors: Mapping[str, tuple[Shape, torch.dtype]], blocks: Callable[[str], Iterable[Tensor]]
) -> None:
    """Write one file.

    Args:
        tensors: shape and type of each.
        blocks: gives a tensor's rows from first to last, in pieces of its type.
    """
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1][1].itemsize))  # each aligned to its own elements
    with path.open("wb") as file:
        file.write(_header(tensors))
        for name in tensors:
            for block in blocks(name):
                file.write(block.contiguous().flatten().view(torch.uint8).numpy().data)


def _header(tensors: Mapping[str, tuple[Shape, torch.dtype]]) -> bytes:
    """Length of what follows, then the table of tensors; as long as a multiple of 8, so that numbers lie aligned."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in tensors.items():
        start, end = end, end + prod(shape) * dtype.itemsize
        table[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
