"""Time and memory of one step of the output head, forward and backward, compared with other implementations.

    python benchmarks/head.py                                       CPU: T 1024, H 1024, V 151936, float32, tp 1 and 2
    python benchmarks/head.py --device cuda --rows 8192 --hidden 2560 --dtype bfloat16 --out head.json

    python benchmarks/head.py --launches

`head_baselines.py` has the problem and the implementations ("contestants").

Time: one process per rank holds all contestants and alternates between them, so that a slow phase of the machine
affects all of them. A barrier precedes every step, and a step takes as long as its slowest rank. The result is the best
round, after one warm-up round. On a CPU the cores (or OMP_NUM_THREADS, if set) are divided among the ranks.

Memory: every contestant runs one step, on one GPU in the same process, otherwise in a fresh process. First come the
inputs, with every page written, and a step on a tiny problem, which starts threads and loads libraries. Then the
allocator releases free memory (CUDA: empty_cache; glibc: malloc_trim). All memory from here to the end of the step
counts. On CUDA this is the peak of torch's allocator (`max_memory_allocated`). On a CPU it is the peak resident memory
of the process, from the kernel's counter (VmHWM, the counter behind getrusage's ru_maxrss, reset through
/proc/self/clear_refs) and from a thread that samples every 5 ms, for machines without the counter. glibc is set to
return freed blocks of at least 1 MiB, which it would otherwise keep. The size of the returned gradient of the
vocabulary matrix is subtracted for all contestants. The figure is the maximum over ranks.

Error: the largest absolute error of log-prob and KL in 64 rows, against float64 on the same input values.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessException, start_processes

if not __package__:  # run as a script: sys.path starts with the script's folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.head_baselines import CONTESTANTS, Outcome, Problem, make_problem, weight_rows
from benchmarks.memory import peak_memory
from sdpg_megatron.head import VocabShard
from sdpg_megatron.observe.files import write_atomically

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SAMPLE_ROWS = 64
COLLECTIVE_TIMEOUT = timedelta(minutes=20)
TINY_ROWS, TINY_COLUMNS = 8, 256
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Setting:
    """A shape and a number of ranks."""

    rows: int
    hidden: int
    vocab: int
    tp: int
    dtype: str
    device: str
    repeats: int
    threads: int
    """Total over all ranks."""


@dataclass(frozen=True, slots=True)
class Result:
    """A row of the output. The JSON has exactly these keys."""

    name: str
    T: int
    H: int
    V: int
    tp: int
    dtype: str
    seconds: float
    peak_bytes: int
    tflops_8THV: float
    max_error_vs_float64: float | None
    """None if a contestant has no terms per row."""


@dataclass(frozen=True, slots=True)
class Reference:
    """Log-prob and KL of some rows in float64."""

    rows: list[int]
    logprob: list[float]
    divergence: list[float]


# --- in a rank


@dataclass(frozen=True, slots=True)
class Rank:
    """State of a rank."""

    index: int
    setting: Setting
    device: torch.device

    def problem(self, rows: int, vocab: int) -> Problem:
        """This rank's shard of a problem."""
        width = -(-vocab // self.setting.tp)
        start = self.index * width
        group = dist.group.WORLD if self.setting.tp > 1 else None
        shard = VocabShard(start, vocab, group)
        columns = min(width, vocab - start)
        return make_problem(rows, self.setting.hidden, shard, columns, DTYPES[self.setting.dtype], self.device)

    def wait(self) -> None:
        """Wait until the device is idle."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


Job = Callable[..., Any]
"""(rank, arguments of the job) -> result, serializable as JSON."""


def run_ranks(setting: Setting, job: Job, *args: Any) -> list[Any]:
    """Run `job` on every rank in fresh processes. Raises torch's `ProcessException` if one fails."""
    # Without the preload each process imports these. torch's checkpoint imports torch._dynamo.
    multiprocessing.set_forkserver_preload(["torch", "torch._dynamo", "sdpg_megatron.head"])
    with tempfile.TemporaryDirectory(prefix="head-benchmark-") as folder:
        arguments = setting, job, args, folder
        start_processes(_rank_main, arguments, setting.tp, start_method="forkserver")  # type: ignore[no-untyped-call]
        return [json.loads(Path(folder, str(rank)).read_text()) for rank in range(setting.tp)]


def _rank_main(index: int, setting: Setting, job: Job, args: tuple[Any, ...], folder: str) -> None:
    gc.freeze()  # garbage collections between steps then skip imported objects
    torch.set_num_threads(max(1, setting.threads // setting.tp))
    device = torch.device(setting.device, index) if setting.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if setting.tp > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, f"file://{folder}/rendezvous", COLLECTIVE_TIMEOUT, setting.tp, index)
    found = job(Rank(index, setting, device), *args)
    Path(folder, str(index)).write_text(json.dumps(found), encoding="utf-8")
    if setting.tp > 1:
        dist.destroy_process_group()


def time_job(rank: Rank, names: Sequence[str], reference: Reference) -> dict[str, tuple[list[float], float | None]]:
    """Seconds per round on this rank, and error, of each contestant."""
    problem = rank.problem(rank.setting.rows, rank.setting.vocab)
    steps = {name: CONTESTANTS[name].prepare(problem) for name in names}
    errors = {name: max_error(step(), reference) for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rank.setting.repeats):
        for name, step in steps.items():
            gc.collect()
            rank.wait()
            if rank.setting.tp > 1:
                dist.barrier()
            start = time.perf_counter()
            step()
            rank.wait()
            seconds[name].append(time.perf_counter() - start)
    return {name: (seconds[name], errors[name]) for name in names}


def max_error(outcome: Outcome, reference: Reference) -> float | None:
    """Largest absolute error in nats; None if the outcome has no terms per row."""
    if outcome.logprob_T is None or outcome.divergence_T is None:
        return None
    found_2R = torch.stack([outcome.logprob_T[reference.rows].double(), outcome.divergence_T[reference.rows].double()])
    expected_2R = torch.tensor([reference.logprob, reference.divergence], dtype=torch.float64)
    return float((found_2R.cpu() - expected_2R).abs().max())


def peaks_job(rank: Rank, names: Sequence[str]) -> list[int | None]:
    """Peak bytes of one step of each contestant, besides its inputs and its gradient of the matrix.

    None if out of memory. With several ranks `torch.OutOfMemoryError` is raised instead, as other ranks would wait.
    """
    problem = rank.problem(rank.setting.rows, rank.setting.vocab)
    peaks: list[int | None] = []
    for name in names:
        contestant = CONTESTANTS[name]
        try:
            contestant.prepare(rank.problem(TINY_ROWS, TINY_COLUMNS))()
            rank.wait()
            with peak_memory(rank.device) as extra:
                gradient_VH = contestant.prepare(problem)().weight_grad_VH
                rank.wait()
            peaks.append(extra[0] - gradient_VH.numel() * gradient_VH.element_size())
            del gradient_VH
        except torch.OutOfMemoryError:
            if rank.setting.tp > 1:
                raise
            problem.hidden_TH.grad = problem.weight_VH.grad = None
            peaks.append(None)
    return peaks


# --- in the parent


@torch.no_grad()
def make_reference(setting: Setting) -> Reference:
    """Compute the reference in float64, in blocks of the vocabulary, from inputs rounded to the run's type."""
    dtype = DTYPES[setting.dtype]
    problem = make_problem(
        setting.rows, setting.hidden, VocabShard(0, setting.vocab, None), 0, dtype, torch.device("cpu")
    )
    rows_R = torch.linspace(0, setting.rows - 1, min(SAMPLE_ROWS, setting.rows)).long()
    hidden_2RH = torch.stack([problem.hidden_TH[rows_R], problem.teacher_TH[rows_R]]).double()
    logits_2RV = torch.empty(2, rows_R.numel(), setting.vocab, dtype=torch.float64)
    block = 1 << 15
    for start in range(0, setting.vocab, block):
        stop = min(start + block, setting.vocab)
        logits_2RV[:, :, start:stop] = hidden_2RH @ weight_rows(start, stop, setting.hidden, dtype).double().T
    logp_RV, logq_RV = torch.log_softmax(logits_2RV, 2)
    logprob_R = logp_RV.gather(1, problem.labels_T[rows_R, None])[:, 0]
    divergence_R = (logp_RV.exp() * (logp_RV - logq_RV)).sum(1)
    return Reference(rows_R.tolist(), logprob_R.tolist(), divergence_R.tolist())


def measure(setting: Setting, names: Sequence[str]) -> tuple[list[Result], dict[str, str]]:
    """Results of the contestants that can run, and the reasons of the others."""
    device = torch.device(setting.device)
    peaks: dict[str, int] = {}
    left_out: dict[str, str] = {}
    for name in names:
        if reason := _no_devices(setting) or CONTESTANTS[name].missing(device, setting.tp):
            left_out[name] = reason
    for batch in _batches(setting, [name for name in names if name not in left_out]):
        _say(f"tp {setting.tp}, {setting.rows} rows: memory of {', '.join(batch)}")
        try:
            found = run_ranks(setting, peaks_job, batch)
        except ProcessException as error:
            if "OutOfMemoryError" not in str(error):
                raise
            found = [[None] * len(batch)]
        for name, sizes in zip(batch, zip(*found, strict=True), strict=True):
            if None in sizes:
                left_out[name] = "out of memory"
            else:
                peaks[name] = max(sizes)
    if not peaks:
        return [], left_out
    _say(f"tp {setting.tp}, {setting.rows} rows: time of {', '.join(peaks)}")
    by_rank = run_ranks(setting, time_job, list(peaks), make_reference(setting))
    return [_result(setting, name, peak, [found[name] for found in by_rank]) for name, peak in peaks.items()], left_out


def _batches(setting: Setting, names: list[str]) -> list[list[str]]:
    """Contestants whose memory is measured in the same process. On a GPU torch's counter can be reset between them."""
    return [names] if setting.device == "cuda" and setting.tp == 1 and names else [[name] for name in names]


def _result(setting: Setting, name: str, peak: int, ranks: list[tuple[list[float], float | None]]) -> Result:
    seconds = min(max(one_round) for one_round in zip(*(rounds for rounds, _ in ranks), strict=True))
    errors = [error for _, error in ranks if error is not None]
    flops = 8 * setting.rows * setting.hidden * setting.vocab
    return Result(
        name=name,
        T=setting.rows,
        H=setting.hidden,
        V=setting.vocab,
        tp=setting.tp,
        dtype=setting.dtype,
        seconds=seconds,
        peak_bytes=peak,
        tflops_8THV=flops / seconds / 1e12,
        max_error_vs_float64=max(errors, default=None),
    )


def _no_devices(setting: Setting) -> str | None:
    if setting.device == "cuda" and torch.cuda.device_count() < setting.tp:
        return f"found {torch.cuda.device_count()} GPUs, needs {setting.tp}"
    return None


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


# --- output


def table(results: Sequence[Result]) -> str:
    """Table of one shape, with time and memory relative to `naive` at the same number of ranks, if it was run."""
    lines = [
        f"{'tp':>2}  {'':20}{'seconds':>9}{'of naive':>9}{'peak MiB':>10}{'of naive':>9}{'TFLOP/s':>9}{'error':>9}"
    ]
    for one in results:
        base = next((r for r in results if r.name == "naive" and r.tp == one.tp), None)
        time_share = f"{one.seconds / base.seconds:.2f}" if base else "-"
        peak_share = f"{one.peak_bytes / base.peak_bytes:.2f}" if base and base.peak_bytes > 0 else "-"
        error = "-" if one.max_error_vs_float64 is None else f"{one.max_error_vs_float64:.1e}"
        lines.append(
            f"{one.tp:>2}  {one.name:20}{one.seconds:9.4g}{time_share:>9}{one.peak_bytes / MIB:10.1f}{peak_share:>9}"
            f"{one.tflops_8THV:9.3g}{error:>9}"
        )
    return "\n".join(lines)


def scaling_table(results: Sequence[Result]) -> str:
    """Table of time and memory of this head at T and 2T rows."""
    lines = [f"{'tp':>2}  {'':20}{'T':>7}{'seconds':>10}{'peak MiB':>10}"]
    ours = [result for result in results if result.name.startswith("ours/")]
    for one in sorted(ours, key=lambda r: (r.tp, r.name, r.T)):
        lines.append(f"{one.tp:>2}  {one.name:20}{one.T:>7}{one.seconds:10.4g}{one.peak_bytes / MIB:10.1f}")
    return "\n".join(lines)


def machine(device: str, threads: int) -> str:
    """Name of the processor or GPU, for reports."""
    if device == "cuda":
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    memory = psutil.virtual_memory().total >> 30
    return f"{next(names, platform.processor() or platform.machine())}, {threads} threads, {memory} GiB"


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=1) + "\n")


# --- command line


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="benchmarks/head.py", description=__doc__, formatter_class=formatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="JSON list of results; FILE.meta.json describes the run"
    )
    parser.add_argument("--rows", type=_positive, default=1024, metavar="T")
    parser.add_argument("--hidden", type=_positive, default=1024, metavar="H")
    parser.add_argument("--vocab", type=_positive, default=151936, metavar="V")
    parser.add_argument("--tp", type=_ranks, default=[1, 2], metavar="1,2", help="numbers of ranks, each measured")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="type of hidden rows and matrix")
    parser.add_argument("--names", type=_names, default=list(CONTESTANTS), help=f"some of {','.join(CONTESTANTS)}")
    parser.add_argument("--repeats", type=_positive, default=3, metavar="N", help="timed rounds, after one warm-up")
    parser.add_argument("--scaling", action="store_true", help="also measure this head at 2T rows")
    parser.add_argument("--launches", action="store_true", help="only count torch calls per chunk (needs triton)")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"found {number}, expected at least 1")
    return number


def _ranks(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


def _names(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in CONTESTANTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"found {unknown[0]!r}, expected some of {', '.join(CONTESTANTS)}")
    return names


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if options.launches:
        return print_launches()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.stderr.write("--device: found no CUDA device, expected one for cuda. Fix: --device cpu\n")
        return 2
    threads = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
    shape = options.rows, options.hidden, options.vocab
    settings = [Setting(*shape, tp, options.dtype, options.device, options.repeats, threads) for tp in options.tp]
    results: list[Result] = []
    notes = {name: note for name in options.names if (note := CONTESTANTS[name].note)}
    left_out: dict[str, str] = {}
    for setting in settings:
        found, missing = measure(setting, options.names)
        results += found
        left_out |= {f"{name}, tp {setting.tp}": reason for name, reason in missing.items()}
    meta = {
        "machine": machine(options.device, threads),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": shlex.join(["python", "benchmarks/head.py", *(sys.argv[1:] if argv is None else argv)]),
        "torch": torch.__version__,
        "notes": notes,
        "left_out": left_out,
    }
    sys.stdout.write(report(options, results, meta))
    if options.scaling:
        doubled = results_at_2T(settings, results)
        sys.stdout.write("\n" + scaling_table([*results, *doubled]) + "\n")
        results += doubled
    if options.out:
        write_json(options.out, [asdict(result) for result in results])
        write_json(options.out.with_name(options.out.name + ".meta.json"), meta)
    return 0


def print_launches() -> int:
    """Print the torch calls per chunk on the GPU code path."""
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    from benchmarks.launches import report as launch_report

    try:
        sys.stdout.write(launch_report())
    except ImportError as error:
        sys.stderr.write(f"--launches: {error}\n")
        return 2
    return 0


def results_at_2T(settings: Sequence[Setting], results: Sequence[Result]) -> list[Result]:
    """Measure this head again with twice the rows, if it is among the results."""
    more: list[Result] = []
    for setting in settings:
        names = [result.name for result in results if result.tp == setting.tp and result.name.startswith("ours/")]
        more += measure(replace(setting, rows=2 * setting.rows), names)[0]
    return more


def report(options: argparse.Namespace, results: Sequence[Result], meta: dict[str, Any]) -> str:
    """Table with machine and command above and notes below."""
    above = [
        f"{meta['machine']}; torch {meta['torch']}; {meta['date']}; {meta['command']}",
        f"T {options.rows}, H {options.hidden}, V {options.vocab}, {options.dtype}; peak without the matrix's gradient",
    ]
    notes = [f"{name}: {note}" for name, note in meta["notes"].items() if any(r.name == name for r in results)]
    missing = [f"left out: {which}: {reason}" for which, reason in meta["left_out"].items()]
    return "\n".join([*above, table(results), *notes, *missing]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
