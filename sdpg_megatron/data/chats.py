"""Parse chat messages in the formats of OpenAI (role, content) and ShareGPT (from, value)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sdpg_megatron.errors import DataError

CHAT_COLUMNS = ("prompt", "messages", "conversations")
"""Columns with a chat, in order of preference."""
CONTEXT_MARK = "[TEACHER_CONTEXT_TOKEN]"
"""Separates question and privileged context in the public SDPG format."""
_MARKS = re.compile(r"\[?\s*teacher[\s_-]*context[\s_-]*token\s*\]?", re.IGNORECASE)
"""The mark in any spelling."""
ROLES = {"human": "user", "gpt": "assistant"}
"""ShareGPT role -> OpenAI role."""

Message = Mapping[str, str]
"""``{"role": ..., "content": ...}``."""


@dataclass(frozen=True, slots=True)
class Chat:
    """Question of a chat with the messages before and after it."""

    question: str
    context: str | None
    """Text after `CONTEXT_MARK`; None without a mark."""
    history: tuple[Message, ...]
    """Messages before the question."""
    reply: str | None
    """Assistant message after the question, such as a reference solution; None if the chat ends with the question."""


def read_chat(where: str, column: str, value: Sequence[object]) -> Chat:
    """Split a chat into history, question (the last user message) and reply.

    Raises:
        DataError: at `where`: a message without role or text; a chat that does not end with a user message and at most
            one assistant message after it; or a `CONTEXT_MARK` twice or outside the question.
    """
    messages = [_message(where, column, message) for message in value]
    reply = messages.pop()["content"] if messages and messages[-1]["role"] == "assistant" else None
    if not messages or messages[-1]["role"] != "user":
        roles = [message["role"] for message in messages] + ["assistant"] * (reply is not None)
        expected = "a chat that ends with a user message, or with one assistant message after it"
        raise DataError(where, f"the roles {roles} in column {column!r}", expected, "correct or remove the row")
    *history, last = messages
    question, context = split_context(where, column, last["content"])
    for text in (*(message["content"] for message in history), reply or ""):
        if _MARKS.search(text):
            expected = f"{CONTEXT_MARK} in the last user message"
            raise DataError(where, f"{CONTEXT_MARK} in another message of {column!r}", expected, "move the context")
    return Chat(question, context, tuple(history), reply)


def split_context(where: str, column: str, text: str) -> tuple[str, str | None]:
    """Split `text` into question and the context after `CONTEXT_MARK`; the context is None without a mark.

    Raises:
        DataError: at `where`: an empty question, a second mark, or a misspelled one.
    """
    for found in _MARKS.findall(text):
        if found != CONTEXT_MARK:
            raise DataError(where, f"{found!r} in column {column!r}", CONTEXT_MARK, "correct its spelling")
    question, mark, context = text.partition(CONTEXT_MARK)
    if not question.strip():
        found = f"no question before {CONTEXT_MARK}" if mark else "an empty question"
        raise DataError(where, f"{found} in column {column!r}", "text", "fill it or remove the row")
    if CONTEXT_MARK in context:
        raise DataError(where, f"{CONTEXT_MARK} twice in column {column!r}", "it once", "remove one")
    return question, context if mark else None


def _message(where: str, column: str, message: object) -> dict[str, str]:
    expected = "{role, content} or {from, value}, with text"
    if not isinstance(message, Mapping):
        raise DataError(where, f"the message {message!r} in column {column!r}", expected, "correct the row")
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if isinstance(content, list):
        content = _join_parts(where, column, content)
    if not isinstance(role, str) or not isinstance(content, str):
        raise DataError(where, f"the message {dict(message)!r} in column {column!r}", expected, "correct the row")
    return {"role": ROLES.get(role, role), "content": content}


def _join_parts(where: str, column: str, parts: Sequence[object]) -> str:
    """Concatenate a content list of ``{"type": "text", "text": ...}``, as chat templates do."""
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else None
        if not isinstance(text, str):
            found = f"the part {part!r} of a message in column {column!r}"
            raise DataError(where, found, "parts of type text only", "remove rows with images or other media")
        texts.append(text)
    return "".join(texts)
