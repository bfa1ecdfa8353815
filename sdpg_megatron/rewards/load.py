"""Find and load the verifier named in the configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from sdpg_megatron.config.external import load_object
from sdpg_megatron.errors import ConfigError, did_you_mean
from sdpg_megatron.records import Prompt
from sdpg_megatron.rewards.base import Extract, ExtractingVerifier, Verifier
from sdpg_megatron.rewards.conventions import (
    EXPECTED,
    Convention,
    call,
    describe_signature,
    find_convention,
    is_callable_class,
)

FIELD = "reward.verifier"
FIX = "give it one of these signatures; further parameters need defaults"
VERIFIERS = {
    "number": "sdpg_megatron.rewards.number:number",
    "math": "sdpg_megatron.rewards.symbolic:math",
    "answer": "sdpg_megatron.rewards.answer_line:answer",
    "exact": "sdpg_megatron.rewards.exact:exact",
    "reasoning_gym": "sdpg_megatron.rewards.gym:reasoning_gym",
}
"""Shipped verifiers, imported on use because some need an optional package."""
EXTRACTS = {
    "number": "sdpg_megatron.rewards.number:extract_number",
    "math": "sdpg_megatron.rewards.symbolic:extract_math",
    "answer": "sdpg_megatron.rewards.answer_line:extract_answer",
    "exact": "sdpg_megatron.rewards.exact:extract_exact",
}
"""Function that extracts the answer of a response, by verifier."""
EXTRAS = {"math_verify": "math", "reasoning_gym": "gym"}
"""Optional package -> extra that installs it."""


@dataclass(frozen=True, slots=True)
class AdaptedVerifier:
    """Custom function, called by its convention."""

    target: Callable[..., object]
    convention: Convention

    def __call__(self, prompt: Prompt, response: str) -> Any:
        """Raw return value of the function; `as_reward` converts it."""
        return call(self.target, self.convention, prompt, response)


@dataclass(frozen=True, slots=True)
class VerifierSource:
    """Verifier that was found and has a valid signature, before `build`."""

    spec: str
    target: Callable[..., object]
    """Function, or class to instantiate."""
    convention: Convention

    @property
    def extracts(self) -> bool:
        """True if the verifier extracts answers; see `Extracting`."""
        return self.spec in EXTRACTS or hasattr(self.target, "extract")

    def build(self) -> Verifier:
        """Instantiate the verifier.

        Raises:
            ConfigError: the constructor raised.
        """
        if self.spec in VERIFIERS:
            verifier = cast(Verifier, self.target)
            extract = load_object(FIELD, EXTRACTS[self.spec]) if self.spec in EXTRACTS else None
        else:
            target = instantiate(FIELD, self.spec, self.target)
            verifier, extract = AdaptedVerifier(target, self.convention), getattr(target, "extract", None)
        return verifier if extract is None else ExtractingVerifier(verifier, cast(Extract, extract))


def load_verifier(spec: str) -> Verifier:
    """Load a shipped verifier by name, or ``module:function``. Raises as `find_verifier`."""
    return find_verifier(spec).build()


def find_verifier(spec: str) -> VerifierSource:
    """Find a verifier and check its signature.

    Raises:
        ConfigError: no such verifier, a module that does not import, no such function in it, or a signature that
            matches no convention.
    """
    if spec not in VERIFIERS and ":" not in spec:
        fix = did_you_mean(spec, VERIFIERS) or "write the function as module:function"
        raise ConfigError(FIELD, spec, f"{', '.join(map(repr, VERIFIERS))}, or module:function", fix)
    target = load_object(FIELD, VERIFIERS.get(spec, spec), extras=EXTRAS)
    unusable = isinstance(target, type) and not is_callable_class(target)
    convention = None if unusable else find_convention(target)
    if convention is None:
        detail = (
            " (a class without __call__, or with constructor arguments)" if unusable else describe_signature(target)
        )
        raise ConfigError(FIELD, f"{spec}{detail}", EXPECTED, FIX)
    return VerifierSource(spec, target, convention)


def instantiate(field: str, spec: str, target: Callable[..., object]) -> Callable[..., object]:
    """Instantiate a class; return a function unchanged. Raises `ConfigError`."""
    if not isinstance(target, type):
        return target
    try:
        return cast(Callable[..., object], target())
    except Exception as error:
        expected = f"a class that can be built without arguments ({type(error).__name__}: {error})"
        raise ConfigError(field, spec, expected, "correct its constructor") from error


def is_custom(spec: str) -> bool:
    """True for a custom verifier, which may read all fields of a prompt."""
    return spec not in VERIFIERS


def compares_text(spec: str) -> bool:
    """True if the verifier requires text answers, as shipped verifiers that compare answers do."""
    return spec in EXTRACTS
