"""Gradient norm and clipping in a few kernels, without Transformer Engine or apex.

The fallback of megatron-core 0.16 to 0.19 synchronizes with the device for each parameter's norm, and scales each
gradient through a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.optimizer import clip_grads
from megatron.core.utils import local_multi_tensor_l2_norm, local_multi_tensor_scale
from torch import Tensor


def install() -> None:
    """Replace megatron-core's fallback functions if it uses them. Idempotent."""
    module: Any = clip_grads
    if module.l2_norm_impl is local_multi_tensor_l2_norm:
        module.l2_norm_impl = l2_norm
    if module.multi_tensor_scale_impl is local_multi_tensor_scale:
        module.multi_tensor_scale_impl = scale


def l2_norm(_chunk: int, _overflow: Tensor, lists: Sequence[list[Tensor]], _per_tensor: bool) -> tuple[Tensor, None]:
    """Global L2 norm of all tensors, [1], on their device."""
    return torch.nn.utils.get_total_norm([tensor for tensors in lists for tensor in tensors]).view(1), None


def scale(_chunk: int, _overflow: Tensor, lists: Sequence[list[Tensor]], factor: float) -> None:
    """Write the tensors of the first list times `factor` to those of the second, which may be the same tensors."""
    sources, targets = lists
    if sources is not targets:
        torch._foreach_copy_(targets, sources)
    torch._foreach_mul_(targets, factor)
