"""Compare the logits of transformers and megatron-core for the same text."""

from __future__ import annotations

import gc
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from sdpg_megatron.architecture import read_architecture
from sdpg_megatron.config import ModelConfig, ParallelConfig
from sdpg_megatron.convert.load_weights import load_weights_only
from sdpg_megatron.data.tokenizer import load_tokenizer
from sdpg_megatron.errors import ConversionError
from sdpg_megatron.mcore import parallel
from sdpg_megatron.mcore.forward_step import last_hidden
from sdpg_megatron.mcore.model import build_chunks, output_weight
from sdpg_megatron.process.rank_environment import RankEnvironment
from sdpg_megatron.rollout.transformers_check import check_reading

TOLERANCE = 1e-3
"""Bound of the logits' difference, relative to the largest logit.

Both models compute in float32 (unit roundoff 6e-8) whatever dtype the weights are stored in. Another summation order
over tens of layers gives differences of about 1e-5; a wrong weight map or setting gives tenths.
"""


def tokens_of(hugging_face: Path, text: str) -> Tensor:
    """Tokenize a text, int64 [1, S].

    Raises:
        ConversionError: the text has no tokens, or more than the model has positions.
        ConfigError: the folder has no usable tokenizer, or transformers reads its config.json differently.
    """
    arch = read_architecture(hugging_face)
    check_reading(hugging_face, arch)
    tokens_1S: Tensor = load_tokenizer(hugging_face, arch.vocab_size)(text, return_tensors="pt").input_ids
    if not 0 < tokens_1S.shape[1] <= arch.max_positions:
        expected = f"1 to {arch.max_positions}, the model's positions"
        raise ConversionError("--verify", f"a text of {tokens_1S.shape[1]} tokens", expected, "choose another text")
    return tokens_1S


def logit_difference(
    hugging_face: Path, checkpoint: Path, text: str, dtype: torch.dtype | None = None
) -> tuple[float, float]:
    """Return the largest difference between the two models' logits, and the largest of transformers' logits.

    Both compute in float32. One model is in memory at a time.

    Args:
        hugging_face: folder with tokenizer and weights.
        checkpoint: folder of the Megatron checkpoint's tensors.
        dtype: round the weights of both to this dtype first, as a conversion did with one of them; None for no
            rounding.

    Raises:
        ConversionError: the difference exceeds `TOLERANCE`; or as `tokens_of`.
        ConfigError: as `tokens_of`.
    """
    tokens_1S = tokens_of(hugging_face, text)
    expected_1SV = _transformers_logits(hugging_face, tokens_1S, dtype)
    gc.collect()
    found_1SV = _megatron_logits(hugging_face, checkpoint, tokens_1S, dtype)
    difference, scale = float((found_1SV - expected_1SV).abs().max()), float(expected_1SV.abs().max())
    if not difference <= TOLERANCE * scale:  # also true for NaN
        raise ConversionError(
            "--verify",
            f"logits of megatron-core and transformers that differ by up to {difference:.3g}, the largest {scale:.3g}",
            f"at most {TOLERANCE:g} of the largest, which the rounding of float32 explains",
            "report this with the model's config.json and the versions of both; do not use the converted model",
        )
    return difference, scale


@torch.no_grad()
def _transformers_logits(folder: Path, tokens_1S: Tensor, dtype: torch.dtype | None) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    _round(model, dtype)
    logits_1SV: Tensor = model(tokens_1S).logits
    return logits_1SV


@torch.no_grad()
def _megatron_logits(folder: Path, checkpoint: Path, tokens_1S: Tensor, dtype: torch.dtype | None) -> Tensor:
    layout = ParallelConfig()
    ranks = parallel.initialize(layout, seed=0, environment=RankEnvironment())
    arch = read_architecture(folder)
    chunks = build_chunks(arch, ModelConfig(path=folder, spec="local"), layout, ranks)
    load_weights_only(chunks, checkpoint)
    (chunk,) = chunks
    _round(chunk, dtype)
    chunk.eval()
    logits_1SV = last_hidden(chunk, tokens_1S) @ output_weight(chunk).T
    return logits_1SV[..., : arch.vocab_size].cpu()


def _round(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Round a float32 model's weights to a narrower type, in place."""
    for parameter in model.parameters() if dtype is not None else ():
        parameter.copy_(parameter.to(dtype))
