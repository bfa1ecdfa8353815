"""Chunked head: statistics, terms and logit gradients for chunks of rows and tiles of columns.

Shapes: T rows, those with a teacher first; G rows with a teacher; C rows of a chunk; V columns of this rank's shard or
of a tile of it; N numbers kept per row: its statistics (see `statistics`), then any extra numbers of its divergence.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from sdpg_megatron.head import rows as row_functions
from sdpg_megatron.head import tile
from sdpg_megatron.head.divergences import Divergence, TopTokens
from sdpg_megatron.head.logits import Logits
from sdpg_megatron.head.options import HeadOptions
from sdpg_megatron.head.rows import Coefficients, Upstream
from sdpg_megatron.head.shard import VocabShard
from sdpg_megatron.head.statistics import NUM_STUDENT_SUMS, NUM_SUMS_WITH_TEACHER, gather
from sdpg_megatron.head.tile import WeightedLogRatio


class Kernels(NamedTuple):
    """Implementations of the elementwise work."""

    tile: ModuleType
    """`tile` or `tile_triton`: passes over a tile of logits."""
    rows: ModuleType
    """`rows` or `rows_triton`: work on N numbers per row."""


class ChunkedHead:
    """Vocabulary sums, terms and logit gradients, one chunk of rows at a time.

    `measure` is collective over `vocab.group`, whose ranks hold the same rows: one gather per chunk, and a second one
    for a divergence with a mixture.
    """

    def __init__(
        self, logits: Logits, labels_T: Tensor, teacher_rows: int, columns: int, vocab: VocabShard, options: HeadOptions
    ) -> None:
        """
        Args:
            teacher_rows: G.
            columns: token columns of this shard, without padding.
        """
        assert options.chunk_rows is not None and options.tile_columns is not None, "sizes are chosen by the caller"
        self.logits = logits
        self.vocab = vocab
        self.labels_T = labels_T - vocab.start if vocab.start else labels_T
        self.teacher_rows = teacher_rows
        self.temperature = options.temperature
        self.divergence: Divergence = options.divergence
        self.top = min(self.divergence.top, vocab.valid)
        self.chunk_rows = options.chunk_rows
        # A shard that is all padding has one tile with zero columns.
        self.tiles = [
            slice(start, min(start + options.tile_columns, columns))
            for start in range(0, max(columns, 1), options.tile_columns)
        ]
        self.kernels = kernels(options, labels_T.device)

    def chunks(self) -> list[slice]:
        """Chunks of at most `chunk_rows` rows with a teacher, then of at most 2 `chunk_rows` rows without one."""
        return [
            *_runs(0, self.teacher_rows, self.chunk_rows),
            *_runs(self.teacher_rows, len(self.labels_T), 2 * self.chunk_rows),
        ]

    def measure(self, rows: slice) -> Tensor:
        """Statistics and divergence numbers of a chunk: float64 [N, C], bit-identical on all ranks. Collective."""
        self.logits.begin(rows)
        has_teacher = rows.stop <= self.teacher_rows
        weighted_log_ratio = self.divergence.weighted_log_ratio if has_teacher else WeightedLogRatio.NONE
        found, best = [], None
        for columns in self.tiles:
            student_CV, teacher_CV = self.logits.tile(columns)
            labels_C = self._labels(rows, columns)
            found.append(
                self.kernels.tile.measure(
                    student_CV, teacher_CV, labels_C, weighted_log_ratio, masked=self.logits.masked
                )
            )
            if self.top and teacher_CV is not None:
                here = self._top_tokens(student_CV, teacher_CV, columns)
                best = here if best is None else best.beside(here).best(self.top)
        packed_NC = self.kernels.rows.join(_stacked(found), weighted_log_ratio)
        if best is not None:
            packed_NC = torch.cat((packed_NC, best.packed(self.top)))
        parts_RNC = gather(packed_NC, self.vocab.group)
        num_sums = NUM_SUMS_WITH_TEACHER if has_teacher else NUM_STUDENT_SUMS
        sums_KC: Tensor = self.kernels.rows.join(parts_RNC[:, :num_sums], weighted_log_ratio)
        if best is not None:
            best = TopTokens.of_ranks(parts_RNC[:, NUM_SUMS_WITH_TEACHER:]).best(self.top, padded=True)
            return torch.cat((sums_KC, best.packed(self.top)))
        if has_teacher and self.divergence.student_mix is not None:
            return torch.cat((sums_KC, self._measure_mixture(sums_KC, self.divergence.student_mix)))
        return sums_KC

    def terms(self, sums_NC: Tensor, out_4C: Tensor) -> None:
        """Write log p(y), H, divergence and log q(y) to `out_4C`. The last two are 0 for rows without a teacher."""
        self.kernels.rows.terms(sums_NC, self.divergence, out_4C)

    def coefficients(self, sums_NC: Tensor, upstream: Upstream) -> Coefficients:
        """Coefficients of the gradient in the logits before temperature, from upstream gradients of the terms."""
        found: Coefficients = self.kernels.rows.coefficients(
            sums_NC, self.divergence, upstream, self.temperature, self.logits.dtype
        )
        return found

    def gradient(self, rows: slice, columns: slice, coefficients: Coefficients, out: Tensor | None = None) -> Tensor:
        """Gradient in a tile of logits before temperature, [C, V]. Call ``logits.begin(rows)`` first."""
        student_CV, teacher_CV = self.logits.tile(columns)
        gradient_CV: Tensor = self.kernels.tile.gradient_(
            student_CV,
            teacher_CV,
            self._labels(rows, columns),
            coefficients.row,
            masked=self.logits.masked,
            out=out,
        )
        if coefficients.top_Ck is not None and coefficients.tokens_Ck is not None and gradient_CV.shape[1]:
            start = self.vocab.start + columns.start
            owned_Ck, column_Ck = tile.locate(coefficients.tokens_Ck - start, gradient_CV.shape[1])
            part_Ck = torch.where(owned_Ck, coefficients.top_Ck, 0).to(gradient_CV.dtype)
            gradient_CV.scatter_add_(1, column_Ck, part_Ck)
        return gradient_CV

    def _labels(self, rows: slice, columns: slice) -> Tensor:
        """Column of each label in a tile; out of range if another tile or shard holds the label."""
        return self.labels_T[rows] - columns.start if columns.start else self.labels_T[rows]

    def _top_tokens(self, student_CV: Tensor, teacher_CV: Tensor, columns: slice) -> TopTokens:
        token_V = torch.arange(columns.start, columns.stop, device=student_CV.device) + self.vocab.start
        return TopTokens(student_CV, teacher_CV, token_V.expand_as(student_CV)).best(self.top)

    def _measure_mixture(self, sums_KC: Tensor, student_mix: float) -> Tensor:
        row = row_functions.mixture_coefficients(sums_KC, student_mix, self.logits.dtype)
        found = [
            self.kernels.tile.measure_mixture(*self.logits.tile(columns), row, masked=self.logits.masked)
            for columns in self.tiles
        ]
        parts_R2C = gather(_stacked(found).sum(0), self.vocab.group)
        return parts_R2C.sum(0)


def _runs(first: int, last: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, last)) for start in range(first, last, size))


def _stacked(parts: list[Tensor]) -> Tensor:
    return parts[0][None] if len(parts) == 1 else torch.stack(parts)


def kernels(options: HeadOptions, device: torch.device) -> Kernels:
    """Choose the modules with the elementwise functions."""
    if not options.uses_triton(device):
        return Kernels(tile, row_functions)
    try:
        import sdpg_megatron.head.rows_triton as rows_triton
        import sdpg_megatron.head.tile_triton as tile_triton
    except ImportError as error:
        raise ImportError(
            "head.kernels: found triton not installed, expected it for kernels=triton. Fix: pip install triton"
        ) from error
    return Kernels(tile_triton, rows_triton)
