"""What was written, held against what was read, number by number."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdpg_megatron.convert.tensors import Tensors, blocks
from sdpg_megatron.errors import ConversionError
from sdpg_megatron.weights.map import Shape


def check_same_tensors(
    source: Tensors,
    written: Tensors,
    specs: Mapping[str, tuple[Shape, torch.dtype]],
    where: Path,
    moved: Callable[[int], None],
) -> None:
    """Compare every tensor bit for bit, after the cast to the type that was asked for.

    Raises:
        ConversionError: naming the first tensor that differs.
    """
    for name, (shape, dtype) in specs.items():
        if written.dtype(name) != dtype:
            raise ConversionError(f"{where}: {name}", str(written.dtype(name)), str(dtype), "convert again")
        for start, length in blocks(shape, max(dtype.itemsize, source.dtype(name).itemsize)):
            expected = source.rows(name, start, length).to(dtype)
            found = written.rows(name, start, length)
            if not np.array_equal(_bits(found), _bits(expected)):
                rows = f"other numbers in rows {start} to {start + length}"
                raise ConversionError(f"{where}: {name}", rows, "those of the source", "check the disk, convert again")
            moved(found.nbytes)


def _bits(rows: Tensor) -> np.ndarray[Any, Any]:
    """As whole numbers, the widest that fit: as they are, -0 would be 0, and no NaN itself."""
    octets: np.ndarray[Any, Any] = rows.contiguous().flatten().view(torch.uint8).numpy()
    return octets if octets.size % 8 else octets.view(np.int64)
