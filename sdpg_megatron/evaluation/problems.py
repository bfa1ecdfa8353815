"""Results of single problems, as lines of JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdpg_megatron.errors import EvaluationError
from sdpg_megatron.observe.files import json_line
from sdpg_megatron.records import Prompt, ScoredGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSamples:
    """Responses to one problem. Each tuple has one item per response."""

    rewards: tuple[float, ...]
    answers: tuple[str | None, ...] | None
    """Extracted answers, None for a response without one. None if the verifier does not extract answers."""
    lengths: tuple[int, ...]
    """Number of tokens, including the stop token."""
    truncated: tuple[bool, ...]
    """True if the response reached the length limit."""
    failures: int
    """Number of failed verifier calls; their responses have the failure reward."""
    responses: tuple[str, ...] | None
    """Text of the responses; None if `eval.responses` is false."""

    @classmethod
    def of(cls, scored: ScoredGroup, *, responses: bool) -> EvalSamples:
        completions = scored.group.completions
        return cls(
            rewards=scored.rewards,
            answers=scored.answers,
            lengths=tuple(len(completion.tokens) for completion in completions),
            truncated=tuple(completion.finish_reason == "length" for completion in completions),
            failures=scored.failures,
            responses=tuple(completion.text for completion in completions) if responses else None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Results of one problem."""

    uid: str
    """Uid of the prompt: file name and row."""
    question: str = ""
    reference_answer: str = ""
    sampled: EvalSamples
    greedy: EvalSamples
    """The greedy response."""

    @classmethod
    def of(cls, sampled: ScoredGroup, greedy: ScoredGroup, *, responses: bool) -> Problem:
        assert sampled.group.prompt is greedy.group.prompt
        return cls(
            uid=sampled.group.prompt.uid,
            question=sampled.group.prompt.question,
            reference_answer=sampled.group.prompt.answer_text,
            sampled=EvalSamples.of(sampled, responses=responses),
            greedy=EvalSamples.of(greedy, responses=responses),
        )

    def without_responses(self) -> Problem:
        parts = {name: replace(getattr(self, name), responses=None) for name in ("sampled", "greedy")}
        return replace(self, **parts)


def by_file(prompts: Iterable[Prompt]) -> dict[str, list[Prompt]]:
    """Group prompts by data file, in order.

    The name of a file is its file name without suffix, or its whole label if two files would have the same name.
    """
    files: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        files.setdefault(prompt.uid.rpartition(":")[0], []).append(prompt)
    stems = [Path(label.removesuffix(".gz")).stem for label in files]
    return {
        stem if stems.count(stem) == 1 else label.strip("/").replace("/", "-"): found
        for stem, (label, found) in zip(stems, files.items(), strict=True)
    }


def as_lines(problems: Sequence[Problem]) -> bytes:
    """Serialize to JSON lines in UTF-8, one problem per line."""
    return b"".join(json_line(dataclasses.asdict(problem)) for problem in problems)


def read_problems(path: Path) -> list[Problem]:
    """Read a file written with `as_lines`.

    Raises:
        EvaluationError: an unreadable file, or an invalid line, by its number.
    """
    problems = []
    try:
        content = path.read_bytes()
    except OSError as error:
        fix = "remove the evaluation's folder and evaluate again"
        raise EvaluationError(str(path), error.strerror or str(error), "results of problems", fix) from error
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            fields = json.loads(line)
            parts: dict[str, Any] = {key: fields.get(key, "") for key in ("question", "reference_answer")}
            parts |= {key: _samples(fields[key]) for key in ("sampled", "greedy")}
            problems.append(Problem(uid=fields["uid"], **parts))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            expected, fix = "the results of one problem", "remove the file and evaluate again"
            raise EvaluationError(f"{path}:{number}", repr(error), expected, fix) from error
    return problems


def _samples(fields: dict[str, Any]) -> EvalSamples:
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    return EvalSamples(**values)
