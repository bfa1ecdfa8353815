"""Read and check a run's model folder without a process group: files, weight headers, tokenizer, stop tokens."""

from __future__ import annotations

from typing import Any

from sdpg_megatron.architecture import Architecture
from sdpg_megatron.config import RunConfig
from sdpg_megatron.data.tokenizer import check_stops, load_tokenizer, stop_ids
from sdpg_megatron.hf_files import check_files
from sdpg_megatron.rollout.transformers_check import check_reading
from sdpg_megatron.weights import open_weights


def read_model(config: RunConfig, arch: Architecture) -> tuple[Any, tuple[int, ...]]:
    """Read a model's tokenizer and stop tokens, and check the rest of its folder but the values of the weights.

    Returns:
        transformers tokenizer, and the ids that end a response.

    Raises:
        ConfigError: a file is damaged; a token has no row in the embedding; tokenizer, chat template and stop tokens do
            not fit each other; the embedded engine's transformers reads another model from config.json.
        WeightError: a weight file is missing, damaged, or does not match config.json.
    """
    folder = config.model.path
    check_files(folder)
    open_weights(folder, arch)
    stops = stop_ids(folder, arch.vocab_size)
    tokenizer = load_tokenizer(folder, arch.vocab_size)
    check_stops(tokenizer, stops, config.data.template_options)
    if config.rollout.engine == "hf":
        check_reading(folder, arch)
    return tokenizer, stops
