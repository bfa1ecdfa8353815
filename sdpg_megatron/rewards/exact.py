"""A verifier for responses that are the answer and nothing else."""

from __future__ import annotations

from sdpg_megatron.answers import normalised
from sdpg_megatron.records import Prompt


def exact(prompt: Prompt, response: str) -> float:
    """1.0 where `response` is the prompt's answer but for case, blanks, Unicode form and markup, else 0.0."""
    return float(normalised(response) == normalised(prompt.answer_text))


def extract_exact(response: str) -> str | None:
    """What `exact` compares; None where that is nothing."""
    return normalised(response) or None
