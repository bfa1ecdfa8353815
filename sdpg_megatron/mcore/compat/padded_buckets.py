"""Fix checkpoints of the distributed optimizer with several gradient buckets.

megatron-core (0.16 to 0.19) writes the `fully_reshardable` format from a buffer without the padding between buckets,
but at offsets that include it: parameters and moments after the first padding are silently saved at shifted positions.
This module can be removed when a round trip with small buckets works without it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor


@contextmanager
def kept(optimizer: Any) -> Iterator[None]:
    """Context in which an optimizer's gathered state includes the padding between buckets."""
    parts = [
        part for part in getattr(optimizer, "chained_optimizers", [optimizer]) if isinstance(part, DistributedOptimizer)
    ]
    for part in parts:
        part.get_parameter_state_dp_zero = functools.partial(_gathered, part)
    try:
        yield
    finally:
        for part in parts:
            del part.get_parameter_state_dp_zero


def _gathered(part: Any, *args: Any, **kwargs: Any) -> Any:
    state = DistributedOptimizer.get_parameter_state_dp_zero(part, *args, **kwargs)
    for number, buffer in enumerate(part.buffers if state is not None else []):
        for tensors in state[number].values():
            for key, packed in tensors.items():
                if isinstance(packed, Tensor):
                    tensors[key] = _padded(packed, buffer)
    return state


def _padded(packed: Tensor, buffer: Any) -> Tensor:
    """Move the concatenated buckets to their offsets in the buffer."""
    padded = packed.new_zeros(buffer.numel)
    first = 0
    for bucket in buffer.buckets:
        padded[bucket.offset : bucket.offset + bucket.numel_unpadded] = packed[first : first + bucket.numel_unpadded]
        first += bucket.numel_unpadded
    return padded
