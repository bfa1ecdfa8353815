"""What a verifier is."""

from __future__ import annotations

from typing import Protocol

from sdpg_megatron.records import Prompt


class Verifier(Protocol):
    """Scores one response. It may raise or hang: the caller bounds it and counts the failure."""

    def __call__(self, prompt: Prompt, response: str) -> float:
        """Reward of `response` (decoded text without special tokens) to `prompt`; 1.0 is right, 0.0 is wrong."""
        ...
