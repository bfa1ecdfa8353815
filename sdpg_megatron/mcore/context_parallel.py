"""Context parallelism: token shards, and exchange of rows between ranks.

For R ranks every sequence is cut into 2 R equal chunks. Rank r has the chunks r and 2 R - 1 - r, so that causal
attention costs every rank the same. Transformer Engine's attention and Megatron's rotary embedding use the same layout
for packed sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from sdpg_megatron.records import Route


def shards(lengths: Sequence[int], size: int) -> tuple[Tensor, Tensor]:
    """Rank of each packed position, and its index among the tokens of that rank.

    Args:
        lengths: sequence lengths; multiples of 2 * size if size > 1.
        size: number of context-parallel ranks.

    Returns:
        Two int64 tensors [sum(lengths)]. On every rank the indices increase with the positions.
    """
    total = sum(lengths)
    if size == 1:
        return torch.zeros(total, dtype=torch.int64), torch.arange(total)
    ranks, places, first = [], [], 0
    for length in lengths:
        half = length // (2 * size)
        position = torch.arange(length)
        chunk = position // half
        ranks.append(torch.minimum(chunk, 2 * size - 1 - chunk))
        places.append(first // size + position % half + (chunk >= size) * half)
        first += length
    return torch.cat(ranks), torch.cat(places)


def route(from_G: Tensor, to_G: Tensor, rank: int, size: int) -> tuple[Tensor, Route]:
    """Plan an exchange of rows between context-parallel ranks.

    Args:
        from_G, to_G: int64 [G], the rank that computes each row and the rank that needs it.

    Returns:
        Indices of the rows that `rank` computes, in the order in which `exchange` expects them, and the route. The
        rows that `rank` needs are returned by `exchange` in ascending order of their indices.
    """
    mine = (from_G == rank).nonzero().squeeze(1)
    mine = mine[to_G[mine].argsort(stable=True)]
    wanted = (to_G == rank).nonzero().squeeze(1)
    arriving = wanted[from_G[wanted].argsort(stable=True)]
    sent = torch.bincount(to_G[mine], minlength=size).tolist()
    received = torch.bincount(from_G[wanted], minlength=size).tolist()
    return mine, Route(tuple(sent), tuple(received), arriving.argsort())


def exchange(rows_GH: Tensor, along: Route, group: ProcessGroup) -> Tensor:
    """Exchange the rows that this rank computed for those that it needs. Collective over the context-parallel group."""
    arrived_GH = rows_GH.new_empty(sum(along.received), *rows_GH.shape[1:])
    dist.all_to_all_single(arrived_GH, rows_GH.contiguous(), list(along.received), list(along.sent), group=group)
    return arrived_GH[along.order_G]
