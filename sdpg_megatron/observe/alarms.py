"""Alarms: known failure modes of such runs, each detected by a function of the metric records so far.

A record holds a step's finite metrics by name. "Now" is the mean of a metric's last `window` values, "the start" the
mean of its first. An alarm with missing or too few metrics is None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from sdpg_megatron.config import AlarmConfig

PREFIX = "alarm/"
HELD_OUT = "eval/sampled_accuracy"
KLS = {"teacher": "distill/kl", "reference": "reference/kl", "rollout": "rollout/kl"}
REWARD, ENTROPY, LENGTH, TRUNCATED = "reward/mean", "train/entropy", "rollout/length", "rollout/truncated"
DEAD, STOP, GATE, BETA = "reward/dead_groups", "rollout/stop_probability", "distill/gate_rate", "distill/beta"
RATIO, FAILURES = "distill/gradient_ratio", "reward/failure_rate"

Record = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Alarm:
    """State of one alarm after a step."""

    on: bool
    text: str
    """Measured value and its bound."""


Check = Callable[[Sequence[Record], AlarmConfig], Alarm | None]


def entropy_collapse(records: Sequence[Record], config: AlarmConfig) -> Alarm | None:
    """Entropy fell: the policy is nearly deterministic, so groups have nothing to compare."""
    return _below_start(records, ENTROPY, config.entropy, config.window)


def length_collapse(records: Sequence[Record], config: AlarmConfig) -> Alarm | None:
    """Responses became short: an answer without reasoning, or none."""
    return _below_start(records, LENGTH, config.length_low, config.window)


def length_explosion(records: Sequence[Record], config: AlarmConfig) -> Alarm | None:
    """Responses became long."""
    if config.length_high is None or (found := _now_and_start(records, LENGTH, config.window)) is None:
        return None
    now, start = found
    return Alarm(now > config.length_high * start, f"{LENGTH} {now:.4g}, {config.length_high:g} x {start:.4g} at most")


def truncation(records: Sequence[Record], config: AlarmConfig) -> Alarm | None:
    """Many responses are truncated, so their rewards do not judge an answer."""
    if config.truncated is not None and records[-1].get(TRUNCATED) == 1:
        return Alarm(True, f"{TRUNCATED} 1, {config.truncated:g} at most")
    return _share(records, TRUNCATED, config.truncated, config.window)


def stop_probability(records: Sequence[Record], config: AlarmConfig) -> Alarm | None:
    """The policy stops less often: a teacher that keeps generating lowers the probability of stop tokens."""
    return _below_start(records, STOP, config.stop_probability, config.window)


def gate_closed(records: Sequence[Record], config: AlarmConfig) -> Alarm | None:
    """Nothing is distilled though beta > 0: no response has a positive advantage."""
    last = records[-config.window :]
    wanted = [
        record[GATE] for record in last if record.get(BETA, 0.0) > 0 and math.isfinite(record.get(GATE, math.nan))
    ]
    if not config.gate or len(wanted) < config.window:
        return None
    return Alarm(max(wanted) == 0, f"{GATE} {max(wanted):.4g} at most in {config.window} steps, above 0 expected")


def kl_spike(records: Sequence[Record], config: AlarmConfig, name: str) -> Alarm | None:
    """A KL jumped from one step to the next."""
    values = _values(records, name)
    if config.kl_spike is None or len(values) <= config.window or name not in records[-1]:
        return None
    usual = median(values[-config.window - 1 : -1])
    limit = max(config.kl_floor, config.kl_spike * usual)
    return Alarm(values[-1] > limit, f"{name} {values[-1]:.4g}, {limit:.4g} at most (median {usual:.4g})")


def entropy_floor(records: Sequence[Record], config: AlarmConfig) -> Alarm | None:
    """The policy is deterministic, regardless of its entropy at the start."""
    found = records[-1].get(ENTROPY)
    if config.entropy_floor is None or found is None:
        return None
    return Alarm(found < config.entropy_floor, f"{ENTROPY} {found:.4g}, {config.entropy_floor:g} at least")


def kl_limit(records: Sequence[Record], config: AlarmConfig, name: str) -> Alarm | None:
    """A KL is so large that the models differ fundamentally, as with wrong weights or another template."""
    return _at_most(records, name, config.kl_limit)


def verifier_failures(records: Sequence[Record], config: AlarmConfig) -> Alarm | None:
    """Verifier calls fail, and their samples get the failure reward."""
    return _at_most(records, FAILURES, config.failures)


def distillation_outweighs(records: Sequence[Record], config: AlarmConfig) -> Alarm | None:
    """The distillation gradient is much larger than the reward's. Keeps the last measurement until the next."""
    values = _values(records, RATIO)
    if config.gradient_ratio is None or not values:
        return None
    return Alarm(values[-1] > config.gradient_ratio, f"{RATIO} {values[-1]:.4g}, {config.gradient_ratio:g} at most")


def dead_groups(records: Sequence[Record], config: AlarmConfig) -> Alarm | None:
    """Nearly all groups have equal rewards and give no gradient: the prompts are too easy or too hard."""
    return _share(records, DEAD, config.dead_groups, config.window)


def reward_hacking(records: Sequence[Record], config: AlarmConfig) -> Alarm | None:
    """Training reward rises but held-out accuracy does not: the policy fits the verifier or the format.

    Compares means over the last `evaluations` evaluations with those over the ones before.
    """
    evaluated = [place for place, record in enumerate(records) if HELD_OUT in record]
    count = config.evaluations
    if config.reward_gain is None or len(evaluated) < 2 * count:
        return None
    first, middle, last = evaluated[-2 * count], evaluated[-count - 1], evaluated[-1]
    spans = [records[first : middle + 1], records[middle + 1 : last + 1]]
    rewards, accuracies = ([_values(span, name) for span in spans] for name in (REWARD, HELD_OUT))
    if not all(rewards):
        return None
    gain = fmean(rewards[1]) - fmean(rewards[0])
    followed = fmean(accuracies[1]) - fmean(accuracies[0])
    text = f"{REWARD} rose by {gain:.4g} over {count} evaluations, {HELD_OUT} by {followed:.4g}"
    return Alarm(gain >= config.reward_gain and followed <= 0, text)


def _spike_of(name: str) -> Check:
    return lambda records, config: kl_spike(records, config, name)


def _limit_of(name: str) -> Check:
    return lambda records, config: kl_limit(records, config, name)


CHECKS: Mapping[str, Check] = {
    "entropy_collapse": entropy_collapse,
    "length_collapse": length_collapse,
    "length_explosion": length_explosion,
    "truncation": truncation,
    "stop_probability": stop_probability,
    "gate_closed": gate_closed,
    **{f"{of}_kl_spike": _spike_of(name) for of, name in KLS.items()},
    "entropy_floor": entropy_floor,
    **{f"{of}_kl_limit": _limit_of(name) for of, name in KLS.items()},
    "verifier_failures": verifier_failures,
    "distillation_outweighs": distillation_outweighs,
    "dead_groups": dead_groups,
    "reward_hacking": reward_hacking,
}
READ = (*KLS.values(), HELD_OUT, REWARD, ENTROPY, LENGTH, TRUNCATED, DEAD, STOP, GATE, BETA, RATIO, FAILURES)


@dataclass(frozen=True, slots=True)
class Findings:
    """Alarms of a step."""

    metrics: dict[str, float]
    """``alarm/<name>``: 1 or 0, for alarms with enough data."""
    warnings: list[str]
    """One for each alarm that was off before."""


class Alarms:
    """Alarms of a run. The whole state is the records in metrics.jsonl."""

    def __init__(self, config: AlarmConfig, records: Sequence[Record]) -> None:
        """`records`: those of the run so far, each with its "step"; empty for a new run."""
        self._config = config
        self._records = [_kept(record) for record in records]

    def update(self, step: int, values: Record) -> Findings:
        """Add metrics of a step, all at once or in parts, and evaluate the alarms."""
        if not self._records or self._records[-1]["step"] != step:
            self._records.append({"step": step})
        known = self._records[-1]
        before = self._records[-2] if len(self._records) > 1 else {}
        joined = {**known, **_kept(values)}
        found = {name: check([*self._records[:-1], joined], self._config) for name, check in CHECKS.items()}
        metrics = {f"{PREFIX}{name}": float(alarm.on) for name, alarm in found.items() if alarm}
        new = [
            f"{name}: {alarm.text}"
            for name, alarm in found.items()
            if alarm and alarm.on and not any(record.get(f"{PREFIX}{name}") for record in (before, known))
        ]
        self._records[-1] = {**joined, **metrics}
        return Findings(metrics, new)


def _kept(record: Record) -> dict[str, float]:
    """Metrics of a record that alarms read. Non-finite values are dropped, as metrics.jsonl has null for them."""
    return {
        name: value
        for name, value in record.items()
        if (name in READ or name == "step" or name.startswith(PREFIX)) and math.isfinite(value)
    }


def _values(records: Sequence[Record], name: str) -> list[float]:
    return [record[name] for record in records if name in record]


def _now_and_start(records: Sequence[Record], name: str, window: int) -> tuple[float, float] | None:
    """Means of the last and of the first `window` values, which do not overlap; None with too few values."""
    values = _values(records, name)
    if len(values) < 2 * window or name not in records[-1]:
        return None
    return fmean(values[-window:]), fmean(values[:window])


def _below_start(records: Sequence[Record], name: str, share: float | None, window: int) -> Alarm | None:
    if share is None or (found := _now_and_start(records, name, window)) is None:
        return None
    now, start = found
    return Alarm(now < share * start, f"{name} {now:.4g}, {share:g} x {start:.4g} at least")


def _at_most(records: Sequence[Record], name: str, limit: float | None) -> Alarm | None:
    """Compare this step's value with a limit. Works from the first step on."""
    found = records[-1].get(name)
    return None if limit is None or found is None else Alarm(found > limit, f"{name} {found:.4g}, {limit:g} at most")


def _share(records: Sequence[Record], name: str, limit: float | None, window: int) -> Alarm | None:
    values = _values(records, name)[-window:]
    if limit is None or len(values) < window or name not in records[-1]:
        return None
    now = fmean(values)
    return Alarm(now > limit, f"{name} {now:.4g}, {limit:g} at most")
