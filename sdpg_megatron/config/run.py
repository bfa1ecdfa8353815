"""Root of the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from sdpg_megatron.config.base import Section
from sdpg_megatron.config.data import DataConfig, RewardConfig
from sdpg_megatron.config.method_defaults import dapo_sections
from sdpg_megatron.config.model import HeadConfig, ModelConfig, OptimizerConfig, ParallelConfig
from sdpg_megatron.config.objective import ObjectiveConfig
from sdpg_megatron.config.observe import AlarmConfig, CheckpointConfig, EvalConfig, RolloutLogConfig, WatchdogConfig
from sdpg_megatron.config.rollout import RolloutConfig, SelectionConfig


class RunConfig(Section):
    """Configuration of a run."""

    run_dir: Path
    """Output folder of the run."""
    steps: int = Field(ge=1, le=1_000_000_000)
    """Number of rollout steps."""
    seed: int = Field(0, ge=0)
    """Seed of prompt order, sampling and all other random choices."""
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig
    reward: RewardConfig = RewardConfig()
    rollout: RolloutConfig = RolloutConfig()
    selection: SelectionConfig = SelectionConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    head: HeadConfig = HeadConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    eval: EvalConfig = EvalConfig()
    rollout_log: RolloutLogConfig = RolloutLogConfig()
    alarms: AlarmConfig = AlarmConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    writers: tuple[str, ...] = ()
    """Custom metrics writers, each as `package.module:Class`, in addition to metrics.jsonl and TensorBoard.
    docs/training.md has the interface."""

    @model_validator(mode="before")
    @classmethod
    def _of_method(cls, tree: Any) -> Any:
        """Set DAPO's defaults in other sections. Sections of a wrong type are left for validation to report."""
        if not isinstance(tree, dict) or _section(tree, "objective").get("name") != "dapo":
            return tree
        longest = _section(tree, "rollout").get("max_response_tokens", RolloutConfig().max_response_tokens)
        defaults = dapo_sections(longest) if isinstance(longest, int) else {}
        sound = {name: fields for name, fields in defaults.items() if isinstance(tree.get(name, {}), dict)}
        return {**tree, **{name: {**fields, **_section(tree, name)} for name, fields in sound.items()}}

    @property
    def total_optimizer_steps(self) -> int:
        """Number of optimizer steps T of the run, for the schedules of beta and learning rate."""
        return self.steps * self.optimizer.minibatches

    @property
    def max_teacher_tokens(self) -> int:
        """Maximum length of a teacher prompt in tokens."""
        if self.objective.context == "data":
            return self.data.max_prompt_tokens
        return self.data.max_peer_tokens or self.data.max_prompt_tokens + self.rollout.max_response_tokens


def _section(tree: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = tree.get(name)
    return section if isinstance(section, dict) else {}
