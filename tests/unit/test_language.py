"""Docstrings are plain technical English: habits that hide meaning stay as rare as in comparable packages."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import sdpg_megatron

ROOT = Path(sdpg_megatron.__file__).parent

HABITS = {
    "what": r"what",
    "whether": r"whether",
    "nobody": r"nobody|no one",
    "of its own": r"of (its|their) own",
    "so many": r"so (many|much|long|few)",
    "that of": r"(that|those) of",
    "one after the other": r"one after (the other|another)",
    "in the place of": r"in the place of",
    "likewise": r"likewise",
    "who": r"who|whom|whose",
}
"""Expression of each habit, as a pattern over whole words."""
PER_10_000_WORDS = 6
OPENERS = ("what", "whether", "of", "likewise", "how", "that", "where", "who", "whose", "which")
OPENER_SHARE = 0.03


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every docstring of a file, those that follow a field or a constant included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else []:
            value = getattr(statement, "value", None)
            if isinstance(statement, ast.Expr) and isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield statement.lineno, value.value


DOCSTRINGS = {
    f"{path.relative_to(ROOT)}:{line}": text for path in sorted(ROOT.rglob("*.py")) for line, text in docstrings(path)
}


@pytest.mark.parametrize("name", HABITS)
def test_a_habit_is_rare(name: str) -> None:
    pattern = re.compile(rf"\b({HABITS[name]})\b", re.IGNORECASE)
    words = sum(len(text.split()) for text in DOCSTRINGS.values())
    found = [place for place, text in DOCSTRINGS.items() for _ in pattern.findall(text)]
    assert len(found) <= PER_10_000_WORDS * words / 10_000, f"{len(found)} in {words} words: {found}"


def test_few_docstrings_open_with_a_question_word() -> None:
    found = [
        place for place, text in DOCSTRINGS.items() if re.split(r"\W+", text.strip(), maxsplit=1)[0].lower() in OPENERS
    ]
    assert len(found) <= OPENER_SHARE * len(DOCSTRINGS), f"{len(found)} of {len(DOCSTRINGS)}: {found}"


def test_docstrings_are_found() -> None:
    assert len(DOCSTRINGS) > 500
