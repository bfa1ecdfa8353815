"""Sources of a chunk's logits: products of hidden rows, or logits that the caller has.

Shapes: T rows, those with a teacher first; C rows of a chunk; V columns of this rank's shard or of a tile of it; H
hidden size; M rows of a product.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from sdpg_megatron.head.products import aligned, multiply, wide


class Logits(Protocol):
    """Student's and teacher's logits over temperature, a tile at a time, in a `products.wide` type."""

    masked: bool
    """They may hold -inf."""
    dtype: torch.dtype

    def begin(self, rows: slice) -> None:
        """Choose the chunk of the tiles that follow."""
        ...

    def tile(self, columns: slice) -> tuple[Tensor, Tensor | None]:
        """[C, V] of the student, and of the teacher for rows that have one.

        Both may be overwritten: after that the tile is not asked for again, except where it is made anew each time.
        """
        ...


class Products:
    """Logits made from hidden rows: each time anew, or held for the chunk.

    With `shared`, student and teacher of one matrix and one temperature have one product, whose rows are the student's
    and below them the teacher's: twice the rows make it more efficient on a GPU, though not on a CPU.
    """

    masked = False

    def __init__(
        self,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        teacher_GH: Tensor,
        teacher_weight_VH: Tensor,
        temperatures: tuple[float, float],
        *,
        held: bool,
        shared: bool,
    ) -> None:
        """`held`: keep the tiles of a chunk."""
        self.dtype = wide(hidden_TH.dtype)
        self.student = (hidden_TH, weight_VH)
        self.teacher = (teacher_GH, teacher_weight_VH)
        self.temperatures = temperatures
        self.held = held
        self.shared = shared and teacher_weight_VH is weight_VH and temperatures[0] == temperatures[1]
        self._rows: slice | None = None
        self._inputs: list[tuple[Tensor, Tensor, float]] = []
        """(hidden rows [M, H], matrix [V, H], factor) of each product. The products' rows are student's, then
        teacher's."""
        self._memory: dict[int, Tensor] = {}
        """By the first column of a tile; all tiles use that of 0 where none is held."""
        self._made: set[int] = set()

    def begin(self, rows: slice) -> None:
        if self._rows == rows:
            return
        self._rows, has_teacher = rows, rows.stop <= self.teacher[0].shape[0]
        self._made.clear()
        (hidden_TH, weight_VH), (teacher_GH, teacher_VH) = self.student, self.teacher
        factor, teacher_factor = (1 / temperature for temperature in self.temperatures)
        if has_teacher and self.shared:
            self._inputs = [(torch.cat((hidden_TH[rows], teacher_GH[rows])), weight_VH, factor)]
        else:
            self._inputs = [(hidden_TH[rows], weight_VH, factor)]
            if has_teacher:
                self._inputs.append((teacher_GH[rows], teacher_VH, teacher_factor))
        if not hidden_TH.is_cuda:  # products of narrow types are widened there: once, rather than for each tile
            self._inputs = [(rows_MH.to(self.dtype), matrix_VH, by) for rows_MH, matrix_VH, by in self._inputs]

    def tile(self, columns: slice) -> tuple[Tensor, Tensor | None]:
        assert self._rows is not None, "`begin` comes first"
        logits_MV, size = self._tile(columns), self._rows.stop - self._rows.start
        return logits_MV[:size], logits_MV[size:] if len(logits_MV) > size else None

    def _tile(self, columns: slice) -> Tensor:
        rows = sum(len(rows_MH) for rows_MH, _, _ in self._inputs)
        width = columns.stop - columns.start
        numbers = rows * aligned(width)
        key = columns.start if self.held else 0
        # Memory is taken for the first and largest use of its place. The caller may have written to what it got.
        if key not in self._memory or self._memory[key].numel() < numbers:
            self._memory[key] = self.student[0].new_empty(numbers, dtype=self.dtype)
        logits_MV = self._memory[key][:numbers].view(rows, aligned(width))[:, :width]
        if not self.held or key not in self._made:
            start = 0
            for rows_MH, weight_VH, factor in self._inputs:
                part_MV = logits_MV[start : start + len(rows_MH)]
                multiply(rows_MH, weight_VH[columns].T, part_MV, factor=factor)
                start += len(rows_MH)
            self._made.add(key)
        return logits_MV


class Given:
    """Logits that the caller has: tiles are copies of them."""

    masked = True

    def __init__(
        self, student_TV: Tensor, teacher_GV: Tensor, order_T: Tensor | None, temperatures: tuple[float, float]
    ) -> None:
        """`order_T`: the student's row for each row of the head; the teacher's rows come in the head's order."""
        self.dtype = wide(student_TV.dtype)
        self.student_TV = student_TV
        self.teacher_GV = teacher_GV
        self.order_T = order_T
        self.temperatures = temperatures
        self._rows = slice(0, 0)

    def begin(self, rows: slice) -> None:
        self._rows = rows

    def tile(self, columns: slice) -> tuple[Tensor, Tensor | None]:
        student_TV, rows = self.student_TV[:, columns], self._rows
        student_CV = student_TV[rows] if self.order_T is None else student_TV.index_select(0, self.order_T[rows])
        has_teacher = rows.stop <= self.teacher_GV.shape[0]
        return _over(student_CV, self.temperatures[0]), (
            _over(self.teacher_GV[rows, columns], self.temperatures[1]) if has_teacher else None
        )


def _over(logits_CV: Tensor, temperature: float) -> Tensor:
    return logits_CV.to(wide(logits_CV.dtype)) / temperature
