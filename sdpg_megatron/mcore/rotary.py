"""Rotary position embedding: cosines once for all layers, and one compiled kernel for each use on a GPU.

megatron-core's own, without Transformer Engine's fused kernel, takes about twelve kernels for queries and as many for
keys in each layer, half of them to make cosines and sines of the same angles anew.

Shapes: P positions or packed tokens; B batch, 1 for packed tokens; N attention heads; D head size; R rotated numbers of
a head, the first ones.
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


@functools.cache  # idempotent: the replacement must not wrap itself
def install() -> None:
    """Replace megatron-core's unfused function for the whole process."""
    original = rope_utils._apply_rotary_pos_emb_bshd

    @functools.wraps(original)
    def apply(t: Tensor, freqs: Tensor, *args: Any, mscale: float = 1.0, **options: Any) -> Tensor:
        if args or any(options.values()):  # interleaved
            interleaved: Tensor = original(t, freqs, *args, mscale=mscale, **options)
            return interleaved
        return rotation(t)(t, *cosines_and_sines(freqs, mscale, t.dtype))

    rope_utils._apply_rotary_pos_emb_bshd = apply


def cosines_and_sines(angles: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``scale * cos`` and ``scale * sin`` of the angles, rounded to `dtype`; the same tensors for each call."""
    kept = vars(angles).setdefault("_cosines_and_sines", {})
    if (scale, dtype) not in kept:
        kept[scale, dtype] = tuple((made * scale).to(dtype) for made in (angles.cos(), angles.sin()))
    found: tuple[Tensor, Tensor] = kept[scale, dtype]
    return found


def rotate(hidden: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotate number i of a head's first R with number i + R / 2, as Llama and Qwen do."""
    size = cosines.shape[-1]
    turned, rest = hidden[..., :size], hidden[..., size:]
    first, second = turned.chunk(2, -1)
    turned = turned * cosines + torch.cat((-second, first), -1) * sines
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned


def rotation(hidden: Tensor) -> Rotation:
    """`rotate`, compiled where `hidden` is on a GPU that kernels can be compiled for."""
    if not (hidden.is_cuda and has_compiled_kernels()):
        return rotate
    return _rotate_any_number


@functools.cache
def _compiled() -> Rotation:
    return torch.compile(rotate)


def _rotate_any_number(hidden: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Compiled once for all numbers of tokens, of which each micro-batch has another."""
    for tensor in (hidden, cosines, sines):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return _compiled()(hidden, cosines, sines)
