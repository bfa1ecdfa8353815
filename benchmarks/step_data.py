"""Data for benchmarks/step.py: groups of given responses, and a pseudo-random verifier."""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Sequence

import numpy as np

from sdpg_megatron.objectives.advantages import group_advantages
from sdpg_megatron.records import Completion, Group, Prompt, ScoredGroup

PROMPT_TOKENS, HINT_TOKENS = 60, 20
MEDIAN, SPREAD, SHORTEST = 100, 1.0, 16
"""Parameters of the lognormal lengths: median, standard deviation of the logarithm, and minimum."""


def coin(prompt: Prompt, response: str) -> float:
    """Deterministic verifier by which about half of all responses are correct."""
    return float(zlib.crc32(response.encode()) % 2)


def even_lengths(count: int, longest: int, seed: int = 0) -> list[int]:
    """Uniform lengths from a tenth of the longest up to the longest."""
    draw = random.Random(seed)
    return [draw.randint(max(1, longest // 10), longest) for _ in range(count)]


def long_tailed_lengths(count: int, longest: int, seed: int = 0) -> list[int]:
    """Lognormal lengths, clipped at both ends: half are below `MEDIAN`, one in a hundred is ten times as long."""
    draw = random.Random(seed)
    drawn = (round(draw.lognormvariate(math.log(MEDIAN), SPREAD)) for _ in range(count))
    return [min(max(length, SHORTEST), longest) for length in drawn]


def given_groups(lengths: Sequence[int], group_size: int, vocab: int, seed: int = 0) -> list[ScoredGroup]:
    """Groups of random prompts and responses of these lengths. Half of the responses of each group are correct."""
    draw = random.Random(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(vocab) for _ in range(count))

    groups = []
    for number, first in enumerate(range(0, len(lengths), group_size)):
        student = tokens(PROMPT_TOKENS)
        prompt = Prompt(f"given:{number}", student, tokens(HINT_TOKENS) + student, "")
        responses = [np.array(tokens(length), np.int32) for length in lengths[first : first + group_size]]
        logprobs = [np.full(len(response), -math.log(vocab), np.float32) for response in responses]
        completions = tuple(Completion(*arrays, "length", 0, "") for arrays in zip(responses, logprobs, strict=True))
        rewards = _rewards([len(response) for response in responses])
        groups.append(ScoredGroup(Group(prompt, completions), rewards, group_advantages(rewards)))
    return groups


def _rewards(lengths: Sequence[int]) -> tuple[float, ...]:
    """1 for half of the responses, with about half of the tokens: by length 1, 0, 0, 1, 1, 0, 0, ..."""
    ordered = sorted(range(len(lengths)), key=lengths.__getitem__)
    right = {response for place, response in enumerate(ordered) if place % 4 in (0, 3)}
    return tuple(float(response in right) for response in range(len(lengths)))
