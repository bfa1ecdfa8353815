"""Sections `eval`, `rollout_log`, `alarms`, `checkpoint` and `watchdog`: what a run measures, keeps and watches."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sdpg_megatron.config.base import MAX_SECONDS, Section


class EvalConfig(Section):
    every: int = Field(0, ge=0)
    """Evaluate every so many steps; 0 for before and after training only."""
    samples: int = Field(4, ge=1, le=65_536)
    """Sampled responses per held-out prompt, besides the greedy one."""
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_response_tokens: int | None = Field(None, ge=1)
    """Null for the rollout's."""
    k: tuple[int, ...] = ()
    """pass@k and majority@k are reported for these; empty for the powers of two up to `samples`, and `samples`."""
    responses: bool = True
    """Keep the responses' text in the file of each problem's results."""


class RolloutLogConfig(Section):
    """Responses that a run keeps for reading, in `run_dir/rollouts`: a JSONL file a step, a response a line."""

    groups: int = Field(8, ge=0)
    """Groups of a step that are kept: the first of its prompts. 0 for none."""
    every: int = Field(1, ge=1)
    """Steps between two files."""
    max_mib: int = Field(256, ge=1)
    """Bound of the folder: the oldest files are removed. Also of `run_dir/eval`: the oldest evaluations lose their
    responses."""


class AlarmConfig(Section):
    """When a run is warned about. Each threshold may be null, for no such alarm. docs/training.md has the formulas."""

    window: int = Field(5, ge=1)
    """Steps that "now" is the mean of; the run's first so many are its start."""
    entropy: float | None = Field(0.1, gt=0)
    """Least entropy, over that of the run's start."""
    length_low: float | None = Field(0.25, gt=0)
    """Least response length, over that of the run's start."""
    length_high: float | None = Field(4.0, gt=1)
    """Largest response length, likewise."""
    truncated: float | None = Field(0.5, gt=0, le=1)
    """Largest share of responses that are cut at their length limit. Where all of a step are, one step is enough."""
    stop_probability: float | None = Field(0.5, gt=0)
    """Least probability of the stop tokens that end responses, over that of the run's start."""
    gate: bool = True
    """Whether to warn where no gate was open for `window` steps."""
    kl_spike: float | None = Field(5.0, gt=1)
    """Largest KL (to teacher, reference or rollout engine), over the median of the `window` steps before."""
    kl_floor: float = Field(0.05, ge=0)
    """Nats a token below which no KL is a spike."""
    entropy_floor: float | None = Field(0.01, ge=0)
    """Least entropy of a step, in nats a token, from the first step on."""
    kl_limit: float | None = Field(5.0, gt=0)
    """Largest KL (to teacher, reference or rollout engine) of a step, in nats a token, from the first step on."""
    failures: float | None = Field(0.1, ge=0, le=1)
    """Largest share of a step's verifier calls that fail, from the first step on. `reward.failure_limit` ends the run.
    """
    gradient_every: int = Field(10, ge=0)
    """Optimizer steps between measurements of `gradient_ratio`, each at the price of some forward passes of the head; 0
    for never."""
    gradient_ratio: float | None = Field(10.0, gt=0)
    """Largest norm of the distillation term's gradient in the logits, over that of the outcome and reference terms."""
    dead_groups: float | None = Field(0.9, gt=0, le=1)
    """Largest share of groups whose rewards are all equal."""
    reward_gain: float | None = Field(0.05, gt=0)
    """Rise of the training reward, from one span of evaluations to the next, that held-out accuracy has to follow."""
    evaluations: int = Field(3, ge=2)
    """Evaluations of such a span."""


class CheckpointConfig(Section):
    every: int = Field(10, ge=0)
    """Save every so many steps, and at the end; 0 for the end only."""
    keep: int = Field(2, ge=1)
    """Newest checkpoints to keep."""
    keep_every: int = Field(0, ge=0)
    """Also keep those whose step is a multiple of this; 0 for none."""
    asynchronous: bool = True
    """Write behind the steps that follow, from a copy of the state in host memory. A checkpoint then is complete a
    step or more later; a run that is stopped or ends waits for it."""
    verify: Literal["digests", "sizes"] = "digests"
    """What of a checkpoint's files is compared with its manifest before they are read: "digests" reads them whole,
    each rank its share."""
    export: bool = True
    """Write the trained model as a Hugging Face folder when the run ends."""


class WatchdogConfig(Section):
    """Seconds that the phases of a run may take on a rank; beyond, the job ends with every rank's place and stack. Null
    for no bound."""

    enabled: bool = True
    silence: float = Field(300.0, gt=0, le=MAX_SECONDS)
    """Seconds without a word from a rank, as its process is dead, stopped or cut off, after which the job ends."""
    start: float | None = Field(2 * 3600.0, gt=0, le=MAX_SECONDS)
    """Reading the model or a checkpoint, starting servers."""
    rollout: float | None = Field(3 * 3600.0, gt=0, le=MAX_SECONDS)
    """Generating and scoring, all rounds of a step."""
    prepare: float | None = Field(3600.0, gt=0, le=MAX_SECONDS)
    """The passes before the weights change."""
    update: float | None = Field(2 * 3600.0, gt=0, le=MAX_SECONDS)
    """All optimizer steps of a rollout."""
    publish: float | None = Field(3600.0, gt=0, le=MAX_SECONDS)
    switch: float | None = Field(3600.0, gt=0, le=MAX_SECONDS)
    """Taking the devices from colocated servers."""
    eval: float | None = Field(3 * 3600.0, gt=0, le=MAX_SECONDS)
    checkpoint: float | None = Field(2 * 3600.0, gt=0, le=MAX_SECONDS)
    finish: float | None = Field(2 * 3600.0, gt=0, le=MAX_SECONDS)
    """Waiting for the last checkpoint, exporting the model."""
    between: float | None = Field(3600.0, gt=0, le=MAX_SECONDS)
    """What is in no phase: planning, the records."""
