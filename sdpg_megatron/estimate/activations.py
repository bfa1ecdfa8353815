"""Memory of activations for the backward pass, and of the head.

The counts are the tensors that autograd saves in this package's layers (`mcore.layers`). On a GPU a norm is one kernel,
and so is attention over packed sequences; a CPU saves more. A test compares the counts with autograd on a CPU.

w is the size of an element in bytes: 2 or 4. Experts are assumed to get equal shares of the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from sdpg_megatron.architecture import Architecture
from sdpg_megatron.config import HeadConfig, ModelConfig, ParallelConfig
from sdpg_megatron.estimate.shards import Grid
from sdpg_megatron.head.sizes import HeadShape, Schedule

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes on a rank per token of that rank."""

    layer: float
    """Saved by a layer."""
    layer_input: float
    final_norm: float
    """Saved by the norm after the last layer, and its output."""
    working: float
    """Temporary memory of one layer's backward pass."""

    @classmethod
    def of(
        cls,
        arch: Architecture,
        model: ModelConfig,
        parallel: ParallelConfig,
        *,
        cuda: bool,
        fused: bool | None = None,
    ) -> Activations:
        """`fused`: the gated activation is one kernel; None for the configuration's choice."""
        fused = cuda and model.activation_fusion if fused is None else fused
        w, t = BYTES[model.dtype], parallel.tensor
        hidden = arch.hidden_size / (t if parallel.sequence else 1)
        query, key = arch.num_heads * arch.head_dim / t, arch.num_kv_heads * arch.head_dim / t
        kept = 2 * _norm(hidden, w) + _attention(arch, query, key, t, w)
        kept += _feed_forward(arch, parallel, w, fused=fused)
        if not cuda:
            kept += _more_on_cpu(arch, hidden, query, key, w)
        if parallel.context > 1:
            kept += (parallel.context - 1) * 2 * key * w  # the other ranks' keys and values
        width = arch.ffn_size / t if arch.experts is None else _routed(arch, parallel) * arch.ffn_size
        return cls(
            layer=kept,
            layer_input=hidden * w,
            final_norm=hidden * (w if cuda else 8) + 4 + arch.hidden_size * w,
            working=w * (5 * width + 2 * hidden),
        )


def _more_on_cpu(arch: Architecture, hidden: float, query: float, key: float, w: int) -> float:
    """Bytes that a layer saves on a CPU in addition to those on a GPU.

    A norm saves a float32 copy of its input instead of the input, and the result before scaling. Attention saves copies
    of queries, keys and values instead of the projection's output, and its output twice.
    """
    kept = 2 * (8 - w) * hidden - key * w
    if arch.qk_norm:
        # in float32 the keys need no copy, and the projection's output stays alive
        kept += 4 * (query + key) + (4 * query + (query + 2 * key) * w if w == 4 else 4 * (query + key))
    return kept


def _norm(hidden: float, w: int) -> float:
    """Input, output and divisor."""
    return hidden * 2 * w + 4


def _attention(arch: Architecture, query: float, key: float, t: int, w: int) -> float:
    kept = (query + 2 * key) * w  # output of the projection, which contains the values
    kept += (query + key) * w  # after the rotary embedding; cosines and sines are shared by all layers
    kept += query * w + 4 * arch.num_heads / t  # output, and the softmax's sums
    if arch.qk_norm:
        kept += 4 * (arch.num_heads + arch.num_kv_heads) / t  # divisors; the inputs are the projection's output
    return kept


def _routed(arch: Architecture, parallel: ParallelConfig) -> float:
    """Tokens of a rank's experts per token of a tensor-parallel group, divided by the ranks of an expert."""
    assert arch.experts is not None
    return arch.experts.per_token / parallel.tensor


def _feed_forward(arch: Architecture, parallel: ParallelConfig, w: int, *, fused: bool) -> float:
    """Gate and up projections and their product; unless `fused`, also up again and the gate's activation."""
    columns = 3 if fused else 5
    if arch.experts is None:
        return columns * arch.ffn_size / parallel.tensor * w
    experts, routed = arch.experts, _routed(arch, parallel)
    choices = (20 * experts.per_token + experts.count * (1 + w)) / (parallel.tensor if parallel.sequence else 1)
    if not fused:
        columns += 1  # the product before scaling
    # An expert's ranks each get all of its tokens, and compute a share of its columns.
    return choices + routed * (parallel.expert_tensor_size * (arch.hidden_size + 1) + columns * arch.ffn_size) * w


def in_flight(grid: Grid, stage: int, micro_batches: int) -> float:
    """Number of micro-batches with saved activations on a stage at a time; fractional with virtual stages."""
    if grid.chunks == 1:
        return min(grid.pipeline - stage, micro_batches)
    warm_up = 2 * (grid.pipeline - stage - 1) + (grid.chunks - 1) * grid.pipeline + 1
    return min(warm_up, micro_batches * grid.chunks) / grid.chunks


def kept(
    a: Activations, layers: int, tokens: float, passes: float, *, recompute: bool, received: bool, last: bool
) -> float:
    """Bytes of a stage's saved activations in the update, without temporary memory.

    Args:
        layers: layers of the stage.
        tokens: tokens of a micro-batch on this rank.
        passes: see `in_flight`.
        received: the stage's input comes from another stage.
    """
    of_layers = layers * (a.layer_input if recompute else a.layer)
    one = of_layers + (a.layer_input if received else 0) + (a.final_norm if last else 0)
    return tokens * (passes * one + (a.layer if recompute else 0))


@dataclass(frozen=True, slots=True)
class HeadBytes:
    """Memory of the head in addition to its inputs."""

    chunk: int
    """Logits, scratch and saved logit gradients."""
    rows: int
    """Hidden rows and their gradients."""
    matrix: int
    """Gradient of the vocabulary matrix, until the backward pass."""

    @property
    def all(self) -> int:
        return self.chunk + self.rows + self.matrix


def head_bytes(
    arch: Architecture, head: HeadConfig, grid: Grid, dtype: str, rows: int, *, distill: bool, cuda: bool, train: bool
) -> HeadBytes:
    """Estimate the head's memory.

    The schedule "auto" counts as "grad_in_forward", which a run chooses if it fits.

    Args:
        rows: response tokens of a micro-batch on this rank.
        distill: with a teacher distribution.
        train: with gradients; otherwise log-probs only.
    """
    columns, w = arch.padded_vocab(grid.tensor) // grid.tensor, BYTES[dtype]
    shape = HeadShape(columns=columns, hidden=arch.hidden_size, cuda=cuda, gradient_bytes=w, fused=cuda)
    of_run: Schedule = "recompute" if head.schedule == "recompute" else "grad_in_forward"
    schedule: Schedule = of_run if train else "recompute"
    # The chunk size is chosen once per run, for the schedule of its updates.
    chunk = head.chunk_rows or shape.chunk_rows(of_run, shape.default_bytes())
    distributions = 2 if distill and train else 1
    reordered = w if distill else 0
    held = min(rows, chunk * 2 // distributions)
    kept = w * columns * min(rows, shape.group_rows(schedule, shape.default_bytes(), chunk))
    return HeadBytes(
        chunk=held * shape.logits_bytes(schedule, distributions) + kept,
        rows=rows * arch.hidden_size * ((4 + w + reordered) if train else w),
        matrix=shape.matrix_bytes if schedule == "grad_in_forward" else 0,
    )
