"""Read the inputs of a run besides weights. All but the prompts is checked before any process group starts."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
from sdpg_megatron.data.tokenizer import check_stops, load_tokenizer, stop_ids
from sdpg_megatron.errors import DataError
from sdpg_megatron.hf_files import check_files
from sdpg_megatron.mcore.compat.device import check_layers
from sdpg_megatron.observe.reading_progress import RowProgress
from sdpg_megatron.observe.writers import find_writer
from sdpg_megatron.rewards.filters import load_filters
from sdpg_megatron.rewards.load import compares_text, find_verifier, is_custom
from sdpg_megatron.rollout.transformers_check import check_reading
from sdpg_megatron.train.run_dir import check_run_dir
from sdpg_megatron.train.shared_prompts import Prompts, share_prompts
from sdpg_megatron.weights import open_weights

if TYPE_CHECKING:  # a dry run reads its inputs without Megatron, which takes seconds to import
    from sdpg_megatron.mcore.parallel import ParallelState

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelInputs:
    """Inputs from a model's folder, besides weights."""

    arch: Architecture
    tokenizer: Any
    stop_ids: tuple[int, ...]
    """Tokens that end a response."""


@dataclass(frozen=True, slots=True)
class Inputs(ModelInputs):
    """Inputs of a run, besides weights."""

    prompts: PromptSource
    held_out: PromptDataset | None


def load_inputs(config: RunConfig, model: ModelInputs | None = None, ranks: ParallelState | None = None) -> Inputs:
    """Read the model's description, tokenizer and data, and check that they and the verifier fit the configuration.

    Args:
        model: result of `load_run_model`; None to call it.
        ranks: ranks of the run, all of which call this: data files are then read once on each machine. None for a
            single process.

    Raises:
        ConfigError: as `load_run_model`; an unknown context template.
        WeightError: as `load_run_model`.
        DataError: a row of the data cannot be used.
    """
    model = model or load_run_model(config)

    def load() -> Prompts:
        with RowProgress(enabled=os.environ.get("RANK", "0") == "0") as progress:
            return load_prompts(
                config.data,
                model.tokenizer,
                config.seed,
                scored_by_metadata=is_custom(config.reward.verifier),
                on_rows=progress,
            )

    if ranks is None or ranks.world == 1 or config.data.reasoning_gym.tasks:
        prompts, held_out = load()
    else:
        prompts, held_out = share_prompts(ranks, load)
    check_answers(config.reward.verifier, [prompts, held_out])
    if os.environ.get("RANK", "0") == "0":
        for data in (prompts, held_out):
            warn_of(data)
    return Inputs(
        arch=model.arch,
        tokenizer=model.tokenizer,
        stop_ids=model.stop_ids,
        prompts=prompts,
        held_out=held_out,
    )


def check_answers(verifier: str, sources: Sequence[PromptSource | None]) -> None:
    """Reject answers that are dicts or lists if the verifier compares text. Raises `DataError`."""
    for source in sources:
        if compares_text(verifier) and isinstance(source, PromptDataset) and source.structured:
            expected = f"text or a number with reward.verifier {verifier}"
            fix = "write it as text, or use a custom verifier (module:function)"
            raise DataError(source.structured, "an answer that is a dict or list", expected, fix)


def warn_of(source: PromptSource | None) -> None:
    """Log warnings about the rows."""
    if isinstance(source, PromptDataset):
        for warning in source.warnings:
            logger.warning("%s", warning)


def load_run_model(config: RunConfig) -> ModelInputs:
    """Read the model's description and tokenizer, and check the run's configuration against them.

    Raises:
        ConfigError: the model cannot be sharded as configured, or is too short for the prompts and responses; no
            tokenizer, chat template or stop token; an unknown verifier or group filter; a run folder that cannot be
            written.
        WeightError: the weights are missing, damaged, or of another model.
    """
    model = load_model_inputs(config)
    check_parallel(model.arch, config.parallel)
    check_layers(config.model)
    load_filters(config.selection.filters)
    for writer in config.writers:
        find_writer(writer)
    check_run_dir(config.run_dir)
    return model


def load_model_inputs(config: RunConfig) -> ModelInputs:
    """Read the model's description and tokenizer, and check that they and the verifier fit the configuration.

    Reads all of the model's folder but the values of the weights. Needs no process group.

    Raises:
        ConfigError: as `load_inputs`, without the layout and the data; a file is damaged; a token has no row in the
            embedding; tokenizer, chat template and stop tokens do not fit each other; the embedded engine's
            transformers reads another model from config.json.
        WeightError: a weight file is missing, damaged, or does not match config.json.
    """
    folder = config.model.path
    arch = read_architecture(folder)
    check_lengths(arch, config)
    check_model(arch, config.model, replay_routing=config.rollout.replay_routing)
    if config.rollout.engine == "sglang" and not config.rollout.sglang.urls:
        check_served(arch, config.rollout.sglang)
    find_verifier(config.reward.verifier)
    check_files(folder)
    open_weights(folder, arch)
    stops = stop_ids(folder, arch.vocab_size)
    tokenizer = load_tokenizer(folder, arch.vocab_size)
    check_stops(tokenizer, stops, config.data.template_options)
    if config.rollout.engine == "hf":
        check_reading(folder, arch)
    return ModelInputs(arch=arch, tokenizer=tokenizer, stop_ids=stops)
