"""Endless prompts from reasoning-gym, and its scorers."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sdpg_megatron.config import DataConfig, RewardConfig
from sdpg_megatron.data.cursor import Cursor
from sdpg_megatron.data.source import load_prompts
from sdpg_megatron.errors import ConfigError
from sdpg_megatron.records import Group, Prompt
from sdpg_megatron.rewards.pool import GroupRewards, VerifierPool
from tests.completions import make_completion
from tests.tiny import tiny_tokenizer

ROOT = Path(__file__).parents[2]
reasoning_gym = pytest.importorskip("reasoning_gym", reason="needs reasoning-gym: pip install -e '.[gym]'")

TASKS: dict[str, Any] = {
    "gcd": {"weight": 3},
    "basic_arithmetic": {"parameters": {"max_terms": 3}},
    "letter_counting": {},
    "word_sorting": {},
}
FEW: dict[str, Any] = {"gcd": {"parameters": {"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 5}}}
"""A task with 25 problems."""
PRINT = """
from tests.unit.test_data_gym import source
print("\\n".join([*(repr(source()[index]) for index in (0, 7, 501, 123456)), source().digest]))
"""


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def config(tasks: dict[str, Any] | None = None, held_out: int = 0, **fields: Any) -> DataConfig:
    gym = {"tasks": TASKS if tasks is None else tasks, "held_out": held_out}
    return DataConfig(reasoning_gym=gym, **fields)


def source(seed: int = 0, **fields: Any) -> Any:
    return load_prompts(config(**fields), tiny_tokenizer(), seed)[0]


def test_a_prompt_follows_from_seed_and_index(tokenizer: Any) -> None:
    indices = [0, 1, 499, 500, 7, 12345]
    prompts = {index: source()[index] for index in indices}
    again = source()
    assert {index: again[index] for index in reversed(indices)} == prompts
    assert len({prompt.question for prompt in prompts.values()}) == len(indices)
    assert source(seed=1)[0] != prompts[0]
    assert again.size is None
    assert prompts[500].uid.endswith(":500")
    answer = tokenizer.decode(prompts[7].teacher_tokens)
    assert f"The correct answer to this problem is: {prompts[7].answer}" in answer


def test_another_process_makes_the_same_prompts() -> None:
    """Whatever its hash seed: the ranks of a run, and the run that continues it."""
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    printed = subprocess.run(
        [sys.executable, "-c", PRINT],
        env={**os.environ, "PYTHONHASHSEED": seed},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    mine = source()
    assert printed == "".join(f"{mine[index]!r}\n" for index in (0, 7, 501, 123456)) + f"{mine.digest}\n"
    assert mine.digest != source(seed=1).digest


def test_a_resumed_run_goes_on_with_the_same_prompts() -> None:
    prompts, cursor = source(), Cursor(None, 0, shuffle=True)
    [prompts[index] for index in cursor.take(6)]
    resumed, continued = source(), Cursor.from_state(cursor.state(), None)
    assert [resumed[i] for i in continued.take(6)] == [prompts[i] for i in cursor.take(6)]


def test_tasks_come_by_their_weights() -> None:
    prompts = source()
    counts = Counter(prompts[index].metadata["reasoning_gym"]["task"] for index in range(600))
    assert counts.keys() == TASKS.keys()
    assert 0.42 < counts["gcd"] / 600 < 0.58


def test_training_never_shows_what_is_held_out(tokenizer: Any) -> None:
    prompts, held_out = load_prompts(config(FEW, held_out=10), tokenizer, 0)
    assert held_out is not None
    questions = {prompt.question for prompt in held_out.prompts}
    assert len(held_out) == len(questions) == 10
    assert {prompts[index].question for index in range(150)}.isdisjoint(questions)
    assert all(prompt.teacher_tokens == prompt.student_tokens for prompt in held_out.prompts)
    with pytest.raises(ConfigError, match=r"data\.reasoning_gym\.tasks\.gcd: found '100 problems that are held out"):
        load_prompts(config(FEW, held_out=26), tokenizer, 0)


def test_more_held_out_problems_than_there_are_are_refused_in_a_bounded_search(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are a few hundred words of three letters; each draw used to make a data set of its own."""
    made = 0
    create = reasoning_gym.create_dataset

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal made
        made += 1
        return create(*arguments, **options)

    monkeypatch.setattr(reasoning_gym, "create_dataset", counted)
    words: dict[str, Any] = {"spell_backward": {"parameters": {"min_word_len": 3, "max_word_len": 3}}}
    with pytest.raises(ConfigError, match=r"spell_backward: found '100 problems .* \([0-9]+ are held out so far\)"):
        load_prompts(config(words, held_out=4000), tokenizer, 0)
    assert made < 60
    prompts, held_out = load_prompts(config(words, held_out=300), tokenizer, 0)
    assert held_out is not None and len({prompt.question for prompt in held_out.prompts}) == 300
    made = 0
    assert {prompts[index].question for index in range(100)}.isdisjoint(p.question for p in held_out.prompts)
    assert made < 40, "blocks that are drawn from again are kept"


def test_held_out_problems_keep_the_tasks_shares(tokenizer: Any) -> None:
    """A task that has few problems is drawn from again rather than passed over."""
    _, held_out = load_prompts(config({**FEW, "word_sorting": {}}, held_out=40), tokenizer, 0)
    assert held_out is not None and len({prompt.question for prompt in held_out.prompts}) == 40
    counts = Counter(prompt.uid.partition(":")[0] for prompt in held_out.prompts)
    drawn = Counter(random.Random(f"0/held out/{index}").choices(["gcd", "word_sorting"])[0] for index in range(40))
    assert counts == drawn and counts["gcd"] > 10


def test_long_problems_are_passed_over_or_cut(tokenizer: Any) -> None:
    tasks: dict[str, Any] = {"gcd": {}, "basic_arithmetic": {}}
    whole = source(tasks=tasks)
    limit = sorted(len(whole[index].teacher_tokens) for index in range(20))[10]
    short = source(tasks=tasks, max_prompt_tokens=limit)
    assert max(len(short[index].teacher_tokens) for index in range(20)) <= limit
    cut = source(tasks=tasks, max_prompt_tokens=limit, overlong="truncate")
    assert [cut[i].teacher_tokens for i in range(20)] == [whole[i].teacher_tokens[-limit:] for i in range(20)]
    with pytest.raises(ConfigError, match=r"longer than data\.max_prompt_tokens"):
        source(max_prompt_tokens=3)


def test_the_context_of_another_problem_is_of_the_same_task_and_wrong(tokenizer: Any) -> None:
    own, other = source(tasks=FEW), source(tasks=FEW, context_of="other")
    for index in range(30):
        told = tokenizer.decode(other[index].teacher_tokens).split("this problem is: ")[1].split("<|im_end|>")[0]
        assert told.isdigit() and told != own[index].answer
        assert (other[index].question, other[index].answer) == (own[index].question, own[index].answer)


def test_a_task_with_one_answer_has_no_other_problem(tokenizer: Any) -> None:
    ones: dict[str, Any] = {"count_bits": {"parameters": {"min_n": 1, "max_n": 2}}}
    with pytest.raises(ConfigError, match=r"data\.context_of: found 'other', expected own with count_bits"):
        load_prompts(config(ones, context_of="other"), tokenizer, 0)


def test_the_tasks_score_themselves_in_the_pool() -> None:
    prompts = [source()[index] for index in range(8)]
    pool = VerifierPool(RewardConfig(verifier="reasoning_gym", timeout=60.0))
    groups = [
        Group(
            prompt,
            tuple(
                make_completion((5,), (-1.0,), "stop", 0, text)
                for text in (
                    prompt.answer,
                    f"Well. <answer>no</answer> <answer> {prompt.answer} </answer> Done.",
                    f"{prompt.answer} <answer>no such thing</answer>",
                    "",
                )
            ),
        )
        for prompt in prompts
    ]
    none = Group(Prompt("a:1", (1,), (1,), "1"), groups[0].completions[:1])
    *scored, failed = pool.score([*groups, none])
    pool.close()
    assert all(score.rewards[:2] == (1.0, 1.0) and max(score.rewards[2:]) < 0.1 for score in scored)
    assert sum(score.failures for score in scored) == 0
    assert failed == GroupRewards((0.0,), 1)


@pytest.mark.parametrize(
    ("tasks", "names"),
    [
        ({"gdc": {}}, r"tasks\.gdc: .*did you mean 'gcd'"),
        ({"ransom_note": {}}, r"tasks\.ransom_note: .*depend on the seed alone"),
        ({"rubiks_cube": {}}, r"tasks\.rubiks_cube: found 'the answer None'"),
        ({"gcd": {"parameters": {"seed": 3}}}, r"tasks\.gcd\.parameters: found \['seed'\]"),
        ({"gcd": {"parameters": {"max_nmbers": 3}}}, r"tasks\.gcd\.parameters: .*max_nmbers"),
        ({"gcd": {"parameters": {"min_numbers": 1}}}, r"tasks\.gcd\.parameters: .*Error"),
    ],
)
def test_a_task_that_cannot_be_used_is_refused(tasks: dict[str, Any], names: str, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=names):
        load_prompts(config(tasks), tokenizer, 0)


def test_without_the_package_its_extra_is_named(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    monkeypatch.delitem(sys.modules, "sdpg_megatron.data.gym", raising=False)
    with pytest.raises(ConfigError, match=r"data\.reasoning_gym\.tasks: .*pip install -e '\.\[gym\]'"):
        load_prompts(config(), tokenizer, 0)
