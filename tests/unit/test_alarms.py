"""Each alarm on a history that must raise it, and on ones that must not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from sdpg_megatron.config import AlarmConfig
from sdpg_megatron.observe.alarms import CHECKS, Alarms
from sdpg_megatron.observe.writers import read_metrics

W = AlarmConfig().window


def history(**series: list[float | None]) -> list[dict[str, float]]:
    """Records from lists of values, step by step; None for a step without one. `__` stands for a slash."""
    length = max(map(len, series.values()))
    return [
        {
            name.replace("__", "/"): value
            for name, values in series.items()
            if step < len(values) and (value := values[step]) is not None
        }
        for step in range(length)
    ]


def evaluated(rewards: list[float], accuracies: list[float]) -> list[dict[str, float]]:
    """One record before training, then an evaluation every second step."""
    later = [value for accuracy in accuracies[1:] for value in (None, accuracy)]
    return history(
        reward__mean=[None, *[reward for reward in rewards for _ in (0, 1)]],
        eval__sampled_accuracy=[accuracies[0], *later],
    )


BEFORE = [1.0] * W
CASES: list[tuple[str, list[dict[str, float]], bool | None]] = [
    ("entropy_collapse", history(train__entropy=[*BEFORE, *[0.05] * W]), True),
    ("entropy_collapse", history(train__entropy=[*BEFORE, *[0.2] * W]), False),
    ("entropy_collapse", history(train__entropy=[*BEFORE, *[0.5] * (W - 1), 0.0]), False),  # one step is not "now"
    ("entropy_collapse", history(train__entropy=[*BEFORE, *[0.05] * (W - 1)]), None),  # too early
    ("entropy_collapse", history(train__entropy=[*BEFORE, *[0.05] * W, None]), None),  # not measured now
    ("length_collapse", history(rollout__length=[*[100.0] * W, *[20.0] * W]), True),
    ("length_collapse", history(rollout__length=[*[100.0] * W, *[50.0] * W]), False),
    ("length_explosion", history(rollout__length=[*[100.0] * W, *[500.0] * W]), True),
    ("length_explosion", history(rollout__length=[*[100.0] * W, *[300.0] * W]), False),
    ("truncation", history(rollout__truncated=[0.6] * W), True),
    ("truncation", history(rollout__truncated=[0.4] * W), False),
    ("truncation", history(rollout__truncated=[0.6] * (W - 1)), None),
    ("truncation", history(rollout__truncated=[1.0]), True),  # all of the first step
    ("truncation", history(rollout__truncated=[1.0, 0.9]), None),
    ("entropy_floor", history(train__entropy=[0.001]), True),
    ("entropy_floor", history(train__entropy=[0.05]), False),
    ("entropy_floor", history(train__entropy=[0.001, None]), None),
    ("teacher_kl_limit", history(distill__kl=[33.0]), True),
    ("teacher_kl_limit", history(distill__kl=[33.0, 0.1]), False),
    ("reference_kl_limit", history(reference__kl=[0.1, 6.0]), True),
    ("reference_kl_limit", history(reference__kl=[2.0]), False),
    ("rollout_kl_limit", history(rollout__kl=[6.0]), True),
    ("rollout_kl_limit", history(rollout__kl=[1.0]), False),
    ("verifier_failures", history(reward__failure_rate=[0.2]), True),
    ("verifier_failures", history(reward__failure_rate=[0.1]), False),
    ("verifier_failures", history(reward__failure_rate=[1.0, 0.0]), False),
    ("verifier_failures", history(train__entropy=BEFORE), None),
    ("stop_probability", history(rollout__stop_probability=[*[0.9] * W, *[0.3] * W]), True),
    ("stop_probability", history(rollout__stop_probability=[*[0.3] * W, *[0.2] * W]), False),
    ("gate_closed", history(distill__gate_rate=[0.0] * W, distill__beta=[0.1] * W), True),
    ("gate_closed", history(distill__gate_rate=[*[0.0] * (W - 1), 0.01], distill__beta=[0.1] * W), False),
    ("gate_closed", history(distill__gate_rate=[0.0] * W, distill__beta=[0.0] * W), None),  # beta is 0
    ("gate_closed", history(train__entropy=BEFORE), None),
    ("teacher_kl_spike", history(distill__kl=[*[0.1] * W, 0.6]), True),
    ("teacher_kl_spike", history(distill__kl=[*[0.1] * W, 0.4]), False),
    ("teacher_kl_spike", history(distill__kl=[0.01] * (W - 1) + [0.6]), None),
    ("reference_kl_spike", history(reference__kl=[0.01 * n for n in range(W)] + [0.5]), True),
    ("reference_kl_spike", history(reference__kl=[10.0**n for n in range(-9, -9 + W)] + [0.01]), False),  # tiny
    ("reference_kl_spike", history(reference__kl=[*[0.1] * W, 0.6, 0.1]), False),  # over
    ("rollout_kl_spike", history(rollout__kl=[*[0.001] * W, 0.2]), True),
    ("rollout_kl_spike", history(rollout__kl=[*[0.001] * W, 0.02]), False),
    ("distillation_outweighs", history(distill__gradient_ratio=[0.1, 20.0, None]), True),
    ("distillation_outweighs", history(distill__gradient_ratio=[20.0, 5.0, None]), False),
    ("distillation_outweighs", history(train__entropy=BEFORE), None),
    ("dead_groups", history(reward__dead_groups=[0.2, *[0.95] * W]), True),
    ("dead_groups", history(reward__dead_groups=[*[0.95] * W, 0.5]), False),
    ("reward_hacking", evaluated([0.2, 0.3, 0.4, 0.6, 0.8], [0.3, 0.3, 0.35, 0.3, 0.3, 0.25]), True),
    ("reward_hacking", evaluated([0.2, 0.3, 0.4, 0.6, 0.8], [0.3, 0.3, 0.35, 0.4, 0.5, 0.6]), False),
    ("reward_hacking", evaluated([0.4, 0.4, 0.4, 0.4, 0.4], [0.3, 0.3, 0.35, 0.3, 0.3, 0.25]), False),
    ("reward_hacking", evaluated([0.2, 0.3, 0.4, 0.6], [0.3, 0.3, 0.35, 0.3, 0.2]), None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "records", "expected"), CASES)
def test_an_alarm_on_a_history(name: str, records: list[dict[str, float]], expected: bool | None) -> None:
    alarm = CHECKS[name](records, AlarmConfig())
    assert (alarm and alarm.on) == expected


def test_every_alarm_was_tried_both_ways() -> None:
    assert {(name, on) for name, _, on in CASES if on is not None} == {(n, on) for n in CHECKS for on in (True, False)}


THRESHOLDS = {
    "entropy": "entropy_collapse", "length_low": "length_collapse", "length_high": "length_explosion",
    "truncated": "truncation", "stop_probability": "stop_probability", "kl_spike": "teacher_kl_spike",
    "entropy_floor": "entropy_floor", "kl_limit": "teacher_kl_limit", "failures": "verifier_failures",
    "gradient_ratio": "distillation_outweighs", "dead_groups": "dead_groups", "reward_gain": "reward_hacking",
}  # fmt: skip


@pytest.mark.parametrize(("field", "name"), THRESHOLDS.items())
def test_without_a_threshold_there_is_no_alarm(field: str, name: str) -> None:
    records = next(records for case, records, on in CASES if case == name and on)
    assert CHECKS[name](records, AlarmConfig.model_validate({field: None})) is None


def test_without_the_gates_alarm() -> None:
    records = history(distill__gate_rate=[0.0] * W, distill__beta=[0.1] * W)
    assert CHECKS["gate_closed"](records, AlarmConfig(gate=False)) is None


ENTROPY = [*BEFORE, *[0.01] * (W + 2), *[3.0] * W, *[0.01] * W]
"""Collapses, recovers, and collapses again."""


def test_an_onset_is_warned_of_once() -> None:
    alarms = Alarms(AlarmConfig(), [])
    found = [alarms.update(step, {"train/entropy": value}) for step, value in enumerate(ENTROPY, start=1)]
    on = [findings.metrics.get("alarm/entropy_collapse") for findings in found]
    assert on == [*[None] * (2 * W - 1), *[1.0] * 3, *[0.0] * (2 * W - 1), 1.0]
    warned = {step: findings.warnings for step, findings in enumerate(found, start=1) if findings.warnings}
    assert warned.keys() == {2 * W, len(ENTROPY)}
    assert warned[2 * W] == ["entropy_collapse: train/entropy 0.01, 0.1 x 1 at least"]


@pytest.mark.parametrize("stopped", [3, 2 * W - 1, 2 * W, 2 * W + 1, 3 * W + 3])
def test_a_continued_run_goes_on_with_what_it_wrote(stopped: int, tmp_path: Path) -> None:
    """Records are read back from metrics.jsonl; what was on stays on, without another warning."""

    def run(alarms: Alarms, steps: range) -> list[Any]:
        found = []
        with (tmp_path / "metrics.jsonl").open("a") as file:
            for step in steps:
                findings = alarms.update(step, {"train/entropy": ENTROPY[step - 1], "policy/loss": math.inf})
                file.write(json.dumps({"step": step, "train/entropy": ENTROPY[step - 1], **findings.metrics}) + "\n")
                found.append(findings)
        return found

    total = len(ENTROPY) + 1
    whole = run(Alarms(AlarmConfig(), []), range(1, total))
    (tmp_path / "metrics.jsonl").unlink()
    first = run(Alarms(AlarmConfig(), []), range(1, stopped))
    again = Alarms(AlarmConfig(), read_metrics(tmp_path / "metrics.jsonl"))
    assert first + run(again, range(stopped, total)) == whole


def test_an_evaluation_that_comes_later_counts_for_its_step() -> None:
    records = evaluated([0.2, 0.3, 0.4, 0.6, 0.8], [0.3, 0.3, 0.35, 0.3, 0.3, 0.25])
    whole = Alarms(AlarmConfig(), [])
    expected = [whole.update(step, record) for step, record in enumerate(records)][-1]
    assert [warning.partition(":")[0] for warning in expected.warnings] == ["reward_hacking"]
    parts = Alarms(AlarmConfig(), [])
    for step, record in enumerate(records[:-1]):
        parts.update(step, record)
    last = dict(records[-1])
    accuracy = {"eval/sampled_accuracy": last.pop("eval/sampled_accuracy")}
    assert "alarm/reward_hacking" not in parts.update(len(records) - 1, last).metrics
    assert parts.update(len(records) - 1, accuracy) == expected
    assert parts.update(len(records), {"reward/mean": 0.8}).warnings == []


def test_what_a_step_says_bit_by_bit_is_warned_of_once() -> None:
    alarms = Alarms(AlarmConfig(), [])
    for step in range(W - 1):
        alarms.update(step, {"rollout/truncated": 0.9})
    assert len(alarms.update(W, {"rollout/truncated": 0.9}).warnings) == 1
    assert alarms.update(W, {"eval/sampled_accuracy": 0.5}).warnings == []


def test_values_that_are_not_finite_count_as_missing() -> None:
    alarms = Alarms(AlarmConfig(), [])
    for step, value in enumerate([*BEFORE, math.nan, *[0.01] * (W - 1)]):
        found = alarms.update(step, {"train/entropy": value}).metrics
        assert ("alarm/entropy_floor" in found) == math.isfinite(value)
        assert "alarm/entropy_collapse" not in found
    assert alarms.update(99, {"train/entropy": 0.01}).metrics["alarm/entropy_collapse"] == 1.0
