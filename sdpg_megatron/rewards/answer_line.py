"""Verifier `answer`, for responses with a last line ``Answer: value`` (the format of DAPO-Math-17k)."""

from __future__ import annotations

from sdpg_megatron.answers import last_line, same
from sdpg_megatron.records import Prompt
from sdpg_megatron.rewards.equality import decide, spelling

try:
    from sdpg_megatron.rewards.symbolic import equal
except ModuleNotFoundError as error:
    if error.name != "math_verify":
        raise

    def equal(answer: str, stated: str) -> bool:
        verdict = decide(answer, stated)
        return same(answer, stated) if verdict is None else verdict


def answer(prompt: Prompt, response: str) -> float:
    """1.0 if the value of the last line ``Answer: value`` of `response` is the prompt's answer, else 0.0.

    Cases that `equality.decide` leaves undecided are compared by math-verify if it is installed, else as normalized
    text.
    """
    stated = last_line(response)
    return float(stated is not None and equal(prompt.answer_text, stated))


def extract_answer(response: str) -> str | None:
    """Answer that `answer` compares, in canonical spelling; None without one."""
    stated = last_line(response)
    return None if stated is None else spelling(stated)
