"""The head's matrix products, and where the gradient of the vocabulary matrix goes.

Products of narrow floats are kept in float32: on CUDA by asking cuBLAS for it, elsewhere by widening a tile at a time.
Shapes: C rows, H hidden size, V columns.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type of logits, sums and gradients: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def multiply(left_MK: Tensor, right_KN: Tensor, out_MN: Tensor, *, add: bool = False) -> Tensor:
    """``left @ right`` into `out_MN`, which is of a `wide` type; `add` keeps what is there."""
    if left_MK.dtype == right_KN.dtype == out_MN.dtype:
        return torch.addmm(out_MN, left_MK, right_KN, out=out_MN) if add else torch.mm(left_MK, right_KN, out=out_MN)
    if out_MN.is_cuda and left_MK.dtype == right_KN.dtype:
        # Both need torch >= 2.8.
        if add:
            torch.ops.aten.addmm.dtype_out(out_MN, left_MK, right_KN, out_MN.dtype, out=out_MN)
        else:
            torch.ops.aten.mm.dtype_out(left_MK, right_KN, out_MN.dtype, out=out_MN)
        return out_MN
    return multiply(left_MK.to(out_MN.dtype), right_KN.to(out_MN.dtype), out_MN, add=add)


class WeightGradient:
    """Sums ``gradient.T @ hidden`` over tiles in a `wide` type, for the token rows of one rank's vocabulary matrix.

    With `fused` it goes straight into ``weight.main_grad``, the float32 buffer of Megatron's data-parallel wrapper,
    by that wrapper's own convention: ``weight.grad_added_to_main_grad`` is set, and autograd gets a stand-in, all zeros
    where ``weight.zero_out_wgrad`` says that another use of the weight (a tied embedding) adds to it.
    """

    def __init__(self, weight_VH: Tensor, *, fused: bool, deferred: bool) -> None:
        """`deferred`: sum up in a buffer of its own, and let `finish` bring that to where it belongs."""
        self.weight_VH = weight_VH
        self.main_VH: Tensor | None = getattr(weight_VH, "main_grad", None) if fused else None
        self.own_VH: Tensor | None = None
        if deferred or self.main_VH is None or self.main_VH.dtype != wide(weight_VH.dtype):
            self.own_VH = torch.zeros_like(weight_VH, dtype=wide(weight_VH.dtype))

    def add(self, columns: slice, gradient_CV: Tensor, hidden_CH: Tensor) -> None:
        """Add the product of a tile's gradient and its input rows at the tile's columns."""
        target_VH = self.main_VH if self.own_VH is None else self.own_VH
        assert target_VH is not None
        part_VH = target_VH[columns]
        kernel = _apex() if gradient_CV.is_cuda and gradient_CV.dtype != part_VH.dtype else None
        if kernel is not None:
            kernel(hidden_CH, gradient_CV, part_VH)
        else:
            multiply(gradient_CV.T, hidden_CH, part_VH, add=True)

    def finish(self, scale: Tensor | None = None) -> Tensor | None:
        """What autograd is to be given for the weight. `scale`, a scalar tensor, multiplies what was summed up.

        May be called once.
        """
        if self.own_VH is not None and scale is not None:
            self.own_VH.mul_(scale)
        if self.main_VH is None:
            return None if self.own_VH is None else self.own_VH.to(self.weight_VH.dtype)
        if self.own_VH is not None:
            self.main_VH.add_(self.own_VH)
        if not hasattr(self.weight_VH, "grad_added_to_main_grad"):
            return None
        self.weight_VH.grad_added_to_main_grad = True
        make = torch.zeros_like if getattr(self.weight_VH, "zero_out_wgrad", False) else torch.empty_like
        return make(self.weight_VH)


def _apex() -> Any:
    """apex's kernel (input rows, output gradient, float32 sum), which adds to a float32 sum as it multiplies."""
    if importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is None:
        return None
    return importlib.import_module("fused_weight_gradient_mlp_cuda").wgrad_gemm_accum_fp32
