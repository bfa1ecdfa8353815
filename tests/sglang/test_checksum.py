"""Weights of real servers, verified by publishing them again over random values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sdpg_megatron.architecture import read_architecture
from sdpg_megatron.rollout.sglang.client import Client
from sdpg_megatron.rollout.sglang.event_loop import LoopThread
from sdpg_megatron.rollout.sglang.publish import Publisher, PublishReport, WeightsChangedError
from sdpg_megatron.rollout.sglang.server import Launch
from sdpg_megatron.rollout.transports import BroadcastTransport, SharedMemoryTransport, Transport
from sdpg_megatron.weights import Bucket, hf_shapes
from tests.rollout.contract import stream
from tests.sglang.conftest import Running, Servers
from tests.tiny import write_tiny_model


@pytest.fixture(scope="module")
def thread() -> Iterator[LoopThread]:
    thread = LoopThread("test-checksum")
    yield thread
    thread.close()


class Verified:
    """A server and the publisher of its model's weights."""

    def __init__(self, thread: LoopThread, folder: Path, client: Client, transport: Transport) -> None:
        self.client, self._thread = client, thread
        self.weights = load_file(folder / "model.safetensors")
        self.publisher = Publisher(transport, hf_shapes(read_architecture(folder)), thread)

    def publish(self, version: str, *, verify: bool = False) -> PublishReport:
        return self.publisher.publish([self.client], version, stream(self.weights), verify=verify)

    def change(self, name: str, tensor: Tensor) -> None:
        """Change one tensor of the server, past all that is tested here."""

        async def send() -> None:
            transport = SharedMemoryTransport()
            await self.client.begin_update()
            assert await transport.open([self.client]) == {}
            assert await transport.pack(Bucket.of([(name, tensor)]))() == {}
            await self.client.end_update()
            await transport.dispose()

        self._thread.run(send())

    def assert_changed(self, name: str, there: str, ranks: list[int]) -> None:
        """Damage one element; the verification names the server's parameter and no other, and repairs it."""
        damaged = self.weights[name].clone()
        damaged.view(-1)[-1] += 1e-3
        self.change(name, damaged)
        report = self.publish("damaged", verify=True)
        found = report.failures[self.client]
        assert isinstance(found, WeightsChangedError) and report.served == ()
        named = str(found).partition("tensor-parallel ranks ")[2].partition(". Fix: ")[0]
        assert (": 1 of " in str(found), named) == (True, f"{ranks}: {there}")
        assert self.publish("repaired", verify=True).failures == {}


@contextmanager
def verified(thread: LoopThread, folder: Path, running: Running, transport: Transport) -> Iterator[Verified]:
    async def make() -> Client:
        return Client(running.url)

    client = thread.run(make())
    found = Verified(thread, folder, client, transport)
    found.publish("first")
    yield found
    found.publisher.close()
    thread.run(client.close())


@pytest.fixture(scope="module")
def dense(thread: LoopThread, server: Running, model: Path) -> Iterator[Verified]:
    with verified(thread, model, server, SharedMemoryTransport()) as found:
        yield found


@pytest.fixture(scope="module")
def mixture(
    thread: LoopThread, launch: Callable[..., Launch], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Verified]:
    """A mixture of experts over two tensor-parallel ranks."""
    folder = write_tiny_model(tmp_path_factory.mktemp("mixture") / "model", "qwen3_moe", tied=False, seed=0)
    servers = Servers(launch)
    try:
        running = servers.start(model=folder, tensor=2)
        cpu = torch.device("cpu")
        transport = BroadcastTransport(nonce="mixture", device=cpu, address=None, seconds=60.0)
        with verified(thread, folder, running, transport) as found:
            yield found
    finally:
        servers.close()


def test_weights_that_are_the_trainers_pass(dense: Verified) -> None:
    report = dense.publish("second", verify=True)
    assert report.failures == {} and report.served == (dense.client,)


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("model.layers.1.self_attn.k_proj.weight", "model.layers.1.self_attn.qkv_proj.weight"),
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_up_proj.weight"),
        ("model.norm.weight", "model.norm.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_one_changed_element_names_its_weight_and_no_other(dense: Verified, name: str, there: str) -> None:
    dense.assert_changed(name, there, [0])


def test_a_weight_that_no_publish_writes_is_found(dense: Verified, monkeypatch: pytest.MonkeyPatch) -> None:
    """The transport loses a tensor, and the server would serve random values."""
    transport, lost = dense.publisher._transport, "model.layers.0.self_attn.o_proj.weight"
    pack = transport.pack

    with monkeypatch.context() as patch:
        patch.setattr(transport, "pack", lambda bucket: pack(Bucket.of(item for item in bucket if item[0] != lost)))
        report = dense.publish("lossy", verify=True)
    assert f"[0]: {lost}. Fix: " in str(report.failures[dense.client])
    assert dense.publish("whole").failures == {}


def test_a_mixture_over_two_ranks_is_verified(mixture: Verified) -> None:
    assert mixture.publish("second", verify=True).failures == {}
    # SGLang pads experts on CPUs to 32 columns per rank: the first rank has all of these.
    mixture.assert_changed("model.layers.1.mlp.experts.2.down_proj.weight", "model.layers.1.mlp.experts.w2_weight", [0])
    mixture.assert_changed("model.layers.0.self_attn.o_proj.weight", "model.layers.0.self_attn.o_proj.weight", [1])
