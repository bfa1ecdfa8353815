"""Configuration of a run: the schema, with the default and description of every field.

`load` reads a file with overrides, `checks` has the checks across fields.
"""

from sdpg_megatron.config.base import MAX_SECONDS, Section
from sdpg_megatron.config.data import MAX_REWARD, DataConfig, GymConfig, GymTask, RewardConfig
from sdpg_megatron.config.model import HeadConfig, ModelConfig, OptimizerConfig, ParallelConfig
from sdpg_megatron.config.objective import Deviation, ObjectiveConfig
from sdpg_megatron.config.observe import AlarmConfig, CheckpointConfig, EvalConfig, RolloutLogConfig, WatchdogConfig
from sdpg_megatron.config.rollout import RolloutConfig, SelectionConfig, SGLangConfig
from sdpg_megatron.config.run import RunConfig

__all__ = [
    "MAX_REWARD",
    "MAX_SECONDS",
    "AlarmConfig",
    "CheckpointConfig",
    "DataConfig",
    "Deviation",
    "EvalConfig",
    "GymConfig",
    "GymTask",
    "HeadConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RewardConfig",
    "RolloutConfig",
    "RolloutLogConfig",
    "RunConfig",
    "SGLangConfig",
    "Section",
    "SelectionConfig",
    "WatchdogConfig",
]
