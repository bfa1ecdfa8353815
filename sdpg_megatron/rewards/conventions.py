"""How a verifier is called and what it may return: this package's convention, verl's and slime's, plain or async."""

from __future__ import annotations

import asyncio
import inspect
import math
from argparse import Namespace
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cache
from numbers import Real
from reprlib import repr as short
from typing import Any

from sdpg_megatron.records import Answer, Prompt

EXPECTED = (
    "f(prompt, response), verl's f(data_source, solution_str, ground_truth, extra_info=None) or slime's "
    "f(args, sample, **kwargs); a function, an async function, or a class with such a __call__"
)
RETURNED = 'a number, a bool, a scalar of NumPy or PyTorch, or a dict with one of them as "score" or "reward"'
SCORES = ("score", "reward")
"""Keys of a dict's reward, the first one that is there."""
LARGEST = 1e100
"""Bound of a reward's magnitude: sums of rewards stay finite."""
BATCHES = {"samples", "prompts", "responses", "completions", "solution_strs"}
"""Parameters of functions that score several responses at a time."""

Arguments = tuple[tuple[object, ...], dict[str, object]]
Convention = Callable[[Prompt, str], Arguments]
"""(prompt, response) -> positional and keyword arguments of the verifier."""


class RewardTypeError(TypeError):
    """A verifier returned something that is no reward, whatever the response."""


@dataclass(frozen=True, slots=True)
class SlimeSample:
    """The attributes of slime's ``Sample`` that are known when a response is scored."""

    prompt: str
    """The question, without chat template."""
    response: str
    label: Answer
    """The prompt's answer."""
    metadata: dict[str, object] = field(default_factory=dict)


def positional(prompt: Prompt, response: str) -> Arguments:
    return (prompt, response), {}


def by_name(prompt: Prompt, response: str) -> Arguments:
    return (), {"prompt": prompt, "response": response}


def verl(signature: inspect.Signature) -> Convention:
    """verl's keywords, as far as the function takes them.

    `data_source` and `extra_info` are the row's columns; without them, the data file's name and all other columns.
    """
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values())

    def arguments(prompt: Prompt, response: str) -> Arguments:
        keywords = {
            "data_source": prompt.metadata.get("data_source", prompt.uid.rpartition(":")[0]),
            "solution_str": response,
            "ground_truth": prompt.answer,
            "extra_info": prompt.metadata.get("extra_info", dict(prompt.metadata)),
        }
        return (), {name: value for name, value in keywords.items() if open_ended or name in signature.parameters}

    return arguments


def slime(prompt: Prompt, response: str) -> Arguments:
    """`args` is an empty namespace: this project has no arguments of slime's."""
    return (Namespace(), SlimeSample(prompt.question, response, prompt.answer, dict(prompt.metadata))), {}


def find_convention(target: Callable[..., object]) -> Convention | None:
    """Return the convention that the signature of a function or class fits; None where it fits none.

    A callable without a signature, such as one of an extension module, is called as ``f(prompt, response)``.
    """
    try:
        signature = _signature(target)
    except ValueError:
        return positional
    names = set(signature.parameters)
    if names & BATCHES:
        return None
    candidates: tuple[Convention, ...] = (positional,)
    if "solution_str" in names:
        candidates = (verl(signature),)
    elif "sample" in names and "prompt" not in names:
        candidates = (slime,)
    elif {"prompt", "response"} <= names:
        candidates = (by_name, positional)
    return next((convention for convention in candidates if _fits(signature, convention)), None)


def describe_signature(target: Callable[..., object]) -> str:
    try:
        return str(_signature(target))
    except (ValueError, TypeError):
        return ""


def is_callable_class(target: object) -> bool:
    """Tell whether `target` is a class that is built without arguments and whose instances can be called."""
    if not isinstance(target, type) or not any("__call__" in vars(base) for base in target.__mro__):
        return False
    try:
        inspect.signature(target).bind()
    except TypeError:
        return False
    except ValueError:  # no signature: only a try will tell
        return True
    return True


def call(target: Callable[..., object], convention: Convention, prompt: Prompt, response: str) -> object:
    """Call a verifier and, where it is async, run it to its end."""
    positionals, keywords = convention(prompt, response)
    value = target(*positionals, **keywords)
    return _runner().run(_result(value)) if inspect.isawaitable(value) else value


def as_reward(value: object) -> float:
    """Convert what a verifier returned into a reward.

    Raises:
        RewardTypeError: a value of another kind than `RETURNED`.
        ValueError: NaN, or a magnitude over `LARGEST`.
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
    if not is_bounded(reward):
        raise ValueError(f"returned {short(value)}, not a finite number up to {LARGEST:g}")
    return reward


def is_bounded(reward: float) -> bool:
    """Tell whether a reward is a number that a group's mean and deviation can be computed with."""
    return abs(reward) <= LARGEST


def scalar(value: object) -> object:
    """Return the element of a NumPy or PyTorch value that has one; None for several; anything else as it is."""
    item = getattr(value, "item", None)
    if not callable(item):
        return value
    try:
        return item()
    except (ValueError, RuntimeError, TypeError):
        return None


def takes(target: Callable[..., object], count: int) -> bool:
    """Tell whether a callable accepts `count` positional arguments; True where it has no signature."""
    try:
        inspect.signature(target).bind(*range(count))
    except TypeError:
        return False
    except ValueError:
        return True
    return True


def _fits(signature: inspect.Signature, convention: Convention) -> bool:
    positionals, keywords = convention(_SAMPLE, "")
    try:
        signature.bind(*positionals, **keywords)
    except TypeError:
        return False
    return True


def _signature(target: Callable[..., object]) -> inspect.Signature:
    """Return the signature of a function, or of a class's ``__call__`` without `self`."""
    if not isinstance(target, type):
        return inspect.signature(target)
    found = inspect.signature(target.__call__)
    return found.replace(parameters=list(found.parameters.values())[1:])


async def _result(value: Awaitable[Any]) -> Any:
    return await value


@cache
def _runner() -> asyncio.Runner:
    """One event loop for all calls of a process, so that a verifier can keep connections open."""
    return asyncio.Runner()


_SAMPLE = Prompt("", (), (), "")
