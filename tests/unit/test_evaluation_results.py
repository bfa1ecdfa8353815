"""An evaluation's folder: what it holds, how it goes on, what is refused; and evaluations side by side."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from sdpg_megatron.config import RunConfig
from sdpg_megatron.config.load import parse
from sdpg_megatron.errors import EvaluationError, WriteError
from sdpg_megatron.evaluation.compare import compare
from sdpg_megatron.evaluation.problems import EvalSamples, Problem, as_lines, by_file, read_problems
from sdpg_megatron.evaluation.results import Evaluation, Request, Results, limit_responses, read_request
from sdpg_megatron.evaluation.scores import per_problem, score
from sdpg_megatron.evaluation.table import scores_table, show
from sdpg_megatron.records import Group, Prompt, ScoredGroup
from tests.completions import make_completion


def config(**evaluation: Any) -> RunConfig:
    tree = {"run_dir": "x", "steps": 10, "model": {"path": "m"}, "data": {"train": []}}
    return parse({**tree, "eval": {"samples": 4, "max_response_tokens": 8} | evaluation})


def prompts(file: str = "sums.jsonl", count: int = 3) -> list[Prompt]:
    return [Prompt(f"{file}:{i}", (1,), (1,), answer=str(i), question=f"{i} + 0?") for i in range(1, count + 1)]


def draws(rewards: Sequence[float], answers: Sequence[str | None] | None, **fields: Any) -> EvalSamples:
    n = len(rewards)
    whole = {"lengths": (4,) * n, "truncated": (False,) * n, "failures": 0, "responses": None} | fields
    return EvalSamples(rewards=tuple(rewards), answers=answers if answers is None else tuple(answers), **whole)


def problem(uid: str, rewards: Sequence[float], answers: Sequence[str | None] | None = None, **fields: Any) -> Problem:
    return Problem(uid=uid, sampled=draws(rewards, answers, **fields), greedy=draws([rewards[0]], None))


def request(name: str = "sums", *, model: str = "a model", count: int = 3, **evaluation: Any) -> Request:
    return Request.of(config(**evaluation), {name: prompts(count=count)}, model=model, fingerprint=model)


PROBLEMS = [
    problem("sums.jsonl:1", [1, 1, 0, 0], ["1", "1", "5", None], truncated=(False, False, False, True)),
    problem("sums.jsonl:2", [0, 0, 0, 0], ["7", "8", "9", None], failures=2),
    problem("sums.jsonl:3", [1, 1, 1, 1], ["3", "3", "3", "3"], lengths=(1, 2, 3, 6)),
]


def finished(folder: Path, problems: Sequence[Problem] = PROBLEMS, **changes: Any) -> Evaluation:
    results = Results.start(folder, request(**changes))
    for name in results.missing:
        results.write(name, problems)
    results.finish()
    return Evaluation.read(folder)


# --- numbers


def test_each_quantity_is_a_mean_over_problems() -> None:
    columns = {name: values.tolist() for name, values in per_problem(PROBLEMS, (1, 2, 4)).items()}
    assert columns == {
        "pass@1": [0.5, 0, 1],
        "pass@2": [pytest.approx(5 / 6), 0, 1],
        "pass@4": [1, 0, 1],
        "majority@2": [pytest.approx((1 + 2 * 0.5 + 2 + 0) / 6), 0, 1],
        "majority@4": [1, 0, 1],
        "greedy": [1, 0, 1],
        "length": [4, 4, 3],
        "truncated": [0.25, 0, 0],
    }
    found = score(PROBLEMS, (1, 2, 4), seed=0)
    assert (found.problems, found.failures) == (3, 2)
    assert found.estimates["pass@1"].value == 0.5
    assert found.estimates["pass@1"].low <= 0.5 <= found.estimates["pass@1"].high


def test_without_answers_there_is_no_majority() -> None:
    silent = [dataclasses.replace(p, sampled=dataclasses.replace(p.sampled, answers=None)) for p in PROBLEMS]
    assert not [name for name in per_problem(silent, (1, 4)) if name.startswith("majority")]


def test_what_is_kept_of_a_group() -> None:
    (prompt,) = prompts(count=1)
    completions = (
        make_completion((5, 6), (-1.0, -1.0), "length", 0, "7 8"),
        make_completion((5,), (-1.0,), "stop", 0, "9"),
    )
    sampled = ScoredGroup(Group(prompt, completions), (1.0, 0.0), (0.0, 0.0), 1, ("8", "9"))
    greedy = ScoredGroup(Group(prompt, completions[1:]), (0.0,), (0.0,))
    found = Problem.of(sampled, greedy, responses=True)
    assert found.sampled == EvalSamples(
        rewards=(1.0, 0.0), answers=("8", "9"), lengths=(2, 1), truncated=(True, False), failures=1,
        responses=("7 8", "9"),
    )  # fmt: skip
    assert found.greedy.answers is None
    assert (found.question, found.reference_answer) == ("1 + 0?", "1")
    assert Problem.of(sampled, greedy, responses=False).sampled.responses is None


def test_older_results_without_the_question_are_read(tmp_path: Path) -> None:
    fields = dataclasses.asdict(PROBLEMS[0])
    del fields["question"], fields["reference_answer"]
    (tmp_path / "a.jsonl").write_text(json.dumps(fields) + "\n")
    assert read_problems(tmp_path / "a.jsonl") == PROBLEMS[:1]


TALKATIVE = [
    dataclasses.replace(found, sampled=dataclasses.replace(found.sampled, responses=("é" * 500,) * 4), question="1?")
    for found in PROBLEMS
]


def test_the_oldest_evaluations_lose_their_responses_and_nothing_else(tmp_path: Path) -> None:
    folders = [tmp_path / f"step_{step}" for step in (1, 2, 3)]
    before = [finished(folder, TALKATIVE) for folder in folders]
    size = sum(file.stat().st_size for file in folders[0].iterdir())
    limit_responses(tmp_path, 3 * size)
    assert [Evaluation.read(folder) for folder in folders] == before
    limit_responses(tmp_path, 5 * size // 2)
    first, *others = [Evaluation.read(folder) for folder in folders]
    assert others == before[1:]
    assert first.scores == before[0].scores
    assert first.request.settings == {**before[0].request.settings, "eval.responses": False}
    assert read_request(folders[0] / "evaluation.json") == first.request
    assert first.problems("sums") == [dataclasses.replace(p, question="1?") for p in PROBLEMS]
    limit_responses(tmp_path, 0)
    assert [found.sampled.responses for found in Evaluation.read(folders[1]).problems("sums")] == [None] * 3
    assert Evaluation.read(folders[2]) == before[2]


def test_a_damaged_evaluation_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2):
        finished(tmp_path / f"step_{step}", TALKATIVE)
    (tmp_path / "step_1" / "sums.jsonl").unlink()
    (tmp_path / "step_2" / "sums.jsonl").unlink()
    (tmp_path / "step_2" / "sums.jsonl").symlink_to("nothing")
    limit_responses(tmp_path, 0)
    assert "responses are not removed: " in caplog.text and "step_1/sums.jsonl" in caplog.text


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["aime24.jsonl", "aime25.parquet"], ["aime24", "aime25"]),
        (["a.jsonl", "a.parquet"], ["a.jsonl", "a.parquet"]),
        (["/x/a.jsonl", "/y/a.jsonl", "b.jsonl"], ["x-a.jsonl", "y-a.jsonl", "b"]),
        (["odd:name.jsonl"], ["odd:name"]),
        (["aime.jsonl.gz", "amc.csv"], ["aime", "amc"]),
    ],
)
def test_data_files_have_names_of_their_own(labels: list[str], names: list[str]) -> None:
    files = by_file([prompt for label in labels for prompt in prompts(label, 2)])
    assert list(files) == names
    assert [[prompt.uid for prompt in found] for found in files.values()] == [[f"{x}:1", f"{x}:2"] for x in labels]


# --- the folder


def test_a_finished_evaluation_reads_back(tmp_path: Path) -> None:
    evaluation = finished(tmp_path)
    assert evaluation.request == request()
    assert evaluation.problems("sums") == PROBLEMS
    assert evaluation.scores["sums"] == score(PROBLEMS, (1, 2, 4), seed=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation.json", "summary.json", "sums.jsonl"]


def test_it_goes_on_with_the_files_that_have_no_results(tmp_path: Path) -> None:
    asked = Request.of(config(), {"a": prompts("a"), "b": prompts("b")}, model="m", fingerprint="f")
    first = Results.start_or_continue(tmp_path, asked)
    assert first.missing == ["a", "b"]
    first.write("a", PROBLEMS)
    again = Results.start_or_continue(tmp_path, asked)
    assert again.missing == ["b"]
    assert Results.start(tmp_path, asked).missing == ["a", "b"]


def test_a_file_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = Results.start(tmp_path, request())
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("killed here")))
    with pytest.raises(WriteError, match="killed here"):
        results.write("sums", PROBLEMS)
    assert results.missing == ["sums"]


def test_one_data_file_more_makes_another_evaluation(tmp_path: Path) -> None:
    Results.start(tmp_path, request())
    more = Request.of(config(), {"sums": prompts(), "more": prompts()}, model="a model", fingerprint="a model")
    with pytest.raises(EvaluationError, match="found the data file 'more': none, expected 3 problems"):
        Results.start_or_continue(tmp_path, more)


def test_starting_anew_leaves_no_summary_of_what_was_there(tmp_path: Path) -> None:
    finished(tmp_path)
    Results.start(tmp_path, request())
    with pytest.raises(EvaluationError, match=r"summary\.json: found No such file"):
        Evaluation.read(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.5}, r"evaluation\.json: found eval\.temperature: 1\.0, expected 0\.5, as requested"),
        ({"count": 2}, r"found the data file 'sums': 3 problems, digest \w+, expected 2 problems"),
        ({"name": "other"}, r"found the data file 'sums': 3 problems, digest \w+, expected none, as requested"),
        ({"model": "another"}, "found results of a model, expected results of another"),
    ],
)
def test_another_evaluation_is_not_mixed_in(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    Results.start(tmp_path, request())
    with pytest.raises(EvaluationError, match=message):
        Results.start_or_continue(tmp_path, request(**changes))


@pytest.mark.parametrize("damage", ["{", "[]", "{}", '{"uid": "x", "sampled": {}, "greedy": {}}'])
def test_a_damaged_line_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "sums.jsonl"
    path.write_bytes(as_lines(PROBLEMS[:1]) + damage.encode() + b"\n")
    with pytest.raises(EvaluationError, match=r"sums\.jsonl:2: found .* Fix: remove the file"):
        read_problems(path)


@pytest.mark.parametrize("damage", ["{", "[]", "{}", '{"steps": 4}'])
def test_a_foreign_summary_is_named(tmp_path: Path, damage: str) -> None:
    (tmp_path / "summary.json").write_text(damage)
    with pytest.raises(EvaluationError, match=r"summary\.json: found .*expected a file written by an evaluation"):
        Evaluation.read(tmp_path)


def test_the_data_are_known_by_questions_and_answers_alone() -> None:
    same = [dataclasses.replace(p, student_tokens=(9, 9), uid=f"other:{i}") for i, p in enumerate(prompts())]
    other = [dataclasses.replace(p, answer="0") for p in prompts()]
    digests = [Request.of(config(), {"f": p}, model="m", fingerprint=None).data["f"] for p in (prompts(), same, other)]
    assert digests[0] == digests[1] != digests[2]


# --- side by side


def shown(folders: Sequence[Evaluation], **options: Any) -> str:
    output = io.StringIO()
    for name, table in compare(folders, **options).items():
        show(name, table, output)
    return output.getvalue()


def test_differences_are_over_pairs_of_the_same_problem(tmp_path: Path) -> None:
    """Each problem gains a quarter: the difference is certain, though each of the two accuracies is not."""
    before = [problem(f"sums.jsonl:{i}", [1] * i + [0] * (4 - i), None) for i in range(3)]
    after = [problem(f"sums.jsonl:{i}", [1] * (i + 1) + [0] * (3 - i), None) for i in range(3)]
    text = shown([finished(tmp_path / "a", before), finished(tmp_path / "b", after)])
    assert "+0.250 (+0.250 to +0.250)" in text
    assert "0.250 (0.000 to 0.500)" in text and "0.500 (0.250 to 0.750)" in text
    assert "a model" in text and str(tmp_path / "b") in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 8, "k": (1, 2, 4)}, r"b: found eval\.samples: 8, expected 4, as in .*a\. Fix: .*--anyway"),
        ({"count": 2}, r"b: found the data file 'sums': 2 problems.*, expected 3 problems"),
        ({"name": "other"}, r"b: found the data file 'sums': none, expected 3 problems"),
    ],
)
def test_unlike_evaluations_are_refused_unless_told(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    pair = [finished(tmp_path / "a"), finished(tmp_path / "b", **changes)]
    with pytest.raises(EvaluationError, match=message):
        compare(pair)
    text = shown(pair, anyway=True)
    assert text.count("pass@1") == (2 if "name" in changes else 1)
    assert ("+0.000" in text) == ("samples" in changes)  # on other problems there are no pairs


def test_what_changes_nothing_that_is_measured_may_differ(tmp_path: Path) -> None:
    assert compare([finished(tmp_path / "a"), finished(tmp_path / "b", responses=True, model="another")])


def test_a_table_for_a_log_is_not_broken(tmp_path: Path) -> None:
    output = io.StringIO()
    scores: Mapping[str, Any] = {f"file{i}": finished(tmp_path).scores["sums"] for i in range(6)}
    title = "long " * 40
    show(title, scores_table(scores), output)
    assert output.getvalue().startswith(title.rstrip())
    (line,) = (line for line in output.getvalue().splitlines() if "pass@1" in line)
    assert line.split("  ")[1:] and line.count("0.500 (") == 6
    assert json.loads((tmp_path / "summary.json").read_text())["scores"]["sums"]["estimates"]["pass@1"]["value"] == 0.5
