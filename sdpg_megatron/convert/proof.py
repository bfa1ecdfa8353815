"""What was written, held against what was read, number by number."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from sdpg_megatron.convert.tensors import Tensors, blocks
from sdpg_megatron.errors import ConversionError
from sdpg_megatron.weights.map import Shape

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Types that compare bit patterns: numbers alone would take -0 for 0, and no NaN for itself."""


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
            expected = source.rows(name, start, length).to(dtype).contiguous()
            found = written.rows(name, start, length).contiguous()
            bits = _BITS[dtype.itemsize]
            if not torch.equal(found.view(bits), expected.view(bits)):
                rows = f"other numbers in rows {start} to {start + length}"
                raise ConversionError(f"{where}: {name}", rows, "those of the source", "check the disk, convert again")
            moved(found.nbytes)
