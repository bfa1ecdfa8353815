"""Tables of the model families: the Hugging Face tensors of each Megatron parameter, and how ranks shard it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sdpg_megatron.architecture import Architecture, Family


class Piece(NamedTuple):
    """`length` rows of Hugging Face tensor number `source`, from row `start`; rows of zeros where source is None."""

    source: int | None
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """Sharding of a parameter over tensor-parallel ranks."""

    cut: Callable[[Architecture, Sequence[int], int, int], list[Piece]]
    """(architecture, length of each source along `dim`, tensor-parallel rank, size) -> the rank's pieces, in order.
    Together the ranks cover every source once."""
    dim: int = 0
    """Dimension along which pieces are split and joined."""
    sharded: bool = True
    """False if every rank holds the whole parameter."""


def _even(arch: Architecture, lengths: Sequence[int], rank: int, size: int) -> list[Piece]:
    """An equal share of each source."""
    return [Piece(source, rank * (length // size), length // size) for source, length in enumerate(lengths)]


def _by_query_group(arch: Architecture, lengths: Sequence[int], rank: int, size: int) -> list[Piece]:
    """By query group: the query heads that share a key-value head, then the key head, then the value head."""
    groups, share = arch.num_kv_heads, arch.num_kv_heads // size
    return [
        Piece(source, group * (length // groups), length // groups)
        for group in range(rank * share, (rank + 1) * share)
        for source, length in enumerate(lengths)
    ]


def _padded_vocabulary(arch: Architecture, lengths: Sequence[int], rank: int, size: int) -> list[Piece]:
    """An equal share of the padded vocabulary; the padding is at the end of the last ranks."""
    rows = arch.padded_vocab(size) // size
    start = min(rank * rows, arch.vocab_size)
    length = min(rows, arch.vocab_size - start)
    return [piece for piece in (Piece(0, start, length), Piece(None, 0, rows - length)) if piece.length]


REPLICATED = ShardLayout(_even, sharded=False)
QKV = ShardLayout(_by_query_group)
GATE_UP = ShardLayout(_even)
INPUT_COLUMNS = ShardLayout(_even, dim=1)
VOCABULARY = ShardLayout(_padded_vocabulary)


@dataclass(frozen=True, slots=True)
class Rule:
    """One entry of a family's map. Names in a layer's rules are relative to the layer; {} is an expert's number."""

    megatron: tuple[str, ...]
    """Names of one parameter: in the local layer specification, then in Transformer Engine's if it differs."""
    tensors: Mapping[str, tuple[str, ...]]
    """Its Hugging Face tensors, with the names of their dimensions."""
    layout: ShardLayout
    exported: bool = True
    """False for a copy of another parameter's tensor."""


_MODEL = (
    Rule(("embedding.word_embeddings.weight",), {"model.embed_tokens.weight": ("vocab", "hidden")}, VOCABULARY),
    Rule(("decoder.final_layernorm.weight",), {"model.norm.weight": ("hidden",)}, REPLICATED),
)
OUTPUT = Rule(("output_layer.weight",), {"lm_head.weight": ("vocab", "hidden")}, VOCABULARY)
# With tied embeddings and several pipeline stages, the last stage holds a copy of the embedding under this name.
_TIED_OUTPUT = Rule(OUTPUT.megatron, _MODEL[0].tensors, VOCABULARY, exported=False)
_ATTENTION = (
    Rule(
        ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
        {"input_layernorm.weight": ("hidden",)},
        REPLICATED,
    ),
    Rule(
        ("self_attention.linear_qkv.weight",),
        {
            "self_attn.q_proj.weight": ("query", "hidden"),
            "self_attn.k_proj.weight": ("key", "hidden"),
            "self_attn.v_proj.weight": ("key", "hidden"),
        },
        QKV,
    ),
    Rule(("self_attention.linear_proj.weight",), {"self_attn.o_proj.weight": ("hidden", "query")}, INPUT_COLUMNS),
    Rule(
        ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
        {"post_attention_layernorm.weight": ("hidden",)},
        REPLICATED,
    ),
)


def _feed_forward(fc1: tuple[str, ...], fc2: tuple[str, ...], gate: str, up: str, down: str) -> tuple[Rule, Rule]:
    return (
        Rule(fc1, {gate: ("ffn", "hidden"), up: ("ffn", "hidden")}, GATE_UP),
        Rule(fc2, {down: ("hidden", "ffn")}, INPUT_COLUMNS),
    )


def _experts(gate: str, up: str, down: str) -> tuple[Rule, Rule]:
    # Experts as separate modules, and as grouped GEMMs of Transformer Engine.
    fc1, fc2 = (
        (f"mlp.experts.local_experts.{{}}.{layer}.weight", f"mlp.experts.{layer}.weight{{}}")
        for layer in ("linear_fc1", "linear_fc2")
    )
    return _feed_forward(fc1, fc2, gate, up, down)


_LAYER = (
    *_ATTENTION,
    *_feed_forward(
        ("mlp.linear_fc1.weight",),
        ("mlp.linear_fc2.weight",),
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
        "mlp.down_proj.weight",
    ),
)
_ROUTER = ("mlp.router.weight",)
_QKV_BIAS = Rule(
    ("self_attention.linear_qkv.bias",),
    {"self_attn.q_proj.bias": ("query",), "self_attn.k_proj.bias": ("key",), "self_attn.v_proj.bias": ("key",)},
    QKV,
)
_QK_NORM = (
    Rule(("self_attention.q_layernorm.weight",), {"self_attn.q_norm.weight": ("head",)}, REPLICATED),
    Rule(("self_attention.k_layernorm.weight",), {"self_attn.k_norm.weight": ("head",)}, REPLICATED),
)
_LAYER_RULES: Mapping[Family, tuple[Rule, ...]] = {
    "llama": _LAYER,
    "qwen2": (*_LAYER, _QKV_BIAS),
    "qwen3": (*_LAYER, *_QK_NORM),
    "qwen3_moe": (
        *_ATTENTION,
        *_QK_NORM,
        Rule(_ROUTER, {"mlp.gate.weight": ("experts", "hidden")}, REPLICATED),
    ),
    "mixtral": (
        *_ATTENTION,
        Rule(_ROUTER, {"block_sparse_moe.gate.weight": ("experts", "hidden")}, REPLICATED),
    ),
}
_EXPERT_RULES: Mapping[Family, tuple[Rule, ...]] = {
    "qwen3_moe": _experts(
        "mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight", "mlp.experts.{}.down_proj.weight"
    ),
    "mixtral": _experts(
        "block_sparse_moe.experts.{}.w1.weight",
        "block_sparse_moe.experts.{}.w3.weight",
        "block_sparse_moe.experts.{}.w2.weight",
    ),
}
"""Rules of each expert of a layer."""


def rules(arch: Architecture) -> Iterable[tuple[str, str, int | None, int | None, Rule]]:
    """(Megatron prefix, Hugging Face prefix, layer, expert, rule) in canonical order."""
    embedding, final_norm = _MODEL
    yield "", "", None, None, embedding
    for layer in range(arch.num_layers):
        prefixes = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        for rule in _LAYER_RULES[arch.family]:
            yield *prefixes, layer, None, rule
        for expert in range(arch.experts.count if arch.experts else 0):
            for rule in _EXPERT_RULES[arch.family]:
                yield *prefixes, layer, expert, rule
    yield "", "", None, None, final_norm
    yield "", "", None, None, _TIED_OUTPUT if arch.tied_embeddings else OUTPUT


def sizes(arch: Architecture) -> dict[str, int]:
    """Lengths of the named dimensions."""
    return {
        "vocab": arch.vocab_size,
        "hidden": arch.hidden_size,
        "ffn": arch.ffn_size,
        "query": arch.num_heads * arch.head_dim,
        "key": arch.num_kv_heads * arch.head_dim,
        "head": arch.head_dim,
        "experts": arch.experts.count if arch.experts else 0,
    }
