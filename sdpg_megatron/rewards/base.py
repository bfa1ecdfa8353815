"""Verifier interface."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from sdpg_megatron.records import Prompt


class Verifier(Protocol):
    """Scores one response. It may raise or hang: the caller enforces a timeout and counts failures."""

    def __call__(self, prompt: Prompt, response: str) -> float:
        """Reward of `response` (decoded text without special tokens) to `prompt`: 1.0 is correct, 0.0 is wrong."""
        ...


Extract = Callable[[str], str | None]
"""Response -> its answer, with the same text for equal answers; None if it gives none."""


@runtime_checkable
class Extracting(Verifier, Protocol):
    """Verifier that also extracts the answer of a response, for majority votes."""

    @property
    def extract(self) -> Extract: ...


@dataclass(frozen=True, slots=True)
class ExtractingVerifier:
    """`Extracting` verifier composed of two functions."""

    verify: Verifier
    extract: Extract

    def __call__(self, prompt: Prompt, response: str) -> float:
        return self.verify(prompt, response)
