"""Context parallelism: which rank has which tokens, and how rows come from one to another.

Every sequence is cut into 2 R equal chunks for R ranks; rank r has the chunks r and 2 R - 1 - r, so that causal
attention costs all the same. Transformer Engine's attention and Megatron's rotary embedding cut packed sequences so.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from sdpg_megatron.records import Route


def shards(lengths: Sequence[int], size: int) -> tuple[Tensor, Tensor]:
    """Where each position of packed sequences lies: its rank, and its place among the tokens of that rank.

    Args:
        lengths: of the sequences; multiples of 2 * size, if there are several ranks.
        size: context-parallel ranks.

    Returns:
        Two int64 tensors [sum(lengths)]. On every rank the places go up with the positions.
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
    """Which rows this rank sends, and how they are exchanged.

    Args:
        from_G, to_G: int64 [G], the rank that computes each row and the one that wants it.

    Returns:
        Indices of the rows that `rank` computes, in the order in which it has to have them; and the route. The rows
        that `rank` wants come out in the order of their indices.
    """
    mine = (from_G == rank).nonzero().squeeze(1)
    mine = mine[to_G[mine].argsort(stable=True)]
    wanted = (to_G == rank).nonzero().squeeze(1)
    arriving = wanted[from_G[wanted].argsort(stable=True)]
    sent = torch.bincount(to_G[mine], minlength=size).tolist()
    received = torch.bincount(from_G[wanted], minlength=size).tolist()
    return mine, Route(tuple(sent), tuple(received), arriving.argsort())


def exchange(rows_GH: Tensor, along: Route, group: ProcessGroup) -> Tensor:
    """This rank's rows for those that it wants. A collective over the context-parallel group."""
    arrived_GH = rows_GH.new_empty(sum(along.received), *rows_GH.shape[1:])
    dist.all_to_all_single(arrived_GH, rows_GH.contiguous(), list(along.received), list(along.sent), group=group)
    return arrived_GH[along.order_G]
