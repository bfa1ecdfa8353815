"""Defaults of each method that differ from `sdpg`.

A field set by the user takes precedence. The defaults are merged in before validation, so the resolved configuration
shows them. docs/methods.md has the sources.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from sdpg_megatron.config.external import is_external, load_object
from sdpg_megatron.config.field_values import Refused
from sdpg_megatron.errors import ConfigError, did_you_mean

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

DEFAULTS: Mapping[str, Mapping[str, object]] = MappingProxyType(
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


def with_method_defaults(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Add the method's defaults to the fields of a section `objective`.

    Raises:
        ConfigError: an external class cannot be imported, or does not declare an option that is set.
    """
    name = tree.get("name", "sdpg")
    if not isinstance(name, str):
        return dict(tree)
    if name in DEFAULTS:
        if tree.get("options"):
            fix = "remove it: options are for objectives of your own"
            return {**tree, "options": Refused(tree["options"], fix, f"none with {name}")}
        return {**DEFAULTS[name], **tree}
    if not is_external(name):
        fix = did_you_mean(name, DEFAULTS) or "choose one of these"
        return {**tree, "name": Refused(name, fix, f"{', '.join(map(repr, DEFAULTS))}, or package.module:Class")}
    declared: Mapping[str, Any] = getattr(load_object("objective.name", name), "defaults", {})
    options, given = declared.get("options", {}), tree.get("options") or {}
    for option in given if isinstance(given, Mapping) else ():
        if option not in options:
            expected = f"an option of {name}: {', '.join(options) or 'it has none'}"
            raise ConfigError(
                f"objective.options.{option}", given[option], expected, did_you_mean(option, options) or "remove it"
            )
    return {**declared, **tree, "options": {**options, **given} if isinstance(given, Mapping) else given}


def dapo_sections(max_tokens: int) -> dict[str, dict[str, object]]:
    """DAPO's defaults outside of `objective`: dynamic sampling, and an overlong penalty over a fifth of the limit.

    The paper uses 4096 of 20480 tokens (arXiv 2503.14476, section 4.1).
    """
    return {"selection": {"drop_dead": True}, "reward": {"overlong_buffer": max(1, max_tokens // 5)}}
