"""A verifier under which it is known which prompts of `tests.e2e.runs` are dead, and group filters."""

from __future__ import annotations

import zlib

from sdpg_megatron.records import Prompt, ScoredGroup


def a_third_lives(prompt: Prompt, response: str) -> float:
    """The answers are 2 n: n divisible by 3 lives, whatever is said is right after it, and wrong before it."""
    kind = int(prompt.answer) // 2 % 3
    return float(kind == 1) if kind else zlib.crc32(response.encode()) % 1000 / 1000


def nothing_lives(prompt: Prompt, response: str) -> float:
    return 0.0


def without_zero(group: ScoredGroup) -> bool:
    return group.group.prompt.answer != "0"
