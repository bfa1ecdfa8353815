"""Answers compared as mathematics, by math-verify."""

from __future__ import annotations

import logging

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from sdpg_megatron.answers import as_number, canonical, last_boxed, last_statement, plain_digits, stripped
from sdpg_megatron.records import Prompt
from sdpg_megatron.rewards.equality import decide, spelling

# math-verify's own limits are signals, which no long integer operation hears; the pool ends a call that takes too long.
# Without them it warns once in each process.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_TARGETS = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())


def math(prompt: Prompt, response: str) -> float:
    r"""1.0 where the last ``\boxed{...}`` of `response` equals the prompt's answer as mathematics, else 0.0.

    Where there is no box, what follows "final answer is" counts; a response with neither is wrong.
    """
    stated = _stated(response)
    return float(stated is not None and equal(prompt.answer_text, stated))


def extract_math(response: str) -> str | None:
    """What `math` compares, in one spelling for numbers, words of yes and no, and option letters."""
    stated = _stated(response)
    return None if stated is None else spelling(stated)


def _stated(response: str) -> str | None:
    return last_boxed(response) or last_statement(response)


def equal(answer: str, stated: str) -> bool:
    """Whether `stated` is `answer`: as `equality.decide` says, or else as math-verify compares numbers (to six
    decimals), sets, intervals, expressions and names.

    It may take any time and much memory: call it where a time limit holds.
    """
    verdict = decide(answer, stated)
    return bool(verify(_parse(answer), _parse(stated), timeout_seconds=None)) if verdict is None else verdict


def _parse(text: str) -> list[object]:
    """What math-verify makes of an answer, best reading first; empty where it makes nothing of it."""
    content = stripped(plain_digits(text)) if as_number(text) is None else canonical(text)  # it knows no 1e-05
    boxed = f"\\boxed{{{content}}}"
    parsed: list[object] = parse(boxed, _TARGETS, parsing_timeout=None)
    return parsed
