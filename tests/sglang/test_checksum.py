"""Checksums of a real server's weights, beside those foreseen from the folder that it loaded."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sdpg_megatron.architecture import Architecture, read_architecture
from sdpg_megatron.errors import WeightError
from sdpg_megatron.rollout.sglang.checksum import Comparison, Served, ask, verify
from sdpg_megatron.rollout.sglang.client import Client
from sdpg_megatron.rollout.sglang.server_layout import ServerLayout
from tests.rollout.contract import stream
from tests.sglang.conftest import Running
from tests.tiny import write_tiny_model


async def _load(url: str, folder: Path) -> Served:
    client = Client(url)
    try:
        await client.begin_update()
        await client.load(str(folder))
        await client.end_update()
        return await ask(client)
    finally:
        await client.close()


@pytest.fixture(scope="module")
def arch(model: Path) -> Architecture:
    return read_architecture(model)


@pytest.fixture(scope="module")
def weights(model: Path) -> dict[str, Tensor]:
    return load_file(model / "model.safetensors")


@pytest.fixture(scope="module")
def served(server: Running, model: Path) -> Served:
    """What the server says once it has loaded `weights`."""
    return asyncio.run(_load(server.url, model))


def test_every_weight_of_the_server_is_foreseen(served: Served, arch: Architecture, weights: dict[str, Tensor]) -> None:
    assert served.layout == ServerLayout(tensor=1, data=1, device="cpu")
    (found,) = verify(arch, [served], stream(weights))
    whole = Comparison(url=served.url, equal=3 + 8 * arch.num_layers, different={}, absent=(), not_compared=())
    assert found == whole, "all parameters of the server, and no others: 3, and 8 in each layer"


def test_one_changed_element_names_its_weight_and_no_other(
    served: Served, arch: Architecture, weights: dict[str, Tensor]
) -> None:
    tried = [name for name in weights if ".layers." not in name or ".layers.1." in name]
    assert len(tried) == 3 + 11
    for name in tried:
        changed = weights[name].clone()
        changed.view(-1)[-1] += 1e-3
        there = re.sub(r"\b[qkv]_proj", "qkv_proj", re.sub(r"(gate|up)_proj", "gate_up_proj", name))
        with pytest.raises(WeightError) as raised:
            verify(arch, [served], stream(weights | {name: changed}))
        assert f"1 of {3 + 8 * arch.num_layers} weights are not the trainer's" in str(raised.value)
        assert f"ranks [0]: {there!r}. Fix: " in str(raised.value)


def test_weights_that_the_server_took_are_the_ones_compared(
    server: Running, arch: Architecture, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    folder = write_tiny_model(tmp_path, "qwen3", tied=False, seed=1)
    other = load_file(folder / "model.safetensors")
    assert not any(torch.equal(other[name], weights[name]) for name in weights)
    served = asyncio.run(_load(server.url, folder))
    assert verify(arch, [served], stream(other))
    count = 3 + 8 * arch.num_layers
    with pytest.raises(WeightError, match=f"{count} of {count} weights are not the trainer's"):
        verify(arch, [served], stream(weights))
