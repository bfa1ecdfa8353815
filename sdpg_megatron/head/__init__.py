"""Vocabulary-parallel output head: log-prob, entropy and exact divergence without materializing the [T, V] logits."""

from sdpg_megatron.head.api import (
    HeadTerms,
    RowLoss,
    TeacherRows,
    head_gradient_squares,
    head_logprobs,
    head_loss,
    head_terms,
    logits_terms,
)
from sdpg_megatron.head.divergences import Divergence, ForwardKL, JensenShannon, ReverseKL, SampledToken, TopK
from sdpg_megatron.head.options import HeadOptions
from sdpg_megatron.head.shard import VocabShard

__all__ = [
    "Divergence",
    "ForwardKL",
    "HeadOptions",
    "HeadTerms",
    "JensenShannon",
    "ReverseKL",
    "RowLoss",
    "SampledToken",
    "TeacherRows",
    "TopK",
    "VocabShard",
    "head_gradient_squares",
    "head_logprobs",
    "head_loss",
    "head_terms",
    "logits_terms",
]
