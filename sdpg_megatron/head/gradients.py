"""Accumulate the gradients of hidden rows and output matrix from tiles of the logit gradient.

Shapes: T rows; C rows of a chunk; R rows of a group of chunks; V columns of this rank's shard or of a tile of it; H
hidden size.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sdpg_megatron.head.chunked import ChunkedHead
from sdpg_megatron.head.options import HeadOptions
from sdpg_megatron.head.products import aligned, multiply, wide
from sdpg_megatron.head.rows import Upstream
from sdpg_megatron.head.shard import VocabShard

SCALED_ROWS = 1 << 14
"""Rows of the matrix that are scaled and rounded at a time on a CPU, where torch allocates a temporary of this size."""


class Gradients:
    """Gradients of the hidden rows, in the head's row order, and of the output matrix.

    With `HeadOptions.group_rows` 0, each tile of logit gradients is multiplied immediately: by the matrix for the
    hidden gradient, and by the hidden rows for the weight gradient. Otherwise the logit gradients of several chunks
    (a group) are kept in the weight's type. The hidden gradient takes one product per chunk over all columns. The
    weight gradient takes one product per group: more rows make it more efficient, and the float32 sum [V, H] is read
    and written less often.
    """

    def __init__(
        self,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        vocab: VocabShard,
        options: HeadOptions,
        wanted: tuple[bool, bool],
        *,
        deferred: bool,
    ) -> None:
        """
        Args:
            wanted: compute the gradient of hidden rows; of the matrix.
            deferred: write to ``main_grad`` only in `result`.
        """
        self.hidden_TH = hidden_TH
        self.weight_VH = vocab.tokens(weight_VH)
        self.process_group = vocab.group if options.reduce_hidden_grad and vocab.ranks > 1 else None
        self.hidden_grad_TH = torch.empty_like(hidden_TH, dtype=wide(hidden_TH.dtype)) if wanted[0] else None
        self.weight = WeightGradient(weight_VH, fused=options.main_grad, deferred=deferred) if wanted[1] else None
        # On CUDA the products take the gradient in the inputs' type. On a CPU it is faster to widen the inputs.
        self.narrow = weight_VH.is_cuda and weight_VH.dtype != wide(weight_VH.dtype)
        self._reductions: list[Any] = []
        self._group_RV: Tensor | None = None
        if options.group_rows and deferred:
            assert options.chunk_rows is not None
            columns = self.weight_VH.shape[0]
            size = group_size(hidden_TH.shape[0], options.chunk_rows, options.group_rows if wanted[1] else 0)
            self._group_RV = self.weight_VH.new_empty(size, aligned(columns))[:, :columns]
        self._group = slice(0, 0)
        """Rows whose gradients are in `_group_RV`."""

    def add_chunk(self, head: ChunkedHead, rows: slice, sums_NC: Tensor, upstream: Upstream) -> None:
        """Compute the logit gradient of a chunk and its products. Call with the chunks in order."""
        if self._group_RV is not None and rows.stop - self._group.start > len(self._group_RV):
            self.flush()
        coefficients = head.coefficients(sums_NC, upstream)
        for number, columns in enumerate(head.tiles):
            gradient_CV = head.gradient(rows, columns, coefficients, self._room(rows, columns))
            if self._group_RV is None:
                self._multiply_hidden(gradient_CV, rows, columns, add=number > 0)
                self._multiply_weight(gradient_CV, rows, columns)
        if self._group_RV is not None:
            self._group = slice(self._group.start, rows.stop)
            whole = slice(0, self._group_RV.shape[1])
            self._multiply_hidden(self._group_RV[self._in_group(rows)], rows, whole, add=False)
        self._reduce(rows)

    def flush(self) -> None:
        """Multiply the kept logit gradients by the hidden rows."""
        rows, self._group = self._group, slice(self._group.stop, self._group.stop)
        if self._group_RV is not None and rows.stop > rows.start:
            gradient_RV = self._group_RV[: rows.stop - rows.start]
            self._multiply_weight(gradient_RV, rows, slice(0, gradient_RV.shape[1]))

    def wait(self) -> None:
        """Wait for the all-reduces of the hidden gradient and free the kept logit gradients."""
        for work in self._reductions:
            work.wait()
        self._reductions.clear()
        self._group_RV = None

    def result(self, order_T: Tensor | None, scale: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of hidden rows and matrix for autograd, multiplied by the scalar tensor `scale`."""
        self.wait()
        hidden_grad_TH = self.hidden_grad_TH
        if hidden_grad_TH is not None:
            scaled_TH = hidden_grad_TH if scale is None else hidden_grad_TH.mul_(scale)
            hidden_grad_TH = restore(scaled_TH.to(self.hidden_TH.dtype), order_T)
        return hidden_grad_TH, None if self.weight is None else self.weight.result(scale)

    def _room(self, rows: slice, columns: slice) -> Tensor | None:
        """Buffer for the gradient of a tile; None to overwrite the logits."""
        if self._group_RV is not None:
            return self._group_RV[self._in_group(rows), columns]
        if not self.narrow:
            return None
        size, width = rows.stop - rows.start, columns.stop - columns.start
        return self.weight_VH.new_empty(size, aligned(width))[:, :width]

    def _in_group(self, rows: slice) -> slice:
        """Rows of a chunk in `_group_RV`."""
        return slice(rows.start - self._group.start, rows.stop - self._group.start)

    def _multiply_hidden(self, gradient_CV: Tensor, rows: slice, columns: slice, *, add: bool) -> None:
        if self.hidden_grad_TH is not None:
            multiply(gradient_CV, self.weight_VH[columns], self.hidden_grad_TH[rows], add=add)

    def _multiply_weight(self, gradient_CV: Tensor, rows: slice, columns: slice) -> None:
        if self.weight is not None:
            self.weight.add(columns, gradient_CV, self.hidden_TH[rows])

    def _reduce(self, rows: slice) -> None:
        """Start the all-reduce of a chunk's hidden gradient. It overlaps with the following products."""
        if self.hidden_grad_TH is not None and self.process_group is not None:
            work = dist.all_reduce(self.hidden_grad_TH[rows], group=self.process_group, async_op=True)
            self._reductions.append(work)


def group_size(rows: int, chunk_rows: int, most: int) -> int:
    """Rows of a group, with `rows` split evenly into the fewest groups of at most `most` rows.

    A group holds at least the largest chunk, which is one without a teacher (2 `chunk_rows`).
    """
    least = 2 * chunk_rows
    most = max(most, least)
    groups = -(-rows // most) or 1
    even = -(-rows // groups)
    return min(max(-(-even // chunk_rows) * chunk_rows, least), most, rows)


def restore(ordered: Tensor, order_T: Tensor | None) -> Tensor:
    """Permute rows from the head's order to the caller's."""
    return ordered if order_T is None else torch.empty_like(ordered).index_copy_(0, order_T, ordered)


class WeightGradient:
    """Sum of ``gradient.T @ hidden`` over tiles, in a `wide` type, for the token rows of this rank's output matrix.

    With `fused` the sum is added to ``weight.main_grad``, the float32 buffer of Megatron's DDP. As Megatron's fused
    linear does, this sets ``weight.grad_added_to_main_grad`` and returns a placeholder gradient to autograd. The
    placeholder is zero-filled if ``weight.zero_out_wgrad`` is set (another use of the weight, such as a tied embedding,
    adds to it), else uninitialized.
    """

    def __init__(self, weight_VH: Tensor, *, fused: bool, deferred: bool) -> None:
        """`deferred`: sum in a separate buffer that `result` adds to ``main_grad``."""
        self.weight_VH = weight_VH
        self.main_VH: Tensor | None = getattr(weight_VH, "main_grad", None) if fused else None
        self.direct = not deferred and self.main_VH is not None and self.main_VH.dtype == wide(weight_VH.dtype)
        self.own_VH: Tensor | None = None
        """Allocated, uninitialized, by the first product."""
        self._written = 0
        """Leading rows of `own_VH` that hold a sum."""

    def add(self, columns: slice, gradient_CV: Tensor, hidden_CH: Tensor) -> None:
        """Add the product of a tile's gradient and its hidden rows. Call with the tiles in order of columns."""
        target_VH = self.main_VH if self.direct else self._own()
        assert target_VH is not None
        part_VH = target_VH[columns]
        first = not self.direct and columns.stop > self._written
        self._written = max(self._written, columns.stop)
        narrow = gradient_CV.is_cuda and gradient_CV.dtype != part_VH.dtype
        kernel = _apex() if narrow and not first else None
        if kernel is not None:
            kernel(hidden_CH, gradient_CV, part_VH)
        else:
            multiply(gradient_CV.T, hidden_CH, part_VH, add=not first)

    def result(self, scale: Tensor | None = None) -> Tensor | None:
        """Gradient for autograd: the sum times the scalar tensor `scale`. Call at most once.

        One pass over the sum scales it and adds it to ``main_grad``, or scales and rounds it.
        """
        own_VH = None
        if not self.direct:
            own_VH = self._own()
            own_VH[self._written :].zero_()  # padding; all of it if there were no rows
        if self.main_VH is None:
            assert own_VH is not None
            return _scaled(own_VH, scale, self.weight_VH.dtype)
        if own_VH is not None:
            _ = self.main_VH.add_(own_VH) if scale is None else self.main_VH.addcmul_(own_VH, scale)
        if not hasattr(self.weight_VH, "grad_added_to_main_grad"):
            return None
        self.weight_VH.grad_added_to_main_grad = True
        make = torch.zeros_like if getattr(self.weight_VH, "zero_out_wgrad", False) else torch.empty_like
        return make(self.weight_VH)

    def _own(self) -> Tensor:
        if self.own_VH is None:
            self.own_VH = torch.empty_like(self.weight_VH, dtype=wide(self.weight_VH.dtype))
        return self.own_VH


def _scaled(sum_VH: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Sum times scale, rounded once. Overwrites the sum if the type is the same."""
    if sum_VH.dtype == dtype:
        return sum_VH if scale is None else sum_VH.mul_(scale)
    if scale is None:
        return sum_VH.to(dtype)
    if sum_VH.is_cuda and importlib.util.find_spec("triton") is not None:  # torch's mixed-type kernel is slow
        from sdpg_megatron.head.tile_triton import scaled

        return scaled(sum_VH, scale, dtype)
    narrow_VH = torch.empty_like(sum_VH, dtype=dtype)
    for start in range(0, len(sum_VH), SCALED_ROWS):
        part = slice(start, start + SCALED_ROWS)
        torch.mul(sum_VH[part], scale, out=narrow_VH[part])
    return narrow_VH


def _apex() -> Any:
    """apex's kernel (input rows, output gradient, float32 sum): product and accumulation in one; None if missing."""
    if importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is None:
        return None
    return importlib.import_module("fused_weight_gradient_mlp_cuda").wgrad_gemm_accum_fp32
