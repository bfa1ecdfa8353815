"""A packed pass on a GPU: as many operations for 64 sequences as for 4, and none that waits for the device.

The tensors are fake ones, which have no numbers: an operation that asks for one raises. They are on the CPU, where the
variable-length kernel is chosen by hand; it takes fake tensors of any device.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.pool import RankPool
from tests.tiny import write_tiny_model

WAITS = {"_local_scalar_dense", "nonzero", "item", "masked_select", "equal"}


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def count_operations(folder: Path, sequences: list[int], context: int) -> Counter[str]:
    from torch._subclasses import FakeTensorMode

    from sdpg_megatron.architecture import read_architecture
    from sdpg_megatron.config import ModelConfig, ParallelConfig
    from sdpg_megatron.mcore import attention, parallel
    from sdpg_megatron.mcore.forward_step import last_hidden
    from sdpg_megatron.mcore.model import build_chunks

    config = ParallelConfig(context=context)
    ranks = parallel.initialize(config, 0)
    (chunk,) = build_chunks(read_architecture(folder), ModelConfig(path=folder), config, ranks)
    last_hidden(chunk, torch.zeros(1, 8 // context, dtype=torch.int64), [8])  # checks the model's output, once
    tokens_BS = torch.zeros(1, sum(sequences) // context, dtype=torch.int64)
    packed = attention.PackedSequences.of(sequences, tokens_BS.device, cumulative=False)
    _ = packed.positions_P, packed.key_places_M, packed.ends  # on the host, where numbers are known
    with (
        mock.patch.object(attention, "takes_varlen", lambda query: True),
        mock.patch.object(attention.PackedSequences, "of", lambda *_, **__: packed),
        FakeTensorMode(allow_non_fake_inputs=True),
        Operations() as operations,
    ):
        last_hidden(chunk, tokens_BS, sequences).sum().backward()
    return operations.count


@pytest.mark.parametrize("context", [1, 2])
def test_operations_do_not_grow_with_the_number_of_sequences(tmp_path: Path, ranks: RankPool, context: int) -> None:
    folder = write_tiny_model(tmp_path / "model", "qwen3", tied=True, seed=2, layers=2)
    few, many = (
        ranks.run(count_operations, context, folder, lengths, context)[0]
        for lengths in ([400, 72, 16, 24], [8, 4, 12, 8] * 16)
    )
    assert few["_varlen_attn"] == 2 and not WAITS & few.keys()
    assert few == many
