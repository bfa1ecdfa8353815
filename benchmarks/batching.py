"""Time from scored responses to micro-batches: gather over ranks, samples, plan, collate.

    python benchmarks/batching.py --out benchmarks/results/batching.json

Two ranks over Gloo with one thread each hold half of the responses; prompts have 512 tokens, half of the responses are
right, and the teacher reads those. After the gather, the first rank builds the micro-batches of all responses alone, as
one data-parallel rank of one does. Copying them to a device is not included. Each figure is CPU seconds of the first
rank in the best round, as other load on the machine disturbs these less than elapsed time.

`tuples` is the same work on Python objects, one for each token, log-prob and gate.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

if not __package__:  # run as a script, whose folder is then the first place to look for modules
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.head import machine, write_json
from benchmarks.publish import run_ranks
from sdpg_megatron.batching.collate import PackingLayout, collate
from sdpg_megatron.batching.micro_batches import Limit, plan
from sdpg_megatron.batching.samples import make_samples
from sdpg_megatron.config import ObjectiveConfig
from sdpg_megatron.objectives.advantages import group_advantages
from sdpg_megatron.records import Completion, Group, Prompt, ScoredGroup

T = TypeVar("T")
RANKS = 2
STEPS = ("gather", "samples", "plan", "collate")


@dataclass(frozen=True, slots=True)
class Setting:
    responses: int
    tokens: int
    """Tokens of each response."""
    prompt: int
    """Tokens of each prompt, the student's and the teacher's."""
    group: int
    """Responses to a prompt."""
    micro_batch_tokens: int
    rounds: int


def make_groups(setting: Setting) -> list[ScoredGroup]:
    draw = np.random.default_rng(0)
    rewards = tuple(float(number % 2) for number in range(setting.group))

    def completion() -> Completion:
        tokens = draw.integers(0, 150_000, setting.tokens, np.int32)
        return Completion(tokens, -draw.random(setting.tokens, np.float32), "length", 0, "text" * setting.tokens)

    def group(number: int) -> ScoredGroup:
        tokens = tuple(draw.integers(0, 150_000, setting.prompt).tolist())
        prompt = Prompt(f"prompts:{number}", tokens, tokens[::-1], "")
        completions = tuple(completion() for _ in rewards)
        return ScoredGroup(Group(prompt, completions), rewards, group_advantages(rewards))

    return [group(number) for number in range(setting.responses // setting.group)]


class Timer:
    """CPU seconds of each step, round by round."""

    def __init__(self) -> None:
        self.rounds: dict[str, list[float]] = {step: [] for step in STEPS}

    def __call__(self, step: str, act: Callable[[], T]) -> T:
        start = time.process_time()
        found = act()
        self.rounds[step].append(time.process_time() - start)
        return found

    def best(self) -> dict[str, float]:
        """Least seconds of each step, without the first round, which warms up."""
        found = {step: min(seconds[1:]) for step, seconds in self.rounds.items()}
        return {**found, "total": sum(found.values())}


def gather(value: Any) -> list[Any]:
    """As `ParallelState.gather_all`."""
    values: list[Any] = [None] * RANKS
    dist.all_gather_object(values, value)
    return values


def measure(rank: int, setting: Setting) -> dict[str, dict[str, float]]:
    """CPU seconds of each step, for arrays and for tuples."""
    groups, limit, config = make_groups(setting), Limit(1, setting.micro_batch_tokens), ObjectiveConfig()
    arrays = [group.group.completions for group in groups[rank::RANKS]]
    tuples = [[as_tuples(completion) for completion in completions] for completions in arrays]
    timers = Timer(), Timer()
    for timer, mine in zip(timers, (arrays, tuples), strict=True):
        for _ in range(1 + setting.rounds):
            dist.barrier()
            timer("gather", partial(gather, mine))
    if rank == 0:
        scored = [(g.group.prompt, [as_tuples(c) for c in g.group.completions], g.advantages) for g in groups]
        for _ in range(1 + setting.rounds):
            samples = timers[0]("samples", lambda: make_samples(groups, config, distill_enabled=is_right))
            build(timers[0], samples, limit, lambda part: collate(part, PackingLayout()))
            build(timers[1], timers[1]("samples", lambda: tuple_samples(scored)), limit, tuple_collate)
    dist.barrier()
    return {name: t.best() for name, t in zip(("arrays", "tuples"), timers, strict=True)} if rank == 0 else {}


def build(timer: Timer, samples: list[Any], limit: Limit, collate_part: Callable[[list[Any]], Any]) -> None:
    (parts,) = timer("plan", lambda: plan(samples, 1, limit, alike=False))
    timer("collate", lambda: [collate_part(part) for part in parts])


def is_right(advantage: float) -> bool:
    return advantage > 0


# --- one Python object for each token


def as_tuples(completion: Completion) -> tuple[Any, ...]:
    return tuple(completion.tokens.tolist()), tuple(completion.logprobs.tolist()), "length", 0, completion.text


@dataclass(frozen=True)
class TupleSample:
    prompts: tuple[tuple[int, ...], tuple[int, ...]]
    """The student's and the teacher's."""
    response: tuple[int, ...]
    logprobs: tuple[float, ...]
    advantage: float
    gates: tuple[bool, ...]

    @cached_property
    def gate(self) -> bool:
        return any(self.gates)

    @cached_property
    def cost(self) -> int:
        return sum(len(prompt) + len(self.response) for prompt in self.prompts[: 1 + self.gate])


def tuple_samples(scored: Sequence[tuple[Prompt, list[tuple[Any, ...]], Sequence[float]]]) -> list[TupleSample]:
    stops = frozenset[int]()
    return [
        TupleSample(
            (prompt.student_tokens, prompt.teacher_tokens),
            tokens,
            logprobs,
            advantage,
            tuple(is_right(advantage) and token not in stops for token in tokens),
        )
        for prompt, completions, advantages in scored
        for (tokens, logprobs, *_), advantage in zip(completions, advantages, strict=True)
    ]


def tuple_collate(samples: list[TupleSample]) -> list[torch.Tensor]:
    """The tensors of a packed micro-batch."""
    gated = [sample for sample in samples if sample.gate]
    lengths = torch.tensor([len(sample.response) for sample in samples])
    sequence_T = torch.arange(len(samples)).repeat_interleave(lengths)
    here = torch.zeros_like(sequence_T) == 0
    gates_T = torch.tensor([float(gate) for sample in samples for gate in sample.gates])
    per_token = [
        gates_T,
        sequence_T,
        torch.tensor([token for sample in samples for token in sample.response]),
        torch.tensor([value for sample in samples for value in sample.logprobs]),
        torch.tensor([sample.advantage for sample in samples])[sequence_T],
        torch.ones(len(samples))[sequence_T],
    ]
    read = tuple_rows([(s.prompts[0], s.response, (True,) * len(s.response)) for s in samples])
    read += tuple_rows([(s.prompts[1], s.response, s.gates) for s in gated]) if gated else []
    return [*(tensor[here] for tensor in per_token), gates_T.nonzero(), *read]


def tuple_rows(texts: list[tuple[tuple[int, ...], tuple[int, ...], tuple[bool, ...]]]) -> list[torch.Tensor]:
    """Tokens, their sequences, and the rows that predict the response tokens."""
    firsts = [0, *itertools.accumulate(len(prompt) + len(response) for prompt, response, _ in texts)]
    tokens_P = torch.zeros(firsts[-1], dtype=torch.int64)
    sequence_P = torch.full((firsts[-1],), -1)
    rows: list[int] = []
    for number, (prompt, response, asked) in enumerate(texts):
        own = slice(firsts[number], firsts[number + 1])
        tokens_P[own] = torch.tensor(prompt + response)
        sequence_P[own] = number
        before = firsts[number] + len(prompt) - 1
        rows.extend(before + i for i, wanted in enumerate(asked) if wanted)
    place_P, here = torch.arange(firsts[-1]), torch.zeros(firsts[-1]) == 0
    return [tokens_P[here], sequence_P[here], place_P[torch.tensor(rows)]]


# --- command line


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="benchmarks/batching.py", description=__doc__, formatter_class=formatter)
    parser.add_argument("--responses", type=int, default=1024, metavar="N")
    parser.add_argument("--tokens", type=int, default=2048, metavar="T", help="of each response")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="timed rounds, after one that is not")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="JSON, CPU seconds of each step; FILE.meta.json has those of tuples"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    setting = Setting(
        options.responses, options.tokens, prompt=512, group=8, micro_batch_tokens=16_384, rounds=options.rounds
    )
    found = run_ranks(RANKS, setting, measure, threads=RANKS, preload=("sdpg_megatron.batching.collate",))[0]
    meta = {
        "machine": machine("cpu", 1),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": shlex.join(["python", "benchmarks/batching.py", *(sys.argv[1:] if argv is None else argv)]),
        "torch": torch.__version__,
        "setting": asdict(setting),
        "tuples": found["tuples"],
    }
    sys.stdout.write(f"{meta['machine']}; torch {meta['torch']}; {meta['date']}; {meta['command']}\n")
    sys.stdout.write(f"{'':8}{'tuples':>8}{'arrays':>8}  s\n")
    for step, seconds in found["arrays"].items():
        sys.stdout.write(f"{step:8}{found['tuples'][step]:8.3f}{seconds:8.3f}\n")
    if options.out:
        write_json(options.out, found["arrays"])
        write_json(options.out.with_name(options.out.name + ".meta.json"), meta)
    return 0


if __name__ == "__main__":
    sys.exit(main())
