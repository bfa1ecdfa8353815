"""Parts of benchmarks/gpu.py, each a function that returns its results. `main` runs one part."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.step_data import HINT_TOKENS, PROMPT_TOKENS, given_groups

ROOT = Path(__file__).resolve().parents[1]
VOCAB = 151_936
SIZES = {
    "0.6b": {"hidden_size": 1024, "intermediate_size": 3072},
    "1.7b": {"hidden_size": 2048, "intermediate_size": 6144},
}
"""Sizes of Qwen3 models. `model_config` has the other fields."""
TINY = {"hidden_size": 32, "intermediate_size": 48}
PACKAGES = (
    "torch",
    "triton",
    "megatron-core",
    "transformers",
    "transformer-engine",
    "apex",
    "flash-attn",
    "liger-kernel",
)
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
SERVER_ARGUMENTS = (
    *("--attention-backend", "triton", "--sampling-backend", "pytorch", "--grammar-backend", "none"),
    *("--disable-cuda-graph", "--disable-overlap-schedule"),
)
"""Arguments of SGLang on a GPU that need few compiled kernels. The warm-up request stays on, so that kernels are
compiled before the server reports its start. A server that compiles later fails its health checks."""
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::_local_scalar_dense")


@dataclass(frozen=True, slots=True)
class Options:
    rehearse: bool
    sglang_python: Path | None
    sglang: Path | None

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.rehearse else "cuda")


# --- machine


def machine(options: Options) -> dict[str, Any]:
    """Versions, and the peak rates of the device."""
    size = 256 if options.rehearse else 8192
    one, other = (torch.randn(size, size, dtype=torch.bfloat16, device=options.device) for _ in range(2))
    big = torch.empty(size * size * 4, dtype=torch.uint8, device=options.device)
    host = torch.empty_like(big, device="cpu", pin_memory=not options.rehearse)
    seconds = {
        "matmul": best_seconds(lambda: one @ other, options),
        "copy": best_seconds(lambda: big.clone(), options),
        "to_host": best_seconds(lambda: host.copy_(big, non_blocking=True), options),
        "from_host": best_seconds(lambda: big.copy_(host, non_blocking=True), options),
    }
    found: dict[str, Any] = {
        "gpu": platform.processor() or "cpu" if options.rehearse else torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "packages": {name: number for name in PACKAGES if (number := installed(name))},
        "matmul_tflops": 2 * size**3 / seconds["matmul"] / 1e12,
        "device_gb_s": 2 * big.numel() / seconds["copy"] / 1e9,
        "to_host_gb_s": big.numel() / seconds["to_host"] / 1e9,
        "from_host_gb_s": big.numel() / seconds["from_host"] / 1e9,
    }
    return found if options.rehearse else {**found, **nccl()}


def nccl() -> dict[str, Any]:
    """Run a collective of one rank."""
    import torch.distributed as dist

    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("nccl", init_method=f"file://{folder}/store", rank=0, world_size=1)
        ones = torch.ones(1024, device="cuda")
        dist.all_reduce(ones)
        assert ones.sum().item() == 1024
        dist.destroy_process_group()
    return {"nccl": ".".join(map(str, torch.cuda.nccl.version()))}


def best_seconds(work: Callable[[], object], options: Options, rounds: int = 5) -> float:
    work()
    found = []
    for _ in range(rounds):
        finish(options)
        started = time.perf_counter()
        work()
        finish(options)
        found.append(time.perf_counter() - started)
    return min(found)


def finish(options: Options) -> None:
    if not options.rehearse:
        torch.cuda.synchronize()


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


# --- tests and head


def tests(options: Options) -> dict[str, Any]:
    """Run tests/gpu. Without a GPU they are skipped, with the reason."""
    workers = ["-n", "4"] if installed("pytest-xdist") else []
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *workers, f"--junitxml={report}", "tests/gpu"]
        subprocess.run([sys.executable, *command], cwd=ROOT)
        cases = list(ET.parse(report).getroot().iter("testcase"))
    kinds = {
        case: next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "") for case in cases
    }
    count = Counter(kinds.values())
    return {
        "passed": count[""],
        "failed": count["failure"] + count["error"],
        "skipped": count["skipped"],
        "failures": [str(case.get("name")) for case, kind in kinds.items() if kind in ("failure", "error")],
    }


def head(options: Options) -> dict[str, Any]:
    """Run benchmarks/head.py with every installed implementation."""
    sizes = ["--rows=64", "--hidden=32", "--vocab=512", "--repeats=1"]
    if not options.rehearse:
        sizes = ["--device=cuda", "--rows=8192", "--hidden=2560", "--dtype=bfloat16", "--repeats=5"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "head.json"
        subprocess.run([sys.executable, "benchmarks/head.py", *sizes, "--tp=1", f"--out={out}"], cwd=ROOT, check=True)
        rows = json.loads(out.read_text(encoding="utf-8"))
    brief = {row["name"]: {"tflops_8THV": row["tflops_8THV"], "peak_bytes": row["peak_bytes"]} for row in rows}
    others = {name: row for name, row in brief.items() if not name.startswith(("ours", "naive", "matmul_floor"))}
    fastest = max(others, key=lambda name: others[name]["tflops_8THV"])
    return {
        **brief["ours/grad_in_forward"],
        "best_other": {fastest: others[fastest]},
        "naive": brief["naive"],
        "matmul_floor": brief["matmul_floor"],
        "all": rows,
    }


# --- training


def model_config(size: str, options: Options) -> dict[str, Any]:
    sizes = {**TINY, "vocab_size": 320} if options.rehearse else {**SIZES[size], "vocab_size": VOCAB}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "num_hidden_layers": 2}
    if not options.rehearse:
        heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 28}
    return {**sizes, **heads, "rope_theta": 1e6, "tie_word_embeddings": True, "max_position_embeddings": 40_960}


def write_model(size: str, folder: Path, options: Options) -> Path:
    """Write a random Qwen3 with the tokenizer of the tests, whose tokens are a part of the vocabulary."""
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    from tests.tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    with options.device:
        model = Qwen3ForCausalLM(Qwen3Config(**model_config(size, options), **ids))
    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    model.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=tokenizer.pad_token_id)
    model.to(torch.float32 if options.rehearse else torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_run(size: str, folder: Path, options: Options, **rollout: Any) -> Path:
    """Write the YAML file of a run of two steps."""
    questions = [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(64)]
    for name, rows in (("train", questions[8:]), ("eval", questions[:8])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    prompts, group, length = (2, 2, 4) if options.rehearse else (8, 8, 128)
    tokens = 256 if options.rehearse else 16_384
    ramps = {"beta_warmup_steps": 0, "beta_decay_steps": 0}
    config = {
        "run_dir": str(folder / "run"),
        "steps": 2,
        "model": {
            "path": str(write_model(size, folder / "model", options)),
            "dtype": "float32" if options.rehearse else "bfloat16",
        },
        "data": {
            "train": [str(folder / "train.jsonl")],
            "eval": [str(folder / "eval.jsonl")],
            "max_prompt_tokens": 256,
        },
        "eval": {"samples": 1},
        "reward": {"verifier": "number"},
        "rollout": {
            "prompts_per_step": prompts,
            "group_size": group,
            "max_response_tokens": length,
            "batch_size": prompts * group,
            **rollout,
        },
        "objective": {"beta": 1e-3, "gate": False, **ramps},
        # student and teacher together; the teacher's prompts are slightly longer
        "optimizer": {"warmup_steps": 0, "micro_batch_tokens": 2 * tokens + tokens // 8},
        "checkpoint": {"every": 0},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def steps(size: str, options: Options) -> dict[str, Any]:
    """Optimizer steps on given responses: passes of student, teacher and reference, and the update.

    Steps that also measure the gradient ratio (every tenth) are not included.
    """
    from benchmarks.step_trainer import StandingPolicyTrainer
    from sdpg_megatron.config.load import load_config

    lengths = [8] * 4 if options.rehearse else [1024 - PROMPT_TOKENS] * 64
    group = 2 if options.rehearse else 8
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        path = write_run(size, folder, options)
        overrides = [f"rollout.prompts_per_step={len(lengths) // group}", f"rollout.group_size={group}"]
        overrides += [f"rollout.max_response_tokens={lengths[0]}", "rollout.mismatch_limit=null"]
        overrides += [f"model.recompute={size == '1.7b'}".lower()]  # without, 1.7B does not fit in 80 GB
        student_tokens = len(lengths) * (lengths[0] + PROMPT_TOKENS) // (1 if options.rehearse else 4)
        planned = plan(path, [*overrides, f"optimizer.micro_batch_tokens={student_tokens}"])
        trainer = StandingPolicyTrainer(load_config(path, overrides))
        groups = given_groups(lengths, group, trainer.inputs.arch.vocab_size)
        seconds = []
        for number in range(4):
            finish(options)
            started = time.perf_counter()
            trainer.learn(groups, 1)
            finish(options)
            seconds.append(time.perf_counter() - started)
            if number == 0 and not options.rehearse:
                torch.cuda.reset_peak_memory_stats()
        peak = 0 if options.rehearse else torch.cuda.max_memory_allocated()
        with profiled() as (calls, kernels):
            trainer.learn(groups, 1)
            finish(options)
        numel = sum(parameter.numel() for chunk in trainer.policy_trainer.chunks for parameter in chunk.parameters())
    best = min(seconds[1:])
    arch = trainer.inputs.arch
    response = sum(lengths)
    student = response + len(lengths) * PROMPT_TOKENS
    teacher = student + len(lengths) * HINT_TOKENS
    layers = numel - arch.vocab_size * arch.hidden_size
    # Matrix products, 2 operations per multiplication: layers forward and backward for the student, forward for teacher
    # and reference; 8 T H V in the head, and one more product for the reference's log-probs. Without attention.
    flops = 2 * layers * (3 * student + teacher + student) + 10 * response * arch.hidden_size * arch.vocab_size
    return {
        "seconds": statistics.median(seconds[1:]),
        "tokens_per_second": student / best,
        "flops": flops,
        "mfu": flops / best / 989e12,
        "peak_gib": peak / 2**30,
        "planned_gib": planned,
        "kernels": sum(calls[name] for name in LAUNCHES),
        "waits": {name: calls[name] for name in WAITS if calls[name]},
        "calls": dict(calls.most_common(40)),
        "kernel_milliseconds": {name: round(spent, 3) for name, spent in kernels.most_common(40)},
        "gpu_busy": kernels.total() / 1e3 / best,
    }


@contextmanager
def profiled() -> Iterator[tuple[Counter[str], Counter[str]]]:
    """Profile a block: calls of the CUDA runtime and of torch operators, and kernel milliseconds, by name.

    The counters are filled on exit.
    """
    from torch.profiler import ProfilerActivity, profile

    calls: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=kinds) as profiler:
        yield calls, kernels
    for event in profiler.key_averages():
        calls[event.key] += event.count
        if event.device_type.name == "CUDA":
            kernels[event.key] += event.self_device_time_total / 1e3


def plan(path: Path, overrides: Sequence[str]) -> float:
    """GiB of torch's allocator in the passes and the update, as estimated by `sdpg-megatron plan`.

    The estimate counts all tokens of a micro-batch as the student's. With a teacher, about half of them are.
    """
    from sdpg_megatron.config.load import load_config
    from sdpg_megatron.estimate.gpus import find_gpu
    from sdpg_megatron.estimate.plan import make_plan

    made = make_plan(load_config(path, overrides), find_gpu("H100"), 1)
    (stage,) = made.stages
    return float(max(stage.total(name) - stage.parts(name)["context"] for name in ("passes", "update"))) / 2**30


def run(options: Options, *overrides: str, compare: bool = False) -> dict[str, Any]:
    """Run `sdpg-megatron train` and return the metrics of its last step. On failure, print the logs of its servers.

    Args:
        compare: also compare the last evaluation's greedy responses with those of the embedded engine.
    """
    with tempfile.TemporaryDirectory() as scratch, peak_memory(options) as peak:
        path = write_run("0.6b", Path(scratch), options)
        done = subprocess.run([sys.executable, "-m", "sdpg_megatron", "train", str(path), *overrides], cwd=ROOT)
        run_dir = Path(scratch) / "run"
        metrics = run_dir / "metrics.jsonl"
        lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
        if done.returncode:
            for log in sorted(run_dir.glob("logs/*.log")):
                sys.stderr.write(f"{log.name}:\n{log.read_text(encoding='utf-8', errors='replace')[-8000:]}\n")
        found: dict[str, float] = json.loads(lines[-1]) if lines else {}
        greedy = compare_greedy(path, run_dir) if compare and not done.returncode else {}
    return {
        "steps": len(lines),
        "seconds": {name.removeprefix("time/"): value for name, value in found.items() if name.startswith("time/")},
        "logprob_diff_mean": found.get("rollout/logprob_diff_mean"),
        **greedy,
        **peak,
        "metrics": found,
        **({"error": f"sdpg-megatron train: exit code {done.returncode}"} if done.returncode else {}),
    }


@contextmanager
def peak_memory(options: Options) -> Iterator[dict[str, float]]:
    """Yield a dictionary that has the device's peak memory of all processes, in GiB, at the end. Empty on a CPU."""
    found: dict[str, float] = {}
    if options.rehearse:
        yield found
        return
    used, done = [0], threading.Event()

    def poll() -> None:
        while not done.wait(0.1):
            free, total = torch.cuda.mem_get_info()
            used.append(total - free)

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()
        found["device_peak_gib"] = max(used) / 2**30


def compare_greedy(path: Path, run_dir: Path) -> dict[str, float]:
    """Compare greedy responses of the run's last evaluation, from its engine, with transformers' on the same weights.

    Returns:
        Share of equal responses.
    """
    out = run_dir.with_name("greedy")
    command = [sys.executable, "-m", "sdpg_megatron", "eval", str(run_dir / "model"), "--out", str(out)]
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    files, rollout = config["data"]["eval"], config["rollout"]
    overrides = [f"data.eval={json.dumps(files)}", "eval.samples=1", f"model.dtype={config['model']['dtype']}"]
    overrides += [f"eval.max_response_tokens={rollout['max_response_tokens']}", "reward.verifier=number"]
    subprocess.run([*command, *overrides], cwd=ROOT, check=True)
    last = max(run_dir.glob("eval/step_*"))
    served, embedded = (greedy_responses(folder) for folder in (last, out))
    return {"greedy_equal": statistics.fmean(served[uid] == text for uid, text in embedded.items())}


def greedy_responses(folder: Path) -> dict[str, str]:
    """Greedy response of each problem in an evaluation's folder."""
    lines = (line for file in folder.glob("*.jsonl") for line in file.read_text(encoding="utf-8").splitlines())
    problems = [json.loads(line) for line in lines]
    return {problem["uid"]: problem["greedy"]["responses"][0] for problem in problems}


def sglang(options: Options) -> dict[str, Any]:
    """`run` with a server, colocated on a GPU, where its memory is released and restored.

    Its weights are verified after every step, and its greedy responses compared with transformers'.
    """
    if options.sglang_python is None and options.sglang is None:
        return {"left_out": "no interpreter with sglang: --sglang-python, or --sglang with a folder of packages"}
    with tempfile.TemporaryDirectory() as folder:
        python = options.sglang_python or write_interpreter(Path(folder) / "python", options.sglang)
        served = ["rollout.engine=sglang", f"rollout.sglang.python={python}", "rollout.sglang.mem_fraction=0.3"]
        served += ["rollout.sglang.transport=shared", "rollout.sglang.verify_every=1"]
        if not options.rehearse:
            served += ["rollout.sglang.colocated=true", f"rollout.sglang.arguments={json.dumps(SERVER_ARGUMENTS)}"]
        return {**run(options, *served, compare=True), "checked": True}


def write_interpreter(path: Path, packages: Path | None) -> Path:
    """Write a wrapper of this interpreter that puts a folder of packages first, even in isolated mode (-I).

    SGLang's memory saver is a library that is preloaded. It needs CUDA's runtime, which pip installs in a folder that
    only torch searches.
    """
    folders = os.pathsep.join(filter(None, (str(packages), os.environ.get("PYTHONPATH"))))
    runtimes = Path(torch.__file__).parents[1].glob("nvidia/*/lib/libcudart.so.*")
    libraries = os.pathsep.join(
        filter(None, (os.environ.get("LD_LIBRARY_PATH"), *(str(runtime.parent) for runtime in runtimes)))
    )
    path.write_text(
        f"""#!/bin/sh
[ "$1" = -I ] && shift
export PYTHONPATH="{folders}" LD_LIBRARY_PATH="{libraries}"
exec "{sys.executable}" "$@"
"""
    )
    path.chmod(0o755)
    return path


PARTS: dict[str, Callable[[Options], dict[str, Any]]] = {
    "machine": machine,
    "train": lambda options: steps("0.6b", options),
    "head": head,
    "tests": tests,
    "run": run,
    "sglang": sglang,
    "train_1.7b": lambda options: steps("1.7b", options),
}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--sglang-python", type=Path)
    parser.add_argument("--sglang", type=Path)
    given = parser.parse_args()
    if given.rehearse:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    found = PARTS[given.part](Options(given.rehearse, given.sglang_python, given.sglang))
    given.out.write_text(json.dumps(found) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
