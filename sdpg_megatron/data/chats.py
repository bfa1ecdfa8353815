"""Chat messages in the layouts that data sets have: OpenAI's role and content, ShareGPT's from and value."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sdpg_megatron.errors import DataError

CHAT_COLUMNS = ("prompt", "messages", "conversations")
"""Columns that hold a chat, in order of preference."""
CONTEXT_MARK = "[TEACHER_CONTEXT_TOKEN]"
"""Stands between question and privileged context in the public SDPG format."""
_MARKS = re.compile(r"\[?\s*teacher[\s_-]*context[\s_-]*token\s*\]?", re.IGNORECASE)
"""The mark in any spelling."""
ROLES = {"human": "user", "gpt": "assistant"}
"""ShareGPT's names of roles."""

Message = Mapping[str, str]
"""``{"role": ..., "content": ...}``."""


@dataclass(frozen=True, slots=True)
class Chat:
    """A question with the messages around it."""

    question: str
    context: str | None
    """The text after `CONTEXT_MARK`; None without one."""
    history: tuple[Message, ...]
    """Messages before the question."""
    reply: str | None
    """The assistant's message after the question, such as a reference solution; None where the chat ends with the
    question."""


def read_chat(where: str, column: str, value: Sequence[object]) -> Chat:
    """Split a chat into the user's last message, the question, and what stands before and after it.

    Raises:
        DataError: at `where`: a message without role or text, a chat that does not end with the user's message and at
            most one of the assistant's, or a `CONTEXT_MARK` elsewhere than once in the question.
    """
    messages = [_message(where, column, message) for message in value]
    reply = messages.pop()["content"] if messages and messages[-1]["role"] == "assistant" else None
    if not messages or messages[-1]["role"] != "user":
        roles = [message["role"] for message in messages] + ["assistant"] * (reply is not None)
        expected = "a chat that ends with the user's message, or with one reply of the assistant to it"
        raise DataError(where, f"the roles {roles} in column {column!r}", expected, "correct or remove the row")
    *history, last = messages
    question, context = split_context(where, column, last["content"])
    for text in (*(message["content"] for message in history), reply or ""):
        if _MARKS.search(text):
            expected = f"{CONTEXT_MARK} in the user's last message"
            raise DataError(where, f"{CONTEXT_MARK} in another message of {column!r}", expected, "move the context")
    return Chat(question, context, tuple(history), reply)


def split_context(where: str, column: str, text: str) -> tuple[str, str | None]:
    """The question in `text`, and the privileged context after `CONTEXT_MARK`; None without a mark.

    Raises:
        DataError: at `where`: nothing but blanks before the mark, a second mark, or one in another spelling.
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
    """The text of a content that is a list of ``{"type": "text", "text": ...}``, joined as chat templates do."""
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else None
        if not isinstance(text, str):
            found = f"the part {part!r} of a message in column {column!r}"
            raise DataError(where, found, "parts of type text only", "remove rows with images or other media")
        texts.append(text)
    return "".join(texts)
