"""tools/prepare_data.py on invented rows with exactly the columns of the published files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from sdpg_megatron.config import DataConfig
from sdpg_megatron.data.chats import CONTEXT_MARK as MARK
from sdpg_megatron.data.dataset import PromptDataset
from sdpg_megatron.errors import DataError
from tests.tiny import tiny_tokenizer
from tools import prepare_data

Rows = list[dict[str, Any]]

BOXED = (
    "Solve the following math problem step by step. Present your final answer inside \\boxed{{}}, for example "
    "\\boxed{{42}}.\n{}\nRemember to put your final answer inside \\boxed{{}}."
)
"""The student's prompt in figure 4 of SDPG's paper."""
ANSWER = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n{}\n"
    'Remember to put your answer on its own line after "Answer:".'
)
ONE_LINE = "Solve the following math problem step by step. {}"
VERL = "{} Let's think step by step and output the final answer within \\boxed{{}}."
CONTEXTS = {
    "\nThe correct answer to this problem is: 34\n"
    "Use this to verify your reasoning, but show your full solution process.": None,
    "The correct answer to this problem is: 34": None,
    "\nThe correct answer to this problem is: 34\n"
    "Use this to verify your reasoning, but show your full solution process.\n\n"
    "Remember to put your final answer inside \\boxed{}.": None,
    "\n[Hint] The correct answer is 34. A common way to solve this is:\nCount\nthem.\n"
    "[Instruction] If possible, derive the answer 34 using an alternative.": "Count\nthem.",
    "\nThe correct answer to this problem is: 34\nAs counting shows.": (
        "The correct answer to this problem is: 34\nAs counting shows."
    ),
}
"""What stands after the mark, and the worked solution in it: the first as the public README states it, the third as
the paper's figure 4."""


def dapo(question: str, answer: str, index: str = "0") -> dict[str, Any]:
    text = (
        "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
        "$Answer (without quotes) where $Answer is the answer to the problem.\n\n"
        f"{question}\n\n"
        'Remember to put your answer on its own line after "Answer:".'
    )
    return chat(text, answer, index)


def chat(text: str, answer: Any, index: str = "0") -> dict[str, Any]:
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": text, "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule"},
        "extra_info": {"index": index},
    }


def dapo_processed(question: str, answer: str) -> dict[str, Any]:
    raw = dapo(question, answer)
    return {"prompt": question, "solution": answer, "source_prompt": raw.pop("prompt")} | raw


def aime_2024(question: str, answer: str) -> dict[str, Any]:
    solution = f"Count. So \\boxed{{{answer}}}."
    return {"id": 60, "problem": question, "solution": solution, "answer": answer, "url": "u", "year": "2024"}


def aime_2025(question: str, answer: str) -> dict[str, Any]:
    return {"question": question, "answer": answer}


def amc_2023(question: str, answer: float) -> dict[str, Any]:
    return {"id": 0, "question": question, "answer": answer, "url": "u"}


def gsm8k(question: str, answer: str) -> dict[str, Any]:
    return {"question": question, "answer": f"He has 2+2=<<2+2=4>>4.\nAll in all.\n#### {answer}"}


def math(question: str, answer: str) -> dict[str, Any]:
    return {"problem": question, "level": "Level 5", "type": "Algebra", "solution": f"Thus $\\boxed{{{answer}}}$."}


def math_500(question: str, answer: str) -> dict[str, Any]:
    row = math(question, answer)
    return {"problem": question, "solution": row["solution"], "answer": answer, "subject": "Algebra", "level": 5,
            "unique_id": "test/algebra/1.json"}  # fmt: skip


def write(path: Path, rows: Rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(folder: Path, *arguments: object) -> None:
    assert prepare_data.main([str(folder), *map(str, arguments)]) == 0


def rows_of(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
@pytest.mark.parametrize(
    ("row", "answer", "context"),
    [
        (dapo("How many?", "34"), "34", None),
        (dapo_processed("How many?", "34"), "34", None),
        (aime_2024("How many?", "025"), "25", "Count. So \\boxed{025}."),
        (aime_2025("How many?", "70"), "70", None),
        (amc_2023("How many?", 27.0), "27", None),
        (gsm8k("How many?", "1,234"), "1234", "He has 2+2=4.\nAll in all."),
        (math("How many?", "\\frac{1}{2}"), "\\frac{1}{2}", "Thus $\\boxed{\\frac{1}{2}}$."),
        (math_500("How many?", "(3, \\pi)"), "(3, \\pi)", "Thus $\\boxed{(3, \\pi)}$."),
    ],
    ids=["dapo", "dapo_processed", "aime_2024", "aime_2025", "amc_2023", "gsm8k", "math", "math_500"],
)
def test_each_published_layout_is_read(
    tmp_path: Path, suffix: str, row: dict[str, Any], answer: str, context: str | None
) -> None:
    source = write(tmp_path / f"set{suffix}", [row])
    run(tmp_path / "out", "--train", source, "--instruction", "none")
    expected = {"question": "How many?", "answer": answer, "source": "set"}
    assert rows_of(tmp_path / "out" / "train.jsonl") == [expected | ({"context": context} if context else {})]


@pytest.mark.parametrize("text", [BOXED, BOXED.replace("\n", " "), BOXED.replace("\n", "\n\n"), ANSWER, ONE_LINE, VERL])
@pytest.mark.parametrize("context", [None, "", *CONTEXTS], ids=["unmarked", "empty", *map(str, range(len(CONTEXTS)))])
@pytest.mark.parametrize("column", ["chat", "text"])
def test_the_student_reads_the_question_and_nothing_else(
    tmp_path: Path, text: str, context: str | None, column: str
) -> None:
    """The published wrappers, in any layout of lines; the context of the public SDPG files goes to the teacher."""
    content = text.format("How many\napples?") + ("" if context is None else f"{MARK}{context}")
    row = chat(content, "34") if column == "chat" else {"question": content, "answer": "34"}
    run(tmp_path / "out", "--train", write(tmp_path / "set.jsonl", [row]), "--instruction", "none")
    (written,) = rows_of(tmp_path / "out" / "train.jsonl")
    assert written["question"].split() == ["How", "many", "apples?"]
    assert written.get("context") == (CONTEXTS[context] if context else None)


@pytest.mark.parametrize("instruction", prepare_data.INSTRUCTIONS)
def test_what_was_written_is_read_back_without_its_instruction(tmp_path: Path, instruction: str) -> None:
    source = write(tmp_path / "train.jsonl", [math("How many?", "4"), aime_2024("How much?", "5")])
    run(tmp_path / "once", "--train", source, "--instruction", instruction)
    run(tmp_path / "twice", "--train", tmp_path / "once" / "train.jsonl", "--instruction", instruction)
    assert rows_of(tmp_path / "twice" / "train.jsonl") == rows_of(tmp_path / "once" / "train.jsonl")


@pytest.mark.parametrize("end", ["", "\n\nRemember to put your final answer inside \\boxed{}"])
def test_an_answer_of_two_lines_is_no_worked_solution(tmp_path: Path, end: str) -> None:
    use = "Use this to verify your reasoning, but show your full solution process."
    content = f"Solve.{MARK}The correct answer to this problem is: x = 3,\ny = 4\n{use}{end}"
    row = chat(content, "x = 3,\ny = 4")
    run(tmp_path / "out", "--train", write(tmp_path / "set.jsonl", [row]), "--instruction", "none")
    (written,) = rows_of(tmp_path / "out" / "train.jsonl")
    assert "context" not in written


@pytest.mark.parametrize(
    "closing",
    [
        'Remember to put your answer on its own line after "Answer".',
        "remember to put your answer on its own line after \u201cAnswer:\u201d",
        "Please reason step by step, and put your final answer within \\boxed{}",
        "Let\u2019s think step by step and output the final answer within \\boxed{}.",
    ],
)
def test_a_closing_line_may_be_spelled_a_little_otherwise(tmp_path: Path, closing: str) -> None:
    source = write(tmp_path / "set.jsonl", [chat(f"How many?\n{closing}", "34")])
    run(tmp_path / "out", "--train", source, "--instruction", "none")
    assert rows_of(tmp_path / "out" / "train.jsonl") == [{"question": "How many?", "answer": "34", "source": "set"}]


@pytest.mark.parametrize(
    "question",
    [
        "How many?\nThe correct answer to this problem is: thirty-four\nUse this to verify your reasoning.",
        "How many?\n[Hint] The  correct answer is 34. A common way to solve this is: count.",
        "How many? COUNT the\n apples one by one, which gives 34.",
    ],
)
def test_an_answer_in_the_question_passes_no_reader_silently(
    tmp_path: Path, question: str, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"question": question, "answer": "34", "context": "Count the apples one by one, which gives 34."}
    source = write(tmp_path / "set.jsonl", [row, aime_2025("Is the correct answer 3 or 4?", "3")])
    run(tmp_path / "out", "--train", source, "--instruction", "none")
    assert [row["answer"] for row in rows_of(tmp_path / "out" / "train.jsonl")] == ["3"]
    assert "1 with solution or answer in the question" in capsys.readouterr().out
    (warning,) = PromptDataset.load(DataConfig(), (source,), tiny_tokenizer()).warnings
    assert warning.startswith("1 questions contain their context or state their answer, the first at ")


@pytest.mark.parametrize("mark", ["[teacher_context_token]", "[ TEACHER_CONTEXT_TOKEN ]", "[TEACHER CONTEXT TOKEN]"])
@pytest.mark.parametrize("layout", [chat, aime_2025])
def test_a_mark_in_another_spelling_is_refused_by_all_readers(
    tmp_path: Path, mark: str, layout: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "set.jsonl", [layout(f"How many? {mark} It is 34.", "34")])
    assert prepare_data.main([str(tmp_path / "out"), "--train", str(source)]) == 1
    assert f"set.jsonl:1: found {mark!r} in column" in " ".join(capsys.readouterr().err.split()).replace('"', "")
    with pytest.raises(DataError, match=r"expected \[TEACHER_CONTEXT_TOKEN\]"):
        PromptDataset.load(DataConfig(), (source,), tiny_tokenizer())


@pytest.mark.parametrize(
    "text", [BOXED.format(""), ANSWER.format("\n"), "Solve the following math problem step by step"]
)
def test_instructions_alone_are_no_question_for_the_project_either(tmp_path: Path, text: str) -> None:
    source = write(tmp_path / "set.jsonl", [aime_2025("a?", "1"), chat(text, "34")])
    with pytest.raises(DataError, match=r"set\.jsonl:2: found .*instructions without a question"):
        PromptDataset.load(DataConfig(), (source,), tiny_tokenizer())


def test_a_question_that_contains_its_solution_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    solution = "Count the apples one by one, which gives \\boxed{4}."
    rows = [{"problem": f"How many?\n{solution}", "solution": solution}, math("How much?", "5")]
    run(tmp_path / "out", "--train", write(tmp_path / "set.jsonl", rows), "--instruction", "none")
    assert [row["question"] for row in rows_of(tmp_path / "out" / "train.jsonl")] == ["How much?"]
    assert "1 of 2 rows, 1 with solution or answer in the question" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("values", "answer"),
    [
        ({"question": "q", "answer": 1e-5}, "0.00001"),
        ({"question": "q", "answer": 1e16}, "10000000000000000"),
        ({"question": "q", "answer": "1e-05"}, "0.00001"),
        ({"question": 7, "answer": 27.0}, "27"),
        (chat("q", 0.5), "0.5"),
        (aime_2025("q", True), "True"),  # type: ignore[arg-type]
        (chat("q", False), "False"),
    ],
)
def test_numbers_are_written_in_digits_and_booleans_in_words(
    tmp_path: Path, values: dict[str, Any], answer: str
) -> None:
    source = write(tmp_path / "set.jsonl", [values])
    run(tmp_path / "out", "--train", source, "--instruction", "none")
    if isinstance(values.get("question"), str) and isinstance(values["answer"], bool):
        assert PromptDataset.load(DataConfig(), (source,), tiny_tokenizer())[0].answer == answer
    assert [row["answer"] for row in rows_of(tmp_path / "out" / "train.jsonl")] == [answer]


@pytest.mark.parametrize(("instruction", "asks"), [("boxed", "\\boxed{}"), ("answer", '"Answer: "'), ("none", None)])
def test_the_project_reads_what_was_written(tmp_path: Path, instruction: str, asks: str | None) -> None:
    source = write(tmp_path / "set.parquet", [math("How many?", "4"), math("How much?", "5")])
    run(tmp_path, "--train", source, "--instruction", instruction)
    config = DataConfig(context_template="solution")
    dataset = PromptDataset.load(config, (tmp_path / "train.jsonl",), tiny_tokenizer())
    assert [prompt.answer for prompt in dataset.prompts] == ["4", "5"]
    assert dataset[0].question.startswith("How many?")
    assert dataset[0].question == "How many?" if asks is None else asks in dataset[0].question
    assert "Thus $\\boxed{4}$." in tiny_tokenizer().decode(dataset[0].teacher_tokens)
    assert dataset[0].metadata == {"source": "set"}


def test_a_question_is_kept_once_and_not_at_all_where_its_answers_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = [
        dapo("Let $x = 2$. Find $\\dfrac{x}{2}$.", "1"),
        dapo("Let $x=2$. find $\\frac{x}{2}$", "1.0"),  # the same
        dapo("Which?", "3"),
        dapo("Which?", "3"),
        dapo("Which?", "4"),
        dapo("Which?", "3"),
        dapo("Alone?", "5"),
    ]
    second = [aime_2025("Alone?", "5"), aime_2025("Other?", "6"), math("No box?", "")]
    sources = [write(tmp_path / "a.parquet", first), write(tmp_path / "b.jsonl", second)]
    run(tmp_path / "out", "--train", *sources, "--instruction", "none")
    kept = rows_of(tmp_path / "out" / "train.jsonl")
    assert [(row["question"], row["source"]) for row in kept] == [
        (prepare_data.bare(first[0]["prompt"][0]["content"]), "a"), ("Alone?", "a"), ("Other?", "b")
    ]  # fmt: skip
    assert capsys.readouterr().out == (
        f"{tmp_path / 'out' / 'train.jsonl'}: 3 of 10 rows, 2 repeated, 1 repeated in another source, "
        "3 with conflicting answers, 1 without an answer\n"
    )


def test_what_is_evaluated_on_is_not_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = write(tmp_path / "t.parquet", [dapo("What is  $2+2$?", "4"), dapo("New?", "1"), dapo("Odd?", "2")])
    one = write(tmp_path / "one.jsonl", [aime_2025("What is $2 + 2$?", "4"), aime_2025("Odd?", "2")])
    two = write(tmp_path / "two.jsonl", [aime_2025("Odd?", "2"), aime_2025("Odd?", "3"), aime_2025("Even?", "4")])
    three = write(tmp_path / "three.jsonl", [aime_2025("Even?", "4")])
    run(tmp_path / "out", "--train", train, "--eval", one, two, three, "--instruction", "none")
    files = {path.name: [row["question"] for row in rows_of(path)] for path in (tmp_path / "out").iterdir()}
    assert files == {
        "train.jsonl": ["New?"],
        "one.jsonl": ["What is $2 + 2$?", "Odd?"],
        "two.jsonl": ["Even?"],
        "three.jsonl": ["Even?"],
    }
    report = capsys.readouterr().out
    assert "train.jsonl: 1 of 3 rows, 2 evaluated on" in report
    assert "two.jsonl and three.jsonl: 1 problems in common" in report


def test_a_known_name_comes_from_the_hub_by_its_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = tmp_path / "hub"
    write(hub / "main" / "train-00000-of-00001.parquet", [gsm8k("Train?", "1")])
    write(hub / "main" / "test-00000-of-00001.parquet", [gsm8k("Test?", "2")])
    asked: list[tuple[Any, ...]] = []

    def snapshot_download(repository: str, *, repo_type: str, allow_patterns: Sequence[str]) -> str:
        asked.append((repository, repo_type, *allow_patterns))
        return str(hub)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    run(tmp_path / "out", "--train", "gsm8k", "--eval", "gsm8k", "--instruction", "none")
    assert [row["question"] for row in rows_of(tmp_path / "out" / "train.jsonl")] == ["Train?"]
    assert [row["question"] for row in rows_of(tmp_path / "out" / "gsm8k.jsonl")] == ["Test?"]
    assert asked == [
        ("openai/gsm8k", "dataset", "main/test-*.parquet"),
        ("openai/gsm8k", "dataset", "main/train-*.parquet"),
    ]


def test_a_hub_that_does_not_answer_is_a_plain_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def snapshot_download(*_: Any, **__: Any) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert prepare_data.main([str(tmp_path / "out"), "--train", "math"]) == 1
    assert "EleutherAI/hendrycks_math: found ConnectionError: no route" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "x", "label": "y"}], r"set.jsonl:1: found the columns text, label, expected one of problem"),
        ([aime_2025("a?", "1"), {"question": "b?"}], "set.jsonl:2: found the columns question"),
        ([{"prompt": [], "reward_model": {}}], "set.jsonl:1: found the roles [] in column 'prompt'"),
        ([dapo("a?", "1") | {"reward_model": {"style": "rule"}}], "in column 'reward_model', expected a mapping"),
        ([chat(BOXED.format(" "), "4")], "set.jsonl:1: found instructions without a question"),
        ([chat(f"{MARK}The answer is 4.", "4")], f"set.jsonl:1: found no question before {MARK}"),
        ([chat(f"a{MARK}b{MARK}c", "4")], f"set.jsonl:1: found {MARK} twice"),
        (
            [
                {
                    "prompt": [
                        {"role": "user", "content": "a"},
                        {"role": "assistant", "content": "b"},
                        {"role": "user", "content": "c"},
                    ],
                    "reward_model": {"ground_truth": "4"},
                }
            ],
            "in column 'prompt', expected one question, after at most a system message",
        ),
        ([aime_2025("a?", float("nan"))], "set.jsonl:1: found nan in column 'answer', expected text or a finite"),
        ([math("a?", "")], "found nothing left: 0 of 1 rows, 1 without an answer, expected problems to train on"),
    ],
)
def test_rows_that_cannot_be_used_are_named(
    tmp_path: Path, rows: Rows, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare_data.main([str(tmp_path / "out"), "--train", str(write(tmp_path / "set.jsonl", rows))]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_no_half_written_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "set.jsonl", [aime_2025("a?", "1"), aime_2025("b?", "2")])
    out = tmp_path / "out"
    run(out, "--train", source)
    before = (out / "train.jsonl").read_bytes()
    line, written = prepare_data.Problem.line, iter([True, False])

    def failing(problem: prepare_data.Problem, instruction: str) -> str:
        if next(written):
            return line(problem, instruction)
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_data.Problem, "line", failing)
    with pytest.raises(KeyboardInterrupt):
        prepare_data.main([str(out), "--train", str(source), "--instruction", "none"])
    assert [path.name for path in out.iterdir()] == ["train.jsonl"]
    assert (out / "train.jsonl").read_bytes() == before


def test_two_sets_of_one_name_and_a_source_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = write(tmp_path / "x" / "set.jsonl", [aime_2025("a?", "1")])
    two = write(tmp_path / "y" / "set.jsonl", [aime_2025("b?", "1")])
    assert prepare_data.main([str(tmp_path / "out"), "--eval", str(one), str(two)]) == 1
    assert "the name set.jsonl a second time" in capsys.readouterr().err
    assert prepare_data.main([str(tmp_path / "out"), "--eval", "aime-2042"]) == 1
    assert "one of dapo-math-17k, aime-2024" in capsys.readouterr().err


def test_the_papers_instruction_stands_around_the_question(tmp_path: Path) -> None:
    """As in figure 4 of arXiv 2606.04036, whatever stood around it before."""
    source = write(tmp_path / "set.parquet", [dapo("How many in {1, 2}?", "2")])
    run(tmp_path, "--train", source, "--instruction", "paper")
    (row,) = rows_of(tmp_path / "train.jsonl")
    assert row["question"] == (
        "Solve the following math problem step by step. Present your final answer inside \\boxed{}, for example "
        "\\boxed{42}.\n\nHow many in {1, 2}?\n\nRemember to put your final answer inside \\boxed{}."
    )
