"""Both models read the same text: transformers from the Hugging Face folder, megatron-core from its checkpoint."""

from __future__ import annotations

import gc
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdpg_megatron.architecture import read_architecture
from sdpg_megatron.checkpoint.weights_only import load_weights_only
from sdpg_megatron.config import ModelConfig, ParallelConfig
from sdpg_megatron.errors import ConversionError
from sdpg_megatron.mcore import parallel
from sdpg_megatron.mcore.forward_step import last_hidden
from sdpg_megatron.mcore.model import build_chunks, output_weight
from sdpg_megatron.process.ranks import RankEnvironment


def tokens_of(hugging_face: Path, text: str) -> Tensor:
    """The text as token ids, [1, tokens].

    Raises:
        ConversionError: there is no tokenizer, or the text has no tokens, or more than the model has positions.
    """
    positions = read_architecture(hugging_face).max_positions
    try:
        tokens_1S: Tensor = AutoTokenizer.from_pretrained(hugging_face)(text, return_tensors="pt").input_ids
    except Exception as error:  # transformers has no error of its own for it
        found = " ".join(str(error).split())
        raise ConversionError(f"--verify: {hugging_face}", found, "a tokenizer", "add it, or leave it out") from error
    if not 0 < tokens_1S.shape[1] <= positions:
        expected = f"1 to {positions}, the model's positions"
        raise ConversionError("--verify", f"a text of {tokens_1S.shape[1]} tokens", expected, "choose another text")
    return tokens_1S


def logit_difference(hugging_face: Path, checkpoint: Path, text: str) -> tuple[float, float]:
    """The largest difference between the logits of the two models, and the largest of transformers' logits.

    Both compute in float32, from the weights as they are stored. Each is held whole, one after the other.

    Args:
        hugging_face: folder with tokenizer and weights.
        checkpoint: folder of the Megatron checkpoint's tensors.

    Raises:
        ConversionError: as `tokens_of` does.
    """
    tokens_1S = tokens_of(hugging_face, text)
    expected_1SV = _transformers_logits(hugging_face, tokens_1S)
    gc.collect()
    found_1SV = _megatron_logits(hugging_face, checkpoint, tokens_1S)
    return float((found_1SV - expected_1SV).abs().max()), float(expected_1SV.abs().max())


@torch.no_grad()
def _transformers_logits(folder: Path, tokens_1S: Tensor) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits_1SV: Tensor = model(tokens_1S).logits
    return logits_1SV


@torch.no_grad()
def _megatron_logits(folder: Path, checkpoint: Path, tokens_1S: Tensor) -> Tensor:
    layout = ParallelConfig()
    ranks = parallel.initialize(layout, seed=0, environment=RankEnvironment())
    arch = read_architecture(folder)
    chunks = build_chunks(arch, ModelConfig(path=folder, spec="local"), layout, ranks)
    load_weights_only(chunks, checkpoint)
    (chunk,) = chunks
    chunk.eval()
    logits_1SV = last_hidden(chunk, tokens_1S) @ output_weight(chunk).T
    return logits_1SV[..., : arch.vocab_size].cpu()
