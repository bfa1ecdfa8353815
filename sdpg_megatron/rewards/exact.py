"""Verifier `exact`, for responses that consist of the answer."""

from __future__ import annotations

from sdpg_megatron.answers import normalized
from sdpg_megatron.records import Prompt


def exact(prompt: Prompt, response: str) -> float:
    """1.0 if `response` equals the prompt's answer up to case, whitespace, Unicode form and markup, else 0.0."""
    return float(normalized(response) == normalized(prompt.answer_text))


def extract_exact(response: str) -> str | None:
    """Text that `exact` compares; None if it is empty."""
    return normalized(response) or None
