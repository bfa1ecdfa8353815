"""Everything that a run reads, read and checked before any process group starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import AutoTokenizer

from sdpg_megatron.architecture import Architecture, check_lengths, check_parallel, read_architecture
from sdpg_megatron.config import RunConfig
from sdpg_megatron.data.dataset import PromptDataset
from sdpg_megatron.data.source import PromptSource, load_prompts
from sdpg_megatron.errors import ConfigError
from sdpg_megatron.rewards.filters import load_filters
from sdpg_megatron.rewards.load import load_verifier
from sdpg_megatron.rollout.hf import stop_ids


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a run reads, besides weights."""

    arch: Architecture
    tokenizer: Any
    prompts: PromptSource
    held_out: PromptDataset | None
    stop_ids: tuple[int, ...]
    """Tokens that end a response."""


def load_inputs(config: RunConfig) -> Inputs:
    """Read the model's description, tokenizer and data, and check that they and the verifier fit the configuration.

    Raises:
        ConfigError: the model cannot be cut or is too short for the prompts and responses; no tokenizer, chat
            template or stop token; an unknown verifier, group filter or context template; a run folder that cannot be
            written.
        DataError: a row of the data cannot be used.
    """
    arch = read_architecture(config.model.path)
    check_parallel(arch, config.parallel)
    check_lengths(arch, config)
    load_verifier(config.reward.verifier)
    load_filters(config.selection.filters)
    stops = stop_ids(config.model.path)
    tokenizer = _tokenizer(config)
    try:
        config.run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("run_dir", str(config.run_dir), "a folder that can be written", str(error)) from error
    prompts, held_out = load_prompts(config.data, tokenizer, config.seed)
    return Inputs(
        arch=arch,
        tokenizer=tokenizer,
        prompts=prompts,
        held_out=held_out,
        stop_ids=stops,
    )


def _tokenizer(config: RunConfig) -> Any:
    path = config.model.path
    if not any((path / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ConfigError("model.path", str(path), "a folder with a tokenizer", "copy the model's tokenizer there")
    return AutoTokenizer.from_pretrained(path)
