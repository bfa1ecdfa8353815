"""Sections `eval`, `rollout_log`, `alarms`, `checkpoint` and `watchdog`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sdpg_megatron.config.base import MAX_SECONDS, Section


class EvalConfig(Section):
    """Evaluation on held-out problems; docs/evaluation.md defines the metrics."""

    every: int = Field(0, ge=0)
    """Interval between evaluations, in rollout steps. 0: only before and after training."""
    samples: int = Field(4, ge=1, le=65_536)
    """Number of sampled responses per problem, in addition to one greedy response."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling threshold. 1: the whole distribution."""
    max_response_tokens: int | None = Field(None, ge=1)
    """Maximum response length in tokens. Null: `rollout.max_response_tokens`."""
    k: tuple[int, ...] = ()
    """Values of k for pass@k and majority@k, each from 1 to `samples`. Empty: the powers of two up to `samples`, and
    `samples`."""
    responses: bool = True
    """Keep the text of the responses in the results."""


class RolloutLogConfig(Section):
    """Log of training responses: one JSONL file per step in `run_dir/rollouts`, one response per line."""

    groups: int = Field(8, ge=0)
    """Number of groups to log per step, in prompt order. 0: no log."""
    every: int = Field(1, ge=1)
    """Interval between logged steps."""
    max_mib: int = Field(256, ge=1)
    """Maximum size of the log in MiB; the oldest files are removed. It also bounds `run_dir/eval`, where the oldest
    evaluations lose the text of their responses."""


class AlarmConfig(Section):
    """Warnings about the state of a run; docs/training.md has the formulas. A threshold of null disables its alarm."""

    window: int = Field(5, ge=1)
    """Number of steps in the moving averages. The reference value "at the start" is the mean of the first `window`
    steps."""
    entropy: float | None = Field(0.1, gt=0)
    """Minimum policy entropy, as a fraction of the entropy at the start."""
    length_low: float | None = Field(0.25, gt=0)
    """Minimum mean response length, as a fraction of the length at the start."""
    length_high: float | None = Field(4.0, gt=1)
    """Maximum mean response length, as a multiple of the length at the start."""
    truncated: float | None = Field(0.5, gt=0, le=1)
    """Maximum fraction of responses that reach the length limit. A single step in which all do raises the alarm."""
    stop_probability: float | None = Field(0.5, gt=0)
    """Minimum probability of the sampled stop tokens, as a fraction of the probability at the start."""
    gate: bool = True
    """Warn if no response was distilled for `window` steps, because no gate was open."""
    kl_spike: float | None = Field(5.0, gt=1)
    """Maximum KL (to teacher, reference or rollout engine) of a step, as a multiple of the median over the `window`
    steps before."""
    kl_floor: float = Field(0.05, ge=0)
    """KL, in nats per token, up to which `kl_spike` raises no alarm."""
    entropy_floor: float | None = Field(0.01, ge=0)
    """Minimum policy entropy of a step, in nats per token. Applies from the first step."""
    kl_limit: float | None = Field(5.0, gt=0)
    """Maximum KL (to teacher, reference or rollout engine) of a step, in nats per token. Applies from the first step.
    """
    failures: float | None = Field(0.1, ge=0, le=1)
    """Maximum fraction of failed verifier calls in a step. Applies from the first step. `reward.failure_limit` is the
    threshold that ends the run."""
    gradient_every: int = Field(10, ge=0)
    """Interval, in optimizer steps, between measurements of the gradient ratio. Each costs about three forward passes
    of the output head. 0: never."""
    gradient_ratio: float | None = Field(10.0, gt=0)
    """Maximum norm of the distillation loss's gradient with respect to the logits, as a multiple of the gradient norm
    of the policy and reference losses."""
    dead_groups: float | None = Field(0.9, gt=0, le=1)
    """Maximum fraction of groups with equal rewards."""
    reward_gain: float | None = Field(0.05, gt=0)
    """Rise of the mean training reward over `evaluations` evaluations that raises the alarm if held-out accuracy does
    not rise, too."""
    evaluations: int = Field(3, ge=2)
    """Number of evaluations per interval that `reward_gain` compares."""


class CheckpointConfig(Section):
    """Checkpoints in `run_dir/checkpoints` and the exported model."""

    every: int = Field(10, ge=0)
    """Interval between checkpoints, in rollout steps; the last step is always saved. 0: only the last step."""
    keep: int = Field(2, ge=1)
    """Number of latest checkpoints to keep."""
    keep_every: int = Field(0, ge=0)
    """Also keep checkpoints at steps that are multiples of this. 0: none."""
    asynchronous: bool = True
    """Write checkpoints in the background, from a copy of the state in host memory. A checkpoint is then complete one
    or more steps later; the end or interruption of a run waits for it."""
    verify: Literal["digests", "sizes"] = "digests"
    """Check of a checkpoint's files against its manifest before loading: `digests` reads all files, each rank a part of
    them; `sizes` compares file sizes only."""
    export: bool = True
    """Write the trained model as a Hugging Face folder at the end of the run."""


class WatchdogConfig(Section):
    """Time limits for the phases of a run on each rank. If one is exceeded, the job ends and reports phase and stack of
    every rank."""

    enabled: bool = True
    """Enable the watchdog."""
    silence: float = Field(300.0, gt=0, le=MAX_SECONDS)
    """Time limit, in seconds, since the last heartbeat of a rank. It is exceeded if the process is dead, stopped or
    disconnected."""
    start: float | None = Field(2 * 3600.0, gt=0, le=MAX_SECONDS)
    """Time limit, in seconds, for loading the model or a checkpoint and starting servers. Null: no limit."""
    rollout: float | None = Field(3 * 3600.0, gt=0, le=MAX_SECONDS)
    """Time limit, in seconds, for generating and scoring the responses of a step, over all rounds. Null: no limit."""
    prepare: float | None = Field(3600.0, gt=0, le=MAX_SECONDS)
    """Time limit, in seconds, for the forward passes before the first update of a rollout (log-probabilities of old
    policy, reference and teacher). Null: no limit."""
    update: float | None = Field(2 * 3600.0, gt=0, le=MAX_SECONDS)
    """Time limit, in seconds, for all optimizer steps of a rollout. Null: no limit."""
    publish: float | None = Field(3600.0, gt=0, le=MAX_SECONDS)
    """Time limit, in seconds, for publishing weights to the rollout engine. Null: no limit."""
    switch: float | None = Field(3600.0, gt=0, le=MAX_SECONDS)
    """Time limit, in seconds, for taking the devices back from colocated servers. Null: no limit."""
    eval: float | None = Field(3 * 3600.0, gt=0, le=MAX_SECONDS)
    """Time limit, in seconds, for an evaluation. Null: no limit."""
    checkpoint: float | None = Field(2 * 3600.0, gt=0, le=MAX_SECONDS)
    """Time limit, in seconds, for saving a checkpoint. Null: no limit."""
    finish: float | None = Field(2 * 3600.0, gt=0, le=MAX_SECONDS)
    """Time limit, in seconds, for waiting for the last checkpoint and exporting the model. Null: no limit."""
    between: float | None = Field(3600.0, gt=0, le=MAX_SECONDS)
    """Time limit, in seconds, outside of these phases, for example for planning and logging. Null: no limit."""
