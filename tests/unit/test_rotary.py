"""The rotary embedding that takes the place of megatron-core's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from megatron.core.models.common.embeddings import rope_utils
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sdpg_megatron.mcore import rotary


@pytest.fixture
def original() -> Callable[..., Tensor]:
    """megatron-core's function, which has been replaced."""
    rotary.install()
    found: Callable[..., Tensor] = rope_utils._apply_rotary_pos_emb_bshd.__wrapped__
    return found


def inputs(shape: tuple[int, ...], rotated: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    angles = torch.randn(shape[0], *[1] * (len(shape) - 2), rotated // 2, generator=generator) * 100
    return hidden, torch.cat((angles, angles), -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "rotated"), [((7, 2, 3, 16), 16), ((7, 3, 16), 16), ((7, 3, 16), 8)])
def test_it_computes_the_same_bits(
    original: Callable[..., Tensor], shape: tuple[int, ...], rotated: int, dtype: torch.dtype
) -> None:
    hidden, angles = inputs(shape, rotated, dtype)
    upstream = torch.randn(shape).to(dtype)
    results = []
    for function in (original, rope_utils._apply_rotary_pos_emb_bshd):
        out = function(hidden, angles, rotary_interleaved=False, mscale=1.25)
        results.append((out, *torch.autograd.grad(out, hidden, upstream)))
    for expected, found in zip(*results, strict=True):
        assert torch.equal(expected, found)


def test_interleaved_heads_are_left_to_megatron_core(original: Callable[..., Tensor]) -> None:
    hidden, angles = inputs((7, 2, 3, 16), 16, torch.float32)
    found = rope_utils._apply_rotary_pos_emb_bshd(hidden, angles, rotary_interleaved=True)
    assert torch.equal(found, original(hidden, angles, rotary_interleaved=True))


class Cosines(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func is torch.ops.aten.cos.default
        return func(*args, **(kwargs or {}))


def test_cosines_are_made_once(original: Callable[..., Tensor]) -> None:
    hidden, angles = inputs((7, 3, 16), 16, torch.float32)
    with Cosines() as cosines:
        for _ in range(4):
            rope_utils._apply_rotary_pos_emb_bshd(hidden, angles, mscale=1.0)
        assert cosines.count == 1
        rope_utils._apply_rotary_pos_emb_bshd(hidden, angles, mscale=2.0)
        rope_utils._apply_rotary_pos_emb_bshd(hidden, angles + 1, mscale=2.0)
    assert cosines.count == 3
