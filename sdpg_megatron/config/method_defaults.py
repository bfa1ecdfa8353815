"""Defaults of each method that differ from `sdpg`.

A field set by the user takes precedence. The defaults are merged in before validation, so the resolved configuration
shows them. docs/methods.md has the sources.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, get_args

Method = Literal["sdpg", "rpg", "grpo", "dapo", "rlsd", "opsd", "opcd", "sdpo"]
TEACHERLESS = ("grpo", "dapo", "rpg")
"""Methods without a teacher."""
UNDISTILLED = (*TEACHERLESS, "rlsd")
"""Methods without a distillation loss: their beta is 0."""

_GRPO: Mapping[str, object] = {
    "beta": 0.0,
    "clip_low": 0.2,
    "clip_high": 0.2,
    "dual_clip": None,
    "alpha": 0.0,
    "reference": "ufkl",
    "ratio_weighted_regularizers": False,
    "aggregation": "sequence-mean",
}
_DISTILLATION: Mapping[str, object] = {
    "beta": 1.0,
    "beta_warmup_steps": 0,
    "beta_decay_steps": 0,
    "gate": False,
    "alpha": 0.0,
    "ratio_weighted_regularizers": False,
    "aggregation": "sequence-mean",
}

DEFAULTS: Mapping[Method, Mapping[str, object]] = MappingProxyType(
    {
        "sdpg": {},
        "rpg": {"beta": 0.0},
        "grpo": _GRPO,
        "dapo": {**_GRPO, "clip_high": 0.28, "aggregation": "token-mean"},
        "rlsd": {
            **_GRPO,
            "dual_clip": 3.0,
            "aggregation": "token-mean",
            "divergence": "sampled_token",
            "gate": False,
            "credit_ratio": "rollout",
        },
        "opsd": {**_DISTILLATION, "divergence": "jsd", "teacher": "initial"},
        "opcd": _DISTILLATION,
        "sdpo": {
            **_DISTILLATION,
            "divergence": "jsd",
            "top_k": 100,
            "teacher": "ema",
            "context": "peer",
            "peer_reward": 0.5,
            "strip_peer_thinking": True,
            "advantage_deviation": "none",
            "correction": "truncate",
            "ratio_weighted_regularizers": True,
            "regularizer_ratio_bound": 2.0,
            "distill_average": "gated",
            "aggregation": "token-mean",
        },
    }
)
assert set(DEFAULTS) == set(get_args(Method))


def defaults(method: object) -> Mapping[str, object]:
    """Defaults of a method; empty for an unknown name, which validation refuses later."""
    return next((fields for name, fields in DEFAULTS.items() if name == method), {})


def dapo_sections(max_tokens: int) -> dict[str, dict[str, object]]:
    """DAPO's defaults outside of `objective`: dynamic sampling, and an overlong penalty over a fifth of the limit.

    The paper uses 4096 of 20480 tokens (arXiv 2503.14476, section 4.1).
    """
    return {"selection": {"drop_dead": True}, "reward": {"overlong_buffer": max(1, max_tokens // 5)}}
