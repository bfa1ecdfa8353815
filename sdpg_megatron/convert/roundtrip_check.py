"""Bitwise comparison of written tensors with their source."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdpg_megatron.convert.tensors import Tensors, blocks
from sdpg_megatron.errors import ConversionError
from sdpg_megatron.weights.map import Shape

THREADS = 4
"""Upper bound; each thread holds two blocks of rows."""

Spec = tuple[Shape, torch.dtype]
"""Shape and target dtype of a tensor."""
Open = Callable[[], Tensors]
"""Makes a reader, for use by one thread."""


def check_same_tensors(
    source: Open, written: Open, specs: Mapping[str, Spec], where: Path, moved: Callable[[int], None]
) -> None:
    """Compare every tensor bit for bit, after the cast to the target dtype, on several threads.

    Raises:
        ConversionError: names a tensor that differs.
    """
    shares = _shares(specs, min(THREADS, os.cpu_count() or 1))
    failed = threading.Event()

    def count(nbytes: int) -> None:
        if failed.is_set():
            raise _NotNeeded
        moved(nbytes)

    with ThreadPoolExecutor(len(shares)) as threads:
        checks = [threads.submit(_check, source(), written(), share, where, count) for share in shares]
        try:
            for check in as_completed(checks):
                check.result()
        finally:  # also on KeyboardInterrupt
            failed.set()


class _NotNeeded(Exception):
    """Ends a thread after another has found a difference."""


def _shares(specs: Mapping[str, Spec], count: int) -> list[dict[str, Spec]]:
    """Split tensors into shares of similar size: the largest first, each to the smallest share."""
    shares: list[dict[str, Spec]] = [{} for _ in range(count)]
    sizes = [0] * count
    for name, spec in sorted(specs.items(), key=lambda item: -prod(item[1][0])):
        least = sizes.index(min(sizes))
        shares[least][name] = spec
        sizes[least] += prod(spec[0])
    return shares


def _check(
    source: Tensors, written: Tensors, specs: Mapping[str, Spec], where: Path, moved: Callable[[int], None]
) -> None:
    for name, (shape, dtype) in specs.items():
        if written.dtype(name) != dtype:
            raise ConversionError(f"{where}: {name}", str(written.dtype(name)), str(dtype), "convert again")
        for start, length in blocks(shape, max(dtype.itemsize, source.dtype(name).itemsize)):
            expected = source.rows(name, start, length).to(dtype)
            found = written.rows(name, start, length)
            if not np.array_equal(_bits(found), _bits(expected)):
                rows = f"other numbers in rows {start} to {start + length}"
                raise ConversionError(f"{where}: {name}", rows, "the source's", "check the disk, convert again")
            moved(found.nbytes)


def _bits(rows: Tensor) -> np.ndarray[Any, Any]:
    """View as integers: floating-point comparison would equate 0 and -0, and distinguish equal NaNs."""
    octets: np.ndarray[Any, Any] = rows.contiguous().flatten().view(torch.uint8).numpy()
    return octets if octets.size % 8 else octets.view(np.int64)
