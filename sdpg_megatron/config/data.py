"""Sections `data` and `reward`: prompts, the teacher's context and the scoring of responses."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from sdpg_megatron.config.base import MAX_SECONDS, Section

MAX_REWARD = 1e100
"""Largest magnitude of a reward. Sums of rewards stay finite."""


class GymTask(Section):
    """One reasoning-gym task."""

    weight: float = Field(1.0, gt=0)
    """Relative sampling weight of the task."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the task for `reasoning_gym.create_dataset`."""


class GymConfig(Section):
    """Endless stream of prompts from reasoning-gym, used instead of `data.train`."""

    tasks: dict[str, GymTask] = Field(default_factory=dict)
    """Tasks by their reasoning-gym name, for example `{gcd: {weight: 2}, basic_arithmetic: {parameters:
    {max_terms: 3}}}`. Empty: prompts come from `data.train`."""
    held_out: int = Field(0, ge=0)
    """Number of problems to evaluate on, used instead of `data.eval`. Training never uses them."""


class DataConfig(Section):
    """Training and evaluation prompts, and the teacher's context."""

    train: tuple[Path, ...] = ()
    """Training files or glob patterns: JSONL, JSON or CSV, each optionally gzipped, or Parquet."""
    eval: tuple[Path, ...] = ()
    """Evaluation files or glob patterns, in the formats of `train`. Empty: no evaluation."""
    reasoning_gym: GymConfig = GymConfig()
    question_key: str = "question"
    """Column with the question: text or a list of chat messages. A row without it is read from the list in its column
    `prompt`, `messages` or `conversations`. The public SDPG format (`[TEACHER_CONTEXT_TOKEN]` in a `prompt` list) is
    detected automatically."""
    answer_key: str = "answer"
    """Column with the reference answer: text, a number or a boolean. Custom verifiers may also take a dict or a list.
    """
    context_key: str = "context"
    """Column with the teacher's context, for example a worked solution. A row without it uses the assistant message
    that ends its chat, or else the answer."""
    context_template: str = "answer"
    """Format of the teacher's prompt: `answer`, `verify`, `solution`, `feedback`, or a custom template with
    `{question}` and, optionally, `{context}` and `{answer}`."""
    context_of: Literal["own", "other"] = "own"
    """Problem that the teacher's context and answer are taken from. `own` is the same problem. `other` is a control
    experiment: a different problem with a different answer, drawn with `seed`."""
    peer_template: str = "peer"
    """Format of the teacher's prompt with a successful response (`objective.context: peer`): `peer`, or a custom
    template with `{question}`, `{context}` (the response) and, optionally, `{answer}`."""
    max_peer_tokens: int | None = Field(None, ge=1)
    """Maximum length, in tokens, of a teacher prompt with a successful response. A response with a
    longer teacher prompt is not distilled. Null: the sum of `max_prompt_tokens` and `rollout.max_response_tokens`."""
    system: str | None = None
    """System message for student and teacher. Null: the default of the chat template."""
    template_options: dict[str, Any] = Field(default_factory=dict)
    """Variables of the model's chat template, for example `{enable_thinking: false}` for Qwen3."""
    max_prompt_tokens: int = Field(2048, ge=1)
    """Maximum length, in tokens, of a student or teacher prompt."""
    overlong: Literal["drop", "truncate"] = "drop"
    """Treatment of prompts over `max_prompt_tokens`: `drop` removes the row, `truncate` cuts the prompt on the left.
    Both are counted and reported."""
    duplicates: Literal["drop", "keep"] = "drop"
    """Treatment of training rows that repeat question, answer and context of an earlier row. With a custom verifier
    the other columns must be equal, too. `drop` removes and counts them. Evaluation always uses each problem once."""
    shuffle: bool = True
    """Shuffle the training prompts in every epoch, with `seed`."""


class RewardConfig(Section):
    """Verifier and reward shaping."""

    verifier: str = "number"
    """Scoring function of a response: `number` (the last number equals the answer), `math` (the last boxed answer, by
    math-verify), `answer` (the last line `Answer: value`), `exact` (the whole response), `reasoning_gym` (the scorer
    of the task), or a custom `module:function`. docs/data.md has the details."""
    timeout: float = Field(10.0, gt=0, le=MAX_SECONDS)
    """Time limit of one verifier call, in seconds. A call that times out or raises is counted as a failure and gives
    `failure_reward`."""
    failure_reward: float = Field(0.0, ge=-MAX_REWARD, le=MAX_REWARD)
    """Reward of a response if its verifier call failed."""
    failure_limit: float | None = Field(0.5, gt=0, le=1)
    """Maximum fraction of failed verifier calls in a step or an evaluation. The run ends with an error if it is
    exceeded, or if all calls fail. Null: no limit."""
    workers: int = Field(1, ge=1, le=1024)
    """Number of verifier processes per data-parallel replica."""
    clip: tuple[float, float] | None = None
    """Lower and upper bound of the rewards that enter the advantages, for example `[0, 1]`. Null: no clipping."""
    overlong_buffer: int | None = Field(None, ge=1)
    """Length in tokens of DAPO's soft overlong penalty (arXiv 2503.14476, eq. 13). Over the last `overlong_buffer`
    tokens below `rollout.max_response_tokens` the term added to the reward falls linearly from 0 to
    -`overlong_penalty`. Null: no penalty. Default of `dapo`: a fifth of `rollout.max_response_tokens`."""
    overlong_penalty: float = Field(1.0, gt=0)
    """Magnitude of the overlong penalty at `rollout.max_response_tokens`."""
