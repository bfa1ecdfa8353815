"""Everything that a run reads, read and checked before any process group starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import AutoTokenizer

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
from sdpg_megatron.rewards.filters import load_filters
from sdpg_megatron.rewards.load import find_verifier
from sdpg_megatron.rollout.hf import stop_ids


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
        DataError: a row of the data cannot be used.
    """
    model = load_model_inputs(config)
    check_parallel(model.arch, config.parallel)
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

    Raises:
        ConfigError: as `load_inputs`, but for the layout and the data.
    """
    arch = read_architecture(config.model.path)
    check_lengths(arch, config)
    check_model(arch, config.model, replay_routing=config.rollout.replay_routing)
    if config.rollout.engine == "sglang" and not config.rollout.sglang.urls:
        check_served(arch, config.rollout.sglang)
    find_verifier(config.reward.verifier)
    return ModelInputs(arch=arch, tokenizer=_tokenizer(config), stop_ids=stop_ids(config.model.path))


def _tokenizer(config: RunConfig) -> Any:
    path = config.model.path
    if not any((path / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ConfigError("model.path", str(path), "a folder with a tokenizer", "copy the model's tokenizer there")
    return AutoTokenizer.from_pretrained(path)
