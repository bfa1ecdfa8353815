"""Rows that repeat a problem, and data sets that are written and mapped."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from sdpg_megatron.config import DataConfig
from sdpg_megatron.data import dataset as datasets
from sdpg_megatron.data.cursor import Cursor
from sdpg_megatron.data.dataset import PromptDataset, digest_of
from sdpg_megatron.data.source import load_prompts
from sdpg_megatron.errors import DataError, WriteError
from sdpg_megatron.observe.reading_progress import INTERVAL, RowProgress
from sdpg_megatron.train.inputs import check_answers
from tests.tiny import tiny_tokenizer

Rows = Sequence[Mapping[str, object]]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def write(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def row(question: str, answer: object = "1", **more: object) -> dict[str, object]:
    return {"question": question, "answer": answer, **more}


def test_a_problem_is_kept_once_and_the_others_are_counted(tmp_path: Path, tokenizer: Any) -> None:
    rows = [row("a"), row("b"), row("a", index=7), row("a", context="count"), row("b", "2"), row("b"), row("A")]
    path = write(tmp_path / "a.jsonl", rows)
    dropped = PromptDataset.load(DataConfig(), (path,), tokenizer)
    assert [prompt.uid for prompt in dropped.prompts] == [f"a.jsonl:{line}" for line in (1, 2, 4, 5, 7)]
    assert (dropped.repeated, dropped.describe()) == (2, "5 prompts (2 repeated)")
    kept = PromptDataset.load(DataConfig(duplicates="keep"), (path,), tokenizer)
    assert (len(kept), kept.repeated, kept.describe()) == (7, 0, "7 prompts")
    assert kept.digest != dropped.digest


@pytest.mark.parametrize("duplicates", ["drop", "keep"])
def test_an_evaluation_takes_a_problem_once(tmp_path: Path, tokenizer: Any, duplicates: Any) -> None:
    """As published, AIME is 30 problems 32 times: as 960 problems its interval would be far too narrow."""
    path = write(tmp_path / "aime.jsonl", [row(f"q{number % 3}", context=f"c{number}") for number in range(12)])
    dataset = PromptDataset.load(DataConfig(duplicates=duplicates), (path,), tokenizer, distill_enabled=False)
    assert [prompt.question for prompt in dataset.prompts] == ["q0", "q1", "q2"]
    (warning,) = dataset.warnings
    assert warning == "9 evaluation rows repeat a problem and are dropped, the first: aime.jsonl:4"


def test_evaluation_files_may_share_problems(tmp_path: Path, tokenizer: Any) -> None:
    files = [write(tmp_path / name, [row("a"), row("b"), row("a")]) for name in ("x.jsonl", "y.jsonl")]
    evaluated = PromptDataset.load(DataConfig(), files, tokenizer, distill_enabled=False)
    assert [prompt.uid for prompt in evaluated.prompts] == ["x.jsonl:1", "x.jsonl:2", "y.jsonl:1", "y.jsonl:2"]
    assert len(PromptDataset.load(DataConfig(), files, tokenizer)) == 2


def test_repeated_rows_are_rendered_once(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rendered: list[str] = []
    students = datasets.Renderer.students

    def counted(renderer: Any, examples: Any) -> Any:
        rendered.extend(example.question for example in examples)
        return students(renderer, examples)

    monkeypatch.setattr(datasets.Renderer, "students", counted)
    monkeypatch.setattr(datasets, "CHUNK", 4)
    path = write(tmp_path / "a.jsonl", [row(f"q{number % 7}") for number in range(70)])
    dataset = PromptDataset.load(DataConfig(), (path,), tokenizer)
    assert rendered == [f"q{number}" for number in range(7)] == [prompt.question for prompt in dataset.prompts]


def test_problems_that_are_trained_and_evaluated_on_are_told(tmp_path: Path, tokenizer: Any) -> None:
    held_out = write(tmp_path / "eval.jsonl", [row("What is  2 + 2?"), row("c")])
    train = write(tmp_path / "train.jsonl", [row("a"), row("what is 2 + 2?"), row("b"), row("c", context="x")])
    prompts, _ = load_prompts(DataConfig(train=(train,), eval=(held_out,)), tokenizer, 0)
    assert isinstance(prompts, PromptDataset)
    assert prompts.warnings == ("2 training problems are also evaluated on: train.jsonl:2 is eval.jsonl:1",)
    apart, _ = load_prompts(
        DataConfig(train=(write(tmp_path / "x.jsonl", [row("a")]),), eval=(held_out,)), tokenizer, 0
    )
    assert isinstance(apart, PromptDataset) and apart.warnings == ()


def test_a_question_with_two_answers_and_one_with_its_context_are_told(tmp_path: Path, tokenizer: Any) -> None:
    context = "Count the apples one by one: four."
    rows = [row("a", "1"), row("a", "1.0"), row("a", "2"), row(f"How many? {context}", "4", context=context)]
    rows.append(row("Four? It is four.", "4", context="four"))  # too short to be more than chance
    dataset = PromptDataset.load(DataConfig(), (write(tmp_path / "a.jsonl", rows),), tokenizer)
    revealed, conflict = dataset.warnings
    assert revealed.startswith("1 questions contain their context or state their answer, the first at ")
    assert "a.jsonl:4: the student reads it, too" in revealed
    assert conflict == "1 rows ask an earlier question with another answer: a.jsonl:1 and a.jsonl:3"


def test_a_dict_is_no_answer_for_a_verifier_of_text(tmp_path: Path, tokenizer: Any) -> None:
    answer = {"cases": [1]}
    path = write(tmp_path / "a.jsonl", [row("a"), row("b", answer)])
    dataset = PromptDataset.load(DataConfig(), (path,), tokenizer)
    assert dataset[1].answer == answer
    assert 'this problem is: {"cases": [1]}' in tokenizer.decode(dataset[1].teacher_tokens)
    check_answers("my_module:grade", [dataset, None])
    with pytest.raises(DataError, match=r"a\.jsonl:2: found an answer that is a dict or list, expected .* math"):
        check_answers("math", [dataset, None])


def test_a_data_set_is_written_and_mapped_as_it_is(tmp_path: Path, tokenizer: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(datasets, "CHUNK", 2)
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "long " * 9}]
    rows: list[dict[str, Any]] = [
        row("é"), row("b", {"x": [1, 2.5]}, level=1.5), {"prompt": chat, "answer": 7}, row("a"), row("é"), row("d"),
    ]  # fmt: skip
    path = write(tmp_path / "a.jsonl", rows)
    dataset = PromptDataset.load(DataConfig(), (path,), tokenizer, seed=1)
    dataset.save(tmp_path / "a.arrow")
    mapped = PromptDataset.open(tmp_path / "a.arrow")
    (tmp_path / "a.arrow").unlink()
    assert list(mapped.prompts) == list(dataset.prompts)
    assert mapped[-1] == dataset[4] and mapped.prompts[1:3] == (dataset[1], dataset[2])
    assert mapped.digest == dataset.digest == digest_of(dataset.prompts)
    assert (mapped.repeated, mapped.structured, mapped.warnings) == (1, dataset.structured, dataset.warnings)
    with pytest.raises(IndexError, match="prompt 5 of 5"):
        mapped[5]
    with pytest.raises(WriteError, match=r"absent/a\.arrow: could not be written"):
        dataset.save(tmp_path / "absent" / "a.arrow")


def test_rows_are_counted_while_they_are_read(tmp_path: Path, tokenizer: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(datasets, "CHUNK", 10)
    path = write(tmp_path / "a.jsonl", [row(f"q{number % 7}") for number in range(35)])
    told: list[int] = []
    load_prompts(DataConfig(train=(path,)), tokenizer, 0, on_rows=told.append)
    assert told == [10, 20, 30]


def test_a_log_gets_a_line_from_time_to_time(capsys: pytest.CaptureFixture[str]) -> None:
    clock = count(0.0, INTERVAL / 2)
    for enabled in (True, False):
        with RowProgress(enabled=enabled, clock=lambda: next(clock)) as progress:
            for rows in range(1024, 6144, 1024):
                progress(rows)
    assert capsys.readouterr().err.splitlines() == ["reading prompts: 2,048 rows", "reading prompts: 4,096 rows"]


def test_an_epochs_order_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that goes on from a saved state does not sort a million keys again."""
    cursor = Cursor(1000, 3, shuffle=True)
    cursor.take(5)
    calls = 0

    def counted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return sorted(*arguments)

    monkeypatch.setattr("builtins.sorted", counted)
    assert Cursor.from_state(cursor.state(), 1000).take(3) == cursor.take(3)
    assert calls == 0


def test_rows_that_a_verifier_of_ones_own_scores_by_other_columns_are_no_repeats(
    tmp_path: Path, tokenizer: Any
) -> None:
    rows = [row("a", tests=["f(1) == 2"]), row("a", tests=["f(2) == 3"]), row("a", tests=["f(1) == 2"])]
    path = write(tmp_path / "a.jsonl", rows)
    read: list[int] = []
    config = DataConfig(train=(path,), eval=(path,))
    for own, kept in ((False, [1]), (True, [1, 2])):
        train, held_out = load_prompts(config, tokenizer, 0, scored_by_metadata=own, on_rows=read.append)
        assert isinstance(train, PromptDataset) and held_out is not None
        assert [prompt.uid for prompt in train.prompts] == [f"a.jsonl:{line}" for line in kept]
        assert len(held_out) == 1
