"""Row-by-row writer of safetensors files: the library's writer needs whole tensors in memory."""

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
        tensors: shape and dtype of each.
        blocks: yields a tensor's rows in order, in blocks of its dtype.
    """
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1][1].itemsize))  # keeps all of them aligned
    with path.open("wb") as file:
        file.write(_header(tensors))
        for name in tensors:
            for block in blocks(name):
                file.write(block.contiguous().flatten().view(torch.uint8).numpy().data)


def _header(tensors: Mapping[str, tuple[Shape, torch.dtype]]) -> bytes:
    """Header length, then the table of tensors, padded to 8 bytes for alignment."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in tensors.items():
        start, end = end, end + prod(shape) * dtype.itemsize
        table[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
