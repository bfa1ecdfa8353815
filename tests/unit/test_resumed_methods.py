"""Runs that were started before a method's fields were there: another behavior shows as a change of configuration."""

from __future__ import annotations

from typing import Any

import pytest

from sdpg_megatron.checkpoint.changes import config_changes
from sdpg_megatron.config.load import parse

NEW = ("advantage_deviation", "credit_ratio", "distill_loss", "strip_peer_thinking")


def resolved(name: str, **objective: Any) -> dict[str, Any]:
    tree = {"run_dir": "x", "steps": 10, "model": {"path": "m"}, "data": {}, "objective": {"name": name, **objective}}
    return parse(tree).model_dump(mode="json")


def started_before(name: str, **objective: Any) -> dict[str, Any]:
    """The configuration that a checkpoint has from when none of the new fields was there."""
    old = resolved(name, **objective)
    return {**old, "objective": {field: value for field, value in old["objective"].items() if field not in NEW}}


@pytest.mark.parametrize("name", ["sdpg", "rpg", "grpo", "dapo", "opsd", "opcd"])
def test_a_method_without_new_behavior_continues(name: str) -> None:
    assert config_changes(started_before(name), resolved(name)) == []


def test_rlsd_does_not_continue_with_another_weight() -> None:
    old = started_before("rlsd", dual_clip=None, aggregation="sequence-mean")
    changes = {change.field: (change.old, change.new) for change in config_changes(old, resolved("rlsd"))}
    assert changes == {
        "objective.aggregation": ("sequence-mean", "token-mean"),
        "objective.credit_ratio": ("current", "rollout"),
        "objective.dual_clip": (None, 3.0),
    }
    as_before = resolved("rlsd", dual_clip=None, aggregation="sequence-mean", credit_ratio="current")
    assert config_changes(old, as_before) == []


def test_sdpo_does_not_continue_with_other_prompts_or_advantages() -> None:
    old = started_before("sdpo", correction="none", peer_reward=1.0)
    changes = {change.field: (change.old, change.new) for change in config_changes(old, resolved("sdpo"))}
    assert changes == {
        "objective.advantage_deviation": ("population", "none"),
        "objective.correction": ("none", "truncate"),
        "objective.peer_reward": (1.0, 0.5),
        "objective.strip_peer_thinking": (False, True),
    }


def test_a_run_of_version_0_1_continues() -> None:
    """Its checkpoints have a field that is renamed, and one that is gone."""
    new = resolved("sdpg")
    servers = dict(new["rollout"]["sglang"])
    servers["sink"] = servers.pop("transport")
    old = {**new, "rollout": {**new["rollout"], "sglang": servers}, "objective": {**new["objective"], "contrast": 0.0}}
    del old["writers"]
    assert config_changes(old, new) == []
    old["objective"]["contrast"] = 0.5
    assert [change.field for change in config_changes(old, new)] == ["objective.contrast"]
