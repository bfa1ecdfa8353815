"""Detect repeated problems: within files, between training and evaluation, and with conflicting answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from hashlib import blake2b

from sdpg_megatron.answers import canonical
from sdpg_megatron.data.examples import Example, folded

ProblemIndex = Mapping[int, str]
"""Digest of a problem (question and history) -> uid of its first row."""


class Repeats:
    """Compares rows by 64-bit digests. A million rows take about 200 MB while files are read."""

    def __init__(
        self, held_out: ProblemIndex | None, *, distill_enabled: bool, scored_by_metadata: bool = False
    ) -> None:
        """
        Args:
            held_out: problems that training rows should not have; None for none.
            distill_enabled: True if rows with different contexts are distinct; otherwise rows of different files are.
            scored_by_metadata: True if rows with different metadata are distinct; only with `distill_enabled`.
        """
        self._scored_by_metadata = scored_by_metadata
        self._held_out, self._distill_enabled = held_out or {}, distill_enabled
        self._rows: set[int] = set()
        self._answers: dict[int, int] = {}
        self._conflicts: list[str] = []
        self._shared: list[str] = []
        self.problems: dict[int, str] = {}
        """First row of each problem."""
        self.first = ""
        """Uid of the first repeated row; empty without one."""

    def add(self, uid: str, example: Example) -> bool:
        """Record a row; return True if it repeats an earlier one."""
        more = (example.context, example.teacher_question) if self._distill_enabled else uid.rpartition(":")[0]
        metadata = dict(example.metadata) if self._distill_enabled and self._scored_by_metadata else None
        row = _digest(example.question, example.history, example.answer_text, more, metadata)
        if row in self._rows:
            self.first = self.first or uid
            return True
        self._rows.add(row)
        problem = _digest(folded(example.question), example.history)
        answer = _digest(canonical(example.answer_text).casefold())
        self.problems.setdefault(problem, uid)
        if self._answers.setdefault(problem, answer) != answer:
            self._conflicts.append(f"{self.problems[problem]} and {uid}")
        if problem in self._held_out:
            self._shared.append(f"{uid} is {self._held_out[problem]}")
        return False

    def warnings(self) -> Iterator[str]:
        if self._conflicts:
            yield f"{len(self._conflicts)} rows ask an earlier question with another answer: {self._conflicts[0]}"
        if self._shared:
            yield f"{len(self._shared)} training problems are also evaluated on: {self._shared[0]}"


def _digest(*parts: object) -> int:
    text = json.dumps(parts, ensure_ascii=False, default=str)
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
