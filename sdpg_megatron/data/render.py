"""Student and teacher prompts as tokens, through the model's own chat template."""

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
"""What the teacher reads in the question's place: with the answer alone; the same as the public SDPG data have it; with
the answer and a worked solution; or with an environment's feedback."""
NEED_CONTEXT = ("feedback",)
"""Templates that make no sense where a row's answer stands in for its context."""
RENDERERS_OWN = ("conversation", "messages", "add_generation_prompt", "tokenize", "return_dict", "return_tensors")
"""Arguments of `apply_chat_template` that are no options of a template."""

PEER_TEMPLATES = {
    "peer": (
        "{question}\n\n"
        "Here is a response that solves this problem:\n{context}\n\n"
        "Solve the problem yourself, and write as if you had not seen that response."
    ),
}
"""What the teacher reads in the question's place beside another response to it."""

FIELDS = ("question", "context", "answer")


class Renderer:
    """Turns an example into the two prompts that its responses will follow."""

    def __init__(self, config: DataConfig, tokenizer: Any) -> None:
        """
        Args:
            tokenizer: transformers tokenizer with a chat template.

        Raises:
            ConfigError: unknown or faulty context template, a tokenizer without a chat template, or an option that its
                chat template does not know.
        """
        template = chat_template(tokenizer)
        self._template = context_template(config.context_template)
        self.needs_context = config.context_template in NEED_CONTEXT
        """Whether an example without a context cannot be rendered for the teacher."""
        self._peer_template = context_template(config.peer_template, "data.peer_template", PEER_TEMPLATES)
        self._system = config.system
        self._options = config.template_options
        self._tokenizer = tokenizer
        _check_options(self._options, template)

    def render(self, example: Example, context: Example | None = None) -> tuple[Tokens, Tokens]:
        """Student and teacher prompt tokens; see `students` and `teachers`."""
        return self.students([example])[0], self.teachers([example], [context])[0]

    def students(self, examples: Sequence[Example]) -> list[Tokens]:
        """Prompt tokens of each question, up to where the assistant's response begins.

        Raises:
            ConfigError: the chat template refuses the messages.
        """
        return self._tokens(examples, [example.question for example in examples])

    def teachers(self, examples: Sequence[Example], contexts: Sequence[Example | None]) -> list[Tokens]:
        """Prompt tokens of each question with its privileged context, or with another problem's (`contexts`).

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
        """Teacher prompt tokens that carry another response to the prompt's question.

        Raises:
            ConfigError: the chat template refuses the messages.
        """
        question = self._peer_template.format(question=prompt.question, context=response, answer=prompt.answer_text)
        return self._tokens([Example(prompt.question, prompt.answer, history=prompt.history)], [question])[0]

    def _tokens(self, examples: Sequence[Example], questions: Sequence[str]) -> list[Tokens]:
        """Tokens of each question after its example's history, rendered and tokenized together."""
        chats = [self._messages(example, question) for example, question in zip(examples, questions, strict=True)]
        try:
            texts = self._texts(chats)
        except jinja2.TemplateError:
            for chat in chats:  # to find the one
                self._check_chat(chat)
            raise
        # as apply_chat_template does: the template has the special tokens
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
            expected = f"messages that the model's chat template takes ({error})"
            raise ConfigError("model.path", roles, expected, "change data.system or the rows' roles") from error


def _check_options(options: Mapping[str, object], chat_template: str) -> None:
    """Refuse what the chat template would silently ignore: an option is a variable that its text reads."""
    variables = set(re.findall(r"[A-Za-z_]\w*", chat_template))
    for name in options:
        if name not in variables or name in RENDERERS_OWN:
            fix = did_you_mean(name, variables - set(RENDERERS_OWN)) or "remove it"
            expected = "a variable of the model's chat template that is left to the user"
            raise ConfigError("data.template_options", name, expected, fix)


def context_template(
    name_or_template: str, field: str = "data.context_template", shipped: Mapping[str, str] = CONTEXT_TEMPLATES
) -> str:
    """A shipped template by name, or the template itself.

    Args:
        field: of the configuration, for the error.

    Raises:
        ConfigError: no {question} in it, a field that does not exist, or unbalanced braces.
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
