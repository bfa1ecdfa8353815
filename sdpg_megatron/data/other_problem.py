"""Control experiment `data.context_of: other`: the teacher reads context and answer of another problem."""

from __future__ import annotations

import random
from collections.abc import Sequence

from sdpg_megatron.answers import normalized, same
from sdpg_megatron.data.examples import Example
from sdpg_megatron.errors import ConfigError


def other_problems(examples: Sequence[Example], seed: int) -> list[Example]:
    """Draw for each example another one with a different question and answer.

    Raises:
        ConfigError: there is none for an example.
    """
    return [_draw(examples, index, random.Random(f"{seed}/context/{index}")) for index in range(len(examples))]


def is_other_problem(other: Example, example: Example) -> bool:
    """True if question and answer differ."""
    return not same(example.answer_text, other.answer_text) and normalized(example.question) != normalized(
        other.question
    )


def no_other_problem(reason: str, fix: str) -> ConfigError:
    """Error for `data.context_of: other` without a suitable other problem."""
    return ConfigError("data.context_of", "other", f"own {reason}", fix)


def _draw(examples: Sequence[Example], index: int, generator: random.Random) -> Example:
    """Return the first other problem after a random position."""
    start = int(generator.random() * len(examples))
    for position in range(start, start + len(examples)):
        other = examples[position % len(examples)]
        if is_other_problem(other, examples[index]):
            return other
    answer = examples[index].answer_text
    reason = f"where every problem has the answer {answer!r} or the same question"
    raise no_other_problem(reason, "use data whose answers differ")
