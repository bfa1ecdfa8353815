"""The prompts of a run, rendered and held in memory."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sdpg_megatron.config import DataConfig
from sdpg_megatron.data.examples import Example, parse_row
from sdpg_megatron.data.hints import others, wish
from sdpg_megatron.data.readers import find_files, read_rows
from sdpg_megatron.data.render import Renderer, Tokens
from sdpg_megatron.errors import DataError
from sdpg_megatron.records import Prompt


@dataclass(frozen=True, slots=True)
class PromptDataset:
    """Prompts in file order, and what the length policy did."""

    prompts: tuple[Prompt, ...]
    dropped: int = 0
    """Rows left out because a prompt was too long."""
    truncated: int = 0
    """Rows of which the student's or a teacher's prompt was cut on its left."""

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> Prompt:
        return self.prompts[index]

    @property
    def size(self) -> int:
        return len(self.prompts)

    @property
    def digest(self) -> str:
        return digest_of(self.prompts)

    def describe(self) -> str:
        left_out = f" ({self.dropped} dropped, {self.truncated} truncated)" if self.dropped or self.truncated else ""
        return f"{len(self)} prompts{left_out}"

    @classmethod
    def load(
        cls,
        config: DataConfig,
        files: Sequence[Path],
        tokenizer: Any,
        *,
        seed: int = 0,
        taught: bool = True,
        contrast: float = 0.0,
    ) -> PromptDataset:
        """Read, render and length-check every row of `files`.

        Args:
            files: paths and glob patterns; see `readers.FORMATS`.
            tokenizer: transformers tokenizer with a chat template.
            seed: of the wrong hints that are drawn.
            taught: False where nobody teaches on these prompts: the teacher's is then the student's.
            contrast: `ObjectiveConfig.contrast`; over 0 the prompts have `contrast_tokens`.

        Raises:
            DataError: a row cannot be used, a file is listed twice, or no row is left.
            ConfigError: the context template, its options or the tokenizer cannot be used.
        """
        files = find_files(files)
        renderer = Renderer(config, tokenizer)
        named = [
            (f"{label}:{row.number}", parse_row(row, config, context_needed=taught and renderer.needs_context))
            for path, label in zip(files, _labels(files), strict=True)
            for row in read_rows(path)
        ]
        examples = [example for _, example in named]
        wanted = wish(config, contrast) if taught else None
        hints = others(examples, seed, wanted) if wanted else examples
        prompts: list[Prompt] = []
        dropped = truncated = 0
        for (uid, example), hint in zip(named, hints, strict=True):
            student = renderer.student(example)
            teacher = renderer.teacher(example, None if contrast else hint) if taught else student
            misled = renderer.teacher(example, hint) if contrast else ()
            if max(len(student), len(teacher), len(misled)) > config.max_prompt_tokens:
                if config.overlong == "drop":
                    dropped += 1
                    continue
                truncated += 1
            prompts.append(make_prompt(uid, example, student, teacher, config.max_prompt_tokens, misled))
        if not prompts:
            found = f"{dropped} rows, all longer than {config.max_prompt_tokens} tokens" if dropped else "no rows"
            where = ", ".join(map(str, files)) or "data files"
            raise DataError(where, found, "at least one prompt", "check the files and data.max_prompt_tokens")
        return cls(tuple(prompts), dropped, truncated)


def digest_of(prompts: Iterable[Prompt]) -> str:
    """Sixteen hexadecimal digits that follow from all that is in the prompts, and their order."""
    found = hashlib.sha256()
    for prompt in prompts:
        found.update(json.dumps([getattr(prompt, field.name) for field in fields(prompt)], default=str).encode())
    return found.hexdigest()[:16]


def make_prompt(
    uid: str, example: Example, student: Tokens, teacher: Tokens, limit: int, contrast: Tokens = ()
) -> Prompt:
    """The prompt of a rendered example, each side cut on its left to `limit` tokens."""
    return Prompt(
        uid=uid,
        student_tokens=student[-limit:],
        teacher_tokens=teacher[-limit:],
        answer=example.answer,
        contrast_tokens=contrast[-limit:],
        question=example.question,
        history=example.history,
        metadata=example.metadata,
    )


def _labels(files: Sequence[Path]) -> list[str]:
    """One distinct name per file: the file's name, or its whole path where two files share a name."""
    twice = [path for path, count in Counter(files).items() if count > 1]
    if twice:
        raise DataError(str(twice[0]), "the file twice", "each file once", "remove it from the list")
    names = Counter(path.name for path in files)
    return [path.name if names[path.name] == 1 else str(path) for path in files]
