"""What a row says: question, answer and privileged context, from plain columns or from the public SDPG format.

The public format has a `prompt` list of chat messages. The last one is the question; where it carries
``[TEACHER_CONTEXT_TOKEN]``, the student reads what stands before the mark and the teacher both parts without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sdpg_megatron.config import DataConfig
from sdpg_megatron.data.readers import Row
from sdpg_megatron.errors import DataError, did_you_mean

MARK = "[TEACHER_CONTEXT_TOKEN]"
CHAT_COLUMN = "prompt"
REWARD_COLUMN = "reward_model"

Message = Mapping[str, str]
"""``{"role": ..., "content": ...}``."""


@dataclass(frozen=True, slots=True)
class Example:
    """One question before rendering."""

    question: str
    answer: str
    context: str | None = None
    """None where the row has none."""
    history: tuple[Message, ...] = ()
    """Messages before the question."""
    teacher_question: str | None = None
    """What the row itself lets the teacher read instead of the question; None leaves that to the context template."""
    metadata: Mapping[str, object] = field(default_factory=dict)
    """The row's other columns."""


def parse_row(row: Row, config: DataConfig, *, context_needed: bool = False) -> Example:
    """Find question, answer and context in a row.

    Raises:
        DataError: a column is missing, empty or of the wrong type; with `context_needed` also that of the context.
    """
    example = _parse(row, config)
    if context_needed and example.context is None and example.teacher_question is None:
        found = f"no value in column {config.context_key!r} (columns: {', '.join(row.values)})"
        expected = f"what the context template {config.context_template!r} tells the teacher"
        raise DataError(row.where, found, expected, "fill it, set data.context_key, or use another template")
    return example


def _parse(row: Row, config: DataConfig) -> Example:
    used = {CHAT_COLUMN, config.question_key, config.answer_key, config.context_key}
    metadata = {name: value for name, value in row.values.items() if name not in used}
    if _is_chat(row, config):
        history, question = _chat(row)
        student, mark, context = question.partition(MARK)
        return Example(
            question=student,
            answer=_answer(row, config),
            context=(context if mark else None) or _context(row, config),
            history=history,
            teacher_question=student + context if mark else None,
            metadata=metadata,
        )
    return Example(
        question=_text(row, config.question_key, "data.question_key"),
        answer=_answer(row, config),
        context=_context(row, config),
        metadata=metadata,
    )


def _is_chat(row: Row, config: DataConfig) -> bool:
    """Whether the question is to be read from the chat column; a plain question column wins over an unmarked chat."""
    chat = row.values.get(CHAT_COLUMN)
    if not isinstance(chat, list):
        return False
    marked = any(isinstance(message, dict) and MARK in str(message.get("content")) for message in chat)
    return marked or not isinstance(row.values.get(config.question_key), str)


def _chat(row: Row) -> tuple[tuple[Message, ...], str]:
    """The messages before the question, and the question."""
    messages = row.values[CHAT_COLUMN]
    assert isinstance(messages, list)
    expected = "a list of {role, content} messages that ends with the user's"
    fix = f"correct the column {CHAT_COLUMN!r}"
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise DataError(row.where, f"the message {message!r}", expected, fix)
    if not messages or messages[-1]["role"] != "user":
        raise DataError(row.where, f"the roles {[message['role'] for message in messages]}", expected, fix)
    *history, question = messages
    if any(MARK in message["content"] for message in history):
        raise DataError(row.where, f"{MARK} before the last message", f"{MARK} in the user's last message", fix)
    return tuple({"role": m["role"], "content": m["content"]} for m in history), question["content"]


def _answer(row: Row, config: DataConfig) -> str:
    """The answer column, or where there is none, the public format's ``reward_model.ground_truth``."""
    reward_model = row.values.get(REWARD_COLUMN)
    if row.values.get(config.answer_key) is None and isinstance(reward_model, dict):
        return _text(Row(row.where, row.number, reward_model), "ground_truth", "data.answer_key")
    return _text(row, config.answer_key, "data.answer_key")


def _context(row: Row, config: DataConfig) -> str | None:
    if row.values.get(config.context_key) is None:
        return None
    return _text(row, config.context_key, "data.context_key")


def _text(row: Row, column: str, config_field: str) -> str:
    """A column as text; numbers are written out."""
    value = row.values.get(column)
    if value is None:
        found = f"no value in column {column!r} (columns: {', '.join(row.values)})"
        hint = did_you_mean(column, row.values)
        raise DataError(row.where, found, "text", " ".join(filter(None, (f"fill it or set {config_field};", hint))))
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(row.where, f"{type(value).__name__} in column {column!r}", "text", f"see {config_field}")
    if not str(value).strip():
        raise DataError(row.where, f"empty column {column!r}", "text", "fill it or remove the row")
    return str(value)
