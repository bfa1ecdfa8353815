"""Section `objective`: training method and loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from sdpg_megatron.config.base import Section
from sdpg_megatron.config.method_defaults import with_method_defaults

Deviation = Literal["population", "sample", "none"]


class ObjectiveConfig(Section):
    """Training method and loss. The defaults are for `sdpg`; `method_defaults.DEFAULTS` has the other methods."""

    name: str = "sdpg"
    """Training method: `sdpg`, `rpg`, `grpo`, `dapo`, `rlsd`, `opsd`, `opcd`, `sdpo`, or the class of a custom
    objective as `package.module:Class`. It selects the defaults of other fields. docs/methods.md has the formulas."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Parameters of a custom objective, as declared by its class. Must be empty for the methods of this package."""
    advantage_deviation: Deviation = "population"
    """Divisor of the centered rewards of a group of G: the standard deviation with divisor G (`population`) or G - 1
    (`sample`), or none."""
    policy: Literal["ratio", "reinforce", "clipped_reinforce"] = "ratio"
    """Policy loss: PPO's clipped importance ratio (`ratio`); advantage times log-probability (`reinforce`), for one
    mini-batch only; or log-probability times the detached clipped loss, which gives clipped tokens a gradient
    (`clipped_reinforce`, arXiv 2606.04036, appendix A.3). With one mini-batch all three have the same gradient."""
    clip_low: float = Field(0.2, gt=0, lt=1)
    """The importance ratio is clipped from below at 1 - `clip_low`."""
    clip_high: float = Field(0.28, gt=0)
    """The importance ratio is clipped from above at 1 + `clip_high`."""
    dual_clip: float | None = Field(10.0, gt=1)
    """Upper bound of the importance ratio where the advantage is negative (dual-clip PPO). Null: no bound."""
    distill_loss: Literal["divergence", "clipped_ratio"] = "divergence"
    """Distillation loss: the divergence from the teacher, or (only for `opsd`) PPO's clipped ratio with the token
    advantage max(log q - log p_old, 0), as in the public SDPG code."""
    beta: float = Field(1e-3, ge=0)
    """Peak weight of the distillation loss. 0: no distillation."""
    beta_warmup_steps: int | None = Field(None, ge=0)
    """Number of optimizer steps over which beta rises linearly from 0. 0: no warm-up. Null: 1/8 of the run, as 50 of
    400 steps in the paper."""
    beta_decay_steps: int | None = Field(None, ge=0)
    """Number of optimizer steps at the end of the run over which beta falls linearly to 0. 0: no decay. Null: 7/8 of
    the run, as 350 of 400 steps in the paper, or the part that a longer warm-up leaves."""
    gate: bool = True
    """Distill only responses with a positive advantage. If false, all responses are distilled."""
    distill_average: Literal["all", "gated"] = "all"
    """Tokens in the denominator of the distillation loss: all response tokens, or only distilled ones."""
    divergence: Literal["reverse_kl", "forward_kl", "jsd", "sampled_token"] = "reverse_kl"
    """Divergence between student p and teacher q. `reverse_kl` is KL(p || q), `forward_kl` is KL(q || p), `jsd` is the
    Jensen-Shannon divergence; these three are exact over the vocabulary. `sampled_token` is log p - log q of the
    sampled token."""
    jsd_beta: float = Field(0.5, gt=0, lt=1)
    """Teacher's weight in `jsd`: beta KL(q || M) + (1 - beta) KL(p || M) with M = (1 - beta) p + beta q."""
    top_k: int | None = Field(None, ge=1, le=1_000_000)
    """Compute the divergence over the student's top k tokens plus one bucket for the rest. Null: the whole
    vocabulary."""
    divergence_clip: float | None = Field(None, gt=0)
    """Maximum divergence per token, in nats. The gradient of a token above it is scaled down and keeps its direction.
    Null: no maximum."""
    distill_stop_tokens: bool = True
    """Distill at positions where the sampled token is a stop token. The teacher tends to continue there."""
    context: Literal["data", "peer"] = "data"
    """Context in the teacher's prompt. `data`: the context of the data set. `peer`: the first successful response of
    the same group other than the distilled one; without one, the response is not distilled."""
    peer_reward: float = 1.0
    """Minimum reward of a successful response (`context: peer`)."""
    strip_peer_thinking: bool = False
    """Remove `<think>...</think>` from a successful response before the teacher reads it. No effect for
    tokenizers that treat these tags as special tokens."""
    teacher: Literal["current", "rollout", "every", "initial", "ema"] = "current"
    """Teacher weights: the student's at each mini-batch (`current`), before the first update of each rollout
    (`rollout`), at every `teacher_every`-th rollout step (`every`), at the start of the run (`initial`), or their
    exponential moving average over optimizer steps (`ema`). The last three keep a copy of the weights in host memory;
    `initial` shares it with the reference model."""
    teacher_every: int = Field(10, ge=1)
    """Interval, in rollout steps, between updates of the teacher `every`."""
    teacher_ema: float = Field(0.05, gt=0, le=1)
    """Update rate per optimizer step of the teacher `ema`: average + rate x (student - average)."""
    teacher_temperature: float | None = Field(None, gt=0)
    """Temperature of the teacher's logits. Null: `rollout.temperature`, as for the student."""
    credit: float = Field(0.5, ge=0, le=1)
    """Only `rlsd`: initial fraction lambda of a token's advantage that is scaled by the teacher."""
    credit_decay_steps: int = Field(50, ge=0)
    """Only `rlsd`: number of optimizer steps over which `credit` falls linearly to 0. 0: no decay."""
    credit_clip: float = Field(0.2, gt=0, lt=1)
    """Only `rlsd`: the teacher's scale is clipped to [1 - `credit_clip`, 1 + `credit_clip`]."""
    credit_ratio: Literal["current", "rollout"] = "current"
    """Only `rlsd`: computation of the scale q / p of the sampled token, at each mini-batch (`current`) or once per
    rollout before its first update (`rollout`)."""
    alpha: float = Field(1e-3, ge=0)
    """Weight of the KL regularization towards the reference model, the weights at the start of the run. 0: none."""
    reference: Literal["urkl", "ufkl", "fkl", "rkl"] = "urkl"
    """Reference loss as a function of r = log(pi / pi_ref) of the sampled token: r^2 / 2 (`urkl`), exp(-r) + r
    (`ufkl`), exp(-r) (`fkl`) or (r + 1)^2 / 2 (`rkl`)."""
    entropy_coefficient: float = Field(0.0, ge=0)
    """Weight of the entropy bonus: coefficient x entropy (in nats) of a response token is subtracted from its loss. 0:
    none."""
    ratio_weighted_regularizers: bool = True
    """Multiply the distillation and reference losses by the detached importance ratio pi / pi_old."""
    regularizer_ratio_bound: float | None = Field(None, gt=1)
    """Maximum of the ratio that weights the distillation and reference losses. Null: no maximum."""
    correction: Literal["none", "truncate", "mask"] = "none"
    """Correction for the difference between trainer and rollout engine. The weight w of a token is its probability
    under the trainer before the first update of the step, divided by its probability in rollout. `truncate`: the loss
    is multiplied by min(w, `correction_bound`). `mask`: the loss is multiplied by w if w is between 1 /
    `correction_bound` and `correction_bound`, and dropped otherwise. With one mini-batch per step it costs one
    additional forward pass."""
    correction_level: Literal["token", "sequence"] = "token"
    """Level of the weight w in `correction`: one weight per token, or one per response, which is the geometric mean of
    its tokens' weights."""
    correction_bound: float = Field(2.0, gt=1)
    """Bound of the weight w in `correction`."""
    aggregation: Literal["token-mean", "group-token-mean", "sequence-mean"] = "token-mean"
    """Reduction of per-token losses: the mean over all tokens, the mean over groups of their token means, or the mean
    over responses of their token means. Denominators are global, over all micro-batches and ranks."""

    @model_validator(mode="before")
    @classmethod
    def _with_method_defaults(cls, tree: Any) -> Any:
        return with_method_defaults(tree) if isinstance(tree, Mapping) else tree
