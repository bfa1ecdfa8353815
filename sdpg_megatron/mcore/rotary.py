"""Rotary position embedding: cosines computed once for all layers, and one compiled kernel per call on a GPU.

Without Transformer Engine's fused kernel, megatron-core launches about twelve kernels each for queries and keys in
every layer. Half of them recompute cosines and sines of the same angles.

Shapes: P positions or packed tokens; B batch, 1 for packed tokens; N attention heads; D head size; R leading elements
of a head that are rotated.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.models.common.embeddings import rope_utils
from torch import Tensor

from sdpg_megatron.mcore.compiled import CompiledOnGpu


@functools.cache  # the replacement must not wrap itself
def install() -> None:
    """Replace megatron-core's unfused function in this process. Idempotent."""
    original = rope_utils._apply_rotary_pos_emb_bshd

    @functools.wraps(original)
    def apply(t: Tensor, freqs: Tensor, *args: Any, mscale: float = 1.0, **options: Any) -> Tensor:
        if args or any(options.values()):  # interleaved rotation
            interleaved: Tensor = original(t, freqs, *args, mscale=mscale, **options)
            return interleaved
        return rotate_on_gpu(t, *cosines_and_sines(freqs, mscale, t.dtype))

    rope_utils._apply_rotary_pos_emb_bshd = apply


def cosines_and_sines(angles: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``scale * cos`` and ``scale * sin`` of the angles, rounded to `dtype`; cached on the tensor of angles."""
    kept = vars(angles).setdefault("_cosines_and_sines", {})
    if (scale, dtype) not in kept:
        kept[scale, dtype] = tuple((made * scale).to(dtype) for made in (angles.cos(), angles.sin()))
    found: tuple[Tensor, Tensor] = kept[scale, dtype]
    return found


def rotate(hidden: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotate element i of a head's first R with element i + R / 2, as Llama and Qwen do.

    Args:
        hidden: [P, B, N, D] or [P, N, D].
        cosines, sines: broadcast to the first R columns of `hidden`.
    """
    size = cosines.shape[-1]
    turned, rest = hidden[..., :size], hidden[..., size:]
    first, second = turned.chunk(2, -1)
    turned = turned * cosines + torch.cat((-second, first), -1) * sines
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned


rotate_on_gpu = CompiledOnGpu(rotate, token_inputs=3)
"""`rotate`, as one kernel on a GPU."""
