"""Student and teacher prompts, and the data set that they make."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from sdpg_megatron.answers import same
from sdpg_megatron.config import DataConfig
from sdpg_megatron.data.chats import CONTEXT_MARK as MARK
from sdpg_megatron.data.dataset import PromptDataset
from sdpg_megatron.data.examples import Example
from sdpg_megatron.data.render import Renderer, context_template
from sdpg_megatron.errors import ConfigError, DataError
from tests.tiny import tiny_tokenizer

ROWS = ({"question": "1 + 1?", "answer": "2"}, {"question": "12 + 34?", "answer": "46"})


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def config(**fields: Any) -> DataConfig:
    return DataConfig(**({"train": ()} | fields))


def write(path: Path, rows: Sequence[Mapping[str, object]] = ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rendered(tokenizer: Any, example: Example, **fields: Any) -> tuple[str, str]:
    student, teacher = Renderer(config(**fields), tokenizer).render(example)
    return tokenizer.decode(student), tokenizer.decode(teacher)


def turn(question: str, before: str = "") -> str:
    return f"<bos>{before}<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def test_answer_template_appends_the_answer(tokenizer: Any) -> None:
    student, teacher = rendered(tokenizer, Example(question="1 + 1?", answer="2", context="long"))
    assert student == turn("1 + 1?")
    assert teacher == turn("1 + 1?\nThe correct answer to this problem is: 2")


def test_verify_template_is_the_public_data_s(tokenizer: Any) -> None:
    _, teacher = rendered(tokenizer, Example(question="1 + 1?", answer="2"), context_template="verify")
    assert teacher == turn(
        "1 + 1?\nThe correct answer to this problem is: 2\n"
        "Use this to verify your reasoning, but show your full solution process."
    )


def test_solution_template_carries_answer_and_solution(tokenizer: Any) -> None:
    student, teacher = rendered(
        tokenizer, Example(question="1 + 1?", answer="2", context="count up"), context_template="solution"
    )
    assert student == turn("1 + 1?")
    assert all(part in teacher for part in ("1 + 1?", "correct answer is: 2", "count up"))


def test_own_template_and_an_answer_that_stands_in_for_the_context(tokenizer: Any) -> None:
    example = Example(question="Which {x}?", answer="2")
    _, teacher = rendered(tokenizer, example, context_template="{context}|{question}|{{}}")
    assert teacher == turn("2|Which {x}?|{}")


def test_feedback_template_shows_what_came_of_it_and_not_the_answer(tokenizer: Any) -> None:
    example = Example(question="Write f.", answer="secret", context="line 3: ZeroDivisionError")
    student, teacher = rendered(tokenizer, example, context_template="feedback")
    assert student == turn("Write f.")
    assert "Write f." in teacher and "line 3: ZeroDivisionError" in teacher
    assert "secret" not in teacher


def test_feedback_is_needed_where_somebody_teaches(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "a.jsonl", [{"question": "q", "answer": "1", "context": "c"}, ROWS[0]])
    with pytest.raises(DataError, match=r"a\.jsonl:2: found no value in column 'context'.*'feedback'"):
        PromptDataset.load(config(context_template="feedback"), (path,), tokenizer)
    for_evaluation = PromptDataset.load(config(context_template="feedback"), (path,), tokenizer, distill_enabled=False)
    assert [p.teacher_tokens for p in for_evaluation.prompts] == [p.student_tokens for p in for_evaluation.prompts]


def test_the_context_of_another_problem_never_has_the_same_answer(tmp_path: Path, tokenizer: Any) -> None:
    answers = ["2", "2.0", "46", " 2 ", "7", "46", "$7$", "8"]
    path = write(tmp_path / "a.jsonl", [{"question": f"q{n}", "answer": a} for n, a in enumerate(answers)])
    mark = "The correct answer to this problem is: "

    def told(seed: int) -> list[str]:
        dataset = PromptDataset.load(config(context_of="other"), (path,), tokenizer, seed=seed)
        texts = [tokenizer.decode(prompt.teacher_tokens) for prompt in dataset.prompts]
        assert all(f"q{number}\n" in text for number, text in enumerate(texts))
        assert [prompt.answer for prompt in dataset.prompts] == answers  # the verifier's stay
        return [text.split(mark)[1].split("<|im_end|>")[0] for text in texts]

    for seed in range(5):
        assert not any(same(own, other) for own, other in zip(answers, told(seed), strict=True))
    assert told(1) == told(1)
    assert len({tuple(told(seed)) for seed in range(5)}) > 1


def test_the_context_of_another_marked_row_takes_the_place_of_its_own(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        {"prompt": [{"role": "user", "content": f"{question}{MARK} It is {answer}."}], "answer": answer}
        for question, answer in (("1 + 1?", "2"), ("3 + 4?", "7"))
    ]
    path = write(tmp_path / "a.jsonl", rows)
    dataset = PromptDataset.load(config(context_of="other"), (path,), tokenizer)
    assert tokenizer.decode(dataset[0].teacher_tokens) == turn("1 + 1? It is 7.")


def test_without_another_answer_there_is_no_such_control(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"question": "a", "answer": "1"}, {"question": "b", "answer": "1.0"}, {"question": "A", "answer": "2"}]
    with pytest.raises(ConfigError, match=r"data\.context_of: found 'other', expected own .* '1'"):
        PromptDataset.load(config(context_of="other"), (write(tmp_path / "a.jsonl", rows[:2]),), tokenizer)
    dataset = PromptDataset.load(config(context_of="other"), (write(tmp_path / "b.jsonl", rows[1:]),), tokenizer)
    assert len(dataset) == 2
    with pytest.raises(ConfigError, match=r"data\.context_of"):  # the same question, though answered otherwise
        PromptDataset.load(config(context_of="other"), (write(tmp_path / "c.jsonl", rows[::2]),), tokenizer)


def test_the_rows_own_teacher_question_passes_by_the_template(tokenizer: Any) -> None:
    example = Example(question="q", answer="2", context="c", teacher_question="q c")
    assert rendered(tokenizer, example, context_template="solution") == (turn("q"), turn("q c"))


def test_system_message_unless_the_row_has_one(tokenizer: Any) -> None:
    system = "<|im_start|>system\n{}<|im_end|>\n"
    student, teacher = rendered(tokenizer, Example(question="q", answer="2"), system="Be brief.")
    assert student == turn("q", before=system.format("Be brief."))
    assert teacher.startswith(student.removesuffix("<|im_end|>\n<|im_start|>assistant\n"))
    own = Example(question="q", answer="2", history=({"role": "system", "content": "Mine."},))
    assert rendered(tokenizer, own, system="Be brief.")[0] == turn("q", before=system.format("Mine."))


@pytest.mark.parametrize(
    ("template", "names"),
    [
        ("solutoin", "did you mean 'solution'"),
        ("only {context}", "add {question}"),
        ("{question} {contxt}", "{contxt}.*did you mean 'context'"),
        ("{question} {answer.real}", "answer.real"),
        ("{question} {answer!r}", "answer"),
        ("{question} {}", "literal brace"),
        ("{question} {", "literal brace"),
    ],
)
def test_a_faulty_template_is_refused(template: str, names: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.context_template: .*{names}"):
        context_template(template)


def test_a_tokenizer_that_cannot_render_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(ConfigError, match=r"model\.path: .*no system role"):
        Renderer(config(), tokenizer).render(Example(question="q", answer="1"))
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match=r"model\.path: .*chat template"):
        Renderer(config(), tokenizer)


def test_dataset_keeps_order_and_names_rows(tmp_path: Path, tokenizer: Any) -> None:
    marked = [{"role": "user", "content": f"9 + 9?{MARK} 18"}]
    files = (write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl", [{"prompt": marked, "answer": 18, "tag": "t"}]))
    dataset = PromptDataset.load(config(), files, tokenizer)
    assert len(dataset) == 3
    assert [p.uid for p in dataset.prompts] == ["a.jsonl:1", "a.jsonl:2", "b.jsonl:1"]
    assert [p.answer for p in dataset.prompts] == ["2", "46", "18"]
    assert (dataset[2].question, dataset[2].metadata) == ("9 + 9?", {"tag": "t"})
    assert tokenizer.decode(dataset[2].teacher_tokens) == turn("9 + 9? 18")


@pytest.mark.parametrize("changed", [{"question": "What?"}, {"answer": "0"}, {"metadata": {"a": 1}}])
def test_a_digest_tells_prompts_apart(tmp_path: Path, tokenizer: Any, changed: dict[str, object]) -> None:
    def digest(rows: Sequence[Mapping[str, object]]) -> str:
        return PromptDataset.load(config(), (write(tmp_path / "rows.jsonl", rows),), tokenizer).digest

    assert digest(ROWS) == digest(ROWS)
    assert digest(ROWS) != digest([*ROWS[:-1], {**ROWS[-1], **changed}])
    assert digest(ROWS) != digest(ROWS[::-1])


def test_uids_stay_distinct_where_file_names_do_not(tmp_path: Path, tokenizer: Any) -> None:
    others = [{**row, "question": f"{row['question']} Say it."} for row in ROWS]
    files = (write(tmp_path / "x" / "a.jsonl"), write(tmp_path / "y" / "a.jsonl", others))
    dataset = PromptDataset.load(config(), files, tokenizer)
    assert len({p.uid for p in dataset.prompts}) == 4
    with pytest.raises(DataError, match="twice"):
        PromptDataset.load(config(), (files[0], files[0]), tokenizer)


def test_overlong_prompts_are_dropped_or_cut_on_the_left_and_counted(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "a.jsonl", [ROWS[0], {"question": "x" * 99, "answer": "1"}])
    full = PromptDataset.load(config(), (path,), tokenizer)
    # The first row's student prompt fits, its teacher prompt does not.
    limit = len(full[0].student_tokens)
    assert limit < len(full[0].teacher_tokens)
    between = len(full[0].teacher_tokens)

    dropped = PromptDataset.load(config(max_prompt_tokens=between), (path,), tokenizer)
    assert (len(dropped), dropped.dropped, dropped.truncated) == (1, 1, 0)
    assert dropped[0] == full[0]

    cut = PromptDataset.load(config(max_prompt_tokens=limit, overlong="truncate"), (path,), tokenizer)
    assert (len(cut), cut.dropped, cut.truncated) == (2, 0, 2)
    assert cut[0].student_tokens == full[0].student_tokens
    assert cut[0].teacher_tokens == full[0].teacher_tokens[-limit:]
    assert cut[1].student_tokens == full[1].student_tokens[-limit:]

    with pytest.raises(DataError, match="2 rows, all longer than 3 tokens"):
        PromptDataset.load(config(max_prompt_tokens=3), (path,), tokenizer)


def test_an_empty_dataset_is_an_error(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"empty\.jsonl: found no rows"):
        PromptDataset.load(config(), (write(tmp_path / "empty.jsonl", []),), tokenizer)
    with pytest.raises(DataError, match="no rows"):
        PromptDataset.load(config(), (), tokenizer)
