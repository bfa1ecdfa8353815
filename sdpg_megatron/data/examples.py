"""Question, answer and privileged context of a row, from plain columns, a chat, or the public SDPG format.

The public format has a `prompt` list of chat messages, of which the last user message is the question. If it contains
``[TEACHER_CONTEXT_TOKEN]``, the student reads the part before the mark and the teacher reads both parts. A mark in a
plain column has the same meaning, so the student never reads the part after it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal

from sdpg_megatron.answers import decimal_text
from sdpg_megatron.config import DataConfig
from sdpg_megatron.data.chats import CHAT_COLUMNS, CONTEXT_MARK, Chat, Message, read_chat, split_context
from sdpg_megatron.data.instructions import is_bare_instruction
from sdpg_megatron.data.readers import Row
from sdpg_megatron.errors import DataError, did_you_mean
from sdpg_megatron.records import Answer, answer_text

REWARD_COLUMN = "reward_model"
LONG_CONTEXT = 30
"""Minimum length in characters of a context for `reveals` to search the question for it."""
_STATED = re.compile(r"the correct answer( to this problem)? is\b[\s:*$]*")
"""Opening of the contexts in the public SDPG files. The shorter form may also be part of a question."""


@dataclass(frozen=True, slots=True)
class Example:
    """Question, answer and context of a row, before rendering."""

    question: str
    answer: Answer
    context: str | None = None
    """None if the row has no context."""
    history: tuple[Message, ...] = ()
    """Messages before the question."""
    teacher_question: str | None = None
    """Teacher question given by the row (public SDPG format); None: rendered from the context template."""
    metadata: Mapping[str, object] = field(default_factory=dict)
    """Other columns of the row."""

    @property
    def is_revealed(self) -> bool:
        """True if the student's messages contain the context or the answer; see `reveals`."""
        shown = " ".join([*(message["content"] for message in self.history), self.question])
        return reveals(shown, self.context, self.answer_text)

    @property
    def answer_text(self) -> str:
        """See `records.answer_text`."""
        return answer_text(self.answer)


def parse_row(row: Row, config: DataConfig, *, context_needed: bool = False) -> Example:
    """Extract question, answer and context from a row.

    Raises:
        DataError: a column is missing, empty or of the wrong type. With `context_needed` this includes the context.
    """
    example = _parse(row, config)
    if context_needed and example.context is None and example.teacher_question is None:
        found = f"no value in column {config.context_key!r} (columns: {', '.join(row.values)})"
        expected = f"a context, which the context template {config.context_template!r} needs"
        raise DataError(row.where, found, expected, "fill it, set data.context_key, or use another template")
    return example


def reveals(question: str, context: str | None, answer: str) -> bool:
    """True if `question` contains the context, of at least `LONG_CONTEXT` characters, or states the answer.

    An answer is stated in the words of the contexts in the public SDPG files. Case and whitespace are ignored.
    """
    question = folded(question)
    whole = folded(context or "")
    if len(whole) >= LONG_CONTEXT and whole in question:
        return True
    stated = _STATED.search(question)
    return stated is not None and (stated[1] is not None or question[stated.end() :].startswith(folded(answer)))


def folded(text: str) -> str:
    """Text without differences of case and whitespace."""
    return " ".join(text.casefold().split())


def _parse(row: Row, config: DataConfig) -> Example:
    column = _chat_column(row, config)
    used = {column, config.question_key, config.answer_key, config.context_key}
    if column is not None:
        messages = row.values[column]
        assert isinstance(messages, list)
        chat = read_chat(row.where, column, messages)
    else:
        text = _text(row, config.question_key, "data.question_key")
        chat = Chat(*split_context(row.where, config.question_key, text), history=(), reply=None)
    if is_bare_instruction(chat.question):
        found = f"instructions without a question: {chat.question!r}"
        raise DataError(row.where, found, "a question", "fill it or remove the row")
    marked = bool(chat.context and chat.context.strip())
    return Example(
        question=chat.question,
        answer=_answer(row, config),
        context=chat.context if marked else _context(row, config) or (chat.reply or "").strip() or None,
        history=chat.history,
        teacher_question=f"{chat.question}{chat.context}" if marked else None,
        metadata={name: value for name, value in row.values.items() if name not in used},
    )


def _chat_column(row: Row, config: DataConfig) -> str | None:
    """Column with the chat to use; None if a plain question column takes precedence over chats without a mark."""
    chats = [name for name in (config.question_key, *CHAT_COLUMNS) if isinstance(row.values.get(name), list)]
    marked = [name for name in chats if CONTEXT_MARK in str(row.values[name])]
    if marked or row.values.get(config.question_key) is None or config.question_key in chats:
        return next(iter(marked + chats), None)
    return None


def _answer(row: Row, config: DataConfig) -> Answer:
    """Value of the answer column, or else of the public format's ``reward_model.ground_truth``."""
    column, reward_model = config.answer_key, row.values.get(REWARD_COLUMN)
    if row.values.get(column) is None and isinstance(reward_model, dict):
        row, column = Row(row.where, row.number, reward_model), "ground_truth"
    value = row.values.get(column)
    if isinstance(value, bool):
        return str(value)
    if not isinstance(value, dict | list):
        return _text(row, column, "data.answer_key")
    if not value:
        raise DataError(row.where, f"empty column {column!r}", "an answer", "fill it or remove the row")
    if any(isinstance(leaf, float) and not math.isfinite(leaf) for leaf in _leaves(value)):
        raise DataError(row.where, f"NaN or infinity in column {column!r}", "finite numbers", "correct the row")
    return value


def _leaves(value: object) -> Iterator[object]:
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _leaves(inner)
    else:
        yield value


def _context(row: Row, config: DataConfig) -> str | None:
    if row.values.get(config.context_key) is None:
        return None
    return _text(row, config.context_key, "data.context_key")


def _text(row: Row, column: str, config_field: str) -> str:
    """Value of a column as text, with numbers in decimal digits."""
    value = row.values.get(column)
    if value is None:
        found = f"no value in column {column!r} (columns: {', '.join(row.values)})"
        hint = did_you_mean(column, row.values)
        raise DataError(row.where, found, "text", " ".join(filter(None, (f"fill it or set {config_field};", hint))))
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        try:
            return decimal_text(value)
        except ValueError as error:
            raise DataError(row.where, f"{error} in column {column!r}", "a finite number", "correct the row") from error
    if not isinstance(value, str):
        expected = f"text or a number, see {config_field}"
        raise DataError(row.where, f"{type(value).__name__} in column {column!r}", expected, "write it as text")
    if not value.strip():
        raise DataError(row.where, f"empty column {column!r}", "text", "fill it or remove the row")
    return value
