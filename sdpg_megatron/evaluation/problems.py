"""What is kept of the responses to one problem, as a line of JSON."""

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
    """Responses to one problem; one item of each tuple for each response."""

    rewards: tuple[float, ...]
    answers: tuple[str | None, ...] | None
    """As the verifier reads them, None for a response that gives none; None where the verifier cannot say."""
    lengths: tuple[int, ...]
    """Tokens, the stop token included."""
    truncated: tuple[bool, ...]
    """Whether the response ended at the length limit."""
    failures: int
    """Calls of the verifier that failed; their responses have the failure reward."""
    responses: tuple[str, ...] | None
    """None where they were not to be kept."""

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
    """One problem's results."""

    uid: str
    """The prompt's: file name and row."""
    question: str = ""
    reference_answer: str = ""
    """The prompt's, which the verifier compares with."""
    sampled: EvalSamples
    greedy: EvalSamples
    """One response."""

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
    """The prompts of each data file, in order.

    A file goes by its name without the suffix; where two would then share a name, by all of what their prompts call it.
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
    """JSON in UTF-8, one problem a line."""
    return b"".join(json_line(dataclasses.asdict(problem)) for problem in problems)


def read_problems(path: Path) -> list[Problem]:
    """What `as_lines` has made.

    Raises:
        EvaluationError: names the line that is not a problem's results.
    """
    problems = []
    try:
        content = path.read_bytes()
    except OSError as error:
        fix = "remove the evaluation's folder to make it anew"
        raise EvaluationError(str(path), error.strerror or str(error), "problems' results", fix) from error
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            fields = json.loads(line)
            parts: dict[str, Any] = {key: fields.get(key, "") for key in ("question", "reference_answer")}
            parts |= {key: _draws(fields[key]) for key in ("sampled", "greedy")}
            problems.append(Problem(uid=fields["uid"], **parts))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            expected = "one problem's results"
            raise EvaluationError(
                f"{path}:{number}", repr(error), expected, "remove the file to make it anew"
            ) from error
    return problems


def _draws(fields: dict[str, Any]) -> EvalSamples:
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    return EvalSamples(**values)
