"""What an evaluation asks of the rollout side: the same at every step, and in every version."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from sdpg_megatron.config.load import load_config, parse
from sdpg_megatron.data import source as data_source
from sdpg_megatron.errors import ConfigError, DataError, VerifierError
from sdpg_megatron.evaluation.problems import by_file
from sdpg_megatron.records import Group, Prompt, ScoredGroup
from sdpg_megatron.rollout.base import Sampling
from sdpg_megatron.train.eval_command import load_prompts
from sdpg_megatron.train.evaluate import evaluate, metrics
from sdpg_megatron.train.held_out import evaluations_after
from sdpg_megatron.train.inputs import ModelInputs
from tests.completions import make_completion
from tests.e2e.runs import ROOT
from tests.tiny import tiny_tokenizer

SEED = 2001423527554960999
"""Of the shipped example's evaluations; its published figures rest on it."""


class Recorder:
    """Answers every request alike, and remembers it."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[str], Sampling, bool]] = []

    def run(self, prompts: Sequence[Prompt], sampling: Sampling, *, extract: bool = False) -> list[ScoredGroup]:
        self.asked.append(([prompt.uid for prompt in prompts], sampling, extract))
        completions = (make_completion((5,), (-1.0,), "stop", 0, "5"),) * sampling.n
        rewards = (1.0,) + (0.0,) * (sampling.n - 1)
        return [ScoredGroup(Group(p, completions), rewards, rewards, 0, ("5",) * sampling.n) for p in prompts]


def prompts(file: str, count: int) -> list[Prompt]:
    return [Prompt(f"{file}.jsonl:{row}", (1,), (1,), answer="5") for row in range(1, count + 1)]


class Failing(Recorder):
    """The verifier fails on every response."""

    def run(self, prompts: Sequence[Prompt], sampling: Sampling, *, extract: bool = False) -> list[ScoredGroup]:
        groups = super().run(prompts, sampling, extract=extract)
        n = sampling.n
        return [replace(group, failures=n, errors=("KeyError: 'k' (v.py:3)",) * n) for group in groups]


def test_an_evaluation_whose_verifier_fails_is_an_error_that_names_the_file() -> None:
    config = load_config(ROOT / "examples" / "smollm2" / "addition.yaml", ["model.path=m"])
    rollouts = Failing()
    said = r"evaluation on sums: found 8 of 8 calls that failed, the first on eval\.jsonl:1: KeyError: 'k' \(v\.py:3\)"
    with pytest.raises(VerifierError, match=said):
        evaluate(config, rollouts, prompts("eval", 2), 0, "sums")  # type: ignore[arg-type]
    assert len(rollouts.asked) == 1, "the greedy responses are not asked for"


def test_the_examples_draws_stay_what_they_are() -> None:
    config = load_config(ROOT / "examples" / "smollm2" / "addition.yaml", ["model.path=m"])
    rollouts = Recorder()
    evaluate(config, rollouts, prompts("eval", 2), 0)  # type: ignore[arg-type]
    uids = ["eval.jsonl:1", "eval.jsonl:2"]
    assert rollouts.asked == [(uids, Sampling(4, 12, 1.0, 1.0, SEED), True), (uids, Sampling(1, 12, 0.0), True)]


def test_replicas_draw_differently_and_limits_are_the_evaluations_own() -> None:
    tree = {"run_dir": "x", "steps": 10, "model": {"path": "m"}, "data": {"train": []}}
    rollouts = Recorder()
    for replica in (0, 1):
        config = parse({**tree, "eval": {"max_response_tokens": 7, "temperature": 0.5, "top_p": 0.9}})
        evaluate(config, rollouts, prompts("eval", 1), replica)  # type: ignore[arg-type]
    sampled = [sampling for _, sampling, _ in rollouts.asked if sampling.n == 4]
    assert [(s.max_tokens, s.temperature, s.top_p) for s in sampled] == [(7, 0.5, 0.9)] * 2
    assert sampled[0].seed == SEED != sampled[1].seed


def test_metrics_by_data_file_where_there_are_several() -> None:
    config = load_config(ROOT / "examples" / "smollm2" / "addition.yaml", ["model.path=m", "eval.k=[2]"])
    one = evaluate(config, Recorder(), prompts("a", 1), 0)  # type: ignore[arg-type]
    names = {"sampled_accuracy", "pass_at_2", "majority_at_2", "greedy_accuracy", "length", "truncated", "failures"}
    alone = metrics(config, {"a": one})
    assert set(alone) == {f"eval/{name}" for name in names}
    assert alone["eval/sampled_accuracy"].value == 0.25
    assert alone["eval/pass_at_2"].value == pytest.approx(0.5)
    both = metrics(config, {"a": one, "b": one})
    assert set(both) == {f"{prefix}/{name}" for prefix in ("eval", "eval/a", "eval/b") for name in names}


@pytest.mark.parametrize("every", [0, 1, 3, 4, 20])
def test_evaluations_to_come_are_those_that_are_due(every: int) -> None:
    tree = {"run_dir": "x", "steps": 12, "model": {"path": "m"}, "data": {"eval": ["x"]}, "eval": {"every": every}}
    config = parse({**tree, "optimizer": {"warmup_steps": 0}})
    due = [step for step in range(1, 13) if step == 12 or (every and step % every == 0)]
    for step in range(13):
        assert evaluations_after(step, config) == len([other for other in due if other > step])


def test_a_file_of_a_pattern_that_has_no_prompts_left_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    short, long = (json.dumps({"question": question, "answer": "2"}) + "\n" for question in ("1+1?", "x" * 900))
    (tmp_path / "a.jsonl").write_text(short + long)
    config = load_config(
        ROOT / "examples" / "smollm2" / "addition.yaml", ["model.path=m", f"data.eval=[{tmp_path}/*.jsonl]"]
    )
    inputs = ModelInputs(arch=cast(Any, None), tokenizer=tiny_tokenizer(), stop_ids=())
    assert [len(found) for found in load_prompts(config, inputs).values()] == [1]
    assert "1 problems left out and 0 cut, as their prompts are over" in caplog.text
    assert "tokens, the first: a.jsonl:2" in caplog.text
    (tmp_path / "b.jsonl").write_text(long)
    with pytest.raises(DataError, match=r"b\.jsonl: found 1 rows, all longer than"):
        load_prompts(config, inputs)


def test_a_run_on_reasoning_gym_is_evaluated_on_what_it_held_out() -> None:
    pytest.importorskip("reasoning_gym", reason="needs reasoning-gym: pip install -e '.[gym]'")
    gym = "data.reasoning_gym={{tasks: {{gcd: {{}}, letter_counting: {{}}}}, held_out: {}}}"
    fields = ["model.path=m", "data.train=[]", "data.eval=[]", "eval.every=0", "data.max_prompt_tokens=400"]
    path = ROOT / "examples" / "smollm2" / "addition.yaml"
    inputs = ModelInputs(arch=cast(Any, None), tokenizer=tiny_tokenizer(), stop_ids=())
    config = load_config(path, [*fields, gym.format(5)])
    held_out = data_source.load_prompts(config.data, inputs.tokenizer, config.seed)[1]
    assert held_out is not None
    assert load_prompts(config, inputs) == by_file(held_out.prompts)
    with pytest.raises(ConfigError, match=r"data\.reasoning_gym\.held_out: found 0, expected problems to evaluate on"):
        load_prompts(load_config(path, [*fields, gym.format(0)]), inputs)
