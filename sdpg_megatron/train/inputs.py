"""Everything that a run reads, read and checked before any process group starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sdpg_megatron.architecture import (
    Architecture,
    check_lengths,
    check_model,
    check_parallel,
    check_served,
    read_architecture,
)
from sdpg_megatron.config import RunConfig
from sdpg_megatron.data.dataset import PromptDataset
from sdpg_megatron.data.source import PromptSource, load_prompts
from sdpg_megatron.errors import ConfigError
from sdpg_megatron.mcore.device import check_layers
from sdpg_megatron.rewards.filters import load_filters
from sdpg_megatron.rewards.load import load_verifier
from sdpg_megatron.train.model_folder import read_model


@dataclass(frozen=True, slots=True)
class ModelInputs:
    """What is read of a model, besides weights."""

    arch: Architecture
    tokenizer: Any
    stop_ids: tuple[int, ...]
    """Tokens that end a response."""


@dataclass(frozen=True, slots=True)
class Inputs(ModelInputs):
    """What a run reads, besides weights."""

    prompts: PromptSource
    held_out: PromptDataset | None


def load_inputs(config: RunConfig) -> Inputs:
    """Read the model's description, tokenizer and data, and check that they and the verifier fit the configuration.

    Raises:
        ConfigError: the model cannot be cut or is too short for the prompts and responses; no tokenizer, chat
            template or stop token; an unknown verifier, group filter or context template; a run folder that cannot be
            written.
        WeightError: the weights are missing or damaged, or another model's.
        DataError: a row of the data cannot be used.
    """
    model = load_model_inputs(config)
    check_parallel(model.arch, config.parallel)
    check_layers(config.model)
    load_filters(config.selection.filters)
    try:
        config.run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("run_dir", str(config.run_dir), "a folder that can be written", str(error)) from error
    prompts, held_out = load_prompts(config.data, model.tokenizer, config.seed, config.objective.contrast)
    return Inputs(
        arch=model.arch,
        tokenizer=model.tokenizer,
        stop_ids=model.stop_ids,
        prompts=prompts,
        held_out=held_out,
    )


def load_model_inputs(config: RunConfig) -> ModelInputs:
    """Read the model's description and tokenizer, and check that they and the verifier fit the configuration.

    Needs no process group.

    Raises:
        ConfigError: as `load_inputs`, but for the layout and the data.
        WeightError: as `read_model`.
    """
    arch = read_architecture(config.model.path)
    check_lengths(arch, config)
    check_model(arch, config.model, replay_routing=config.rollout.replay_routing)
    if config.rollout.engine == "sglang" and not config.rollout.sglang.urls:
        check_served(arch, config.rollout.sglang)
    load_verifier(config.reward.verifier)
    tokenizer, stops = read_model(config, arch)
    return ModelInputs(arch=arch, tokenizer=tokenizer, stop_ids=stops)
