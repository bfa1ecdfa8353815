"""Wrong hints: the context and answer of another problem."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from sdpg_megatron.answers import normalised, same
from sdpg_megatron.config import DataConfig
from sdpg_megatron.data.examples import Example
from sdpg_megatron.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Wish:
    """Who wants wrong hints: a field, its value, and what it would have to be where there are none."""

    field: str
    value: object
    instead: str


def wish(config: DataConfig, contrast: float) -> Wish | None:
    """None where nobody wants wrong hints. `contrast`: `ObjectiveConfig.contrast`."""
    if contrast:
        return Wish("objective.contrast", contrast, "0")
    return Wish("data.context_of", "other", "own") if config.context_of == "other" else None


def others(examples: Sequence[Example], seed: int, wish: Wish) -> list[Example]:
    """For each example another one, drawn by `seed`: not the same question, and not the same answer.

    Raises:
        ConfigError: for some example there is none.
    """
    return [_other(examples, index, random.Random(f"{seed}/context/{index}"), wish) for index in range(len(examples))]


def misleads(other: Example, example: Example) -> bool:
    """Whether the context of `other` is that of another problem than `example`'s, and gives another answer."""
    return not same(example.answer_text, other.answer_text) and normalised(example.question) != normalised(
        other.question
    )


def _other(examples: Sequence[Example], index: int, generator: random.Random, wish: Wish) -> Example:
    """The first that misleads, from a drawn place on."""
    start = int(generator.random() * len(examples))
    for place in range(start, start + len(examples)):
        other = examples[place % len(examples)]
        if misleads(other, examples[index]):
            return other
    answer = examples[index].answer_text
    expected = f"{wish.instead} where every problem has the answer {answer!r} or the same question"
    raise ConfigError(wish.field, wish.value, expected, "use data whose answers differ")
