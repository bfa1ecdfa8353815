"""Render student and teacher prompts with the model's chat template."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from string import Formatter
from typing import Any

import jinja2

from sdpg_megatron.config import DataConfig
from sdpg_megatron.data.chats import Message
from sdpg_megatron.data.examples import Example
from sdpg_megatron.data.tokenizer import chat_template
from sdpg_megatron.errors import ConfigError, did_you_mean
from sdpg_megatron.records import Prompt

Tokens = tuple[int, ...]

CONTEXT_TEMPLATES = {
    "answer": "{question}\nThe correct answer to this problem is: {answer}",
    "verify": (
        "{question}\nThe correct answer to this problem is: {answer}\n"
        "Use this to verify your reasoning, but show your full solution process."
    ),
    "solution": (
        "{question}\n\n"
        "For your eyes only, the correct answer is: {answer}\n"
        "One way to reach it:\n{context}\n\n"
        "Work the problem out afresh and present a derivation of your own that differs from the one above. "
        "Write as if you had found the result yourself: do not mention or hint that the answer or a solution was given."
    ),
    "feedback": (
        "{question}\n\n"
        "An earlier attempt at this was tried out, with this outcome:\n{context}\n\n"
        "Use the outcome to get it right this time. "
        "Write as if this were the first attempt: do not mention the earlier one or its outcome."
    ),
}
"""Templates of the teacher's question: with the answer; with the answer in the words of the public SDPG data; with
answer and worked solution; with the feedback of an environment."""
NEED_CONTEXT = ("feedback",)
"""Templates that need a context; the answer cannot replace it."""
RENDERERS_OWN = ("conversation", "messages", "add_generation_prompt", "tokenize", "return_dict", "return_tensors")
"""Arguments of `apply_chat_template` that are not template options."""

PEER_TEMPLATES = {
    "peer": (
        "{question}\n\n"
        "Here is a response that solves this problem:\n{context}\n\n"
        "Solve the problem yourself, and write as if you had not seen that response."
    ),
}
"""Templates of the teacher's question with a successful response."""

FIELDS = ("question", "context", "answer")


class Renderer:
    """Renders the student and teacher prompt of an example."""

    def __init__(self, config: DataConfig, tokenizer: Any) -> None:
        """
        Args:
            tokenizer: transformers tokenizer with a chat template.

        Raises:
            ConfigError: unknown or invalid context template, a tokenizer without chat template, or an option that the
                chat template does not use.
        """
        template = chat_template(tokenizer)
        self._template = context_template(config.context_template)
        self.needs_context = config.context_template in NEED_CONTEXT
        """True if the context template needs a context in every example."""
        self._peer_template = context_template(config.peer_template, "data.peer_template", PEER_TEMPLATES)
        self._system = config.system
        self._options = config.template_options
        self._tokenizer = tokenizer
        _check_options(self._options, template)

    def render(self, example: Example, context: Example | None = None) -> tuple[Tokens, Tokens]:
        """Student and teacher prompt tokens; see `students` and `teachers`."""
        return self.students([example])[0], self.teachers([example], [context])[0]

    def students(self, examples: Sequence[Example]) -> list[Tokens]:
        """Prompt tokens of each question, up to the start of the assistant's response.

        Raises:
            ConfigError: the chat template refuses the messages.
        """
        return self._tokens(examples, [example.question for example in examples])

    def teachers(self, examples: Sequence[Example], contexts: Sequence[Example | None]) -> list[Tokens]:
        """Prompt tokens of each question with its privileged context, or with the context of another example.

        Raises:
            ConfigError: the chat template refuses the messages.
        """
        return self._tokens(examples, [self._teacher_question(*pair) for pair in zip(examples, contexts, strict=True)])

    def _teacher_question(self, example: Example, context: Example | None) -> str:
        source = context or example
        if source.teacher_question is not None:
            return example.question + source.teacher_question[len(source.question) :]
        return self._template.format(
            question=example.question, context=source.context or source.answer_text, answer=source.answer_text
        )

    def with_peer(self, prompt: Prompt, response: str) -> Tokens:
        """Teacher prompt tokens with a successful response to the same question.

        Raises:
            ConfigError: the chat template refuses the messages.
        """
        question = self._peer_template.format(question=prompt.question, context=response, answer=prompt.answer_text)
        return self._tokens([Example(prompt.question, prompt.answer, history=prompt.history)], [question])[0]

    def _tokens(self, examples: Sequence[Example], questions: Sequence[str]) -> list[Tokens]:
        """Render and tokenize each question after the history of its example."""
        chats = [self._messages(example, question) for example, question in zip(examples, questions, strict=True)]
        try:
            texts = self._texts(chats)
        except jinja2.TemplateError:
            for chat in chats:  # find the one that fails
                self._check_chat(chat)
            raise
        # as in apply_chat_template: the template contains the special tokens
        encoded = self._tokenizer(texts, add_special_tokens=False, return_attention_mask=False)
        return [tuple(tokens) for tokens in encoded["input_ids"]]

    def _messages(self, example: Example, question: str) -> list[Message]:
        messages: list[Message] = [*example.history, {"role": "user", "content": question}]
        if self._system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self._system})
        return messages

    def _texts(self, chats: list[list[Message]]) -> list[str]:
        texts: list[str] = self._tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=False, **self._options
        )
        return texts

    def _check_chat(self, chat: list[Message]) -> None:
        try:
            self._texts([chat])
        except jinja2.TemplateError as error:
            roles = [message["role"] for message in chat]
            expected = f"messages that the model's chat template accepts ({error})"
            raise ConfigError("model.path", roles, expected, "change data.system or the rows' roles") from error


def _check_options(options: Mapping[str, object], chat_template: str) -> None:
    """Refuse options that do not occur in the chat template, which would silently ignore them."""
    variables = set(re.findall(r"[A-Za-z_]\w*", chat_template))
    for name in options:
        if name not in variables or name in RENDERERS_OWN:
            fix = did_you_mean(name, variables - set(RENDERERS_OWN)) or "remove it"
            expected = "a variable of the model's chat template that users may set"
            raise ConfigError("data.template_options", name, expected, fix)


def context_template(
    name_or_template: str, field: str = "data.context_template", shipped: Mapping[str, str] = CONTEXT_TEMPLATES
) -> str:
    """Shipped template by name, or a validated custom template.

    Args:
        field: configuration field, for errors.

    Raises:
        ConfigError: no {question}, an unknown field, or unbalanced braces.
    """
    template = shipped.get(name_or_template, name_or_template)
    known = ", ".join(f"{{{name}}}" for name in FIELDS)
    try:
        parts = [part for part in Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        expected = f"a template with {known} ({error})"
        raise ConfigError(field, template, expected, "write a literal brace twice") from error
    for _, name, spec, conversion in parts:
        if name not in FIELDS or spec or conversion:
            fix = did_you_mean(name or "", FIELDS) or "write a literal brace twice"
            raise ConfigError(field, f"{{{name}}}", f"only plain {known}", fix)
    if all(name != "question" for _, name, _, _ in parts):
        fix = did_you_mean(template, shipped) or "add {question}"
        expected = f"{' or '.join(map(repr, shipped))}, or a template with {{question}}"
        raise ConfigError(field, template, expected, fix)
    return template
