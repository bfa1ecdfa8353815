"""Rotary position embedding: cosines computed once for all layers, and one compiled kernel per call on a GPU.

Without Transformer Engine's fused kernel, megatron-core launches about twelve kernels each for queries and keys in
every layer. Half of them recompute cosines and sines of the same angles.

Shapes: P positions or packed tokens; B batch, 1 for packed tokens; N attention heads; D head size; R leading elements
of a head that are rotated.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.common.embeddings import rope_utils
from torch import Tensor

from sdpg_megatron.mcore.compat.device import has_compiled_kernels

Rotation = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden [P, B, N, D] or [P, N, D], cosines and sines that broadcast to its first R columns) -> hidden, rotated."""


@functools.cache  # the replacement must not wrap itself
def install() -> None:
    """Replace megatron-core's unfused function in this process. Idempotent."""
    original = rope_utils._apply_rotary_pos_emb_bshd

    @functools.wraps(original)
    def apply(t: Tensor, freqs: Tensor, *args: Any, mscale: float = 1.0, **options: Any) -> Tensor:
        if args or any(options.values()):  # interleaved rotation
            interleaved: Tensor = original(t, freqs, *args, mscale=mscale, **options)
            return interleaved
        return rotation(t)(t, *cosines_and_sines(freqs, mscale, t.dtype))

    rope_utils._apply_rotary_pos_emb_bshd = apply


def cosines_and_sines(angles: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``scale * cos`` and ``scale * sin`` of the angles, rounded to `dtype`; cached on the tensor of angles."""
    kept = vars(angles).setdefault("_cosines_and_sines", {})
    if (scale, dtype) not in kept:
        kept[scale, dtype] = tuple((made * scale).to(dtype) for made in (angles.cos(), angles.sin()))
    found: tuple[Tensor, Tensor] = kept[scale, dtype]
    return found


def rotate(hidden: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotate element i of a head's first R with element i + R / 2, as Llama and Qwen do."""
    size = cosines.shape[-1]
    turned, rest = hidden[..., :size], hidden[..., size:]
    first, second = turned.chunk(2, -1)
    turned = turned * cosines + torch.cat((-second, first), -1) * sines
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned


def rotation(hidden: Tensor) -> Rotation:
    """`rotate`, compiled if `hidden` is on a GPU and Triton is installed."""
    return _rotate_compiled if hidden.is_cuda and has_compiled_kernels() else rotate


@functools.cache
def _compiled() -> Rotation:
    return torch.compile(rotate)


def _rotate_compiled(hidden: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """`rotate`, compiled once for all numbers of tokens, which differ between micro-batches."""
    for tensor in (hidden, cosines, sines):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return _compiled()(hidden, cosines, sines)
