"""Time and memory of publishing weights from Megatron shards to a running SGLang server, by transport.

    SDPG_SGLANG_PYTHON=.venv-sglang/bin/python python benchmarks/publish.py
    SDPG_SGLANG_PYTHON=... python benchmarks/publish.py --models qwen3 --layouts 1x1,2x1 --out publish.json

The trainer's ranks are real processes over Gloo that hold shards of the model on CPUs. A real server runs on the same
machine. `smollm2` is SmolLM2-135M-Instruct, as scripts/setup.sh prepares it. `qwen3` has the shape of Qwen3-0.6B with
12 layers and random weights, 1.4 GB in float32.

Seconds: a complete publish of the trainer, from the pause until the server reports the version. The first publish of
each transport creates process groups and is not counted. The result is the best of the others.

Raw: the cost of the bytes. Gloo broadcasts of the sizes of the stream's buckets in sequence, from one process to
another, between buffers that both have used before, without server, HTTP and tensors.

Phases, as shares of the total: "gather" builds full tensors from shards, "convert" brings them into the transport's
format, "send" transfers them to the server, which copies them into place. These phases overlap, so the shares may sum
to more than 1. "control" is the time before and after them.

Memory: the peak of a rank during the first publish less its memory before, see benchmarks/memory.py. The figure is the
maximum over ranks, next to the bound of the code: two buckets and the largest tensor. Later publishes reuse buffers.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

if not __package__:  # run as a script: sys.path starts with the script's folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.head import machine, write_json
from benchmarks.memory import MIB, peak_memory
from sdpg_megatron.architecture import Architecture, read_architecture
from sdpg_megatron.config import SGLangConfig
from sdpg_megatron.rollout.sglang.client import Client, Timeouts
from sdpg_megatron.rollout.sglang.event_loop import LoopThread
from sdpg_megatron.rollout.sglang.interpreter import PYTHON_VARIABLE, default_python
from sdpg_megatron.rollout.sglang.publish import Publisher
from sdpg_megatron.rollout.sglang.server import Launch, ServerProcess
from sdpg_megatron.rollout.transports import BroadcastTransport, DiskTransport, SharedMemoryTransport, Transport
from sdpg_megatron.weights import WeightStream, hf_shapes, weight_map

SMOLLM2 = Path("~/.cache/sdpg_megatron/smollm2-135m-instruct").expanduser()
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "eos_token_id": 0,
}
SERVER_ARGUMENTS = ("--max-total-tokens", "4096", "--mem-fraction-static", "0.3", "--skip-tokenizer-init")
START_SECONDS = 600.0
COLLECTIVE_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True, slots=True)
class Result:
    """A row of the output. The JSON has exactly these keys."""

    model: str
    tp: int
    pp: int
    transport: str
    bytes: int
    seconds: float
    raw_seconds: float
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class Setting:
    """A model and a layout of trainer ranks."""

    folder: Path
    url: str
    tp: int
    pp: int
    transports: tuple[str, ...]
    bucket_mib: int
    repeats: int
    threads: int
    """Total over all ranks."""
    scratch: Path


# --- in a rank

S = TypeVar("S")


def run_ranks(
    count: int,
    setting: S,
    job: Callable[[int, S], Any],
    *,
    threads: int,
    preload: Sequence[str] = ("sdpg_megatron.rollout.sglang.publish",),
) -> list[Any]:
    """Run ``job(rank, setting)`` on every rank, in fresh processes of one Gloo group. Returns the results as JSON.

    Args:
        threads: total over all ranks.
        preload: modules to import once for all processes.
    """
    multiprocessing.set_forkserver_preload(["torch", *preload])
    with tempfile.TemporaryDirectory(prefix="benchmark-ranks-") as folder:
        arguments = count, setting, job, threads, folder
        start_processes(_rank_main, arguments, count, start_method="forkserver")  # type: ignore[no-untyped-call]
        return [json.loads(Path(folder, str(rank)).read_text()) for rank in range(count)]


def _rank_main(rank: int, count: int, setting: S, job: Callable[[int, S], Any], threads: int, folder: str) -> None:
    gc.freeze()
    torch.set_num_threads(max(1, threads // count))
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", COLLECTIVE_TIMEOUT, count, rank)
    found = job(rank, setting)
    Path(folder, str(rank)).write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


class Trainer:
    """A rank's shard of the model, with every page written, and its part in weight streams."""

    def __init__(self, rank: int, setting: Setting) -> None:
        tp, pp = setting.tp, setting.pp
        self.arch = read_architecture(setting.folder)
        self.bucket_bytes = setting.bucket_mib * MIB
        tp_groups = [dist.new_group([stage * tp + i for i in range(tp)]) for stage in range(pp)]
        pp_groups = [dist.new_group([stage * tp + i for stage in range(pp)]) for i in range(tp)]
        self.groups = {"tp_group": tp_groups[rank // tp], "pp_group": pp_groups[rank % tp]}
        shapes = local_shapes(self.arch, tp=tp, stage=rank // tp, stages=pp)
        self.params = {name: torch.full(shape, 0.01) for name, shape in shapes.items()}

    def stream(self) -> Iterator[Any]:
        return WeightStream(self.params, self.arch, bucket_bytes=self.bucket_bytes, **self.groups)


def local_shapes(arch: Architecture, *, tp: int, stage: int, stages: int) -> dict[str, tuple[int, ...]]:
    """Local shapes of a pipeline stage's parameters by Megatron name."""
    found: dict[str, tuple[int, ...]] = {}
    covered: set[str] = set()
    for name, parameter in weight_map(arch).items():
        if covered.issuperset(parameter.tensors):
            continue  # an alternative name or a copy
        covered.update(parameter.tensors)
        if parameter.layer is not None:
            owner = parameter.layer * stages // arch.num_layers
        else:
            owner = 0 if name.startswith("embedding") else stages - 1
        if owner == stage:
            found[name] = parameter.local_shape(tp)
    return found


def publish_job(rank: int, setting: Setting) -> dict[str, Any]:
    """By transport: this rank's peak; on rank 0 also seconds, bytes and phases."""
    trainer = Trainer(rank, setting)
    with publishers(setting) if rank == 0 else no_publishers(setting) as publish:
        return {
            transport: _measure(transport, publish[transport], trainer, setting.repeats)
            for transport in setting.transports
        }


def _measure(transport: str, publish: Callable[[Iterator[Any]], Any], trainer: Trainer, repeats: int) -> dict[str, Any]:
    dist.barrier()
    with peak_memory(torch.device("cpu")) as extra:  # of the first publish only: transports keep their buffers
        publish(trainer.stream())
        dist.barrier()
    best: dict[str, Any] = {"seconds": float("inf")}
    for _ in range(repeats):
        dist.barrier()
        start = time.perf_counter()
        report = publish(trainer.stream())
        seconds = time.perf_counter() - start
        if seconds < best["seconds"]:
            best = {"seconds": seconds} | ({"bytes": report.bytes, "phases": dict(report.seconds)} if report else {})
    dist.barrier()
    return best | {"peak": extra[0]}


def make_transport(name: str, setting: Setting) -> Transport:
    match name:
        case "broadcast":
            nonce, cpu = f"benchmark-{os.getpid()}", torch.device("cpu")
            return BroadcastTransport(nonce=nonce, device=cpu, address=None, seconds=Timeouts().update)
        case "shared":
            return SharedMemoryTransport()
        case _:
            folder = setting.scratch / "published"
            return DiskTransport(folder=folder, source_folder=setting.folder, shard_bytes=setting.bucket_mib * MIB)


@contextmanager
def publishers(setting: Setting) -> Iterator[dict[str, Callable[[Iterator[Any]], Any]]]:
    """Functions that publish a stream on rank 0, by transport."""
    thread = LoopThread("publish-benchmark")

    async def make_client() -> Client:
        return Client(setting.url, timeouts=Timeouts())

    client = thread.run(make_client())
    shapes = hf_shapes(read_architecture(setting.folder))
    versions = iter(range(10**6))

    def make(name: str) -> Callable[[Iterator[Any]], Any]:
        transport = make_transport(name, setting)
        made.append(publisher := Publisher(transport, shapes, thread))

        def publish(buckets: Iterator[Any]) -> Any:
            report = publisher.publish([client], f"{name}-{next(versions)}", buckets)
            if report.failures:
                raise RuntimeError(f"{name}: {next(iter(report.failures.values()))}")
            return report

        return publish

    made: list[Publisher] = []
    yield {name: make(name) for name in setting.transports}
    for publisher in made:
        publisher.close()
    thread.run(client.close())
    thread.close()


@contextmanager
def no_publishers(setting: Setting) -> Iterator[dict[str, Callable[[Iterator[Any]], Any]]]:
    """Functions for the other ranks, which only iterate over the stream, by transport."""

    def drain(buckets: Iterator[Any]) -> None:
        for _ in buckets:
            pass

    yield dict.fromkeys(setting.transports, drain)


def sizes_job(rank: int, setting: Setting) -> list[int]:
    """Bytes per bucket of the stream."""
    return [sum(tensor.nbytes for _, tensor in bucket) for bucket in Trainer(rank, setting).stream()]


def raw_job(rank: int, setting: Setting) -> list[float]:
    """Seconds per round of broadcasts from rank 0 with the sizes of the buckets."""
    sizes = json.loads((setting.scratch / "sizes.json").read_text())
    memory = torch.zeros(max(sizes), dtype=torch.uint8)
    rounds = []
    for _ in range(1 + setting.repeats):
        dist.barrier()
        start = time.perf_counter()
        for size in sizes:
            dist.broadcast(memory[:size], src=0)
        dist.barrier()
        rounds.append(time.perf_counter() - start)
    return rounds[1:]


# --- in the parent


def raw_seconds(setting: Setting) -> float:
    """Seconds of the best round of raw broadcasts."""
    sizes = run_ranks(setting.tp * setting.pp, setting, sizes_job, threads=setting.threads)[0]
    (setting.scratch / "sizes.json").write_text(json.dumps(sizes))
    rounds: list[list[float]] = run_ranks(2, setting, raw_job, threads=setting.threads)
    return min(max(one) for one in zip(*rounds, strict=True))


def measure(model: str, setting: Setting) -> tuple[list[Result], dict[str, dict[str, float]]]:
    """Results and phases by transport."""
    raw = raw_seconds(setting)
    ranks = run_ranks(setting.tp * setting.pp, setting, publish_job, threads=setting.threads)
    results, phases = [], {}
    for transport in setting.transports:
        first = ranks[0][transport]
        peak = max(rank[transport]["peak"] for rank in ranks)
        results.append(Result(model, setting.tp, setting.pp, transport, first["bytes"], first["seconds"], raw, peak))
        phases[f"{model} {setting.tp}x{setting.pp} {transport}"] = first["phases"]
    return results, phases


@contextmanager
def model_folder(name: str, scratch: Path) -> Iterator[Path]:
    """Hugging Face folder of the model, for servers without a tokenizer."""
    if name == "smollm2":
        yield SMOLLM2
        return
    folder = scratch / name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(QWEN3))
    numbers = torch.Generator().manual_seed(0)
    weights: dict[str, Tensor] = {
        tensor: torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=numbers) * 0.02
        for tensor, shape in hf_shapes(read_architecture(folder)).items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    del weights
    yield folder


@contextmanager
def running_server(folder: Path, scratch: Path, arguments: Sequence[str] = SERVER_ARGUMENTS) -> Iterator[str]:
    """Run a server of the model; yields its URL."""
    launch = Launch(
        model=folder,
        log=scratch / "server.log",
        dtype="float32",
        device="cpu",
        python=default_python(),
        arguments=tuple(arguments),
    )
    process = ServerProcess(launch)
    process.start()
    thread = LoopThread("wait-for-server")
    try:
        thread.run(_until_well(process))
        yield process.url
    finally:
        thread.close()
        process.stop()


async def _until_well(process: ServerProcess) -> None:
    client = Client(process.url)
    deadline = time.monotonic() + START_SECONDS
    try:
        while not await client.alive():
            if not process.alive() or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start:\n{process.log_tail(40)}")
            time.sleep(0.5)
    finally:
        await client.close()


def misfit(arch: Architecture, tp: int, pp: int) -> str | None:
    """Reason for which a model does not support a layout; None if it does."""
    for what, count, size in (("key-value heads", arch.num_kv_heads, tp), ("layers", arch.num_layers, pp)):
        if count % size:
            return f"{count} {what} over {size} ranks"
    return None


def table(results: Sequence[Result], phases: dict[str, dict[str, float]], bounds: dict[str, int]) -> str:
    """Table of all results."""
    lines = [
        f"{'model':8} {'tpxpp':6}{'transport':10}{'MB':>7}{'s':>7}{'GB/s':>6}{'raw s':>7}{'of raw':>7}"
        f"{'gather':>8}{'convert':>8}{'send':>6}{'control':>8}{'peak MiB':>9}{'bound':>7}"
    ]
    for one in results:
        parts = phases[f"{one.model} {one.tp}x{one.pp} {one.transport}"]
        gather, convert, send, control = (
            parts[name] / one.seconds for name in ("gather", "convert", "send", "control")
        )
        lines.append(
            f"{one.model:8} {f'{one.tp}x{one.pp}':6}{one.transport:10}{one.bytes / 1e6:7.0f}{one.seconds:7.2f}"
            f"{one.bytes / one.seconds / 1e9:6.2f}{one.raw_seconds:7.2f}{one.raw_seconds / one.seconds:7.2f}"
            f"{gather:8.2f}{convert:8.2f}{send:6.2f}{control:8.2f}{one.peak_bytes / MIB:9.0f}"
            f"{bounds[one.model] / MIB:7.0f}"
        )
    return "\n".join(lines) + "\n"


def memory_bound(arch: Architecture, bucket_mib: int) -> int:
    """Bytes of two buckets and the largest tensor. A tensor above the bucket limit is a separate bucket."""
    largest = max(4 * prod(shape) for shape in hf_shapes(arch).values())
    return 2 * max(bucket_mib * MIB, largest) + largest


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="benchmarks/publish.py", description=__doc__, formatter_class=formatter)
    parser.add_argument("--models", type=_some("smollm2", "qwen3"), default=["smollm2", "qwen3"], metavar="NAMES")
    parser.add_argument("--layouts", type=_layouts, default=[(1, 1), (2, 1), (1, 2)], metavar="TPxPP,...")
    parser.add_argument(
        "--transports", type=_some("broadcast", "shared", "disk"), default=["broadcast", "shared", "disk"]
    )
    parser.add_argument("--bucket-mib", type=int, default=SGLangConfig().bucket_mib, metavar="MIB")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="timed publishes, after one warm-up")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="JSON list of results; FILE.meta.json describes the run"
    )
    return parser.parse_args(argv)


def _some(*known: str) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        found = text.split(",")
        if unknown := set(found) - set(known):
            raise argparse.ArgumentTypeError(f"found {sorted(unknown)[0]!r}, expected some of {', '.join(known)}")
        return found

    return names


def _layouts(text: str) -> list[tuple[int, int]]:
    layouts = []
    for part in text.split(","):
        tp, separator, pp = part.partition("x")
        if not (separator and tp.isdigit() and pp.isdigit() and int(tp) and int(pp)):
            raise argparse.ArgumentTypeError(f"found {part!r}, expected tensor x pipeline ranks such as 2x1")
        layouts.append((int(tp), int(pp)))
    return layouts


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    threads = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
    results: list[Result] = []
    phases: dict[str, dict[str, float]] = {}
    bounds: dict[str, int] = {}
    left_out: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="publish-benchmark-") as name:
        for model in options.models:
            scratch = Path(name)
            if model == "smollm2" and not SMOLLM2.exists():
                left_out[model] = f"no {SMOLLM2}: scripts/setup.sh prepares it"
                continue
            with model_folder(model, scratch) as folder, running_server(folder, scratch) as url:
                arch = read_architecture(folder)
                bounds[model] = memory_bound(arch, options.bucket_mib)
                for tp, pp in options.layouts:
                    if reason := misfit(arch, tp, pp):
                        left_out[f"{model} {tp}x{pp}"] = reason
                        continue
                    sys.stderr.write(f"{model}, {tp} x {pp} ranks\n")
                    transports = tuple(options.transports)
                    setting = Setting(
                        folder, url, tp, pp, transports, options.bucket_mib, options.repeats, threads, scratch
                    )
                    found, parts = measure(model, setting)
                    results += found
                    phases |= parts
    meta = {
        "machine": machine("cpu", threads),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": shlex.join(["python", "benchmarks/publish.py", *(sys.argv[1:] if argv is None else argv)]),
        "torch": torch.__version__,
        "bucket_mib": options.bucket_mib,
        "memory_bound_bytes": bounds,
        "phases": phases,
        "left_out": left_out,
    }
    sys.stdout.write(f"{meta['machine']}; torch {meta['torch']}; {meta['date']}; {meta['command']}\n")
    sys.stdout.write(table(results, phases, bounds))
    sys.stdout.writelines(f"left out: {which}: {reason}\n" for which, reason in left_out.items())
    if options.out:
        write_json(options.out, [asdict(result) for result in results])
        write_json(options.out.with_name(options.out.name + ".meta.json"), meta)
    return 0


if __name__ == "__main__":
    if not os.environ.get(PYTHON_VARIABLE):
        sys.stderr.write(f"set {PYTHON_VARIABLE} to an interpreter that has sglang (scripts/install_sglang_cpu.sh)\n")
        sys.exit(2)
    sys.exit(main())
