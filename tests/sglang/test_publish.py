"""Weights into real servers: every transport delivers the same ones; no fault leaves a server paused or half-updated.

Tests of one transport share a transport, as the sessions of a run do. The last tests stop and kill a second server.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from sdpg_megatron.architecture import read_architecture
from sdpg_megatron.errors import RolloutError, ServerError, WeightError
from sdpg_megatron.rollout.base import Bucket, Sampling
from sdpg_megatron.rollout.sglang.client import Client, GeneratedSample, Timeouts
from sdpg_megatron.rollout.sglang.event_loop import LoopThread
from sdpg_megatron.rollout.sglang.publish import UNFINISHED, Publisher, PublishReport
from sdpg_megatron.rollout.transports import (
    BroadcastTransport,
    DiskTransport,
    SharedMemoryTransport,
    Transport,
    shared_buffer,
)
from sdpg_megatron.rollout.transports.shared_buffer import FOLDER
from sdpg_megatron.weights import WeightStream, hf_shapes, load_shards, write_folder
from tests.dist.test_weights_stream import megatron_shapes
from tests.rollout.contract import stream
from tests.sglang.conftest import Running, Servers, handles, wait_until_well

T = TypeVar("T")
Weights = dict[str, Tensor]

PATIENT = Timeouts(control=60.0, update=60.0, generate=120.0)
HASTY = replace(PATIENT, control=8.0, update=10.0)
"""Where a server stands still: what a call to it, or a bucket, may take."""
BOUND = 2 * (HASTY.control + HASTY.update) + 15
"""Seconds that a publish may take then: the bucket that fails, sent once more, and what is around it."""
SINKS = ("broadcast", "shared", "disk")
PROMPT = (5, 60, 70, 80, 90)
GREEDY = Sampling(n=1, max_tokens=8, temperature=0)


@pytest.fixture(scope="module")
def thread() -> Iterator[LoopThread]:
    thread = LoopThread("test-publish")
    yield thread
    thread.close()


@contextmanager
def client_of(thread: LoopThread, running: Running) -> Iterator[Client]:
    async def make() -> Client:
        return Client(running.url, timeouts=PATIENT)

    client = thread.run(make())
    yield client
    thread.run(client.close())


@pytest.fixture(scope="module")
def client(thread: LoopThread, server: Running) -> Iterator[Client]:
    with client_of(thread, server) as client:
        yield client


@pytest.fixture(scope="module", autouse=True)
def second(launch: Callable[..., Any]) -> Iterator[Running]:
    """A second server, begun before the first test, so that it gets ready while those of one server run."""
    servers = Servers(launch)
    yield servers.begin()
    servers.close()


@pytest.fixture(scope="module")
def victim(second: Running) -> Running:
    """The second server, which tests may stop, and the last one kill."""
    wait_until_well(second.process)
    return second


@pytest.fixture(scope="module")
def doomed(thread: LoopThread, victim: Running) -> Iterator[Client]:
    with client_of(thread, victim) as client:
        yield client


@pytest.fixture(scope="module")
def weights(model: Path) -> Weights:
    return load_file(model / "model.safetensors")


@pytest.fixture(scope="module")
def changed(weights: Weights) -> Weights:
    noise = torch.Generator().manual_seed(0)
    return {name: w + 0.02 * torch.randn(w.shape, generator=noise) for name, w in weights.items()}


def broadcast_sink(nonce: str, seconds: float) -> BroadcastTransport:
    return BroadcastTransport(nonce=nonce, device=torch.device("cpu"), address=None, seconds=seconds)


@pytest.fixture(scope="module")
def transports(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Transport]:
    folder = tmp_path_factory.mktemp("disk-transport")
    return {
        "broadcast": broadcast_sink("test", PATIENT.update),
        "shared": SharedMemoryTransport(),
        "disk": DiskTransport(folder=folder, source_folder=model, shard_bytes=50_000),
    }


@pytest.fixture(scope="module")
def publishers(
    transports: dict[str, Transport], model: Path, thread: LoopThread, client: Client
) -> Iterator[dict[str, Publisher]]:
    shapes = hf_shapes(read_architecture(model))
    publishers = {name: Publisher(transport, shapes, thread) for name, transport in transports.items()}
    yield publishers
    for publisher in publishers.values():
        publisher.close()


@pytest.fixture(params=SINKS)
def publisher(request: pytest.FixtureRequest, publishers: dict[str, Publisher]) -> Publisher:
    return publishers[request.param]


class Server:
    """What a client says, for tests that are no coroutines."""

    def __init__(self, client: Client, thread: LoopThread) -> None:
        self.client, self._thread = client, thread

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._thread.run(work)

    def checksums(self) -> Mapping[str, str]:
        (rank,) = self.run(self.client.checksums())
        return rank.by_name

    def version(self) -> str:
        return self.run(self.client.weight_version())

    def greedy(self) -> GeneratedSample:
        (sample,) = self.run(self.client.generate(PROMPT, GREEDY, []))
        return sample

    def read(self, folder: Path) -> Mapping[str, str]:
        """Load a folder, past all that is tested here."""
        self.run(self.client.load(str(folder)))
        self.run(self.client.flush_cache(5))
        return self.checksums()

    def assert_free(self) -> None:
        """Neither paused nor in a session of updates."""
        assert len(self.greedy().tokens) == GREEDY.max_tokens
        self.run(self.client.begin_update())
        self.run(self.client.end_update())


@pytest.fixture
def one(client: Client, thread: LoopThread) -> Server:
    return Server(client, thread)


def assert_all_served(report: PublishReport, *clients: Client) -> None:
    assert report.failures == {}
    assert report.served == clients


@pytest.fixture(scope="module")
def changed_folder(model: Path, changed: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("changed") / "model"
    write_folder(stream(changed), folder, source_folder=model)
    return folder


def from_shards(folder: Path, stream: type[WeightStream] = WeightStream) -> WeightStream:
    """The stream of a trainer of one rank, in many buckets."""
    arch = read_architecture(folder)
    shapes = megatron_shapes(arch, tp=1, stage=0, pp=1, fused=False)
    params = {name: torch.empty(shape) for name, shape in shapes.items()}
    load_shards(params, folder, arch, tp_rank=0, tp_size=1)
    return stream(params, arch, bucket_bytes=50_000)


def from_folder(folder: Path) -> Iterator[Bucket]:
    """Tensors as they are, in one bucket."""
    return stream(load_file(folder / "model.safetensors"), 10_000)


# --- the weights


@pytest.mark.parametrize("source", [from_folder, from_shards])
def test_the_same_weights_arrive_by_every_sink(
    publisher: Publisher,
    one: Server,
    model: Path,
    changed_folder: Path,
    source: Callable[[Path], Iterator[Bucket]],
) -> None:
    """Several publishes in a row, with the same prompt in between: keys and values of old weights must not live on."""
    expected = {folder: one.read(folder) for folder in (changed_folder, model)}
    assert expected[model] != expected[changed_folder]
    for folder, checksums in expected.items():
        version = f"{source.__name__}-{folder.parent.name}"
        report = publisher.publish([one.client], version, source(folder))
        assert_all_served(report, one.client)
        weights = load_file(folder / "model.safetensors")
        assert report.bytes == sum(w.nbytes for w in weights.values())
        assert one.checksums() == checksums
        assert_like_transformers(one.greedy(), model, weights, version)


@torch.no_grad()
def assert_like_transformers(sample: GeneratedSample, folder: Path, weights: Weights, version: str) -> None:
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    reference.load_state_dict(weights, strict=False)
    logits_NV = reference(torch.tensor([[*PROMPT, *sample.tokens]])).logits[0, len(PROMPT) - 1 : -1]
    assert sample.versions == {version}
    assert sample.tokens == tuple(logits_NV.argmax(-1).tolist())
    expected_N = logits_NV.log_softmax(-1).amax(-1)
    torch.testing.assert_close(torch.tensor(sample.logprobs), expected_N, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["broadcast", "shared"])
def test_types_are_mixed_and_become_the_servers(
    publishers: dict[str, Publisher], name: str, one: Server, changed: Weights
) -> None:
    """Norms in float32 between matrices in bfloat16, with an odd number of elements before them."""
    mixed = {n: w if "norm" in n else w.bfloat16() for n, w in changed.items()}
    assert_all_served(publishers[name].publish([one.client], "mixed", stream(mixed, 5)), one.client)
    found = one.checksums()
    plain = {n: w.float() for n, w in mixed.items()}
    assert_all_served(publishers[name].publish([one.client], "plain", stream(plain)), one.client)
    assert found == one.checksums()


def test_the_group_is_kept_between_publishes(
    publishers: dict[str, Publisher], transports: dict[str, Any], one: Server, weights: Weights
) -> None:
    groups = []
    for round_ in range(2):
        publishers["broadcast"].publish([one.client], f"kept-{round_}", stream(weights))
        groups.append(transports["broadcast"]._group)
    assert groups[0] is groups[1] is not None


# --- what is left behind


def test_nothing_is_left_of_shared_memory_and_folders(
    transports: dict[str, Any],
    publishers: dict[str, Publisher],
    thread: LoopThread,
    one: Server,
    model: Path,
    weights: Weights,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shared_buffer, "PREFIX", prefix := f"sdpg-test-{os.getpid()}-")
    (FOLDER / f"{prefix}left-by-a-killed-run").write_bytes(b"")
    publisher = Publisher(SharedMemoryTransport(), hf_shapes(read_architecture(model)), thread)
    counts = []
    for round_ in range(2):
        assert_all_served(publisher.publish([one.client], f"shared-{round_}", from_shards(model)), one.client)
        counts.append(len({path.stat().st_ino for path in FOLDER.glob(f"{prefix}*")}))
    assert counts == [2, 2], "two segments for all buckets of all publishes"
    publisher.close()
    assert not list(FOLDER.glob(f"{prefix}*"))
    leftover = transports["disk"]._target / "half"
    leftover.mkdir(parents=True)
    publishers["disk"].publish([one.client], "disk", stream(weights))
    assert not list(leftover.parent.parent.iterdir())


# --- requests


def test_a_publish_while_responses_are_made_mixes_nothing(
    publisher: Publisher, one: Server, thread: LoopThread, weights: Weights
) -> None:
    """A response ends as aborted, or has tokens of one version; whoever asked before or during the publish gets one."""
    publisher.publish([one.client], "first", stream(weights))
    sampling = Sampling(n=16, max_tokens=450)
    early = [thread.submit(one.client.generate(PROMPT, sampling, [])) for _ in range(3)]
    late = []

    def asking() -> Iterator[Bucket]:
        for index, bucket in enumerate(stream(weights)):
            if index < 3:
                late.append(thread.submit(one.client.generate(PROMPT, sampling, [])))
            yield bucket

    time.sleep(0.2)
    assert_all_served(publisher.publish([one.client], "second", asking()), one.client)
    for samples in (future.result(timeout=120) for future in early):
        assert all(sample.finish_reason == "abort" or sample.versions == {"first"} for sample in samples)
        assert any(sample.finish_reason == "abort" for sample in samples), "the publish came too late to end any"
    for samples in (future.result(timeout=120) for future in late):
        assert all(sample.finish_reason == "abort" or sample.versions == {"second"} for sample in samples)
    assert one.greedy().versions == {"second"}


# --- faults of the stream


@pytest.mark.parametrize("fault", ["missing", "unknown", "shape", "twice"])
def test_a_faulty_stream_is_read_to_its_end_and_frees_the_server(
    publishers: dict[str, Publisher], one: Server, weights: Weights, fault: str
) -> None:
    faulty, name = dict(weights), "model.layers.1.mlp.up_proj.weight"
    extra: list[Bucket] = []
    match fault:
        case "missing":
            del faulty[name]
        case "unknown":
            faulty[name.replace("up_proj", "upp_proj")] = faulty.pop(name)
        case "shape":
            faulty[name] = faulty[name][:-1]
        case "twice":
            extra.append(Bucket.of([(name, faulty[name])]))
    read: list[str] = []

    def watched() -> Iterator[Bucket]:
        for bucket in (*extra, *stream(faulty)):
            read.extend(name for name, _ in bucket)
            yield bucket

    transport = "shared" if fault == "shape" else "broadcast"
    with pytest.raises(WeightError, match=name):
        publishers[transport].publish([one.client], "faulty", watched())
    assert sorted(set(read)) == sorted(faulty)
    one.assert_free()
    assert one.version().startswith(UNFINISHED)
    assert_all_served(publishers[transport].publish([one.client], "good", stream(weights)), one.client)


def test_a_stream_that_breaks_off_frees_the_server(publisher: Publisher, one: Server, weights: Weights) -> None:
    def broken() -> Iterator[Bucket]:
        buckets = stream(weights)
        yield next(buckets)
        yield next(buckets)
        raise ConnectionError("a trainer rank is gone")

    with pytest.raises(ConnectionError):
        publisher.publish([one.client], "broken", broken())
    one.assert_free()
    assert one.version().startswith(UNFINISHED)
    assert_all_served(publisher.publish([one.client], "good", stream(weights)), one.client)


def test_a_folder_that_cannot_be_written_frees_the_server(
    one: Server, thread: LoopThread, model: Path, weights: Weights, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    transport = DiskTransport(folder=tmp_path / "file", source_folder=model, shard_bytes=50_000)
    publisher = Publisher(transport, hf_shapes(read_architecture(model)), thread)
    read: list[str] = []

    def watched() -> Iterator[Bucket]:
        for bucket in stream(weights):
            read.extend(name for name, _ in bucket)
            yield bucket

    with pytest.raises(RolloutError, match="file"):
        publisher.publish([one.client], "nowhere", watched())
    assert sorted(read) == sorted(weights)
    one.assert_free()


def test_what_a_killed_publisher_left_is_no_obstacle(publisher: Publisher, one: Server, weights: Weights) -> None:
    one.run(one.client.pause())
    one.run(one.client.begin_update())
    assert_all_served(publisher.publish([one.client], "after", stream(weights)), one.client)
    one.assert_free()


# --- faults of a server


@pytest.fixture
def processes(victim: Running) -> list[Any]:
    """The second server's processes, without the one that guards them."""
    assert victim.process.pid is not None
    return [process for process in handles(victim.process.pid) if process.pid != victim.process.pid]


def publish_and_strike(
    publisher: Publisher, clients: list[Client], version: str, folder: Path, strike: Callable[[], None]
) -> tuple[PublishReport, float]:
    """`strike` before the fifth bucket is made. Returns the report and seconds."""

    class Struck(WeightStream):
        asked = 0

        def __next__(self) -> Bucket:
            self.asked += 1
            if self.asked == 5:
                strike()
            return super().__next__()

    start = time.monotonic()
    report = publisher.publish(clients, version, from_shards(folder, Struck))
    return report, time.monotonic() - start


def test_a_server_that_stops_costs_the_other_nothing_but_time(
    model: Path,
    one: Server,
    doomed: Client,
    thread: LoopThread,
    processes: list[Any],
    changed: Weights,
    changed_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = one.read(changed_folder)
    publisher = Publisher(broadcast_sink("stop", HASTY.update), hf_shapes(read_architecture(model)), thread)
    both = [one.client, doomed]
    assert_all_served(publisher.publish(both, "both", stream(changed)), *both)
    for client in both:
        monkeypatch.setattr(client, "timeouts", HASTY)

    def stop() -> None:
        for process in processes:
            os.kill(process.pid, signal.SIGSTOP)

    try:
        report, seconds = publish_and_strike(publisher, both, "stopped", changed_folder, stop)
    finally:
        for process in processes:
            os.kill(process.pid, signal.SIGCONT)
    assert seconds < BOUND
    assert report.served == (one.client,) and list(report.failures) == [doomed]
    assert doomed.url in str(report.failures[doomed])
    assert one.checksums() == expected
    assert one.greedy().versions == {"stopped"}
    one.assert_free()
    assert_comes_back(publisher, both, changed, Server(doomed, thread), expected)
    publisher.close()


def assert_comes_back(
    publisher: Publisher, both: list[Client], weights: Weights, server: Server, expected: Mapping[str, str]
) -> None:
    """A server that goes on takes weights again; what it was told while it stood still may come in between."""
    deadline = time.monotonic() + 60
    while (report := publisher.publish(both, "again", stream(weights))).failures:
        assert time.monotonic() < deadline, report.failures
    assert server.checksums() == expected
    server.assert_free()


def test_a_server_that_is_killed_costs_the_other_nothing(
    publishers: dict[str, Publisher],
    one: Server,
    doomed: Client,
    processes: list[Any],
    changed: Weights,
    changed_folder: Path,
) -> None:
    """The last test: the second server is gone after it."""
    expected = one.read(changed_folder)

    def kill() -> None:
        for process in processes:
            os.kill(process.pid, signal.SIGKILL)

    both = [doomed, one.client]
    report, seconds = publish_and_strike(publishers["broadcast"], both, "killed", changed_folder, kill)
    assert seconds < BOUND
    assert report.served == (one.client,) and list(report.failures) == [doomed]
    assert isinstance(report.failures[doomed], ServerError) and doomed.url in str(report.failures[doomed])
    assert one.checksums() == expected
    one.assert_free()
    for name in SINKS:
        report = publishers[name].publish(both, f"dead-{name}", stream(changed))
        assert report.served == (one.client,)
        assert one.greedy().versions == {f"dead-{name}"}
