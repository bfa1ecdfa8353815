"""Section `objective`: the loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from sdpg_megatron.config.base import Section
from sdpg_megatron.config.method_defaults import with_method_defaults

Deviation = Literal["population", "sample", "none"]


class ObjectiveConfig(Section):
    """The defaults written here are SDPG's; `methods.DEFAULTS` has what other methods have instead."""

    name: str = "sdpg"
    """Training method: sdpg, rpg, grpo, dapo, rlsd, opsd, opcd, sdpo, or the class of an objective of your own as
    package.module:Class (docs/methods.md)."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Parameters of an objective of your own, as its class declares them."""
    advantage_deviation: Deviation = "population"
    """Divides a group's rewards less their mean: the standard deviation with the divisor G, with G - 1, or nothing."""
    policy: Literal["ratio", "reinforce", "clipped_reinforce"] = "ratio"
    """Outcome term: clipped importance ratio; advantage-weighted log-prob; or log-prob weighted by the clipped ratio's
    loss, which leaves clipped tokens a gradient (the paper's appendix A.3). Equal gradients with one mini-batch."""
    clip_low: float = Field(0.2, gt=0, lt=1)
    clip_high: float = Field(0.28, gt=0)
    """The ratio is clipped to [1 - clip_low, 1 + clip_high]."""
    dual_clip: float | None = Field(10.0, gt=1)
    """Bound c of the ratio where the advantage is negative; null for none."""
    distill_loss: Literal["divergence", "clipped_ratio"] = "divergence"
    """Distillation term: the divergence; or, for opsd, PPO's clipped ratio with the token advantage
    max(log q - log p_old, 0), as in the public SDPG code's opsd."""
    beta: float = Field(1e-3, ge=0)
    """Weight of the distillation term; 0 for methods that have none."""
    beta_warmup_steps: int | None = Field(None, ge=0)
    """Optimizer steps over which beta rises from 0; null for the paper's 50 of 400, scaled to the run; 0 for none."""
    beta_decay_steps: int | None = Field(None, ge=0)
    """Last optimizer steps, over which beta falls to 0; null for the paper's 350 of 400, scaled so; 0 for none."""
    gate: bool = True
    """Distil only responses with a positive advantage."""
    distill_average: Literal["all", "gated"] = "all"
    """Tokens that the distillation term is averaged over."""
    divergence: Literal["reverse_kl", "forward_kl", "jsd", "sampled_token"] = "reverse_kl"
    """Of the student from the teacher, exact over the vocabulary; or log p - log q of the sampled token alone."""
    jsd_beta: float = Field(0.5, gt=0, lt=1)
    """The teacher's share in jsd's mixture: beta KL(q || M) + (1 - beta) KL(p || M), M = (1 - beta) p + beta q."""
    top_k: int | None = Field(None, ge=1, le=1_000_000)
    """Tell apart the student's top k tokens alone, all others being one outcome; null for the whole vocabulary."""
    divergence_clip: float | None = Field(None, gt=0)
    """Largest divergence of a token. Beyond, its gradient is scaled down and keeps its direction. Null for none."""
    distill_stop_tokens: bool = True
    """Distil where the sampled token is a stop token, too. The privileged teacher keeps mass on going on."""
    context: Literal["data", "peer"] = "data"
    """What the teacher reads beside the question: what the data has, or, of the responses to the same question, the
    first successful one that is not the response at hand. Where there is none, nothing is distilled."""
    peer_reward: float = 1.0
    """Least reward of a response that is successful."""
    strip_peer_thinking: bool = False
    """Remove <think>...</think> from a successful response before the teacher reads it (sdpo's default). Models that
    treat these tags as special tokens leave none in the text."""
    teacher: Literal["current", "rollout", "every", "initial", "ema"] = "current"
    """Whose weights read the privileged context: the student's at each mini-batch; the student's before a rollout's
    first update; those at every `teacher_every`-th rollout step; those that the run started from; or their exponential
    moving average over optimizer steps. The last three cost a copy of the weights in host memory, which `initial`
    shares with the reference."""
    teacher_every: int = Field(10, ge=1)
    """Rollout steps."""
    teacher_ema: float = Field(0.05, gt=0, le=1)
    """Share of the way to the student's weights that the average goes at each optimizer step."""
    teacher_temperature: float | None = Field(None, gt=0)
    """Divides the teacher's logits; null for the rollout's temperature, as the student's."""
    credit: float = Field(0.5, ge=0, le=1)
    """rlsd: share lambda of a token's advantage that the teacher scales, before its decay."""
    credit_decay_steps: int = Field(50, ge=0)
    """Optimizer steps over which that share falls to 0; 0 to keep it."""
    credit_clip: float = Field(0.2, gt=0, lt=1)
    """The teacher's scale is clipped to [1 - credit_clip, 1 + credit_clip]."""
    credit_ratio: Literal["current", "rollout"] = "current"
    """rlsd: when that scale, q / p of the sampled token, is computed. "rollout": once per rollout, by the teacher's and
    the student's weights before its first update (rlsd's default); "current": at each mini-batch."""
    alpha: float = Field(1e-3, ge=0)
    """Weight of the reference term."""
    reference: Literal["urkl", "ufkl", "fkl", "rkl"] = "urkl"
    """Reference term as a function of log(pi / pi_ref) of the sampled token."""
    entropy_coefficient: float = Field(0.0, ge=0)
    """Weight of an entropy bonus: so many times each response token's entropy is taken from the loss."""
    ratio_weighted_regularizers: bool = True
    """Near on-policy, weight the distillation and reference terms by the detached ratio pi / pi_old."""
    regularizer_ratio_bound: float | None = Field(None, gt=1)
    """Largest such ratio; null for none."""
    correction: Literal["none", "truncate", "mask"] = "none"
    """What is done about the difference of trainer and rollout engine. The importance weight of a token is the ratio of
    its probability in training, before the step's first update, to that in rollout. "truncate": its loss is
    multiplied by min(weight, `correction_bound`); "mask": by the weight where that lies between the bound and
    its inverse, and left out elsewhere. Costs one forward pass where a step has one mini-batch."""
    correction_level: Literal["token", "sequence"] = "token"
    """Weight of each token, or one of a whole response: the geometric mean of its tokens' weights."""
    correction_bound: float = Field(2.0, gt=1)
    aggregation: Literal["token-mean", "group-token-mean", "sequence-mean"] = "token-mean"
    """How per-token losses become one number; denominators are global."""

    @model_validator(mode="before")
    @classmethod
    def _with_method_defaults(cls, tree: Any) -> Any:
        return with_method_defaults(tree) if isinstance(tree, Mapping) else tree
