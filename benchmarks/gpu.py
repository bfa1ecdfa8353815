"""Test and benchmark one GPU in a few minutes, without network: tests, head, training steps, a run, SGLang.

    python benchmarks/gpu.py --minutes 12 --out FOLDER [--sglang-python PYTHON | --sglang PACKAGES]
    python benchmarks/gpu.py --rehearse --out FOLDER       every part on a CPU, at tiny sizes

The most informative parts run first. Each part is a process with a time limit, so a part that fails or takes too long
does not affect the others. FOLDER/gpu.json is written after each part; FOLDER/PART.log has the output of a part. The
last lines of the output are a table. The exit code is 1 if a part failed.

    machine     versions; seconds of a bfloat16 matrix product, of copies on the device and to the host; NCCL
    train       optimizer steps of a random Qwen3 0.6B on given responses, packed, 16k tokens per micro-batch: tokens/s,
                MFU, peak memory and its estimate by `sdpg-megatron plan`, kernels and host synchronizations of a step
    head        benchmarks/head.py at T 8192, H 2560, V 151936, bfloat16
    sglang      `sdpg-megatron train`, two steps with a colocated server, if an interpreter with sglang is given:
                seconds of its phases, log-prob difference; its weights verified after every step
    tests       tests/gpu, including Transformer Engine's if it is installed
    run         like sglang, with the embedded engine
    train_1.7b  like train, with recomputed layers
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TAIL = 400
"""Characters of a failed part's output in the results."""


@dataclass(frozen=True, slots=True)
class Part:
    name: str
    minutes: float
    """Time limit."""
    shown: tuple[str, ...] = ()
    """Keys of its results in the table."""


PARTS = (
    Part("machine", 1.5, ("gpu", "torch", "matmul_tflops", "device_gb_s", "to_host_gb_s")),
    Part("train", 2.5, ("tokens_per_second", "mfu", "seconds", "peak_gib", "planned_gib", "kernels", "waits")),
    Part("head", 2.5, ("tflops_8THV", "peak_bytes", "best_other", "naive", "matmul_floor")),
    Part("sglang", 4.0, ("seconds", "logprob_diff_mean", "greedy_equal", "device_peak_gib")),
    Part("tests", 3.0, ("passed", "failed", "skipped")),
    Part("run", 2.0, ("seconds", "logprob_diff_mean", "device_peak_gib")),
    Part("train_1.7b", 2.5, ("tokens_per_second", "mfu", "seconds", "peak_gib", "planned_gib", "kernels", "waits")),
)
NAMES = [part.name for part in PARTS]


def run_part(part: Part, folder: Path, seconds: float, more: Sequence[str]) -> dict[str, Any]:
    """Run a part in a separate process. Returns its results, with `error` if it failed."""
    result = folder / f"{part.name}.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu_parts", part.name, "--out", str(result), *more]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    started = time.monotonic()
    with (folder / f"{part.name}.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        with suppress(ProcessLookupError):  # also ends child processes
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}
    found["part_seconds"] = round(time.monotonic() - started, 1)
    if code != 0:
        told = (folder / f"{part.name}.log").read_text(encoding="utf-8", errors="replace").strip()
        found["error"] = f"timeout after {seconds:.0f} s" if code is None else told[-TAIL:] or f"exit code {code}"
    return found


def write_results(folder: Path, results: Mapping[str, Any]) -> None:
    staging = folder / ".gpu.json"
    staging.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    staging.replace(folder / "gpu.json")


def table(results: Mapping[str, Any]) -> Iterator[str]:
    for part in PARTS:
        found = results.get(part.name)
        if found is None:
            yield f"{part.name:<12}not run"
            continue
        said = [f"{name} {show(found[name])}" for name in part.shown if name in found]
        said += [
            f"{name}: {' '.join(str(found[name]).split())[-160:]}" for name in ("left_out", "error") if name in found
        ]
        yield f"{part.name:<12}{found['part_seconds']:6.1f} s  {', '.join(said)}"


def show(value: object) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{name} {show(part)}" for name, part in value.items()) + ")"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(argv: Sequence[str] | None = None) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.py", description=__doc__, formatter_class=formatter)
    parser.add_argument("--minutes", type=float, default=12.0, metavar="N", help="total limit (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--rehearse", action="store_true", help="run on a CPU, at tiny sizes")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="PART")
    server = parser.add_mutually_exclusive_group()
    server.add_argument("--sglang-python", type=Path, metavar="PYTHON", help="interpreter that has sglang")
    server.add_argument("--sglang", type=Path, metavar="PACKAGES", help="folder of packages for this interpreter")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    more = ["--rehearse"] if options.rehearse else []
    for name in ("sglang_python", "sglang"):
        if getattr(options, name) is not None:
            more += [f"--{name.replace('_', '-')}", str(getattr(options, name).absolute())]
    results: dict[str, Any] = {"date": datetime.now(UTC).date().isoformat(), "rehearsal": options.rehearse}
    end = time.monotonic() + 60 * options.minutes
    for part in PARTS:
        left = end - time.monotonic()
        if part.name in options.only and left > 5:
            results[part.name] = run_part(part, options.out.absolute(), min(left, 60 * part.minutes), more)
            write_results(options.out, results)
    sys.stdout.write("".join(f"{line}\n" for line in table(results)))
    return int(any("error" in found for found in results.values() if isinstance(found, dict)))


if __name__ == "__main__":
    sys.exit(main())
