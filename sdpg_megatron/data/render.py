"""Student and teacher prompts as tokens, through the model's own chat template."""

from __future__ import annotations

from string import Formatter
from typing import Any

import jinja2

from sdpg_megatron.config import DataConfig
from sdpg_megatron.data.examples import Example, Message
from sdpg_megatron.errors import ConfigError, did_you_mean

Tokens = tuple[int, ...]

CONTEXT_TEMPLATES = {
    "answer": "{question}\nThe correct answer to this problem is: {answer}",
    "solution": (
        "{question}\n\n"
        "For your eyes only, the correct answer is: {answer}\n"
        "One way to reach it:\n{context}\n\n"
        "Work the problem out afresh and present a derivation of your own that differs from the one above. "
        "Write as if you had found the result yourself: do not mention or hint that the answer or a solution was given."
    ),
}
"""What the teacher reads in the question's place: the answer alone, or the answer and a worked solution."""

FIELDS = ("question", "context", "answer")


class Renderer:
    """Turns an example into the two prompts that its responses will follow."""

    def __init__(self, config: DataConfig, tokenizer: Any) -> None:
        """
        Args:
            tokenizer: transformers tokenizer with a chat template.

        Raises:
            ConfigError: unknown or faulty context template, or a tokenizer without a chat template.
        """
        if not tokenizer.chat_template:
            raise ConfigError("model.path", None, "a tokenizer with a chat template", "use an instruction-tuned model")
        self._template = context_template(config.context_template)
        self._system = config.system
        self._tokenizer = tokenizer

    def render(self, example: Example) -> tuple[Tokens, Tokens]:
        """Student and teacher prompt tokens, both ending where the assistant's response begins.

        Raises:
            ConfigError: the chat template refuses the messages.
        """
        teacher_question = example.teacher_question
        if teacher_question is None:
            teacher_question = self._template.format(
                question=example.question, context=example.context or example.answer, answer=example.answer
            )
        return self._tokens(example, example.question), self._tokens(example, teacher_question)

    def _tokens(self, example: Example, question: str) -> Tokens:
        messages: list[Message] = [*example.history, {"role": "user", "content": question}]
        if self._system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self._system})
        try:
            tokens = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        except jinja2.TemplateError as error:
            roles = [message["role"] for message in messages]
            expected = f"messages that the model's chat template takes ({error})"
            raise ConfigError("model.path", roles, expected, "change data.system or the rows' roles") from error
        return tuple(tokens)


def context_template(name_or_template: str) -> str:
    """A shipped template by name, or the template itself.

    Raises:
        ConfigError: no {question} in it, a field that does not exist, or unbalanced braces.
    """
    template = CONTEXT_TEMPLATES.get(name_or_template, name_or_template)
    known = ", ".join(f"{{{field}}}" for field in FIELDS)
    try:
        parts = [part for part in Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        expected = f"a template with {known} ({error})"
        raise ConfigError("data.context_template", template, expected, "write a literal brace twice") from error
    for _, field, spec, conversion in parts:
        if field not in FIELDS or spec or conversion:
            fix = did_you_mean(field or "", FIELDS) or "write a literal brace twice"
            raise ConfigError("data.context_template", f"{{{field}}}", f"only plain {known}", fix)
    if all(field != "question" for _, field, _, _ in parts):
        fix = did_you_mean(template, CONTEXT_TEMPLATES) or "add {question}"
        expected = f"{' or '.join(map(repr, CONTEXT_TEMPLATES))}, or a template with {{question}}"
        raise ConfigError("data.context_template", template, expected, fix)
    return template
