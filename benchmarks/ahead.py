"""Speed-up of generating one step ahead of training: the same run with and without `rollout.ahead`, on SGLang.

    SDPG_SGLANG_PYTHON=.venv-sglang/bin/python python benchmarks/ahead.py
    SDPG_SGLANG_PYTHON=... python benchmarks/ahead.py --out benchmarks/results/ahead-cpu.json

Server and trainer each get half of the machine's processors, as if they were separate machines. Both runs train SmolLM2
on the demo's addition problems with importance weights, and differ only in `rollout.ahead`. The cost of a step depends
on the number of correct responses, so the learning rate is almost 0: step k of both runs has the same prompts and
weights. The samples still differ, because SGLang's samples depend on its concurrent requests. The two kinds of runs
therefore alternate, several of each. The first two steps of a run are not counted: they are warm-up, and the first step
of a run with `rollout.ahead` waits for its responses.

    seconds_in_turns   mean seconds per step without `rollout.ahead`
    seconds_ahead      mean seconds per step with `rollout.ahead=1`
    gain               the first over the second
    ideal              gain if the shorter of rollout and learning were hidden completely
    staleness          mean number of steps by which the sampling weights are older than the trained weights
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean
from typing import Any

import megatron.core
import torch

if not __package__:  # run as a script: sys.path starts with the script's folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.head import machine, write_json
from benchmarks.publish import SMOLLM2, running_server
from sdpg_megatron.observe.writers import read_metrics
from sdpg_megatron.rollout.sglang.interpreter import PYTHON_VARIABLE
from tools.make_addition import split, write

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "examples" / "smollm2" / "addition.yaml"
SERVER_ARGUMENTS = ("--max-total-tokens", "16384", "--mem-fraction-static", "0.3")
SETTINGS = {
    "data.eval": [],
    "eval.every": 0,
    "rollout.engine": "sglang",
    "objective.correction": "truncate",
    "optimizer.lr": 1e-30,
    "checkpoint.every": 0,
    "checkpoint.export": False,
    "alarms.gradient_every": 0,
}
WARM_UP = 2
"""Steps per run that are not counted."""
LEARNING = ("time/prepare", "time/update")


@dataclass(slots=True)
class Result:
    """The output. The JSON has exactly these keys."""

    seconds_in_turns: float
    seconds_ahead: float
    gain: float
    ideal: float
    staleness: float


def halves() -> tuple[set[int], set[int]]:
    """Processors of the server and of the trainer."""
    found = sorted(os.sched_getaffinity(0))
    if len(found) < 2:
        sys.exit("ahead.py: found one processor, expected at least two: one for the server and one for the trainer")
    return set(found[: len(found) // 2]), set(found[len(found) // 2 :])


def run(options: argparse.Namespace, folder: Path, url: str, *, ahead: int) -> list[dict[str, float]]:
    """Run training and return the metrics of the counted steps."""
    run_dir = Path(tempfile.mkdtemp(prefix=f"ahead{ahead}-", dir=folder))
    fields = {
        **SETTINGS,
        "run_dir": run_dir,
        "steps": options.steps + WARM_UP,
        "objective.beta_decay_steps": 0,
        "model.path": options.model,
        "data.train": [folder / "train.jsonl"],
        "rollout.sglang.urls": [url],
        "rollout.prompts_per_step": options.prompts,
        "rollout.max_response_tokens": options.tokens,
        "rollout.ahead": ahead,
    }
    overrides = [f"{name}={json.dumps(value, default=str)}" for name, value in fields.items()]
    line = [sys.executable, "-m", "sdpg_megatron", "train", str(CONFIG), *overrides]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the run exited with {done.returncode}:\n{done.stderr[-4000:]}")
    return read_metrics(run_dir / "metrics.jsonl")[WARM_UP:]


def measure(options: argparse.Namespace) -> tuple[Result, dict[str, Any]]:
    """Result, and seconds of each phase of a step."""
    servers, trainers = halves()
    os.environ["OMP_NUM_THREADS"] = str(len(trainers))
    steps: dict[str, list[dict[str, float]]] = {"in_turns": [], "ahead": []}
    with tempfile.TemporaryDirectory(prefix="ahead-benchmark-") as name:
        folder = Path(name)
        write(folder / "train.jsonl", split(held_out=64, train=None, seed=0)[0])
        os.sched_setaffinity(0, servers)  # inherited by the server
        with running_server(options.model, folder, SERVER_ARGUMENTS) as url:
            os.sched_setaffinity(0, trainers)
            for number in range(options.rounds):
                for kind, ahead in (("in_turns", 0), ("ahead", 1)):
                    steps[kind] += run(options, folder, url, ahead=ahead)
                    sys.stderr.write(f"round {number}: {kind}: {_show(_parts(steps[kind]))}\n")
            os.sched_setaffinity(0, servers | trainers)
    parts = {kind: _parts(found) for kind, found in steps.items()}
    turns = parts["in_turns"]
    learning = sum(turns[name] for name in LEARNING)
    ideal = turns["time/step"] / (turns["time/step"] - min(turns["time/rollout"], learning))
    result = Result(
        seconds_in_turns=turns["time/step"],
        seconds_ahead=parts["ahead"]["time/step"],
        gain=turns["time/step"] / parts["ahead"]["time/step"],
        ideal=ideal,
        staleness=mean(step["rollout/staleness"] for step in steps["ahead"]),
    )
    shown = {kind: [step["time/step"] for step in found] for kind, found in steps.items()}
    lengths = {kind: mean(step["rollout/length"] for step in found) for kind, found in steps.items()}
    return result, {"parts": parts, "gains": gains(shown, options.rounds), "steps": shown, "mean_length": lengths}


def gains(seconds: Mapping[str, Sequence[float]], rounds: int) -> list[float]:
    """Gain of each round."""
    size = len(seconds["ahead"]) // rounds
    runs = [slice(first, first + size) for first in range(0, rounds * size, size)]
    return [mean(seconds["in_turns"][run]) / mean(seconds["ahead"][run]) for run in runs]


def _parts(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means of all time metrics."""
    names = [name for name in steps[0] if name.startswith("time/")]
    return {name: mean(step.get(name, 0.0) for step in steps) for name in names}


def _show(parts: Mapping[str, float]) -> str:
    return ", ".join(f"{name[5:]} {value:.2f}" for name, value in parts.items())


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="benchmarks/ahead.py", description=__doc__, formatter_class=formatter)
    parser.add_argument("--model", type=Path, default=SMOLLM2, metavar="FOLDER")
    parser.add_argument("--steps", type=int, default=8, metavar="N", help="counted steps per run")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="runs of each kind")
    parser.add_argument("--prompts", type=int, default=4, metavar="N", help="prompts per step, eight responses each")
    parser.add_argument("--tokens", type=int, default=48, metavar="N", help="maximum tokens of a response")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON result; FILE.meta.json describes the run")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if not options.model.exists():
        sys.stderr.write(f"no {options.model}: scripts/setup.sh prepares it\n")
        return 2
    if not os.environ.get(PYTHON_VARIABLE):
        sys.stderr.write(f"set {PYTHON_VARIABLE} to an interpreter that has sglang\n")
        return 2
    result, details = measure(options)
    meta = {
        "machine": machine("cpu", len(halves()[0])) + " on either side",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": shlex.join(["python", "benchmarks/ahead.py", *(sys.argv[1:] if argv is None else argv)]),
        "torch": torch.__version__,
        "megatron_core": megatron.core.__version__,
        "model": options.model.name,
        **details,
    }
    sys.stdout.write(f"{meta['machine']}; torch {meta['torch']}; {meta['date']}; {meta['command']}\n")
    for name, value in asdict(result).items():
        sys.stdout.write(f"{name:18}{value:7.3f}\n")
    for kind, parts in details["parts"].items():
        sys.stdout.write(f"{kind:18}{_show(parts)}\n")
    if options.out:
        write_json(options.out, asdict(result))
        write_json(options.out.with_name(options.out.name + ".meta.json"), meta)
    return 0


if __name__ == "__main__":
    sys.exit(main())
