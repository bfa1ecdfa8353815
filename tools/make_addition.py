"""Write two-digit addition problems as JSONL: train.jsonl, and eval.jsonl with held-out problems.

A problem and its copy with swapped numbers are in the same file. The same arguments give identical files.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from sdpg_megatron.observe.files import write_atomically

NUMBERS = range(10, 50)
Problem = tuple[int, int]


def split(held_out: int, train: int | None, seed: int) -> tuple[list[Problem], list[Problem]]:
    """Return shuffled training and held-out problems.

    Args:
        held_out: number of held-out problems, without swapped copies.
        train: number of training problems; None for all remaining ones.

    Raises:
        ValueError: a number that is not available.
    """
    problems = [(a, b) for a in NUMBERS for b in NUMBERS]
    random.Random(seed).shuffle(problems)
    by_pair: dict[frozenset[int], Problem] = {}
    for problem in problems:
        by_pair.setdefault(frozenset(problem), problem)
    pairs = list(by_pair)
    held_out_pairs = set(pairs[:held_out])
    evaluation = [by_pair[pair] for pair in pairs[:held_out]]
    rest = [problem for problem in problems if frozenset(problem) not in held_out_pairs]
    for name, wanted, available in (
        ("--eval", held_out, len(pairs) - 1),
        ("--train", len(rest) if train is None else train, len(rest)),
    ):
        if not 1 <= wanted <= available:
            raise ValueError(f"{name}: found {wanted}, expected 1 to {available}. Fix: choose a number in that range")
    return rest[:train], evaluation


def row(problem: Problem) -> dict[str, str]:
    a, b = problem
    return {"question": f"What is {a} + {b}? Reply with only the number.", "answer": str(a + b)}


def write(path: Path, problems: Sequence[Problem]) -> None:
    write_atomically(path, "".join(json.dumps(row(problem)) + "\n" for problem in problems))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write two-digit addition problems as JSONL.")
    parser.add_argument("folder", type=Path, help="output folder of train.jsonl and eval.jsonl")
    parser.add_argument("--eval", type=int, default=64, help="number of held-out problems (default: %(default)s)")
    parser.add_argument("--train", type=int, help="number of training problems (default: all others)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the shuffle (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        train, evaluation = split(options.eval, options.train, options.seed)
    except ValueError as error:
        parser.error(str(error))
    options.folder.mkdir(parents=True, exist_ok=True)
    write(options.folder / "train.jsonl", train)
    write(options.folder / "eval.jsonl", evaluation)
    sys.stdout.write(f"{options.folder}: {len(train)} training and {len(evaluation)} held-out problems\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
