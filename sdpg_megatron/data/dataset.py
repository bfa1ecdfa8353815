"""The prompts of a run, rendered and held in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdpg_megatron.config import DataConfig
from sdpg_megatron.data.examples import parse_row
from sdpg_megatron.data.readers import read_rows
from sdpg_megatron.data.render import Renderer
from sdpg_megatron.errors import DataError
from sdpg_megatron.records import Prompt


@dataclass(frozen=True, slots=True)
class PromptDataset:
    """Prompts in file order, and what the length policy did."""

    prompts: tuple[Prompt, ...]
    dropped: int = 0
    """Rows left out because a prompt was too long."""
    truncated: int = 0
    """Rows of which the student's or the teacher's prompt was cut on its left."""

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> Prompt:
        return self.prompts[index]

    @classmethod
    def load(cls, config: DataConfig, files: Sequence[Path], tokenizer: Any) -> PromptDataset:
        """Read, render and length-check every row of `files`.

        Args:
            tokenizer: transformers tokenizer with a chat template.

        Raises:
            DataError: a row cannot be used, a file is listed twice, or no row is left.
            ConfigError: the context template or the tokenizer cannot be used.
        """
        renderer = Renderer(config, tokenizer)
        prompts: list[Prompt] = []
        dropped = truncated = 0
        for path, label in zip(files, _labels(files), strict=True):
            for row in read_rows(path):
                example = parse_row(row, config)
                student, teacher = renderer.render(example)
                if max(len(student), len(teacher)) > config.max_prompt_tokens:
                    if config.overlong == "drop":
                        dropped += 1
                        continue
                    truncated += 1
                prompts.append(
                    Prompt(
                        uid=f"{label}:{row.number}",
                        student_tokens=student[-config.max_prompt_tokens :],
                        teacher_tokens=teacher[-config.max_prompt_tokens :],
                        answer=example.answer,
                        question=example.question,
                        metadata=example.metadata,
                    )
                )
        if not prompts:
            found = f"{dropped} rows, all longer than {config.max_prompt_tokens} tokens" if dropped else "no rows"
            where = ", ".join(map(str, files)) or "data files"
            raise DataError(where, found, "at least one prompt", "check the files and data.max_prompt_tokens")
        return cls(tuple(prompts), dropped, truncated)


def _labels(files: Sequence[Path]) -> list[str]:
    """One distinct name per file: the file's name, or its whole path where two files share a name."""
    twice = [path for path, count in Counter(files).items() if count > 1]
    if twice:
        raise DataError(str(twice[0]), "the file twice", "each file once", "remove it from the list")
    names = Counter(path.name for path in files)
    return [path.name if names[path.name] == 1 else str(path) for path in files]
