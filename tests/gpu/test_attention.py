"""Attention, rotary embedding and head norms on a GPU agree with plain torch, forward and backward."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from sdpg_megatron.mcore import attention, layers, rotary
from sdpg_megatron.mcore.attention import CausalAttention, PackedSequences

pytestmark = pytest.mark.gpu

LENGTHS = (300, 1, 64, 65, 128, 7, 511)
CHUNKS = ((100, 300), (100, 400), (1, 1), (30, 511))
"""Queries and keys of chunks as under context parallelism."""


def attend(tensors: list[Tensor], packed: PackedSequences, upstream: Tensor, *, varlen: bool) -> list[Tensor]:
    config = TransformerConfig(
        num_layers=1, hidden_size=512, num_attention_heads=8, num_query_groups=2, attention_dropout=0.0
    )
    core = CausalAttention(config, 1, AttnMaskType.causal)
    with mock.patch.object(attention, "takes_varlen", lambda query: varlen):
        found = core(*tensors, packed_seq_params=packed)
    return [found, *torch.autograd.grad(found, tensors, upstream)]


@pytest.mark.parametrize("chunks", [tuple(zip(LENGTHS, LENGTHS, strict=True)), CHUNKS], ids=["sequences", "chunks"])
def test_both_kernels_agree(chunks: tuple[tuple[int, int], ...]) -> None:
    assert attention.varlen_kernel() is not None, "torch 2.10 or flash-attn has one"
    generator = torch.Generator("cuda").manual_seed(0)
    queries, keys = (sum(counts) for counts in zip(*chunks, strict=True))
    shapes = ((queries, 8, 64), (keys, 2, 64), (keys, 2, 64))
    tensors = [
        torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for shape in shapes
    ]
    packed = PackedSequences.of([1], torch.device("cuda"), cumulative=False)
    packed.__dict__["chunks"] = list(chunks)
    upstream = torch.randn(queries, 512, generator=generator, device="cuda", dtype=torch.bfloat16)
    fast = attend(tensors, packed, upstream, varlen=True)
    wide = [x.detach().float().requires_grad_() for x in tensors]
    slow = attend(wide, packed, upstream.float(), varlen=False)
    for found, expected in zip(fast, slow, strict=True):
        error = (found.float() - expected).norm() / expected.norm()
        assert error < 2**-7, "bfloat16 rounds by 2^-9"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_compiled_rotary_embedding_rotates_as_the_plain_one(dtype: torch.dtype) -> None:
    """For several numbers of tokens and heads, of which none makes it compile without end."""
    generator = torch.Generator("cuda").manual_seed(0)
    for tokens, heads in ((300, 8), (300, 2), (5, 8), (1, 2), (1024, 8)):
        hidden = torch.randn(tokens, heads, 64, generator=generator, device="cuda").to(dtype).requires_grad_()
        angles = torch.randn(tokens, 1, 32, generator=generator, device="cuda").repeat(1, 1, 2) * 100
        upstream = torch.randn(hidden.shape, generator=generator, device="cuda").to(dtype)
        pair = rotary.cosines_and_sines(angles, 1.0, dtype)
        found, expected = rotary.rotate_on_gpu(hidden, *pair), rotary.rotate(hidden, *pair)
        assert (found - expected).norm() < 2**-7 * expected.norm()
        (found,) = torch.autograd.grad(found, hidden, upstream)
        (expected,) = torch.autograd.grad(expected, hidden, upstream)
        assert (found - expected).norm() < 2**-7 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_compiled_norm_agrees_with_the_plain_one(dtype: torch.dtype) -> None:
    """For several numbers of tokens and heads, and for heads that are columns of a wider tensor."""
    generator = torch.Generator("cuda").manual_seed(0)
    weight = torch.rand(128, generator=generator, device="cuda").to(dtype).requires_grad_()
    for tokens, heads in ((300, 8), (300, 2), (5, 8), (1, 2), (1024, 8)):
        wide = torch.randn(tokens, heads * 200, generator=generator, device="cuda").to(dtype)
        hidden = wide[:, : heads * 128].view(tokens, 1, heads, 128).requires_grad_()
        upstream = torch.randn(hidden.shape, generator=generator, device="cuda").to(dtype)
        results = []
        for norm in (layers.rms_norm_on_gpu, layers.rms_norm):
            out = norm(hidden, weight, 1e-6)
            results.append((out, *torch.autograd.grad(out, (hidden, weight), upstream)))
        for found, expected in zip(*results, strict=True):
            assert (found - expected).norm() < 2**-7 * expected.norm()
