"""Causal attention for padded and packed sequences, without a loop over sequences.

On a GPU, packed sequences of 16-bit floats take one variable-length kernel call: flash-attn if it is installed, else
`torch.nn.attention.varlen`. On a CPU, and in float32, which these kernels do not support, sequences of similar lengths
are padded to a common length and share one `scaled_dot_product_attention` call.

Shapes: S sequence, B batch, N attention heads of this rank, K key-value heads of this rank, D head size, P packed
tokens of this rank, A packed tokens of all context-parallel ranks, M keys that this rank reads, n chunks of a bucket,
Q and U query and key length of the bucket.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional

from sdpg_megatron.mcore.context_parallel import shards

_READ = "sdpg_packed_sequences"
"""Attribute of `PackedSeqParams` in which `PackedSequences.read` keeps its result."""


class LengthBucket(NamedTuple):
    """Chunks of similar lengths, padded to a common length. Padding repeats a chunk's last position."""

    query_nQ: Tensor
    """int64: index of each query in this rank's tokens."""
    key_nU: Tensor
    """int64: index of each key in the keys that this rank reads."""
    mask_n1QU: Tensor | None
    """bool: True for keys that a query attends to; None for the plain causal mask."""


@dataclass
class PackedSequences(PackedSeqParams):  # type: ignore[misc]
    """Megatron's `PackedSeqParams` with cached indices that all layers share.

    A rank's tokens form chunks: whole sequences or, under context parallelism, two parts of each sequence. A chunk's
    queries are the last positions of its keys. The indices are computed on the host from the lengths.
    """

    lengths: tuple[int, ...] = ()
    """Sequence lengths over all context-parallel ranks."""
    device: torch.device | None = None
    """Device of the tokens."""

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device, *, cumulative: bool) -> PackedSequences:
        """
        Args:
            cumulative: set ``cu_seqlens_q`` and ``cu_seqlens_kv``, which Transformer Engine reads. If they are set,
                megatron-core's rotary embedding synchronizes with the device and loops over sequences. Otherwise it
                takes one angle per token.
        """
        longest = max(lengths)
        found = cls("thd", max_seqlen_q=longest, max_seqlen_kv=longest, lengths=tuple(lengths), device=device)
        if cumulative:
            found.cu_seqlens_q = found.cu_seqlens_kv = found._cumulated(lengths)
        return found

    @classmethod
    def read(cls, given: PackedSeqParams, device: torch.device) -> PackedSequences:
        """Megatron's own parameters with the indices; read from the device once, and kept on the object."""
        if isinstance(given, cls):
            return given
        if (kept := getattr(given, _READ, None)) is None:
            ends = given.cu_seqlens_q_padded if given.cu_seqlens_q_padded is not None else given.cu_seqlens_q
            lengths = ends.diff().tolist()
            kept = cls.of([length for length in lengths if length], device, cumulative=False)
            setattr(given, _READ, kept)
        return kept

    @cached_property
    def positions_P(self) -> Tensor:
        """int64: position of each of this rank's tokens in its sequence."""
        positions_A = torch.cat([torch.arange(length) for length in self.lengths])
        size, rank = _context()
        return self._moved(positions_A if size == 1 else positions_A[shards(self.lengths, size)[0] == rank])

    @cached_property
    def chunks(self) -> list[tuple[int, int]]:
        """(queries, keys) of each chunk."""
        size, rank = _context()
        if size == 1:
            return [(length, length) for length in self.lengths]
        halves = [length // (2 * size) for length in self.lengths]
        return [(half, (part + 1) * half) for half in halves for part in (rank, 2 * size - 1 - rank)]

    @cached_property
    def key_places_M(self) -> Tensor | None:
        """int64: index of each key that this rank reads in the gathered tokens of all context-parallel ranks.

        The gathered tokens are in rank order. None without context parallelism: the keys are the rank's tokens.
        """
        size, _ = _context()
        if size == 1:
            return None
        ranks_A, places_A = shards(self.lengths, size)
        gathered_A = ranks_A * (sum(self.lengths) // size) + places_A
        starts = [start for start in itertools.accumulate(self.lengths[:-1], initial=0) for _ in range(2)]
        read = [gathered_A[start : start + keys] for start, (_, keys) in zip(starts, self.chunks, strict=True)]
        return self._moved(torch.cat(read))

    @cached_property
    def ends(self) -> tuple[Tensor, Tensor]:
        """Cumulative numbers of queries and of keys, each int32 [chunks + 1]."""
        queries, keys = zip(*self.chunks, strict=True)
        return self._cumulated(queries), self._cumulated(keys)

    @cached_property
    def buckets(self) -> tuple[list[LengthBucket], Tensor]:
        """Chunks grouped by size class; and int64 [P], index of each token in the concatenated bucket queries."""
        members: dict[tuple[int, int], list[int]] = {}
        for number, (queries, keys) in enumerate(self.chunks):
            members.setdefault((size_class(queries), size_class(keys)), []).append(number)
        query_ends, key_ends = (list(itertools.accumulate(counts)) for counts in zip(*self.chunks, strict=True))
        buckets, order, base = [], [torch.empty(0)] * len(self.chunks), 0
        for numbers in members.values():
            query_counts, key_counts = zip(*(self.chunks[number] for number in numbers), strict=True)
            query_nQ = _padded([query_ends[number] for number in numbers], query_counts)
            key_nU = _padded([key_ends[number] for number in numbers], key_counts)
            mask_n1QU = None
            if query_counts != key_counts:
                ahead_n = torch.tensor(key_counts) - torch.tensor(query_counts)
                last_nQ = torch.arange(query_nQ.shape[1]) + ahead_n[:, None]
                mask_n1QU = self._moved((torch.arange(key_nU.shape[1]) <= last_nQ[:, :, None])[:, None])
            buckets.append(LengthBucket(self._moved(query_nQ), self._moved(key_nU), mask_n1QU))
            for row, number in enumerate(numbers):
                first = base + row * query_nQ.shape[1]
                order[number] = torch.arange(first, first + self.chunks[number][0])
            base += query_nQ.numel()
        return buckets, self._moved(torch.cat(order))

    def _cumulated(self, counts: Sequence[int]) -> Tensor:
        return self._moved(torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32))

    def _moved(self, tensor: Tensor) -> Tensor:
        """Copy to the device without synchronizing with it."""
        assert self.device is not None
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)


def size_class(length: int) -> int:
    """Round a length up to one of four sizes per power of two, so that padding is at most a quarter."""
    step = 1 << max(length.bit_length() - 3, 0)
    return -(-length // step) * step


def _padded(ends: Sequence[int], counts: Sequence[int]) -> Tensor:
    """int64 [n, longest]: the `counts` numbers before each of `ends`, padded with the last one."""
    end_n, count_n = torch.tensor([ends, counts]).unbind()
    return (end_n - count_n)[:, None] + torch.arange(max(counts)).minimum(count_n[:, None] - 1)


def _context() -> tuple[int, int]:
    """Context-parallel size and rank."""
    if not parallel_state.model_parallel_is_initialized():
        return 1, 0
    return parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()


class CausalAttention(torch.nn.Module):
    """Core attention for Megatron's self-attention module, causal and without a mask argument.

    Padding follows the tokens of a sequence, so the causal mask is enough to hide it. Packed sequences do not attend to
    each other. Context-parallel ranks gather each other's keys and values.
    """

    def __init__(
        self, config: TransformerConfig, layer_number: int, attn_mask_type: AttnMaskType, *_: Any, **__: Any
    ) -> None:
        super().__init__()
        if attn_mask_type is not AttnMaskType.causal:
            raise NotImplementedError(f"attention mask type: found {attn_mask_type}, expected causal")
        if config.attention_dropout:
            found = config.attention_dropout
            raise NotImplementedError(f"attention_dropout: found {found}, expected 0. Fix: set it to 0")
        self.softmax_scale = config.softmax_scale
        self.context_size = config.context_parallel_size

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *_: Any,
        packed_seq_params: PackedSeqParams | None = None,
        **__: Any,
    ) -> Tensor:
        """[S, B, N, D], [S, B, K, D], [S, B, K, D] -> [S, B, N * D]; packed: P instead of S, B."""
        if attention_mask is not None:
            raise NotImplementedError("attention_mask: found a mask, expected None: this attention core is causal")
        if packed_seq_params is None:
            if self.context_size > 1:
                raise NotImplementedError("context parallelism: found padded sequences, expected packed ones")
            found = self._attend(*(x.transpose(0, 1) for x in (query, key, value)))
            return found.transpose(0, 1).flatten(2)
        packed = PackedSequences.read(packed_seq_params, query.device)
        if self.context_size > 1:
            key, value = self._gather(key, value, packed)
        if (kernel := varlen_kernel()) is not None and takes_varlen(query):
            query_ends, key_ends = packed.ends
            queries, keys = map(max, zip(*packed.chunks, strict=True))
            found = kernel(query, key, value, query_ends, key_ends, queries, keys, scale=self.softmax_scale)
            return found.flatten(1)
        buckets, order_P = packed.buckets
        parts = [self._attend_bucket(query, key, value, bucket) for bucket in buckets]
        return torch.cat(parts).index_select(0, order_P).flatten(1)

    def _gather(self, key: Tensor, value: Tensor, packed: PackedSequences) -> tuple[Tensor, Tensor]:
        """Gather keys and values over context-parallel ranks and select those that this rank reads, each [M, K, D]."""
        group = parallel_state.get_context_parallel_group()
        everywhere = gather_from_sequence_parallel_region(torch.stack((key, value), dim=1), group=group)
        assert packed.key_places_M is not None
        keys_M, values_M = everywhere.index_select(0, packed.key_places_M).unbind(1)
        return keys_M, values_M

    def _attend_bucket(self, query: Tensor, key: Tensor, value: Tensor, bucket: LengthBucket) -> Tensor:
        """Attention of one bucket, [n * Q, N, D]."""

        def taken(x: Tensor, at: Tensor) -> Tensor:
            return x.index_select(0, at.flatten()).view(*at.shape, *x.shape[1:])

        queries, keys, values = taken(query, bucket.query_nQ), taken(key, bucket.key_nU), taken(value, bucket.key_nU)
        return self._attend(queries, keys, values, bucket.mask_n1QU).flatten(0, 1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, S, N, D], [B, S', K, D], [B, S', K, D] -> [B, S, N, D]. `mask` is [B, 1, S, S']; None: causal."""
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
        return out_BNSD.transpose(1, 2)


# --- variable-length kernels

VarlenKernel = Callable[..., Tensor]
"""(query [P, N, D], key [M, K, D], value [M, K, D], cumulative queries, cumulative keys, maximum queries and maximum
keys of a chunk, scale=softmax scale) -> [P, N, D]. Causal: a chunk's last query attends to its last key."""


def takes_varlen(query: Tensor) -> bool:
    """True if the kernels support these queries: 16-bit floats on a GPU, head size at most 256 and a multiple of 8."""
    narrow = query.dtype in (torch.bfloat16, torch.float16)
    return query.is_cuda and narrow and query.shape[-1] <= 256 and query.shape[-1] % 8 == 0


@cache
def varlen_kernel() -> VarlenKernel | None:
    """flash-attn's kernel if it is installed, else torch's (2.10 or newer), else None."""
    if importlib.util.find_spec("flash_attn") is not None:
        from flash_attn import flash_attn_varlen_func

        return lambda *inputs, scale: flash_attn_varlen_func(*inputs, softmax_scale=scale, causal=True)
    try:
        varlen_attn: Callable[..., Tensor] = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
    if "enable_gqa" in known:  # older versions accept fewer key-value heads without it
        options["enable_gqa"] = True
    return lambda *inputs, scale: varlen_attn(*inputs, **options, **({} if scale is None else {"scale": scale}))
