"""From the configuration's name of a verifier to the function."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import cast

from sdpg_megatron.errors import ConfigError, did_you_mean
from sdpg_megatron.rewards.base import Extract, ExtractingVerifier, Verifier

FIELD = "reward.verifier"
VERIFIERS = {
    "number": "sdpg_megatron.rewards.number:number",
    "math": "sdpg_megatron.rewards.symbolic:math",
    "answer": "sdpg_megatron.rewards.line:answer",
    "exact": "sdpg_megatron.rewards.exact:exact",
    "reasoning_gym": "sdpg_megatron.rewards.gym:reasoning_gym",
}
"""The shipped verifiers; each is imported where it is used, as some need a package of their own."""
EXTRACTS = {
    "number": "sdpg_megatron.rewards.number:extract_number",
    "math": "sdpg_megatron.rewards.symbolic:extract_math",
    "answer": "sdpg_megatron.rewards.line:extract_answer",
    "exact": "sdpg_megatron.rewards.exact:extract_exact",
}
"""What reads the answer of a response, by verifier."""
EXTRAS = {"math_verify": "math", "reasoning_gym": "gym"}
"""Packages that this project does not require, and the extra that brings each."""


def load_verifier(spec: str) -> Verifier:
    """The verifier that `spec` names: a shipped one, or ``module:function``.

    Raises:
        ConfigError: no such verifier, a module that does not import, or no such function in it.
    """
    if spec not in VERIFIERS and ":" not in spec:
        fix = did_you_mean(spec, VERIFIERS) or "write the function as module:function"
        raise ConfigError(FIELD, spec, f"{', '.join(map(repr, VERIFIERS))}, or module:function", fix)
    verifier = cast(Verifier, load_function(FIELD, VERIFIERS.get(spec, spec)))
    if spec not in EXTRACTS:
        return verifier
    return ExtractingVerifier(verifier, cast(Extract, load_function(FIELD, EXTRACTS[spec])))


def compares_text(spec: str) -> bool:
    """Whether the verifier takes answers that are text only, as all shipped ones do that compare answers."""
    return spec in EXTRACTS


def load_function(field: str, spec: str) -> Callable[..., object]:
    """The function that `spec` names as ``module:function``.

    Raises:
        ConfigError: about `field`: another form, a module that does not import, or no such function in it.
    """
    module_name, _, name = spec.partition(":")
    if not (module_name and name):
        raise ConfigError(field, spec, "module:function", "write the function as module:function")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and (extra := EXTRAS.get(error.name or "")):
            fix = f"pip install -e '.[{extra}]'"
            raise ConfigError(field, spec, f"the package {error.name}, which is not installed", fix) from error
        expected = f"a module that imports ({type(error).__name__}: {error})"
        raise ConfigError(field, spec, expected, "correct it, or put its folder on PYTHONPATH") from error
    function: Callable[..., object] | None = getattr(module, name, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if callable(value)]
        fix = did_you_mean(name, functions) or f"define {name} in {module.__file__}"
        raise ConfigError(field, spec, f"a function of {module_name}", fix)
    return function
