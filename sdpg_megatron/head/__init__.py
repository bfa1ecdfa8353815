"""The vocabulary-parallel output head: log-prob, entropy and exact divergence without a row of logits to spare."""

from sdpg_megatron.head.api import HeadTerms, TeacherRows, head_logprobs, head_terms
from sdpg_megatron.head.shard import VocabShard

__all__ = ["HeadTerms", "TeacherRows", "VocabShard", "head_logprobs", "head_terms"]
