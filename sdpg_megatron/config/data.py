"""Sections `data` and `reward`: prompts, privileged contexts, and how responses are scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from sdpg_megatron.config.base import MAX_SECONDS, Section

MAX_REWARD = 1e100
"""Bound of a reward's magnitude: sums of rewards stay finite."""


class GymTask(Section):
    weight: float = Field(1.0, gt=0)
    """Its share of the prompts, relative to the other tasks' weights."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    """The task's own settings, as reasoning_gym.create_dataset takes them."""


class GymConfig(Section):
    """Endless prompts from reasoning-gym, in the place of `data.train`."""

    tasks: dict[str, GymTask] = Field(default_factory=dict)
    """By reasoning-gym's name, for example {gcd: {weight: 2}, basic_arithmetic: {parameters: {max_terms: 3}}}."""
    held_out: int = Field(0, ge=0)
    """Problems for evaluation, in the place of `data.eval`; training never shows them."""


class DataConfig(Section):
    train: tuple[Path, ...] = ()
    """Files of prompts, or glob patterns: JSONL, JSON, CSV (each also gzipped) or Parquet."""
    eval: tuple[Path, ...] = ()
    """Held-out prompts; empty for no evaluation."""
    reasoning_gym: GymConfig = GymConfig()
    question_key: str = "question"
    """Column of the question, text or a list of chat messages. Where a row has none, the list in its column `prompt`,
    `messages` or `conversations`. The public SDPG format ([TEACHER_CONTEXT_TOKEN] in the content of a `prompt` list) is
    recognised by itself."""
    answer_key: str = "answer"
    """Column of the verifier's answer: text, a number, or a dict or list for a verifier of your own."""
    context_key: str = "context"
    """Column of the privileged context. Where a row has none: the assistant's message that ends its chat, else the
    answer."""
    context_template: str = "answer"
    """How the teacher's prompt carries the context: "answer", "verify", "solution", "feedback", or a template with
    {question}, {context} and, if wanted, {answer}."""
    context_of: Literal["own", "other"] = "own"
    """Whose context and answer the teacher is given: the problem's own or, as a control, those of another problem with
    another answer, drawn by `seed`."""
    peer_template: str = "peer"
    """How the teacher's prompt carries another response to the same question: "peer", or a template of your own with
    {question}, {context} (the response) and, if wanted, {answer}."""
    max_peer_tokens: int | None = Field(None, ge=1)
    """Longest teacher prompt with another response; one that is longer counts as none. Null for `max_prompt_tokens` and
    `rollout.max_response_tokens` together."""
    system: str | None = None
    """System message for student and teacher; null leaves the chat template's own default."""
    template_options: dict[str, Any] = Field(default_factory=dict)
    """Variables of the model's chat template, for example {enable_thinking: false} for Qwen3."""
    max_prompt_tokens: int = Field(2048, ge=1)
    """Longest student or teacher prompt."""
    overlong: Literal["drop", "truncate"] = "drop"
    """What happens to a longer one: left out, or cut on its left. Both are counted and reported."""
    duplicates: Literal["drop", "keep"] = "drop"
    """What happens to training rows with the question, answer and context of an earlier row, and the same other columns
    where the verifier is a module:function: left out and counted, or kept. An evaluation takes a problem once either
    way."""
    shuffle: bool = True
    """Shuffle every epoch, seeded by `seed`."""


class RewardConfig(Section):
    verifier: str = "number"
    """How a response is scored: "number" (its last number equals the answer), "math" (its last boxed answer, by
    math-verify), "answer" (its last line "Answer: value"), "exact" (all of it), "reasoning_gym" (the task's own
    scorer), or "module:function" of your own. docs/data.md says what each accepts."""
    timeout: float = Field(10.0, gt=0, le=MAX_SECONDS)
    """Seconds for one call; a call that takes longer, or raises, gives `failure_reward` and is counted."""
    failure_reward: float = Field(0.0, ge=-MAX_REWARD, le=MAX_REWARD)
    failure_limit: float | None = Field(0.5, gt=0, le=1)
    """Largest share of a step's or an evaluation's verifier calls that may fail; beyond, or where all fail, the run
    ends. Null for no limit."""
    workers: int = Field(1, ge=1, le=1024)
    """Processes that run verifiers."""
    clip: tuple[float, float] | None = None
    """Bounds of a verifier's reward in the advantages, for example [0, 1]; null for none."""
    overlong_buffer: int | None = Field(None, ge=1)
    """DAPO's penalty: over the last so many tokens below `rollout.max_response_tokens`, what is added to a reward falls
    linearly from 0 to -`overlong_penalty`; null for none."""
    overlong_penalty: float = Field(1.0, gt=0)
