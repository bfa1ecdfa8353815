"""Rows of both file types, and errors that name the place."""

import json
from decimal import Decimal
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from sdpg_megatron.config import DataConfig
from sdpg_megatron.data.examples import MARK, parse_row
from sdpg_megatron.data.readers import Row, read_rows
from sdpg_megatron.errors import DataError

ROWS = [{"question": f"q{i}", "answer": str(i), "extra": {"level": i}} for i in range(3)]


def config(**fields: object) -> DataConfig:
    return DataConfig(train=(), **fields)


def row(**values: object) -> Row:
    return Row("file.jsonl:7", 7, values)


def test_jsonl_and_parquet_give_the_same_rows(tmp_path: Path) -> None:
    jsonl, parquet = tmp_path / "a.jsonl", tmp_path / "a.parquet"
    jsonl.write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), parquet, row_group_size=2)
    assert [r.values for r in read_rows(jsonl)] == ROWS
    assert [r.values for r in read_rows(parquet)] == ROWS
    assert [r.where for r in read_rows(jsonl)][-1] == f"{jsonl}:3"
    assert [r.where for r in read_rows(parquet)][-1] == f"{parquet}: row 3"


def test_blank_lines_are_passed_over_but_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n  \n{"a": 2}')
    assert [(r.number, r.values["a"]) for r in read_rows(path)] == [(1, 1), (4, 2)]


@pytest.mark.parametrize("line", [b'{"question": "x"', b"[1, 2]", b"\xff\xfe{}", b"NaN nonsense"])
def test_a_bad_line_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b"\n")
    with pytest.raises(DataError, match=r"bad\.jsonl:2: found .* expected .* Fix:"):
        list(read_rows(path))


@pytest.mark.parametrize("name", ["absent.jsonl", "absent.parquet", "rows.csv", "junk.parquet"])
def test_an_unreadable_file_is_named(tmp_path: Path, name: str) -> None:
    if not name.startswith("absent"):
        (tmp_path / name).write_text("not a table")
    with pytest.raises(DataError, match=name):
        list(read_rows(tmp_path / name))


def test_plain_columns() -> None:
    example = parse_row(row(q="2+2?", a=4, context="count", level="easy"), config(question_key="q", answer_key="a"))
    assert (example.question, example.answer, example.context) == ("2+2?", "4", "count")
    assert example.metadata == {"level": "easy"}
    assert example.teacher_question is None
    assert parse_row(row(question="x", answer="1", context=None), config()).context is None


@pytest.mark.parametrize("answer", [{"answer": "4"}, {"reward_model": {"ground_truth": "4", "style": "rule"}}])
def test_public_format_is_recognised_by_itself(answer: dict[str, object]) -> None:
    chat = [{"role": "user", "content": f"2+2?{MARK} It is 4."}]
    example = parse_row(row(prompt=chat, **answer), config())
    assert example.question == "2+2?"
    assert example.teacher_question == "2+2? It is 4."
    assert example.answer == "4"


def test_a_marked_chat_wins_over_a_question_column_and_an_unmarked_one_does_not() -> None:
    marked = [{"role": "user", "content": f"chat{MARK}c"}]
    assert parse_row(row(prompt=marked, question="plain", answer="1"), config()).question == "chat"
    unmarked = [{"role": "user", "content": "chat"}]
    assert parse_row(row(prompt=unmarked, question="plain", answer="1"), config()).question == "plain"


def test_a_chat_without_mark_leaves_the_teacher_to_the_template() -> None:
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "2+2?"}]
    example = parse_row(row(prompt=chat, reward_model={"ground_truth": "4"}), config())
    assert example.question == "2+2?"
    assert example.teacher_question is None
    assert example.history == ({"role": "system", "content": "be brief"},)


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"questoin": "x", "answer": "1"}, "'question'.*did you mean 'questoin'"),
        ({"question": None, "answer": "1"}, "'question'"),
        ({"question": "x"}, "'answer'.*data.answer_key"),
        ({"question": "x", "answer": True}, "bool in column 'answer'"),
        ({"question": "x", "answer": "  "}, "empty column 'answer'"),
        ({"question": ["x"], "answer": "1"}, "list in column 'question'"),
        ({"question": "x", "answer": "1", "context": 2j}, "complex in column 'context'"),
        ({"question": "x", "answer": Decimal(1)}, "Decimal in column 'answer'"),
        ({"prompt": [], "answer": "1"}, "the roles"),
        ({"prompt": ["x"], "answer": "1"}, "the message 'x'"),
        ({"prompt": [{"role": "assistant", "content": "x"}], "answer": "1"}, "ends with the user's"),
        (
            {"prompt": [{"role": "system", "content": MARK}, {"role": "user", "content": "x"}], "answer": "1"},
            "before the last message",
        ),
        ({"prompt": [{"role": "user", "content": "x"}], "reward_model": {"style": "rule"}}, "'ground_truth'"),
    ],
)
def test_a_bad_row_names_place_and_column(values: dict[str, object], names: str) -> None:
    with pytest.raises(DataError, match=rf"file\.jsonl:7: .*{names}"):
        parse_row(row(**values), config())
