"""Calling conventions of verifiers: this package's, verl's and slime's, sync or async; and their return values."""

from __future__ import annotations

import asyncio
import inspect
import math
from argparse import Namespace
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cache
from numbers import Real
from reprlib import repr as short
from typing import Any

from sdpg_megatron.config import MAX_REWARD
from sdpg_megatron.records import Answer, Prompt

EXPECTED = (
    "f(prompt, response), f(response, ground_truth), verl's f(data_source, solution_str, ground_truth, "
    "extra_info=None) or slime's f(args, sample, **kwargs); a function, an async function, or a class with such a "
    "__call__"
)
RETURNED = 'a number, a bool, a scalar of NumPy or PyTorch, or a dict with one of them as "score" or "reward"'
SCORES = ("score", "reward")
"""Keys of the reward in a dict; the first existing one is used."""
BATCHES = {"samples", "prompts", "responses", "completions", "solution_strs"}
"""Parameter names of functions that score a batch of responses."""
RESPONSE_WORDS = {"response", "completion", "prediction", "predicted", "pred", "output", "generated", "generation"}
"""Words in the name of a parameter for the response text."""
ANSWER_WORDS = {
    *("answer", "truth", "gt", "label", "target", "gold", "golden", "reference", "ref", "expected", "correct"),
    "solution",
}
"""Words in the name of a parameter for the reference answer."""

VERL = {"data_source": "data_source", "solution_str": "response", "ground_truth": "answer", "extra_info": "extra_info"}
"""verl keyword -> role."""
AMBIGUOUS = "ambiguous"

Arguments = tuple[tuple[object, ...], dict[str, object]]
Convention = Callable[[Prompt, str], Arguments]
"""(prompt, response) -> positional and keyword arguments of the verifier."""


class RewardTypeError(TypeError):
    """A verifier returned a value of a type that cannot be a reward."""


@dataclass(frozen=True, slots=True)
class SlimeSample:
    """Attributes of slime's ``Sample`` that are known when a response is scored."""

    prompt: str
    """Question without chat template."""
    response: str
    label: Answer
    """Reference answer."""
    metadata: dict[str, object] = field(default_factory=dict)


def positional(prompt: Prompt, response: str) -> Arguments:
    return (prompt, response), {}


def named(signature: inspect.Signature) -> Convention:
    """Convention that passes arguments by the roles of parameter names, including verl's keywords.

    `data_source` and `extra_info` are columns of the row, or else the data file's name and all other columns.
    """
    parameters = signature.parameters
    roles = {parameter.name: _role(parameter.name) for parameter in _bound_parameters(signature)}
    roles |= {name: role for name, role in VERL.items() if name in parameters}
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if open_ended and "solution_str" in parameters:
        roles |= VERL
    by_position = [name for name in roles if name in parameters and _is_positional_only(parameters[name])]

    def arguments(prompt: Prompt, response: str) -> Arguments:
        values = {
            "prompt": prompt,
            "response": response,
            "answer": prompt.answer,
            "data_source": prompt.metadata.get("data_source", prompt.uid.rpartition(":")[0]),
            "extra_info": prompt.metadata.get("extra_info", dict(prompt.metadata)),
        }
        keywords = {name: values[role] for name, role in roles.items() if role}
        return tuple(keywords.pop(name) for name in by_position), keywords

    return arguments


def slime(prompt: Prompt, response: str) -> Arguments:
    """slime's convention, with an empty namespace for `args`."""
    return (Namespace(), SlimeSample(prompt.question, response, prompt.answer, dict(prompt.metadata))), {}


def find_convention(target: Callable[..., object]) -> Convention | None:
    """Convention that matches the signature of a function or class; None without a match.

    Parameter names with a known role decide; without known roles, positions do. A callable without a signature, such as
    one of an extension module, is called as ``f(prompt, response)``.
    """
    try:
        signature = _signature(target)
    except ValueError:
        return positional
    names, bound = list(signature.parameters), [parameter.name for parameter in _bound_parameters(signature)]
    roles = [_role(name) for name in bound]
    convention: Convention | None = None
    if not BATCHES.isdisjoint(names):
        return None
    if names[1:2] == ["sample"] and _role(names[0]) is None:
        convention = slime
    elif _are_clear(roles) and (len(bound) > 1 or "solution_str" in names):
        convention = named(signature)
    elif {"answer", AMBIGUOUS}.isdisjoint(roles) and "response" not in roles[:1] and "prompt" not in roles[1:]:
        convention = positional
    return convention if convention is not None and _fits(signature, convention) else None


def describe_signature(target: Callable[..., object]) -> str:
    try:
        return str(_signature(target))
    except (ValueError, TypeError):
        return ""


def is_callable_class(target: object) -> bool:
    """True if `target` is a class with a constructor without arguments and callable instances."""
    if not isinstance(target, type) or not any("__call__" in vars(base) for base in target.__mro__):
        return False
    try:
        inspect.signature(target).bind()
    except TypeError:
        return False
    except ValueError:  # no signature: only calling it can tell
        return True
    return True


def call(target: Callable[..., object], convention: Convention, prompt: Prompt, response: str) -> object:
    """Call a verifier; run it to completion if it is async."""
    positionals, keywords = convention(prompt, response)
    value = target(*positionals, **keywords)
    return _runner().run(_result(value)) if inspect.isawaitable(value) else value


def as_reward(value: object) -> float:
    """Convert the return value of a verifier to a reward.

    Raises:
        RewardTypeError: a value of another type than `RETURNED`.
        ValueError: NaN, or a magnitude above `MAX_REWARD`.
    """
    number = value
    if isinstance(number, Mapping):
        number = next((number[key] for key in SCORES if key in number), None)
    number = scalar(number)
    if not isinstance(number, Real | Decimal):
        raise RewardTypeError(f"returned {short(value)}, not {RETURNED}")
    try:
        reward = float(number)
    except OverflowError:
        reward = math.inf
    if not abs(reward) <= MAX_REWARD:  # NaN is refused, too
        raise ValueError(f"returned {short(value)}, not a finite number up to {MAX_REWARD:g}")
    return reward


def scalar(value: object) -> object:
    """Element of a NumPy or PyTorch value with one element; None for several; other values unchanged."""
    item = getattr(value, "item", None)
    if not callable(item):
        return value
    try:
        return item()
    except (ValueError, RuntimeError, TypeError):
        return None


def takes(target: Callable[..., object], count: int) -> bool:
    """True if a callable accepts `count` positional arguments, or has no signature."""
    try:
        inspect.signature(target).bind(*range(count))
    except TypeError:
        return False
    except ValueError:
        return True
    return True


def _role(name: str) -> str | None:
    """Role of a parameter by its name: a key of the values in `named`, or `AMBIGUOUS`; None for other names."""
    if name in VERL or name == "prompt":
        return VERL.get(name, name)
    words = set(name.lower().split("_"))
    found = [role for role, known in (("response", RESPONSE_WORDS), ("answer", ANSWER_WORDS)) if words & known]
    if len(found) > 1 or name == "sample":
        return AMBIGUOUS
    return found[0] if found else None


def _bound_parameters(signature: inspect.Signature) -> list[inspect.Parameter]:
    """Parameters that get an argument: all without a default, and some with a default and a known role.

    The latter are the first two parameters, and an answer that defaults to None.
    """
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = [parameter for parameter in signature.parameters.values() if parameter.kind not in variable]
    return [
        parameter
        for index, parameter in enumerate(parameters)
        if parameter.default is parameter.empty
        or (index < 2 and _role(parameter.name) is not None)
        or (parameter.default is None and _role(parameter.name) == "answer")
    ]


def _are_clear(roles: Sequence[str | None]) -> bool:
    """True if names determine all roles. `prompt` together with an answer may mean the question's text: not clear."""
    known = None not in roles and AMBIGUOUS not in roles and len(set(roles)) == len(roles)
    return known and "response" in roles and not {"prompt", "answer"} <= set(roles)


def _is_positional_only(parameter: inspect.Parameter) -> bool:
    return parameter.kind is parameter.POSITIONAL_ONLY


def _fits(signature: inspect.Signature, convention: Convention) -> bool:
    positionals, keywords = convention(_SAMPLE, "")
    try:
        signature.bind(*positionals, **keywords)
    except TypeError:
        return False
    return True


def _signature(target: Callable[..., object]) -> inspect.Signature:
    """Signature of a function, or of a class's ``__call__`` without `self`."""
    if not isinstance(target, type):
        return inspect.signature(target)
    found = inspect.signature(target.__call__)
    return found.replace(parameters=list(found.parameters.values())[1:])


async def _result(value: Awaitable[Any]) -> Any:
    return await value


@cache
def _runner() -> asyncio.Runner:
    """One event loop per process, so that a verifier can keep connections open between calls."""
    return asyncio.Runner()


_SAMPLE = Prompt("", (), (), "")
