"""Dataset of prompts from files, rendered and packed in memory."""

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
"""Number of rows rendered and tokenized at a time."""

OnRows = Callable[[int], None]
"""Progress callback with the number of rows read so far."""


@dataclass(frozen=True, slots=True)
class PromptDataset:
    """Prompts in file order, with statistics of dropped rows."""

    prompts: Sequence[Prompt]
    dropped: int = 0
    """Number of rows dropped because a prompt was too long."""
    truncated: int = 0
    """Number of rows with a student or teacher prompt that was cut on the left."""
    repeated: int = 0
    """Number of rows dropped as repetitions of an earlier row."""
    overlong: str = ""
    """Name of the first row that was dropped or cut for its length."""
    digest: str = ""
    """`digest_of` the prompts."""
    warnings: tuple[str, ...] = ()
    """Warnings about the rows, for the log."""
    structured: str | None = None
    """Name of the first prompt with a dict or list as answer."""
    problems: ProblemIndex = field(default_factory=dict, compare=False)
    """First row of each problem, only for evaluation prompts; used to detect the same problems in training data."""

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> Prompt:
        return self.prompts[index]

    @property
    def size(self) -> int:
        return len(self.prompts)

    def describe(self) -> str:
        counts = {"repeated": self.repeated, "dropped": self.dropped, "truncated": self.truncated}
        noted = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        return f"{len(self)} prompts" + (f" ({noted})" if noted else "")

    def save(self, path: Path) -> None:
        """Write the dataset to a file for `open` within the same job. Raises `WriteError`."""
        assert isinstance(self.prompts, PackedPrompts)
        notes = {part.name: getattr(self, part.name) for part in fields(self) if part.name != "prompts"}
        with writing(path):
            self.prompts.save(path, notes)

    @classmethod
    def open(cls, path: Path) -> PromptDataset:
        """Memory-map a file written by `save`; see `packed.open_packed`. Raises `OSError`."""
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
            seed: seed of the contexts drawn with `data.context_of: other`.
            distill_enabled: False for an evaluation: the teacher prompt equals the student prompt, and each problem is
                kept once, regardless of `data.duplicates`.
            held_out: evaluation prompts, to warn about training rows with the same problems.
            scored_by_metadata: True if the verifier may read the other columns. Training rows that differ in them are
                then distinct.
            on_rows: called with the number of rows read so far.

        Raises:
            DataError: an invalid row, a file that is listed twice, or no row left.
            ConfigError: invalid context template, template options or tokenizer.
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
    """Builds a dataset chunk by chunk."""

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
        """Yield uid and example of the rows to keep."""
        needed = self._distill_enabled and self._renderer.needs_context
        keep = self._distill_enabled and self._config.duplicates == "keep"
        read = 0
        for path, label in zip(files, _labels(files), strict=True):
            for row in read_rows(path):
                example = parse_row(row, self._config, context_needed=needed)
                uid, read = f"{label}:{row.number}", read + 1
                if read % CHUNK == 0:
                    on_rows(read)
                if self._repeats.add(uid, example) and not keep:
                    self._repeated += 1
                    continue
                if example.is_revealed:
                    self._revealed.append(row.where)
                if self._structured is None and not isinstance(example.answer, str):
                    self._structured = row.where
                yield uid, example

    def add(self, rows: Iterator[tuple[str, Example]], seed: int) -> None:
        """Render the rows in chunks. Only `data.context_of: other` needs all rows in memory at once."""
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
            found = f"{self._repeated} evaluation rows repeat a problem"
            yield f"{found} and are dropped, the first: {self._repeats.first}"
        yield from self._repeats.warnings()


def digest_of(prompts: Iterable[Prompt]) -> str:
    """Digest of the content and order of the prompts, 16 hexadecimal digits."""
    found = hashlib.sha256()
    _add_to_digest(found, prompts)
    return found.hexdigest()[:16]


def _add_to_digest(digest: Any, prompts: Iterable[Prompt]) -> None:
    for p in prompts:
        # The empty tuple stands for a field of version 0.1, so that digests in its checkpoints stay valid.
        values = (p.uid, p.student_tokens, p.teacher_tokens, p.answer, (), p.question, p.history, p.metadata)
        digest.update(json.dumps(values, default=str).encode())


def make_prompt(uid: str, example: Example, student: Tokens, teacher: Tokens, limit: int) -> Prompt:
    """Prompt of a rendered example; student and teacher tokens are cut on the left to `limit`."""
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
    """Distinct name of each file: its name, or its whole path if two files have the same name."""
    twice = [path for path, count in Counter(files).items() if count > 1]
    if twice:
        raise DataError(str(twice[0]), "the file twice", "each file once", "remove it from the list")
    names = Counter(path.name for path in files)
    return [path.name if names[path.name] == 1 else str(path) for path in files]
