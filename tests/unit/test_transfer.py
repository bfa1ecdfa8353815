"""Micro-batches on their way to the device."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sdpg_megatron.batching.collate import PackingLayout, collate
from sdpg_megatron.mcore.transfer import to_device
from sdpg_megatron.records import MicroBatch
from tests.unit.test_batch import sample


class Transfers(TorchDispatchMode):
    """Counts copies of memory's tensors to the device `meta`."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = [x for x in args if isinstance(x, torch.Tensor) and not x.is_meta]
        if given and isinstance(found, torch.Tensor) and found.is_meta:
            self.bytes.append(found.nbytes)
        return found


def some_batches() -> list[MicroBatch]:
    experts = np.arange(24, dtype=np.int16).reshape(4, 3, 2)
    with_experts = dataclasses.replace(sample(3, 2, gate=True), experts=experts)
    across = PackingLayout(context=1, context_size=2)
    return [
        collate([with_experts, sample(1, 4)], PackingLayout(packed=False)),
        collate([], PackingLayout()),
        collate([dataclasses.replace(x, unit=across.unit) for x in (sample(3, 2, gate=True), sample(1, 5))], across),
    ]


def tensors_of(batch: MicroBatch) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    batch.mapped(lambda x: found.append(x) or x)  # type: ignore[func-returns-value]
    return found


def test_micro_batches_arrive_as_they_were() -> None:
    batches = some_batches()
    moved = to_device(batches, torch.device("cpu"))
    assert any(batch.teacher and batch.teacher.route for batch in moved)
    for batch, there in zip(batches, moved, strict=True):
        for one, other in zip(tensors_of(batch), tensors_of(there), strict=True):
            assert one.dtype == other.dtype and one.data_ptr() % one.element_size() == 0
            assert one.is_contiguous() and torch.equal(one, other)
        assert there.num_tokens == batch.num_tokens and there.student.lengths == batch.student.lengths


def test_all_tensors_of_a_step_are_one_transfer() -> None:
    batches = some_batches()
    with Transfers() as transfers:
        (first, *_) = to_device(batches, torch.device("meta"))
    assert len(transfers.bytes) == 1
    assert transfers.bytes[0] >= sum(x.nbytes for batch in batches for x in tensors_of(batch))
    assert all(x.is_meta for x in tensors_of(first))
