"""What a verifier is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from sdpg_megatron.records import Prompt


class Verifier(Protocol):
    """Scores one response. It may raise or hang: the caller bounds it and counts the failure."""

    def __call__(self, prompt: Prompt, response: str) -> float:
        """Reward of `response` (decoded text without special tokens) to `prompt`; 1.0 is right, 0.0 is wrong."""
        ...


Extract = Callable[[str], str | None]
"""Response -> the answer that it gives, in one spelling for all that mean the same; None where it gives none."""


@runtime_checkable
class Extracting(Verifier, Protocol):
    """A verifier that also says which answer a response gives: what majority votes count."""

    @property
    def extract(self) -> Extract: ...


@dataclass(frozen=True, slots=True)
class ExtractingVerifier:
    """An `Extracting` verifier of two functions."""

    verify: Verifier
    extract: Extract

    def __call__(self, prompt: Prompt, response: str) -> float:
        return self.verify(prompt, response)
