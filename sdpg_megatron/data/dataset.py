"""The prompts of data files, rendered once for each distinct problem and packed in memory."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import islice, repeat
from pathlib import Path
from typing import Any

from sdpg_megatron.config import DataConfig
from sdpg_megatron.data.examples import Example, parse_row
from sdpg_megatron.data.other_problem import other_problems
from sdpg_megatron.data.packed import PackedPrompts, open_packed, pack
from sdpg_megatron.data.readers import find_files, read_rows
from sdpg_megatron.data.render import Renderer, Tokens
from sdpg_megatron.data.repeats import ProblemIndex, Repeats
from sdpg_megatron.errors import DataError
from sdpg_megatron.observe.files import writing
from sdpg_megatron.records import Prompt

CHUNK = 1024
"""Rows that are rendered and tokenized at a time."""

OnRows = Callable[[int], None]
"""Called with the number of rows read so far."""


@dataclass(frozen=True, slots=True)
class PromptDataset:
    """Prompts in file order, and what was left out."""

    prompts: Sequence[Prompt]
    dropped: int = 0
    """Rows left out because a prompt was too long."""
    truncated: int = 0
    """Rows of which the student's or a teacher's prompt was cut on its left."""
    repeated: int = 0
    """Rows left out because an earlier one has the same problem."""
    overlong: str = ""
    """Name of the first of the rows that were left out or cut for their length."""
    digest: str = ""
    """`digest_of` the prompts."""
    warnings: tuple[str, ...] = ()
    """What a user should know about the rows."""
    structured: str | None = None
    """Name of the first prompt whose answer is a dict or list."""
    problems: ProblemIndex = field(default_factory=dict, compare=False)
    """Of an evaluation's prompts: each problem's first row, to find it again in the training data."""

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> Prompt:
        return self.prompts[index]

    @property
    def size(self) -> int:
        return len(self.prompts)

    def describe(self) -> str:
        counts = {"repeated": self.repeated, "dropped": self.dropped, "truncated": self.truncated}
        told = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        return f"{len(self)} prompts" + (f" ({told})" if told else "")

    def save(self, path: Path) -> None:
        """Write the data set to a file for `open`, in this job. Raises `WriteError`."""
        assert isinstance(self.prompts, PackedPrompts)
        notes = {part.name: getattr(self, part.name) for part in fields(self) if part.name != "prompts"}
        with writing(path):
            self.prompts.save(path, notes)

    @classmethod
    def open(cls, path: Path) -> PromptDataset:
        """Map what `save` has written; see `packed.open_packed`. Raises `OSError`."""
        prompts, notes = open_packed(path)
        return cls(prompts, **notes)

    @classmethod
    def load(
        cls,
        config: DataConfig,
        files: Sequence[Path],
        tokenizer: Any,
        *,
        seed: int = 0,
        distill_enabled: bool = True,
        held_out: PromptDataset | None = None,
        scored_by_metadata: bool = False,
        on_rows: OnRows = lambda rows: None,
    ) -> PromptDataset:
        """Read, render and length-check every row of `files`.

        Args:
            files: paths and glob patterns; see `readers.FORMATS`.
            tokenizer: transformers tokenizer with a chat template.
            seed: of the draws where `data.context_of` is "other".
            distill_enabled: False for an evaluation: the teacher's prompt is the student's, and a problem counts once,
                independent of `data.duplicates`.
            held_out: an evaluation's prompts, to warn where these rows have the same problems.
            scored_by_metadata: Whether the verifier may read the other columns: then training rows that differ in them
                are no repeats.
            on_rows: called with the number of rows read so far.

        Raises:
            DataError: a row cannot be used, a file is listed twice, or no row is left.
            ConfigError: the context template, its options or the tokenizer cannot be used.
        """
        files = find_files(files)
        repeats = Repeats(
            held_out.problems if held_out else None,
            distill_enabled=distill_enabled,
            scored_by_metadata=scored_by_metadata,
        )
        builder = _Builder(config, Renderer(config, tokenizer), repeats, distill_enabled=distill_enabled)
        builder.add(builder.rows(files, on_rows), seed)
        if not len(builder.prompts):
            found = f"{builder.dropped} rows, all longer than {config.max_prompt_tokens} tokens"
            where = ", ".join(map(str, files)) or "data files"
            fix = "check the files and data.max_prompt_tokens"
            raise DataError(where, found if builder.dropped else "no rows", "at least one prompt", fix)
        return builder.finish()


class _Builder:
    """A data set that grows by chunks of rows."""

    def __init__(self, config: DataConfig, renderer: Renderer, repeats: Repeats, *, distill_enabled: bool) -> None:
        self._config, self._renderer, self._distill_enabled = config, renderer, distill_enabled
        self._repeats = repeats
        self._batches: list[Any] = []
        self._digest = hashlib.sha256()
        self._revealed: list[str] = []
        self._structured: str | None = None
        self._overlong = ""
        self.dropped = self._truncated = self._repeated = 0

    @property
    def prompts(self) -> PackedPrompts:
        return PackedPrompts(self._batches)

    def rows(self, files: Sequence[Path], on_rows: OnRows) -> Iterator[tuple[str, Example]]:
        """Names and examples of the rows that are kept."""
        needed = self._distill_enabled and self._renderer.needs_context
        keep = self._distill_enabled and self._config.duplicates == "keep"
        read = 0
        for path, label in zip(files, _labels(files), strict=True):
            for row in read_rows(path):
                example = parse_row(row, self._config, context_needed=needed)
                uid, read = f"{label}:{row.number}", read + 1
                if read % CHUNK == 0:
                    on_rows(read)
                if self._repeats.seen(uid, example) and not keep:
                    self._repeated += 1
                    continue
                if example.is_revealed:
                    self._revealed.append(row.where)
                if self._structured is None and not isinstance(example.answer, str):
                    self._structured = row.where
                yield uid, example

    def add(self, rows: Iterator[tuple[str, Example]], seed: int) -> None:
        """Render the rows, in chunks; all rows are in memory at once only if `data.context_of` is "other"."""
        contexts: Iterator[Example | None] = repeat(None)
        if self._distill_enabled and self._config.context_of == "other":
            named = list(rows)
            contexts = iter(other_problems([example for _, example in named], seed))
            rows = iter(named)
        while chunk := list(islice(rows, CHUNK)):
            self._add_chunk(chunk, list(islice(contexts, len(chunk))))

    def _add_chunk(self, chunk: Sequence[tuple[str, Example]], contexts: Sequence[Example | None]) -> None:
        examples, renderer, limit = [example for _, example in chunk], self._renderer, self._config.max_prompt_tokens
        students = renderer.students(examples)
        teachers = renderer.teachers(examples, contexts) if self._distill_enabled else students
        prompts = []
        for (uid, example), *tokens in zip(chunk, students, teachers, strict=True):
            if max(map(len, tokens)) > limit:
                self._overlong = self._overlong or uid
                if self._config.overlong == "drop":
                    self.dropped += 1
                    continue
                self._truncated += 1
            student, teacher = tokens
            prompts.append(make_prompt(uid, example, student, teacher, limit))
        if prompts:
            self._batches.append(pack(prompts))
            _add_to_digest(self._digest, prompts)

    def finish(self) -> PromptDataset:
        return PromptDataset(
            prompts=self.prompts,
            dropped=self.dropped,
            truncated=self._truncated,
            repeated=self._repeated,
            overlong=self._overlong,
            digest=self._digest.hexdigest()[:16],
            warnings=tuple(self._warnings()),
            structured=self._structured,
            problems={} if self._distill_enabled else self._repeats.problems,
        )

    def _warnings(self) -> Iterator[str]:
        if self._revealed:
            first = f"the first at {self._revealed[0]}: the student reads it, too"
            yield f"{len(self._revealed)} questions contain their context or state their answer, {first}"
        if self._repeated and not self._distill_enabled:
            found = f"{self._repeated} rows of the evaluation repeat a problem"
            yield f"{found} and are left out, the first: {self._repeats.first}"
        yield from self._repeats.warnings()


def digest_of(prompts: Iterable[Prompt]) -> str:
    """Sixteen hexadecimal digits that follow from all that is in the prompts, and their order."""
    found = hashlib.sha256()
    _add_to_digest(found, prompts)
    return found.hexdigest()[:16]


def _add_to_digest(digest: Any, prompts: Iterable[Prompt]) -> None:
    for p in prompts:
        # The empty tuple is a field of version 0.1: digests stay equal to those in its checkpoints.
        values = (p.uid, p.student_tokens, p.teacher_tokens, p.answer, (), p.question, p.history, p.metadata)
        digest.update(json.dumps(values, default=str).encode())


def make_prompt(uid: str, example: Example, student: Tokens, teacher: Tokens, limit: int) -> Prompt:
    """The prompt of a rendered example, each side cut on its left to `limit` tokens."""
    return Prompt(
        uid=uid,
        student_tokens=student[-limit:],
        teacher_tokens=teacher[-limit:],
        answer=example.answer,
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
