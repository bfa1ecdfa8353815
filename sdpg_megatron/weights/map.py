"""One map per model family between Megatron parameters and Hugging Face tensors.

A rank's shard of a Megatron parameter is a row of *pieces*: slices of Hugging Face tensors, laid end to end along one
dimension. The pieces are all that is declared. Loading copies them from files into the shard, exporting copies them
from the shards back into whole tensors, so the two directions cannot disagree.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sdpg_megatron.architecture import Architecture, Family
from sdpg_megatron.errors import WeightError, did_you_mean

Shape = tuple[int, ...]


class Piece(NamedTuple):
    """`length` rows of Hugging Face tensor number `source`, from row `start`; rows of zeros where source is None."""

    source: int | None
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class ExpertShare:
    """A rank's experts of a layer, and its part of each. The defaults are for a rank that holds all of them whole."""

    rank: int = 0
    size: int = 1
    """Expert-parallel: who holds which experts."""
    tensor_rank: int = 0
    tensor_size: int = 1
    """Tensor-parallel within an expert; may differ from that of the other parameters."""

    def owner(self, expert: int, count: int) -> int:
        """The expert-parallel rank that holds expert `expert` of `count`."""
        return expert // (count // self.size)


WHOLE_EXPERTS = ExpertShare()


@dataclass(frozen=True, slots=True)
class Layout:
    """How tensor-parallel ranks share a parameter."""

    cut: Callable[[Architecture, Sequence[int], int, int], list[Piece]]
    """(architecture, length of each source along `dim`, tensor-parallel rank, size) -> that rank's pieces, in order.
    Over all ranks they cover every source once."""
    dim: int = 0
    """The dimension that pieces are cut and joined along."""
    sharded: bool = True
    """False where every rank holds the whole."""


def _even(arch: Architecture, lengths: Sequence[int], rank: int, size: int) -> list[Piece]:
    """An equal share of each source, one after the other."""
    return [Piece(source, rank * (length // size), length // size) for source, length in enumerate(lengths)]


def _by_query_group(arch: Architecture, lengths: Sequence[int], rank: int, size: int) -> list[Piece]:
    """Group by group: the query heads that share a key-value head, then that key head, then that value head."""
    groups, share = arch.num_kv_heads, arch.num_kv_heads // size
    return [
        Piece(source, group * (length // groups), length // groups)
        for group in range(rank * share, (rank + 1) * share)
        for source, length in enumerate(lengths)
    ]


def _padded_vocabulary(arch: Architecture, lengths: Sequence[int], rank: int, size: int) -> list[Piece]:
    """An equal share of the padded vocabulary; the padding lies at the end of the last ranks."""
    rows = arch.padded_vocab(size) // size
    start = min(rank * rows, arch.vocab_size)
    length = min(rows, arch.vocab_size - start)
    return [piece for piece in (Piece(0, start, length), Piece(None, 0, rows - length)) if piece.length]


REPLICATED = Layout(_even, sharded=False)
QKV = Layout(_by_query_group)
GATE_UP = Layout(_even)
INPUT_COLUMNS = Layout(_even, dim=1)
VOCABULARY = Layout(_padded_vocabulary)


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of a family's map. Names in a layer's rules are relative to the layer; {} is an expert's number."""

    megatron: tuple[str, ...]
    """Spellings of one parameter: the local layer specification's, then Transformer Engine's where it differs."""
    tensors: Mapping[str, tuple[str, ...]]
    """Hugging Face tensors that it is made of, with the names of their dimensions."""
    layout: Layout
    exported: bool = True
    """False for a copy of a tensor that another parameter exports."""


_MODEL = (
    Rule(("embedding.word_embeddings.weight",), {"model.embed_tokens.weight": ("vocab", "hidden")}, VOCABULARY),
    Rule(("decoder.final_layernorm.weight",), {"model.norm.weight": ("hidden",)}, REPLICATED),
)
_OUTPUT = Rule(("output_layer.weight",), {"lm_head.weight": ("vocab", "hidden")}, VOCABULARY)
# With tied embeddings and several pipeline stages, the last stage has a copy of the embedding under this name.
_TIED_OUTPUT = Rule(_OUTPUT.megatron, _MODEL[0].tensors, VOCABULARY, exported=False)
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
    # Experts that are modules one by one, and those whose products Transformer Engine groups.
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
"""Once for each expert of a layer."""
_NOT_PARAMETERS = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""Tensors of old checkpoints that hold no weights."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A Megatron parameter of one model, under its name with the global numbers of layer and expert."""

    arch: Architecture
    tensors: Mapping[str, Shape]
    """The Hugging Face tensors that it is made of, with their shapes."""
    layout: Layout
    exported: bool
    layer: int | None
    """Global layer number; None outside the layers."""
    expert: int | None = None
    """Global number of the expert, of which `ExpertShare` says who holds it and how it is cut; None for all else."""

    def pieces(self, rank: int, size: int) -> list[Piece]:
        """What tensor-parallel rank `rank` of `size` holds, in order along `layout.dim`.

        Of an expert's parameter, the tensor-parallel ranks are those within the expert.
        """
        if not self.layout.sharded:
            rank, size = 0, 1
        return self.layout.cut(self.arch, [shape[self.layout.dim] for shape in self.tensors.values()], rank, size)

    def local_shape(self, size: int) -> Shape:
        """Shape of a rank's shard; it is the same on all of `size` tensor-parallel ranks."""
        shape = list(next(iter(self.tensors.values())))
        shape[self.layout.dim] = sum(piece.length for piece in self.pieces(0, size))
        return tuple(shape)


def weight_map(arch: Architecture) -> dict[str, Parameter]:
    """Every parameter that a Megatron model of this architecture can have, in canonical order, under all spellings."""
    sizes = _sizes(arch)
    parameters: dict[str, Parameter] = {}
    for prefix, hf_prefix, layer, expert, rule in _rules(arch):
        tensors = {
            hf_prefix + tensor.format(expert): tuple(sizes[dim] for dim in dims)
            for tensor, dims in rule.tensors.items()
        }
        parameter = Parameter(arch, tensors, rule.layout, rule.exported, layer, expert)
        parameters |= {prefix + name.format(expert): parameter for name in rule.megatron}
    return parameters


def hf_shapes(arch: Architecture) -> dict[str, Shape]:
    """Name and shape of every tensor of the Hugging Face model, tied copies left out."""
    return {name: shape for parameter in weight_map(arch).values() for name, shape in parameter.tensors.items()}


def check_local(
    parameters: Mapping[str, Parameter],
    shapes: Mapping[str, Shape],
    tp_size: int,
    experts: ExpertShare = WHOLE_EXPERTS,
) -> None:
    """Check the names and shapes of parameters that one or more ranks own, and that no layer among them lacks one.

    `experts`: those that these ranks hold.

    Raises:
        WeightError: a parameter is not in the map, has another shape or is another rank's expert, or a Hugging Face
            tensor of a layer that is there would not be loaded.
    """
    for name, shape in shapes.items():
        if name not in parameters:
            raise WeightError(_unknown("Megatron parameter", name, parameters))
        parameter = parameters[name]
        if not _is_held(parameter, experts):
            raise WeightError(
                f"Megatron parameter {name!r} is on expert-parallel rank {experts.rank} of {experts.size}, which does "
                "not hold this expert. Fix: name experts by their number among all of the layer"
            )
        size = tp_size if parameter.expert is None else experts.tensor_size
        expected = parameter.local_shape(size)
        if tuple(shape) != expected:
            raise WeightError(
                f"Megatron parameter {name!r} has shape {list(shape)}, expected {list(expected)} on each of {size} "
                "tensor-parallel ranks. Fix: build the model from the same config.json, and pad its vocabulary to "
                "Architecture.padded_vocab"
            )
    layers = {parameters[name].layer for name in shapes} - {None}
    wanted = (p for p in parameters.values() if p.layer in layers and _is_held(p, experts))
    check_covered([tensor for parameter in wanted for tensor in parameter.tensors], parameters, shapes)


def _is_held(parameter: Parameter, share: ExpertShare) -> bool:
    if parameter.expert is None or parameter.arch.experts is None:
        return True
    return share.owner(parameter.expert, parameter.arch.experts.count) == share.rank


def check_covered(tensors: Iterable[str], parameters: Mapping[str, Parameter], names: Iterable[str]) -> None:
    """Check that the parameters `names` hold every one of `tensors`.

    Raises:
        WeightError: naming the first one that none of them holds, and the parameter that would.
    """
    covered = {tensor for name in names for tensor in parameters[name].tensors}
    for tensor in tensors:
        if tensor not in covered:
            owner = next(name for name, parameter in parameters.items() if tensor in parameter.tensors)
            raise WeightError(
                f"Hugging Face tensor {tensor!r} has no place in this model, which lacks the Megatron parameter "
                f"{owner!r}. Fix: build the model with the features that its config.json asks for"
            )


def check_folder(arch: Architecture, found: Iterable[str], where: str) -> None:
    """Check that a Hugging Face checkpoint has the model's tensors and no others.

    Args:
        arch: what the model is.
        found: names of the checkpoint's tensors.
        where: what to call the checkpoint in an error.

    Raises:
        WeightError: naming the first tensor that is missing or not in the map, and the ones most like it.
    """
    expected = hf_shapes(arch)
    names = {name for name in found if not _NOT_PARAMETERS.fullmatch(name)}
    if arch.tied_embeddings:
        names -= set(_OUTPUT.tensors)
    extra = sorted(names - set(expected))
    for name in expected:
        if name not in names:
            hint = did_you_mean(name, extra)
            raise WeightError(f"{where}: tensor {name!r} is missing{hint and '; ' + hint}")
    if extra:
        raise WeightError(f"{where}: {_unknown('tensor', extra[0], expected)}")


def _rules(arch: Architecture) -> Iterable[tuple[str, str, int | None, int | None, Rule]]:
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
    yield "", "", None, None, _TIED_OUTPUT if arch.tied_embeddings else _OUTPUT


def _sizes(arch: Architecture) -> dict[str, int]:
    """Lengths of dimensions by their names."""
    return {
        "vocab": arch.vocab_size,
        "hidden": arch.hidden_size,
        "ffn": arch.ffn_size,
        "query": arch.num_heads * arch.head_dim,
        "key": arch.num_kv_heads * arch.head_dim,
        "head": arch.head_dim,
        "experts": arch.experts.count if arch.experts else 0,
    }


def _unknown(noun: str, name: str, known: Iterable[str]) -> str:
    hint = did_you_mean(name, known)
    return f"{noun} {name!r} is not in the map of this model{hint and '; ' + hint}"
