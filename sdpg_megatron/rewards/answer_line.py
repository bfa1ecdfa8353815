"""A verifier for responses whose last line is ``Answer: value``, as DAPO-Math-17k asks for."""

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
    """1.0 where the value of the last line ``Answer: value`` of `response` is the prompt's answer, else 0.0.

    What `equality.decide` leaves open is compared as mathematics where math-verify is installed, and as normalised text
    where it is not.
    """
    stated = last_line(response)
    return float(stated is not None and equal(prompt.answer_text, stated))


def extract_answer(response: str) -> str | None:
    """What `answer` compares, in one spelling for numbers, words of yes and no, and option letters."""
    stated = last_line(response)
    return None if stated is None else spelling(stated)
