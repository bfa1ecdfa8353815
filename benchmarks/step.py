"""Time of a training step, compared with steps that do less, or do the same in another way.

    python benchmarks/step.py
    python benchmarks/step.py --rounds 5 --out benchmarks/results/step-cpu.json

The model is SmolLM2-135M-Instruct, as scripts/setup.sh prepares it, with the settings of the demo
(examples/smollm2/addition.yaml), except for these: alpha is the paper's 1e-3, so every step has a reference pass; beta
is constant; half of the responses count as correct, regardless of their content; the learning rate is so small that the
model does not change. The steps are the trainer's (`step_trainer.py`). Compared steps alternate in this process; the
first round is not counted. A ratio is the median over rounds, so that a slow phase of the machine affects both sides.

sdpg_over_beta0: seconds of passes and update over the seconds of the same step with beta 0, on the same groups of
random tokens: prompts of 60 tokens, 80 for the teacher, and responses from a tenth of `--longest-even` up to all of it.
`gated_share` is the share of response tokens that the teacher reads. Every tenth optimizer step measures the gradient
ratio of the loss terms (`alarms.gradient_every`): `sdpg_measured` is such a step.

packed_over_padded: tokens (of prompts and responses) per second of passes and update with `model.packed`, over those
without it, on responses of long-tailed lengths up to `--longest`, in micro-batches with the same number of sequences.
The padded micro-batches are this package's, of sequences of similar length. This is the best case of padding, and it
improves with the number of sequences per step. `packed_over_unsorted` compares with padded micro-batches in the order
of arrival, as in trainers that do not sort.

step_over_plain: seconds of a complete step (rollout by the embedded engine, scoring, passes, update, publishing) over
those of a plain PyTorch and transformers loop that does the same work (`step_plain.py`), on the same prompts of the
addition data, sampled with the same seed.

The meta file and the table have more than the JSON: the seconds and processor seconds of every round, lengths, phases,
`sdpg_measured_over_beta0`, `packed_over_unsorted`, and the minimum and maximum of each ratio.
"""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import megatron.core
import torch
import transformers

if not __package__:  # run as a script: sys.path starts with the script's folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.head import machine, write_json
from benchmarks.step_data import PROMPT_TOKENS, coin, even_lengths, given_groups, long_tailed_lengths
from benchmarks.step_plain import PlainLoop
from benchmarks.step_trainer import StandingPolicyTrainer, StandingTrainer, no_leftovers
from sdpg_megatron.batching.micro_batches import Limit
from sdpg_megatron.batching.samples import Sample
from sdpg_megatron.config import RunConfig
from sdpg_megatron.config.load import load_config
from sdpg_megatron.mcore import parallel
from sdpg_megatron.records import ScoredGroup
from tools.make_addition import split, write
from tools.prepare_smollm2 import FOLDER, default_cache

DEMO = Path(__file__).resolve().parents[1] / "examples" / "smollm2" / "addition.yaml"
STEPS = 1000
SETTINGS = {
    "steps": STEPS,
    "reward.verifier": "benchmarks.step_data:coin",
    "rollout.mismatch_limit": None,  # the log-probs of given responses are not from a model
    "objective.alpha": 1e-3,
    "objective.beta_warmup_steps": 0,
    "objective.beta_decay_steps": 1,  # beta is constant, and 0 in the last step
    "optimizer.lr": 1e-12,
    "optimizer.schedule": "constant",
    "optimizer.warmup_steps": 0,
}
BETA_ZERO, BETA_POSITIVE, MEASURED = STEPS - 1, 1, 10
"""Step numbers: with beta 0, with beta > 0, and with the gradient ratio measured as well."""
MORE = ("sdpg_measured_over_beta0", "packed_over_unsorted")
"""Ratios in the meta file."""
GIVEN = {"optimizer.micro_batch_size": 8, "head.chunk_rows": 256}
"""Settings for given responses, which are longer than the demo's: the package's defaults."""

Known = Mapping[str, float]
"""Other figures of a step, besides its seconds."""
Step = Callable[[], Known]


@dataclass(frozen=True, slots=True)
class Result:
    """The output. The JSON has exactly these keys."""

    sdpg_over_beta0: float
    gated_share: float
    packed_over_padded: float
    step_over_plain: float


@dataclass(slots=True)
class Rounds:
    """Measurements of one kind of step, by round."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    """Processor seconds of all threads of this process, which other programs on the machine affect less."""
    known: dict[str, list[float]] = field(default_factory=dict)

    def add(self, seconds: float, cpu_seconds: float, known: Known) -> None:
        self.seconds.append(seconds)
        self.cpu_seconds.append(cpu_seconds)
        for name, value in known.items():
            self.known.setdefault(name, []).append(value)

    @property
    def median(self) -> float:
        return median(self.seconds)

    def report(self) -> dict[str, Any]:
        spent = {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds}
        return {**spent, **{name: median(found) for name, found in self.known.items()}}


def ratios(one: Rounds, other: Rounds) -> list[float]:
    """Seconds of one over those of the other, by round."""
    return [mine / its for mine, its in zip(one.seconds, other.seconds, strict=True)]


def take_turns(steps: Mapping[str, Step], rounds: int) -> dict[str, Rounds]:
    """Alternate between the steps for `rounds` rounds, after one warm-up round."""
    found = {name: Rounds() for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            gc.collect()
            started, cpu_started = time.perf_counter(), time.process_time()
            known = step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
            sys.stderr.write(f"round {number}: {name} {seconds:.2f} s, processor {cpu_seconds:.2f} s\n")
            if number:
                found[name].add(seconds, cpu_seconds, known)
    return found


def compare_beta(config: RunConfig, lengths: Sequence[int], rounds: int) -> dict[str, Rounds]:
    """Steps on given responses: with beta 0, with beta > 0, and with the gradient ratio measured as well."""
    with no_leftovers():
        trainer = StandingPolicyTrainer(config)
        groups = given_groups(lengths, config.rollout.group_size, trainer.policy_trainer.arch.vocab_size)
        at = {"beta0": BETA_ZERO, "sdpg": BETA_POSITIVE, "sdpg_measured": MEASURED}
        steps = {name: _learning(trainer, groups, step) for name, step in at.items()}
        return take_turns(steps, rounds)


def compare_layouts(config: RunConfig, lengths: Sequence[int], rounds: int) -> dict[str, Rounds]:
    """Steps on given responses: packed, padded, and padded in the order of arrival."""
    with no_leftovers():
        trainer = StandingPolicyTrainer(config)
        groups = given_groups(lengths, config.rollout.group_size, trainer.policy_trainer.arch.vocab_size)
        padded = _learning(trainer, groups, BETA_POSITIVE, packed=False)

        def unsorted() -> Known:
            with patch("sdpg_megatron.batching.step_batch.plan", plan_unsorted):
                return padded()

        steps = {
            "packed": _learning(trainer, groups, BETA_POSITIVE, packed=True),
            "padded": padded,
            "unsorted": unsorted,
        }
        return take_turns(steps, rounds)


def plan_unsorted(samples: Sequence[Sample], ranks: int, limit: Limit, *, alike: bool) -> list[list[list[Sample]]]:
    """Replacement of `batching.micro_batches.plan` on one rank: micro-batches in the order of arrival."""
    size = limit.sequences
    return [[list(samples[first : first + size]) for first in range(0, len(samples), size)]]


def _learning(trainer: StandingPolicyTrainer, groups: Sequence[ScoredGroup], step: int, **changes: Any) -> Step:
    def learn() -> Known:
        return {"gated_share": trainer.learn(groups, step, **changes)["distill/gate_rate"]}

    return learn


def compare_plain(config: RunConfig, rounds: int) -> dict[str, Rounds]:
    """Complete steps of the trainer and of the plain loop."""
    with no_leftovers() as stack:
        trainer = StandingTrainer(config, stack)
        plain = PlainLoop(config, coin, trainer.policy_trainer.device)
        prompts, seed = trainer.prompts_of_step(BETA_POSITIVE)

        def our_step() -> Known:
            metrics = trainer.whole_step(BETA_POSITIVE)
            phases = {name: value for name, value in metrics.items() if name.startswith("time/")}
            gated_share, tokens = metrics["distill/gate_rate"], metrics["rollout/length"]
            return {"gated_share": gated_share, "response_tokens": tokens, **phases}

        def plain_step() -> Known:
            # Without a GPU `mcore.compat.device` intercepts every torch call in this process. This excludes its cost
            # from the plain loop.
            with torch._C.DisableTorchFunction():
                responses = plain.step(prompts, seed)
            phases = {f"time/{name}": seconds for name, seconds in plain.seconds.items()}
            tokens = [len(response.tokens) for response in responses]
            gated = sum(len(response.tokens) for response in responses if response.advantage > 0)
            return {"gated_share": gated / sum(tokens), "response_tokens": sum(tokens) / len(tokens), **phases}

        return take_turns({"ours": our_step, "plain": plain_step}, rounds)


def settings(options: argparse.Namespace, folder: Path, **changes: Any) -> RunConfig:
    """Configuration of the demo with `SETTINGS`, on data in `folder`."""
    fields = {
        **SETTINGS,
        "run_dir": folder / "run",
        "model.path": options.model,
        "data.train": [folder / "train.jsonl"],
        "data.eval": [],
        "eval.every": 0,
        "rollout.prompts_per_step": options.prompts,
        **changes,
    }
    overrides = [f"{name}={json.dumps(value, default=str)}" for name, value in fields.items()]
    return load_config(DEMO, overrides)


def measure(options: argparse.Namespace) -> tuple[Result, dict[str, Any]]:
    """Result, and details for the meta file."""
    with tempfile.TemporaryDirectory(prefix="step-benchmark-") as name:
        folder = Path(name)
        write(folder / "train.jsonl", split(held_out=64, train=None, seed=0)[0])
        whole = settings(options, folder)
        given = settings(options, folder, **GIVEN)
        count = options.groups * given.rollout.group_size
        even, tailed = even_lengths(count, options.longest_even), long_tailed_lengths(count, options.longest)
        beta = compare_beta(given, even, options.rounds)
        layouts = compare_layouts(given, tailed, options.rounds)
        steps = compare_plain(whole, options.rounds)
        parallel.shutdown()
    found = {
        "sdpg_over_beta0": ratios(beta["sdpg"], beta["beta0"]),
        "sdpg_measured_over_beta0": ratios(beta["sdpg_measured"], beta["beta0"]),
        "packed_over_padded": ratios(layouts["padded"], layouts["packed"]),
        "packed_over_unsorted": ratios(layouts["unsorted"], layouts["packed"]),
        "step_over_plain": ratios(steps["ours"], steps["plain"]),
    }
    middle = {name: median(rounds) for name, rounds in found.items()}
    more = {name: middle.pop(name) for name in MORE}
    result = Result(gated_share=beta["sdpg"].known["gated_share"][0], **middle)
    details = {
        **more,
        "spread": {name: [min(rounds), max(rounds)] for name, rounds in found.items()},
        "response_tokens": {"even": even, "long_tailed": tailed},
        "tokens_per_second": {
            name: (sum(lengths) + count * PROMPT_TOKENS) / one.median
            for lengths, kinds in ((even, beta), (tailed, layouts))
            for name, one in kinds.items()
        },
        "steps": {name: one.report() for name, one in {**beta, **layouts, **steps}.items()},
    }
    return result, details


def table(result: Result, details: Mapping[str, Any]) -> str:
    """Table of the ratios and of each kind of step."""
    lines = [f"{name:26}{value:6.3f}" for name, value in asdict(result).items()]
    lines += [f"{name:26}{details[name]:6.3f}" for name in MORE]
    lines += [f"{name:26}{low:6.3f} to {high:.3f}" for name, (low, high) in details["spread"].items()]
    lines.append(f"{'':16}{'seconds':>9}{'tokens/s':>10}")
    for name, one in details["steps"].items():
        speed = details["tokens_per_second"].get(name)
        phases = ", ".join(f"{key[5:]} {value:.2f}" for key, value in one.items() if key.startswith("time/"))
        lines.append(f"{name:16}{median(one['seconds']):9.2f}{f'{speed:.0f}' if speed else '':>10}  {phases}")
    return "\n".join(lines) + "\n"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="benchmarks/step.py", description=__doc__, formatter_class=formatter)
    parser.add_argument("--model", type=Path, default=default_cache() / FOLDER, metavar="FOLDER")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="timed rounds, after one warm-up")
    parser.add_argument("--groups", type=int, default=4, metavar="N", help="prompts per step on given responses")
    parser.add_argument("--longest-even", type=int, default=200, metavar="N", help="maximum tokens, even lengths")
    parser.add_argument("--longest", type=int, default=1024, metavar="N", help="maximum tokens, long-tailed lengths")
    parser.add_argument("--prompts", type=int, default=8, metavar="N", help="prompts per complete step")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON result; FILE.meta.json describes the run")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if not options.model.exists():
        sys.stderr.write(f"no {options.model}: scripts/setup.sh prepares it\n")
        return 2
    result, details = measure(options)
    meta = {
        "machine": machine("cuda" if torch.cuda.is_available() else "cpu", torch.get_num_threads()),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": shlex.join(["python", "benchmarks/step.py", *(sys.argv[1:] if argv is None else argv)]),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "megatron_core": megatron.core.__version__,
        "model": options.model.name,
        **details,
    }
    sys.stdout.write(f"{meta['machine']}; torch {meta['torch']}; {meta['date']}; {meta['command']}\n")
    sys.stdout.write(table(result, details))
    if options.out:
        write_json(options.out, asdict(result))
        write_json(options.out.with_name(options.out.name + ".meta.json"), meta)
    return 0


if __name__ == "__main__":
    sys.exit(main())
