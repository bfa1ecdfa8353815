"""Rows of both file types, and errors that name the place."""

import gzip
import json
import pickle
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from sdpg_megatron.answers import decimal_text
from sdpg_megatron.config import DataConfig
from sdpg_megatron.data.chats import CONTEXT_MARK as MARK
from sdpg_megatron.data.examples import parse_row
from sdpg_megatron.data.readers import Row, find_files, read_rows
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


@pytest.mark.parametrize(
    "name", ["absent.jsonl", "absent.parquet", "rows.txt", "junk.parquet", "junk.jsonl.gz", "rows.parquet.gz"]
)
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
        ({"question": True, "answer": "x"}, "bool in column 'question'"),
        ({"question": "x", "answer": "  "}, "empty column 'answer'"),
        ({"question": ["x"], "answer": "1"}, "the message 'x' in column 'question'"),
        ({"question": {"q": 1}, "answer": "1"}, "dict in column 'question'"),
        ({"question": "x", "answer": "1", "context": 2j}, "complex in column 'context'"),
        ({"question": "x", "answer": Decimal("NaN")}, "NaN in column 'answer'"),
        ({"question": "x", "answer": float("nan")}, "nan in column 'answer', expected a finite number"),
        ({"question": "x", "answer": float("-inf")}, "-inf in column 'answer'"),
        ({"question": "x", "answer": "1", "context": float("nan")}, "nan in column 'context'"),
        ({"question": "x", "answer": {"a": [1, float("inf")]}}, "NaN or infinity in column 'answer'"),
        ({"question": "x", "answer": []}, "empty column 'answer'"),
        ({"question": f" {MARK}c", "answer": "1"}, "no question before"),
        ({"question": f"x{MARK}a{MARK}b", "answer": "1"}, "twice in column 'question'"),
        ({"prompt": [{"role": "user", "content": " "}], "answer": "1"}, "an empty question in column 'prompt'"),
        ({"prompt": [{"role": "user", "content": f"{MARK}c"}], "answer": "1"}, "no question before"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}], "answer": "1"}, "parts of type text"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}], "answer": "1"}, "'tool'"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": f"b{MARK}"}], "answer": 1},
            "in another message",
        ),
        ({"prompt": [], "answer": "1"}, "the roles"),
        ({"prompt": ["x"], "answer": "1"}, "the message 'x'"),
        ({"prompt": [{"role": "assistant", "content": "x"}], "answer": "1"}, "ends with a user message"),
        (
            {"prompt": [{"role": "system", "content": MARK}, {"role": "user", "content": "x"}], "answer": "1"},
            "in another message",
        ),
        ({"prompt": [{"role": "user", "content": "x"}], "reward_model": {"style": "rule"}}, "'ground_truth'"),
    ],
)
def test_a_bad_row_names_place_and_column(values: dict[str, object], names: str) -> None:
    with pytest.raises(DataError, match=rf"file\.jsonl:7: .*{names}"):
        parse_row(row(**values), config())


# --- formats

TABLE = [{"question": "a, b\nc", "answer": "007"}, {"question": "\u00e9 \u2028 \u2212", "answer": "1e-05"}]


def as_csv(rows: list[dict[str, str]]) -> str:
    lines = ["question,answer", *(f'"{row["question"]}",{row["answer"]}' for row in rows)]
    return "\r\n".join(lines) + "\r\n"


TEXTS = {
    "rows.jsonl": "".join(json.dumps(row) + "\n" for row in TABLE),
    "crlf.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in TABLE),
    "array.json": json.dumps(TABLE, indent=2, ensure_ascii=False),
    "lines.json": "\n" + "".join(json.dumps(row) + "\n" for row in TABLE),
    "rows.csv": as_csv(TABLE),
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("gzipped", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "bom"])
def test_every_text_format_gives_the_same_rows(tmp_path: Path, name: str, gzipped: bool, mark: bytes) -> None:
    content = mark + TEXTS[name].encode()
    path = tmp_path / (f"{name}.gz" if gzipped else name)
    path.write_bytes(gzip.compress(content) if gzipped else content)
    assert [row.values for row in read_rows(path)] == TABLE


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("crlf.jsonl", [("crlf.jsonl:1", 1), ("crlf.jsonl:2", 2)]),
        ("array.json", [("array.json:2", 1), ("array.json:6", 2)]),
        ("lines.json", [("lines.json:2", 2), ("lines.json:3", 3)]),
        ("rows.csv", [("rows.csv:2", 2), ("rows.csv:4", 4)]),
    ],
)
def test_rows_are_named_by_the_line_that_they_start_in(
    tmp_path: Path, name: str, places: list[tuple[str, int]]
) -> None:
    (tmp_path / name).write_text(TEXTS[name], encoding="utf-8", newline="")
    found = [(row.where.removeprefix(f"{tmp_path}/"), row.number) for row in read_rows(tmp_path / name)]
    assert found == places


@pytest.mark.parametrize(
    ("name", "content", "names"),
    [
        ("a.json", b'[{"a": 1},\n{"a": 2]', r"a\.json:2: found invalid JSON"),
        ("a.json", b'[{"a": 1}\n{"a": 2}]', r"a\.json:2: found '{' after an object, expected a comma"),
        ("a.json", b'[{"a": 1}', r"a\.json:1: found '' after an object"),
        ("a.json", b'[{"a": 1}]\n]', r"a\.json:1: found '\]' after the array"),
        ("a.json", b"[\n1]", r"a\.json:2: found a JSON int"),
        ("a.json", b'{\n "a": 1\n}', r"a\.json:1: .*expected an array of objects, or one JSON object per line"),
        ("a.csv", b"q,a\n1,2,3\n", r"a\.csv:2: found 3 fields, expected 2"),
        ("a.csv", b"q,q\n1,2\n", r"a\.csv:1: found the columns \['q', 'q'\]"),
        ("a.csv", b'q,a\n"1,2\n', r"a\.csv:2: found invalid CSV"),
        ("a.csv", b"q,a\nx,y\n\xe9,2\n", r"a\.csv:3: found bytes that are not UTF-8"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xe9"}\n', r"a\.jsonl:2: found bytes that are not UTF-8"),
        ("a.jsonl", b'{"a": 1}\n\xed\xa0\x80\n', r"a\.jsonl:2: found bytes that are not UTF-8"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n', mtime=0)[:-9], r"a\.jsonl\.gz: found .*end-of-stream"),
    ],
)
def test_a_faulty_file_is_named_with_its_line(tmp_path: Path, name: str, content: bytes, names: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=names):
        list(read_rows(tmp_path / name))


@pytest.mark.parametrize(
    "row",
    [
        r'{"question": "a\ud83d b", "answer": "2"}',
        r'{"question": "q", "answer": "\uDC00"}',
        r'{"question": "q", "answer": "2", "context": "\ud83d"}',
        r'{"question": "q", "answer": "2", "tags": [{"x": "\udfff"}]}',
        r'{"question": "q", "answer": "2", "\ud83d": 1}',
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_lone_surrogate_is_named(tmp_path: Path, name: str, row: str) -> None:
    good = r'{"question": "\ud83d\ude00", "answer": "\\ud83d"}'  # a whole pair, and an escaped backslash
    (tmp_path / name).write_text(f"[{good},\n{row}]" if name == "a.json" else f"{good}\n{row}\n", encoding="utf-8")
    with pytest.raises(DataError, match=rf"{name}:2: found a lone surrogate .* in column '.*, expected text"):
        list(read_rows(tmp_path / name))


def test_parquet_text_that_is_not_utf8_is_named_by_its_row(tmp_path: Path) -> None:
    raw = pyarrow.array([b"ok", b"a\xed\xa0\x80b"], pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.utf8(), len(raw), raw.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"question": text}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: row 2: found text that is not UTF-8"):
        list(read_rows(tmp_path / "a.parquet"))


def test_globs_are_expanded_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.csv", "odd[1].jsonl"):
        (tmp_path / name).touch()
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "d.csv").touch()

    def found(*patterns: str) -> list[str]:
        return [str(path.relative_to(tmp_path)) for path in find_files([tmp_path / pattern for pattern in patterns])]

    assert found("c.csv", "[ab].jsonl") == ["c.csv", "a.jsonl", "b.jsonl"]
    assert found("**/*.csv") == ["c.csv", "deep/d.csv"]
    assert found("odd[1].jsonl", "absent.jsonl") == ["odd[1].jsonl", "absent.jsonl"]
    with pytest.raises(DataError, match=r"\*\.parquet: found no file that matches"):
        found("*.parquet")


def test_a_folder_is_refused_with_a_pattern(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"found a folder, .*/\*\.jsonl"):
        read_rows(tmp_path)


# --- numbers


@pytest.mark.parametrize(
    ("written", "answer"),
    [
        ("0.00001", "0.00001"),
        ("1e-05", "0.00001"),
        ("1e16", "10000000000000000"),
        ("7.30", "7.30"),
        ("42.0", "42.0"),
        ("-0.5E2", "-50"),
        ("0.1000000000000000055511151231257827", "0.1000000000000000055511151231257827"),
        ("123456789012345678901234567890", "123456789012345678901234567890"),
        ("7", "7"),
    ],
)
def test_a_json_number_is_told_as_written(tmp_path: Path, written: str, answer: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"question": {written}, "answer": {written}, "context": {written}, "more": [{written}]}}')
    (row,) = read_rows(path)
    example = parse_row(row, config())
    assert (example.question, example.answer, example.context) == (answer, answer, answer)
    assert pickle.loads(pickle.dumps(example.metadata)) == {"more": [json.loads(written)]}


@pytest.mark.parametrize("written", ["NaN", "-Infinity", "1e999", "1e-99999"])
def test_a_json_number_without_decimal_text_is_refused(tmp_path: Path, written: str) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"question": "q", "answer": {written}}}')
    with pytest.raises(DataError, match=r"a\.jsonl:1: found .* in column 'answer', expected a finite number"):
        [parse_row(row, config()) for row in read_rows(tmp_path / "a.jsonl")]


@pytest.mark.parametrize(
    ("kind", "value", "answer"),
    [
        (pyarrow.float32(), 7.3, "7.3"),
        (pyarrow.float16(), np.float16(0.1), "0.1"),
        (pyarrow.float32(), 1e-5, "0.00001"),
        (pyarrow.float32(), 42, "42"),
        (pyarrow.float32(), 1e20, "100000000000000000000"),
        (pyarrow.float64(), 0.1, "0.1"),
        (pyarrow.float64(), 27.0, "27"),
        (pyarrow.float64(), 1e-7, "0.0000001"),
        (pyarrow.int64(), 2**60, str(2**60)),
        (pyarrow.decimal128(20, 4), Decimal("12.3400"), "12.3400"),
    ],
)
def test_a_parquet_number_is_told_in_its_shortest_digits(
    tmp_path: Path, kind: pyarrow.DataType, value: object, answer: str
) -> None:
    column = pyarrow.array([value, None], kind)
    nested = pyarrow.array([[value], None], pyarrow.list_(kind))
    pairs = pyarrow.array([{"x": value}, None], pyarrow.struct([("x", kind)]))
    table = pyarrow.table({"question": ["q", "q"], "answer": column, "nested": nested, "pairs": pairs})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    first, second = read_rows(tmp_path / "a.parquet")
    example = parse_row(first, config())
    assert example.answer == answer
    (inner,), pair = example.metadata["nested"], example.metadata["pairs"]
    assert (decimal_text(inner), decimal_text(pair["x"])) == (answer, answer)  # type: ignore[index]
    assert second.values == {"question": "q", "answer": None, "nested": None, "pairs": None}


# --- shapes


@pytest.mark.parametrize("column", ["prompt", "messages", "conversations", "dialog"])
@pytest.mark.parametrize("layout", ["openai", "parts", "sharegpt"])
def test_a_chat_is_read_from_any_layout(column: str, layout: str) -> None:
    def message(role: str, text: str) -> dict[str, object]:
        if layout == "sharegpt":
            return {"from": {"user": "human", "assistant": "gpt"}.get(role, role), "value": text}
        parts: object = [{"type": "text", "text": text[:2]}, {"type": "text", "text": text[2:]}]
        return {"role": role, "content": parts if layout == "parts" else text}

    chat = [
        message("system", "be brief"),
        message("user", "hello"),
        message("assistant", "hi"),
        message("user", "2+2?"),
    ]
    settings = config(question_key="dialog") if column == "dialog" else config()
    example = parse_row(row(**{column: chat, "answer": 4, "level": 1}), settings)
    assert example.question == "2+2?"
    assert [message["role"] for message in example.history] == ["system", "user", "assistant"]
    assert (example.context, example.teacher_question, example.metadata) == (None, None, {"level": 1})
    replied = parse_row(row(**{column: [*chat, message("assistant", " It is 4. ")], "answer": "4"}), settings)
    assert (replied.question, replied.context) == ("2+2?", "It is 4.")
    assert parse_row(row(**{column: chat, "answer": "4", "context": "own"}), settings).context == "own"


def test_the_first_chat_column_asks_and_the_others_are_metadata() -> None:
    chats = {name: [{"role": "user", "content": name}] for name in ("messages", "prompt")}
    example = parse_row(row(answer="1", **chats), config())
    assert (example.question, set(example.metadata)) == ("prompt", {"messages"})


def test_a_mark_in_a_plain_column_keeps_the_context_from_the_student() -> None:
    example = parse_row(row(question=f"2+2?{MARK} It is 4.", answer="4"), config())
    assert (example.question, example.context, example.teacher_question) == ("2+2?", " It is 4.", "2+2? It is 4.")
    bare = parse_row(row(question=f"2+2?{MARK} ", answer="4", context="count"), config())
    assert (bare.question, bare.context, bare.teacher_question) == ("2+2?", "count", None)


@pytest.mark.parametrize("answer", [{"cases": [[1, 2.5], "x"]}, ["12", "twelve"]])
def test_a_structured_answer_stays_as_it_is(answer: object) -> None:
    for values in ({"answer": answer}, {"reward_model": {"ground_truth": answer}}):
        example = parse_row(row(question="q", **values), config())
        assert example.answer == answer
        assert example.answer_text == json.dumps(answer)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".jsonl.gz", ".parquet"])
def test_a_file_that_is_not_there_is_told_by_its_folder(suffix: str, tmp_path: Path) -> None:
    message = rf"^{tmp_path}/a/b{suffix}: found .*\. Fix: check the path: there is no a in {tmp_path}$"
    with pytest.raises(DataError, match=message):
        list(read_rows(tmp_path / "a" / f"b{suffix}"))


def test_a_damaged_file_is_to_be_copied_again(tmp_path: Path) -> None:
    for name in ("x.jsonl.gz", "x.parquet"):
        (tmp_path / name).write_bytes(b"damaged")
        with pytest.raises(DataError, match=r"Fix: copy or write the file again$"):
            list(read_rows(tmp_path / name))
