"""Causal attention on `torch.nn.functional.scaled_dot_product_attention`, for padded and for packed sequences.

Shapes: S sequence, B batch, N attention heads of this rank, K key-value heads of this rank, D head size, P tokens of
all packed sequences on this rank, A on all context-parallel ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional

from sdpg_megatron.mcore.context import shards


@dataclass
class PackedSequences(PackedSeqParams):  # type: ignore[misc]
    """Megatron's parameters, and what every layer would otherwise wait for the device to tell, or make for itself."""

    lengths: tuple[int, ...] = ()
    """Of the sequences, over all context-parallel ranks."""

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> PackedSequences:
        ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
        longest = max(lengths)
        return cls("thd", ends, ends, max_seqlen_q=longest, max_seqlen_kv=longest, lengths=tuple(lengths))

    @cached_property
    def places_A(self) -> Tensor:
        """int64: where each position lies in the tokens of all context-parallel ranks, one rank after the other."""
        size = parallel_state.get_context_parallel_world_size()
        ranks_A, places_A = shards(self.lengths, size)
        everywhere_A: Tensor = ranks_A * (sum(self.lengths) // size) + places_A
        return everywhere_A.to(self.cu_seqlens_q.device)

    @cached_property
    def masks(self) -> list[Tensor]:
        """Which positions each of this rank's chunks attends to, two chunks of each sequence: bool [S, S']."""
        group = parallel_state.get_context_parallel_group()
        size, rank, device = group.size(), group.rank(), self.cu_seqlens_q.device
        masks = []
        for half in (length // (2 * size) for length in self.lengths):
            ends = ((chunk + 1) * half for chunk in (rank, 2 * size - 1 - rank))
            masks += [torch.ones(half, end, dtype=torch.bool, device=device).tril(end - half) for end in ends]
        return masks


class ScaledDotProductAttention(torch.nn.Module):
    """Megatron's core attention without a mask of its own.

    Padding comes after a sequence, so that causality alone keeps it out of every real position. Packed sequences are
    attended to one by one, those of equal length together where they are neighbours. Context-parallel ranks gather
    the keys and values of all of them.
    """

    def __init__(
        self, config: TransformerConfig, layer_number: int, attn_mask_type: AttnMaskType, *_: Any, **__: Any
    ) -> None:
        super().__init__()
        if attn_mask_type is not AttnMaskType.causal:
            raise NotImplementedError(f"this attention core is causal, asked for {attn_mask_type}")
        if config.attention_dropout:
            found = config.attention_dropout
            raise NotImplementedError(
                f"this attention core has no dropout, found attention_dropout={found}: set it to 0"
            )
        self.softmax_scale = config.softmax_scale
        self.context_size = config.context_parallel_size

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *_: Any,
        packed_seq_params: PackedSequences | None = None,
        **__: Any,
    ) -> Tensor:
        """[S, B, N, D], [S, B, K, D], [S, B, K, D] -> [S, B, N * D]; packed, [P, N, D] and so on -> [P, N * D]."""
        if attention_mask is not None:
            raise NotImplementedError("this attention core is causal alone: pass no mask")
        if packed_seq_params is None:
            if self.context_size > 1:
                raise NotImplementedError("context parallelism takes packed sequences")
            return self._attend(*(x.transpose(0, 1) for x in (query, key, value))).transpose(0, 1)
        if self.context_size > 1:
            return self._across_ranks(query, key, value, packed_seq_params)
        parts, first = [], 0
        for length, neighbours in itertools.groupby(packed_seq_params.lengths):
            count = len(list(neighbours))
            span = slice(first, first + count * length)
            alike = [x[span].view(count, length, *x.shape[1:]) for x in (query, key, value)]
            parts.append(self._attend(*alike).flatten(0, 1))
            first = span.stop
        return torch.cat(parts)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, S, N, D], [B, S', K, D], [B, S', K, D] -> [B, S, N * D]; without a `mask` [S, S'], causal."""
        query_BNSD, key_BKSD, value_BKSD = (x.transpose(1, 2) for x in (query, key, value))
        out_BNSD = functional.scaled_dot_product_attention(
            query_BNSD,
            key_BKSD,
            value_BKSD,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=query_BNSD.shape[1] != key_BKSD.shape[1],
        )
        return out_BNSD.transpose(1, 2).flatten(2)

    def _across_ranks(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences) -> Tensor:
        """This rank's two chunks of each sequence, with the keys and values of all ranks up to their ends."""
        group = parallel_state.get_context_parallel_group()
        everywhere = gather_from_sequence_parallel_region(torch.stack((key, value), dim=1), group=group)
        keys, values = everywhere[packed.places_A].unbind(1)
        parts, first = [], 0
        whole = [start for start in itertools.accumulate(packed.lengths, initial=0) for _ in range(2)]
        for start, mask in zip(whole, packed.masks, strict=False):
            half, end = mask.shape
            asking, seen = slice(first, first + half), slice(start, start + end)
            parts.append(self._attend(query[None, asking], keys[None, seen], values[None, seen], mask)[0])
            first += half
        return torch.cat(parts)
