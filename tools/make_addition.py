"""Write two-digit addition problems as JSONL: train.jsonl, and eval.jsonl with problems that training never shows.

A problem and the same problem with its numbers swapped count as one: both are held out, or neither is. The same
arguments give the same files, byte for byte.
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
    """Shuffled training and held-out problems.

    Args:
        held_out: number of held-out problems, no two of which are swaps of each other.
        train: number of training problems; None for all that remain.

    Raises:
        ValueError: more problems wanted than there are.
    """
    problems = [(a, b) for a in NUMBERS for b in NUMBERS]
    random.Random(seed).shuffle(problems)
    by_pair: dict[frozenset[int], Problem] = {}
    for problem in problems:
        by_pair.setdefault(frozenset(problem), problem)
    pairs = list(by_pair)
    kept_apart = set(pairs[:held_out])
    evaluation = [by_pair[pair] for pair in pairs[:held_out]]
    rest = [problem for problem in problems if frozenset(problem) not in kept_apart]
    for name, wanted, there in (
        ("--eval", held_out, len(pairs) - 1),
        ("--train", len(rest) if train is None else train, len(rest)),
    ):
        if not 1 <= wanted <= there:
            raise ValueError(f"{name}: found {wanted}, expected 1 to {there}. Fix: choose a number in that range")
    return rest[:train], evaluation


def row(problem: Problem) -> dict[str, str]:
    a, b = problem
    return {"question": f"What is {a} + {b}? Reply with only the number.", "answer": str(a + b)}


def write(path: Path, problems: Sequence[Problem]) -> None:
    write_atomically(path, "".join(json.dumps(row(problem)) + "\n" for problem in problems))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write two-digit addition problems as JSONL.")
    parser.add_argument("folder", type=Path, help="where train.jsonl and eval.jsonl go")
    parser.add_argument("--eval", type=int, default=64, help="held-out problems (default: %(default)s)")
    parser.add_argument("--train", type=int, help="training problems (default: all others)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
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
