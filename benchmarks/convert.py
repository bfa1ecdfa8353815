"""Time and memory of converting a model to Megatron's checkpoint format and back.

    python benchmarks/convert.py
    python benchmarks/convert.py --models qwen3 --gigabytes 0.5 --out convert.json

`smollm2` is SmolLM2-135M-Instruct in float32, as scripts/setup.sh prepares it. `qwen3` has random bfloat16 weights, the
vocabulary and widths of Qwen3-0.6B, and as many layers as fit `--gigabytes`.

Each is converted to a Megatron checkpoint and back. `qwen3` is also saved by four ranks, real processes over Gloo at
TP 2 x PP 2, as Megatron-LM saves a model. That checkpoint is converted to a Hugging Face folder, and the converted
checkpoint is loaded by four such ranks. The results are compared with the model bit by bit, outside the timed part.

Seconds: a complete conversion in a fresh process, without imports: reading, writing, fsync, and reading the result back
for the comparison. For comparison, the model's files are copied twice, with an fsync of each copy.

Memory: the peak of the process less its memory before, see benchmarks/memory.py. The code should stay below 1.5 times
the model's largest tensor, apart from blocks and buffers of bounded size. For loading ranks, seconds are of the slowest
rank and peaks the largest, without the shard of the model that is filled.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import multiprocessing.connection
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file

if not __package__:  # run as a script: sys.path starts with the script's folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.head import machine, write_json
from benchmarks.memory import MIB, peak_memory
from benchmarks.publish import QWEN3, SMOLLM2, run_ranks
from sdpg_megatron.architecture import read_architecture
from sdpg_megatron.config import ModelConfig, ParallelConfig
from sdpg_megatron.convert.command import convert
from sdpg_megatron.weights import hf_shapes
from sdpg_megatron.weights.load import SafetensorsFolder

COPY_BYTES = 16 * MIB
LAYOUT = ParallelConfig(tensor=2, pipeline=2)
RANKS = 4


@dataclass(frozen=True, slots=True)
class Result:
    """A row of the output. The JSON has exactly these keys."""

    model: str
    saved_by: str
    """Writer of the source: "" for one process."""
    to: str
    """Target format, or "ranks" for loading by ranks."""
    bytes: int
    seconds: float
    copied_twice_seconds: float
    peak_bytes: int
    largest_tensor_bytes: int


def in_process(job: Callable[[Path, Path], object], source: Path, target: Path) -> tuple[float, int]:
    """Seconds and peak memory of ``job(source, target)`` in a fresh process."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_measured, args=(there, job, source, target))
    process.start()
    there.close()
    seconds, peak = here.recv()
    process.join()
    return seconds, peak


def _measured(
    pipe: multiprocessing.connection.Connection, job: Callable[[Path, Path], object], source: Path, target: Path
) -> None:
    with peak_memory(torch.device("cpu")) as peak:
        start = time.perf_counter()
        job(source, target)
        seconds = time.perf_counter() - start
    pipe.send((seconds, peak[0]))


def run_conversion(source: Path, target: Path, like: Path | None = None) -> None:
    convert(source, target, like=like, console=Console(quiet=True))


# --- in a rank


@dataclass(frozen=True, slots=True)
class Setting:
    """Settings shared by the four ranks."""

    folder: Path
    dtype: str
    checkpoint: Path


def build(setting: Setting) -> tuple[Any, Any, Any]:
    """This rank's model chunks with uninitialized weights, the architecture, and the parallel state."""
    from sdpg_megatron.mcore.model import build_chunks
    from sdpg_megatron.mcore.parallel import initialize

    ranks = initialize(LAYOUT, seed=0)
    arch = read_architecture(setting.folder)
    model = ModelConfig(path=setting.folder, spec="local", dtype=setting.dtype)  # type: ignore[arg-type]
    return build_chunks(arch, model, LAYOUT, ranks), arch, ranks


def save_job(rank: int, setting: Setting) -> None:
    """Save the model as Megatron-LM does, without its optimizer."""
    from megatron.core import dist_checkpointing

    from sdpg_megatron.mcore.model import load_weights

    chunks, arch, ranks = build(setting)
    load_weights(chunks, setting.folder, arch, ranks)
    if ranks.is_main:
        setting.checkpoint.mkdir()
    ranks.barrier()
    dist_checkpointing.save({"model": chunks[0].sharded_state_dict(), "iteration": 1}, str(setting.checkpoint))


def load_job(rank: int, setting: Setting) -> tuple[float, int]:
    """Seconds and peak memory of loading this rank's shard of the model."""
    from sdpg_megatron.convert.load_weights import load_weights_only
    from sdpg_megatron.mcore.model import load_weights, named_parameters

    chunks, arch, ranks = build(setting)
    for _, parameter in named_parameters(chunks):
        torch.nn.init.constant_(parameter, torch.nan)
    ranks.barrier()
    with peak_memory(torch.device("cpu")) as peak:
        start = time.perf_counter()
        load_weights_only(chunks, setting.checkpoint)
        seconds = time.perf_counter() - start
    found = {name: parameter.detach().clone() for name, parameter in named_parameters(chunks)}
    load_weights(chunks, setting.folder, arch, ranks)
    if not all(torch.equal(found[name], parameter) for name, parameter in named_parameters(chunks)):
        raise RuntimeError(f"rank {rank}: {setting.checkpoint}: weights differ from those of {setting.folder}")
    return seconds, peak[0]


# --- in the parent


def on_ranks(job: Callable[[int, Setting], Any], setting: Setting) -> list[Any]:
    preload = ("megatron.core.dist_checkpointing", "sdpg_megatron.mcore.model", "sdpg_megatron.convert.load_weights")
    return run_ranks(RANKS, setting, job, threads=len(os.sched_getaffinity(0)), preload=preload)


def check_same(expected: Path, found: Path) -> None:
    """Raise `RuntimeError` if the tensors of two folders with one file each differ in a bit."""
    with safe_open(expected / "model.safetensors", "pt") as one, safe_open(found / "model.safetensors", "pt") as other:
        names = set(one.keys())
        if names != set(other.keys()) or not all(
            torch.equal(one.get_tensor(name), other.get_tensor(name)) for name in names
        ):
            raise RuntimeError(f"{found}: tensors differ from those of {expected}")


def copy_twice(source: Path, target: Path) -> None:
    """Copy the model's files, then the files of the copy."""
    for number, folder in enumerate((source, target / "0")):
        (target / str(number)).mkdir(parents=True)
        for file in sorted(folder.glob("*.safetensors")):
            _copy(file, target / str(number) / file.name)


def _copy(source: Path, target: Path) -> None:
    room = memoryview(bytearray(COPY_BYTES))
    with source.open("rb") as reader, target.open("wb") as writer:
        while count := reader.readinto(room):  # type: ignore[attr-defined]
            writer.write(room[:count])
        os.fsync(writer.fileno())


def measure(model: str, folder: Path, scratch: Path, repeats: int) -> list[Result]:
    """Lowest seconds and highest peak of `repeats` rounds of each conversion."""
    source = SafetensorsFolder(folder)
    arch = read_architecture(folder)
    dtypes = {name: source.dtype(name) for name in hf_shapes(arch)}
    sizes = [prod(shape) * dtypes[name].itemsize for name, shape in hf_shapes(arch).items()]
    source.close()
    sharded = scratch / "sharded"
    by_ranks = model == "qwen3"
    if by_ranks:
        dtype = str(next(iter(dtypes.values()))).removeprefix("torch.")
        on_ranks(save_job, Setting(folder, dtype, sharded))
    one, four = "", f"TP {LAYOUT.tensor} x PP {LAYOUT.pipeline}"
    rounds: dict[tuple[str, str], list[tuple[float, int]]] = defaultdict(list)
    for _ in range(repeats):
        rounds[one, "megatron"].append(in_process(run_conversion, folder, scratch / "megatron"))
        rounds[one, "huggingface"].append(in_process(run_conversion, scratch / "megatron", scratch / "back"))
        rounds[one, "copy"].append(in_process(copy_twice, folder, scratch / "copies"))
        check_same(folder, scratch / "back")
        if by_ranks:
            shutil.rmtree(scratch / "back")
            job = partial(run_conversion, like=folder)
            rounds[four, "huggingface"].append(in_process(job, sharded, scratch / "back"))
            check_same(folder, scratch / "back")
            found = on_ranks(load_job, Setting(folder, dtype, scratch / "megatron" / "release"))
            rounds[one, "ranks"].append((max(seconds for seconds, _ in found), max(peak for _, peak in found)))
        for name in ("megatron", "back", "copies"):
            shutil.rmtree(scratch / name)
    shutil.rmtree(sharded, ignore_errors=True)
    copied = min(seconds for seconds, _ in rounds.pop((one, "copy")))
    return [
        Result(
            model,
            saved_by,
            to,
            sum(sizes),
            min(seconds for seconds, _ in found),
            copied,
            max(peak for _, peak in found),
            max(sizes),
        )
        for (saved_by, to), found in rounds.items()
    ]


@contextmanager
def model_folder(name: str, gigabytes: float, scratch: Path) -> Iterator[Path]:
    if name == "smollm2":
        yield SMOLLM2
        return
    folder = scratch / name
    folder.mkdir()
    config = {**QWEN3, "torch_dtype": "bfloat16", "num_hidden_layers": 1}
    for layers in range(LAYOUT.pipeline, 10_000, LAYOUT.pipeline):
        (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
        shapes = hf_shapes(read_architecture(folder))
        if sum(prod(shape) for shape in shapes.values()) * 2 >= gigabytes * 1e9:
            break
    numbers = torch.Generator().manual_seed(0)
    weights = {tensor: torch.randn(shape, generator=numbers, dtype=torch.bfloat16) for tensor, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    del weights
    yield folder
    shutil.rmtree(folder)


def table(results: Sequence[Result]) -> str:
    """Table of all results."""
    columns = f"{'MB':>7}{'s':>8}{'copied twice s':>16}{'peak MiB':>10}{'largest MiB':>13}"
    lines = [f"{'model':9}{'saved by':13}{'to':13}{columns}"]
    lines += [
        f"{r.model:9}{r.saved_by:13}{r.to:13}{r.bytes / 1e6:7.0f}{r.seconds:8.2f}{r.copied_twice_seconds:16.2f}"
        f"{r.peak_bytes / MIB:10.0f}{r.largest_tensor_bytes / MIB:13.0f}"
        for r in results
    ]
    return "\n".join(lines) + "\n"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="benchmarks/convert.py", description=__doc__, formatter_class=formatter)
    parser.add_argument("--models", nargs="+", choices=("smollm2", "qwen3"), default=["smollm2", "qwen3"])
    parser.add_argument("--gigabytes", type=float, default=2.0, metavar="N", help="size of qwen3")
    parser.add_argument("--repeats", type=int, default=3, metavar="N")
    parser.add_argument(
        "--scratch", type=Path, metavar="FOLDER", help="folder on the measured disk (default: temporary)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="JSON list of results; FILE.meta.json describes the run"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    results: list[Result] = []
    left_out: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="convert-benchmark-", dir=options.scratch) as name:
        for model in options.models:
            if model == "smollm2" and not SMOLLM2.exists():
                left_out[model] = f"no {SMOLLM2}: scripts/setup.sh prepares it"
                continue
            with model_folder(model, options.gigabytes, Path(name)) as folder:
                sys.stderr.write(f"{model}\n")
                results += measure(model, folder, Path(name), options.repeats)
    threads = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
    meta = {
        "machine": machine("cpu", threads),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": shlex.join(["python", "benchmarks/convert.py", *(sys.argv[1:] if argv is None else argv)]),
        "torch": torch.__version__,
        "left_out": left_out,
    }
    sys.stdout.write(f"{meta['machine']}; torch {meta['torch']}; {meta['date']}; {meta['command']}\n")
    sys.stdout.write(table(results))
    sys.stdout.writelines(f"left out: {which}: {reason}\n" for which, reason in left_out.items())
    if options.out:
        write_json(options.out, [asdict(result) for result in results])
        write_json(options.out.with_name(options.out.name + ".meta.json"), meta)
    return 0


if __name__ == "__main__":
    sys.exit(main())
