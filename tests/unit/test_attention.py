"""The attention core: packed sequences know nothing of one another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from sdpg_megatron.mcore.attention import CausalAttention, PackedSequences, size_class

LENGTHS = (3, 3, 1, 7, 2, 2, 2)


def core(kind: AttnMaskType = AttnMaskType.causal, **options: Any) -> CausalAttention:
    sizes = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2}
    config = TransformerConfig(**{"attention_dropout": 0.0, **sizes, **options})
    return CausalAttention(config, 1, kind)


def inputs(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(sum(LENGTHS), heads, 8, generator=generator, requires_grad=True) for heads in (4, 2, 2)]


def packed(lengths: tuple[int, ...] = LENGTHS) -> PackedSequences:
    return PackedSequences.of(lengths, torch.device("cpu"), cumulative=False)


def test_packed_is_each_sequence_alone() -> None:
    tensors = inputs()
    found = core()(*tensors, packed_seq_params=packed())
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad((found * upstream).sum(), tensors)
    first = 0
    for length in LENGTHS:
        span = slice(first, first + length)
        alone = [x[span].detach().unsqueeze(1).requires_grad_() for x in tensors]
        expected = core()(*alone)
        torch.testing.assert_close(found[span], expected.squeeze(1))
        own = torch.autograd.grad((expected.squeeze(1) * upstream[span]).sum(), alone)
        for grad, twin in zip(grads, own, strict=True):
            torch.testing.assert_close(grad[span], twin.squeeze(1))
        first += length


def test_megatrons_own_parameters_are_taken() -> None:
    """A host's packed batch has `PackedSeqParams` with the lengths as a tensor, and padding as a last sequence."""
    tensors = inputs()
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    params = PackedSeqParams("thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=7, max_seqlen_kv=7)
    for _ in range(2):  # the lengths are read once
        assert torch.equal(core()(*tensors, packed_seq_params=params), core()(*tensors, packed_seq_params=packed()))
    padded = PackedSeqParams("thd", cu_seqlens_q=ends - 1, cu_seqlens_kv=ends - 1, cu_seqlens_q_padded=ends)
    assert torch.equal(core()(*tensors, packed_seq_params=padded), core()(*tensors, packed_seq_params=packed()))


def test_no_bit_crosses_a_boundary() -> None:
    tensors = [x.detach() for x in inputs()]
    before = core()(*tensors, packed_seq_params=packed())
    for x in tensors:
        x[7:14] = 1e4  # the sequence of 7
    after = core()(*tensors, packed_seq_params=packed())
    assert torch.equal(before[:7], after[:7]) and torch.equal(before[14:], after[14:])
    assert not torch.equal(before[7:14], after[7:14])


def test_no_number_is_read_from_the_device() -> None:
    """The core asks the device for nothing: tensors on "meta" have no numbers to tell."""
    tensors = [x.detach().to("meta") for x in inputs()]
    found = core()(*tensors, packed_seq_params=PackedSequences.of(LENGTHS, torch.device("meta"), cumulative=False))
    assert found.is_meta and found.shape == (sum(LENGTHS), 32)


def test_unsupported_arguments_raise() -> None:
    query, key, value = (x.unsqueeze(1) for x in inputs())
    with pytest.raises(NotImplementedError, match="attention_mask: found a mask"):
        core()(query, key, value, torch.ones(1, 1, 1, 1, dtype=torch.bool))
    with pytest.raises(NotImplementedError, match="packed"):
        core(context_parallel_size=2)(query, key, value)
    with pytest.raises(NotImplementedError, match="causal"):
        core(kind=AttnMaskType.padding)
    with pytest.raises(NotImplementedError, match=r"attention_dropout: found 0\.1"):
        core(attention_dropout=0.1)


@pytest.mark.parametrize("length", [*range(1, 70), 1000, 4097])
def test_padding_is_at_most_a_quarter(length: int) -> None:
    assert length <= size_class(length) <= 1.25 * length


def test_calls_do_not_grow_with_the_number_of_sequences() -> None:
    lengths = tuple(range(41, 65)) * 8
    buckets, order_P = packed(lengths).buckets
    assert len(buckets) == 3 and order_P.numel() == sum(lengths)
