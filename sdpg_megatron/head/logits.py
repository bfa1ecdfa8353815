"""Sources of a chunk's logits: products of hidden rows, or given logits.

Shapes: T rows, those with a teacher first; C rows of a chunk; V columns of this rank's shard or of a tile of it; H
hidden size; M rows of a product.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from sdpg_megatron.head.products import aligned, multiply, wide


class Logits(Protocol):
    """Student and teacher logits over temperature, one tile at a time, in a `products.wide` type."""

    masked: bool
    """The logits may hold -inf."""
    dtype: torch.dtype

    def begin(self, rows: slice) -> None:
        """Select the chunk for the following calls of `tile`."""
        ...

    def tile(self, columns: slice) -> tuple[Tensor, Tensor | None]:
        """Student tile [C, V], and the teacher tile [C, V] if the rows have a teacher.

        The caller may overwrite both. A source that holds its tiles does not restore an overwritten one.
        """
        ...


class Products:
    """Logits computed from hidden rows, on each call or once per chunk.

    With `shared`, a student and a teacher with the same matrix and temperature take one product over the student's rows
    followed by the teacher's. Twice the rows make the product more efficient on a GPU, but not on a CPU.
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
        """`held`: compute the tiles of a chunk once and keep them."""
        self.dtype = wide(hidden_TH.dtype)
        self.student = (hidden_TH, weight_VH)
        self.teacher = (teacher_GH, teacher_weight_VH)
        self.temperatures = temperatures
        self.held = held
        self.shared = shared and teacher_weight_VH is weight_VH and temperatures[0] == temperatures[1]
        self._rows: slice | None = None
        self._inputs: list[tuple[Tensor, Tensor, float]] = []
        """(hidden rows [M, H], matrix [V, H], factor) of each product: student's rows first, then the teacher's."""
        self._memory: dict[int, Tensor] = {}
        """Buffers by first column of the tile; all tiles share the one of column 0 if none is held."""
        self._made: set[int] = set()
        """First columns of the tiles in memory."""

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
        if not hidden_TH.is_cuda:  # `multiply` widens narrow types on a CPU: do it once, not for each tile
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
        # The first use of a buffer is the largest. The caller may have overwritten its contents.
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
    """Logits given by the caller. Tiles are copies of them."""

    masked = True

    def __init__(
        self, student_TV: Tensor, teacher_GV: Tensor, order_T: Tensor | None, temperatures: tuple[float, float]
    ) -> None:
        """`order_T`: row of `student_TV` for each row of the head. `teacher_GV` is in the head's order already."""
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
