"""Matrix products of the head.

Products of 16-bit inputs have float32 outputs: by cuBLAS on CUDA, elsewhere by widening the inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """Type of logits, sums and gradients for inputs of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def aligned(columns: int) -> int:
    """Row stride of a matrix, in elements: cuBLAS's fastest kernels need rows aligned to 16 bytes."""
    return -(-columns // 64) * 64


def multiply(left_MK: Tensor, right_KN: Tensor, out_MN: Tensor, *, add: bool = False, factor: float = 1.0) -> Tensor:
    """Write ``factor * left @ right`` to `out_MN`, of a `wide` type. With `add`, add it to the contents."""
    kept = 1.0 if add else 0.0  # with 0 the contents are not read, so NaN there does no harm
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
