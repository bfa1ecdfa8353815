"""From the configuration's name of a verifier to the function."""

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
"""The shipped verifiers; each is imported where it is used, as some need a package of their own."""
EXTRACTS = {
    "number": "sdpg_megatron.rewards.number:extract_number",
    "math": "sdpg_megatron.rewards.symbolic:extract_math",
    "answer": "sdpg_megatron.rewards.answer_line:extract_answer",
    "exact": "sdpg_megatron.rewards.exact:extract_exact",
}
"""What reads the answer of a response, by verifier."""
EXTRAS = {"math_verify": "math", "reasoning_gym": "gym"}
"""Packages that this project does not require, and the extra that brings each."""


@dataclass(frozen=True, slots=True)
class AdaptedVerifier:
    """A function of the user's, called by its convention."""

    target: Callable[..., object]
    convention: Convention

    def __call__(self, prompt: Prompt, response: str) -> Any:
        """Whatever the function returns; `as_reward` makes a number of it."""
        return call(self.target, self.convention, prompt, response)


@dataclass(frozen=True, slots=True)
class VerifierSource:
    """A verifier that was found and whose signature was checked; `build` makes what can be called."""

    spec: str
    target: Callable[..., object]
    """A function, or a class that `build` makes an instance of."""
    convention: Convention

    @property
    def extracts(self) -> bool:
        """Tell whether it reads answers from responses; see `Extracting`."""
        return self.spec in EXTRACTS or hasattr(self.target, "extract")

    def build(self) -> Verifier:
        """Return the verifier.

        Raises:
            ConfigError: the constructor of a class raised.
        """
        if self.spec in VERIFIERS:
            verifier = cast(Verifier, self.target)
            extract = load_object(FIELD, EXTRACTS[self.spec]) if self.spec in EXTRACTS else None
        else:
            target = instantiate(FIELD, self.spec, self.target)
            verifier, extract = AdaptedVerifier(target, self.convention), getattr(target, "extract", None)
        return verifier if extract is None else ExtractingVerifier(verifier, cast(Extract, extract))


def load_verifier(spec: str) -> Verifier:
    """Return the verifier that `spec` names: a shipped one, or ``module:function``. Raises as `find_verifier`."""
    return find_verifier(spec).build()


def find_verifier(spec: str) -> VerifierSource:
    """Find a verifier and check that it can be called, without calling it.

    Raises:
        ConfigError: no such verifier, a module that does not import, no such function in it, or a signature that fits
            no convention.
    """
    if spec not in VERIFIERS and ":" not in spec:
        fix = did_you_mean(spec, VERIFIERS) or "write the function as module:function"
        raise ConfigError(FIELD, spec, f"{', '.join(map(repr, VERIFIERS))}, or module:function", fix)
    target = load_object(FIELD, VERIFIERS.get(spec, spec), extras=EXTRAS)
    unusable = isinstance(target, type) and not is_callable_class(target)
    convention = None if unusable else find_convention(target)
    if convention is None:
        what = " (a class without __call__, or whose constructor takes arguments)"
        raise ConfigError(FIELD, f"{spec}{what if unusable else describe_signature(target)}", EXPECTED, FIX)
    return VerifierSource(spec, target, convention)


def instantiate(field: str, spec: str, target: Callable[..., object]) -> Callable[..., object]:
    """Return an instance of a class that is called, or a function as it is. Raises `ConfigError`."""
    if not isinstance(target, type):
        return target
    try:
        return cast(Callable[..., object], target())
    except Exception as error:
        expected = f"a class that can be built without arguments ({type(error).__name__}: {error})"
        raise ConfigError(field, spec, expected, "correct its constructor") from error


def is_own(spec: str) -> bool:
    """Tell whether the verifier is the user's, which may read all of a prompt."""
    return spec not in VERIFIERS


def compares_text(spec: str) -> bool:
    """Whether the verifier takes answers that are text only, as all shipped ones do that compare answers."""
    return spec in EXTRACTS
