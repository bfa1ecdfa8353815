"""Verifier `math`: symbolic comparison of answers by math-verify."""

from __future__ import annotations

import logging

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from sdpg_megatron.answers import as_number, canonical, last_boxed, last_statement, plain_digits, stripped
from sdpg_megatron.records import Prompt
from sdpg_megatron.rewards.equality import decide, spelling

# math-verify's timeouts use signals, which cannot interrupt a long integer operation. They are off; the verifier pool
# enforces the time limit. Without them math-verify warns once per process.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_TARGETS = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())


def math(prompt: Prompt, response: str) -> float:
    r"""1.0 if the last ``\boxed{...}`` of `response` equals the prompt's answer mathematically, else 0.0.

    Without a box the text after "final answer is" counts. A response with neither is wrong.
    """
    stated = _stated(response)
    return float(stated is not None and equal(prompt.answer_text, stated))


def extract_math(response: str) -> str | None:
    """Answer that `math` compares, in canonical spelling; None without one."""
    stated = _stated(response)
    return None if stated is None else spelling(stated)


def _stated(response: str) -> str | None:
    return last_boxed(response) or last_statement(response)


def equal(answer: str, stated: str) -> bool:
    """True if `stated` equals `answer`, by `equality.decide` or else by math-verify.

    math-verify compares numbers (to six decimals), sets, intervals, expressions and names. Time and memory are
    unbounded: call it under a time limit.
    """
    verdict = decide(answer, stated)
    return bool(verify(_parse(answer), _parse(stated), timeout_seconds=None)) if verdict is None else verdict


def _parse(text: str) -> list[object]:
    """Parse an answer with math-verify, best candidate first; empty if it cannot be parsed."""
    content = stripped(plain_digits(text)) if as_number(text) is None else canonical(text)  # it cannot parse 1e-05
    boxed = f"\\boxed{{{content}}}"
    parsed: list[object] = parse(boxed, _TARGETS, parsing_timeout=None)
    return parsed
