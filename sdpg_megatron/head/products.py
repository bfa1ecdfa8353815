"""The head's matrix products.

Products of narrow floats are kept in float32: on CUDA by asking cuBLAS for it, elsewhere by widening a tile at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type of logits, sums and gradients: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def aligned(columns: int) -> int:
    """Numbers from one row of a matrix to the next: cuBLAS's fastest kernels ask for rows that start at 16 bytes."""
    return -(-columns // 64) * 64


def multiply(left_MK: Tensor, right_KN: Tensor, out_MN: Tensor, *, add: bool = False, factor: float = 1.0) -> Tensor:
    """``factor * left @ right`` into `out_MN`, which is of a `wide` type; `add` keeps what is there."""
    kept = 1.0 if add else 0.0  # with 0 what is there is not read, be it NaN
    plain = not add and factor == 1
    if left_MK.dtype == right_KN.dtype == out_MN.dtype:
        if plain:
            return torch.mm(left_MK, right_KN, out=out_MN)
        return torch.addmm(out_MN, left_MK, right_KN, beta=kept, alpha=factor, out=out_MN)
    if out_MN.is_cuda and left_MK.dtype == right_KN.dtype:
        # Both need torch >= 2.8.
        if plain:
            torch.ops.aten.mm.dtype_out(left_MK, right_KN, out_MN.dtype, out=out_MN)
        else:
            torch.ops.aten.addmm.dtype_out(out_MN, left_MK, right_KN, out_MN.dtype, beta=kept, alpha=factor, out=out_MN)
        return out_MN
    return multiply(left_MK.to(out_MN.dtype), right_KN.to(out_MN.dtype), out_MN, add=add, factor=factor)
