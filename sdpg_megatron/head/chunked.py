"""A head's rows in chunks, their columns in tiles: statistics, terms, and the gradient in the logits.

Shapes: T rows, those with a teacher first; G rows with a teacher; C rows of a chunk; V columns of this rank's shard or
of a tile of it; H hidden size; N numbers kept for a row: its statistics (see `statistics`) and what its divergence
adds to them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from sdpg_megatron.head import tile
from sdpg_megatron.head.divergences import Divergence, Pull, TopTokens
from sdpg_megatron.head.options import HeadOptions
from sdpg_megatron.head.products import multiply, wide
from sdpg_megatron.head.shard import VocabShard
from sdpg_megatron.head.statistics import STUDENT, TAUGHT, StudentSums, TeacherSums, gather, join
from sdpg_megatron.head.tile import Gap, RowCoefficients

Upstream = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Gradients of log-prob, entropy and divergence, each [C]; None for a term that nobody used."""


class Logits(Protocol):
    """Student's and teacher's logits over temperature, a tile at a time, in a `products.wide` type."""

    masked: bool
    """They may hold -inf."""

    def begin(self, rows: slice) -> None:
        """From now on tiles of these rows are asked for."""
        ...

    def tile(self, columns: slice) -> tuple[Tensor, Tensor | None]:
        """[C, V] of the student, and of the teacher for rows that have one.

        Both may be overwritten: after that the tile is not asked for again, except where it is made anew each time.
        """
        ...


class Products:
    """Logits made from hidden rows: each time anew, or held for the chunk."""

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
    ) -> None:
        self.student = (hidden_TH, weight_VH)
        self.teacher = (teacher_GH, teacher_weight_VH)
        self.temperatures = temperatures
        self.held = held
        self._buffers: dict[tuple[bool, int], Tensor] = {}
        self._made: set[tuple[bool, int]] = set()
        self._rows = slice(0, 0)

    def begin(self, rows: slice) -> None:
        self._rows = rows
        self._made.clear()

    def tile(self, columns: slice) -> tuple[Tensor, Tensor | None]:
        taught = self._rows.stop <= self.teacher[0].shape[0]
        return self._tile(columns, False), self._tile(columns, True) if taught else None

    def _tile(self, columns: slice, teacher: bool) -> Tensor:
        rows_TH, weight_VH = self.teacher if teacher else self.student
        hidden_CH, part_VH = rows_TH[self._rows], weight_VH[columns]
        key = (teacher, columns.start if self.held else 0)
        size = hidden_CH.shape[0], part_VH.shape[0]
        # A buffer is made for the first and largest use of its place. The caller may have written to what it got.
        if key not in self._buffers or self._buffers[key].numel() < size[0] * size[1]:
            self._buffers[key] = hidden_CH.new_empty(size[0] * size[1], dtype=wide(hidden_CH.dtype))
        logits_CV = self._buffers[key][: size[0] * size[1]].view(size)
        if not self.held or key not in self._made:
            multiply(hidden_CH, part_VH.T, logits_CV)
            self._made.add(key)
            if self.temperatures[teacher] != 1:
                logits_CV.div_(self.temperatures[teacher])
        return logits_CV


class Given:
    """Logits that the caller has: tiles are copies of them."""

    masked = True

    def __init__(
        self, student_TV: Tensor, teacher_GV: Tensor, order_T: Tensor | None, temperatures: tuple[float, float]
    ) -> None:
        """`order_T`: the student's row for each row of the head; the teacher's rows come in the head's order."""
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
        taught = rows.stop <= self.teacher_GV.shape[0]
        return _over(student_CV, self.temperatures[0]), (
            _over(self.teacher_GV[rows, columns], self.temperatures[1]) if taught else None
        )


def _over(logits_CV: Tensor, temperature: float) -> Tensor:
    return logits_CV.to(wide(logits_CV.dtype)) / temperature


@dataclass(frozen=True, slots=True)
class Coefficients:
    """What turns the logits of a chunk into their gradient."""

    row: RowCoefficients
    tokens_Ck: Tensor | None = None
    top_Ck: Tensor | None = None
    """To be added at the columns of these tokens."""


class ChunkedHead:
    """Sums over the vocabulary, and what follows from them, for one chunk of rows at a time.

    Everything here is a collective of `vocab.group`, whose ranks hold the same rows: one gather a chunk, and one more
    where the divergence looks at a mixture.
    """

    def __init__(
        self, logits: Logits, labels_T: Tensor, taught: int, columns: int, vocab: VocabShard, options: HeadOptions
    ) -> None:
        """`taught`: G; `columns`: those of this shard that are tokens."""
        assert options.chunk_rows is not None and options.tile_columns is not None, "sizes are chosen by the caller"
        self.logits = logits
        self.vocab = vocab
        self.labels_T = labels_T - vocab.start
        self.taught = taught
        self.temperature = options.temperature
        self.divergence: Divergence = options.divergence
        self.top = min(self.divergence.top, vocab.valid)
        self.chunk_rows = options.chunk_rows
        # A shard of padding alone has one tile without columns: its sums are those over nothing.
        self.tiles = [
            slice(start, min(start + options.tile_columns, columns))
            for start in range(0, max(columns, 1), options.tile_columns)
        ]
        self.kernels = kernels(options, labels_T.device)

    def chunks(self) -> Iterator[slice]:
        """Runs of at most `chunk_rows` rows that all have a teacher, or all have none."""
        total = self.labels_T.shape[0]
        for first, last in ((0, self.taught), (self.taught, total)):
            for start in range(first, last, self.chunk_rows):
                yield slice(start, min(start + self.chunk_rows, last))

    def measure(self, rows: slice) -> Tensor:
        """What is to be kept of the chunk: float64 [N, C], with the same bits on every rank."""
        self.logits.begin(rows)
        taught = rows.stop <= self.taught
        gap = self.divergence.gap if taught else Gap.NONE
        found, best = [], None
        for columns in self.tiles:
            student_CV, teacher_CV = self.logits.tile(columns)
            labels_C = self.labels_T[rows] - columns.start
            found.append(self.kernels.measure(student_CV, teacher_CV, labels_C, gap, masked=self.logits.masked))
            if self.top and teacher_CV is not None:
                here = self._top_tokens(student_CV, teacher_CV, columns)
                best = here if best is None else best.beside(here).best(self.top)
        packed_NC = join(torch.stack(found), gap)
        if best is not None:
            packed_NC = torch.cat((packed_NC, best.packed(self.top)))
        parts_RNC = gather(packed_NC, self.vocab.group)
        sums_KC = join(parts_RNC[:, : TAUGHT if taught else STUDENT], gap)
        if best is not None:
            return torch.cat((sums_KC, self._join_top(parts_RNC[:, TAUGHT:])))
        if taught and self.divergence.keep is not None:
            return torch.cat((sums_KC, self._measure_mixture(sums_KC, self.divergence.keep)))
        return sums_KC

    def terms(self, sums_NC: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """log p(y), H, divergence and log q(y), each float64 [C]; the last two are 0 for rows without a teacher."""
        student = StudentSums.of(sums_NC)
        if sums_NC.shape[0] == STUDENT:
            none_C = torch.zeros_like(student.max)
            return student.logprob, student.entropy, none_C, none_C
        teacher = TeacherSums.of(sums_NC)
        divergence_C = self.divergence.value(student, teacher, sums_NC[TAUGHT:])
        return student.logprob, student.entropy, divergence_C, teacher.logprob

    def coefficients(self, sums_NC: Tensor, upstream: Upstream) -> Coefficients:
        """From upstream gradients to those in the logits before temperature."""
        logprob_C, entropy_C, divergence_C = (None if g_C is None else g_C.double() for g_C in upstream)
        student = StudentSums.of(sums_NC)
        pulls = []
        if logprob_C is not None:
            pulls.append(Pull(-logprob_C / student.sum, label=logprob_C))
        if entropy_C is not None:
            slope_C = -entropy_C / student.sum
            pulls.append(Pull(-slope_C * student.spread / student.sum, student=slope_C))
        taught = sums_NC.shape[0] > STUDENT
        teacher = TeacherSums.of(sums_NC) if taught else None
        if teacher is not None and divergence_C is not None:
            pulls.append(self.divergence.pull(student, teacher, sums_NC[TAUGHT:], divergence_C))
        return self._collect(student, teacher, sums_NC[TAUGHT:], pulls)

    def gradient(self, rows: slice, columns: slice, coefficients: Coefficients, out: Tensor | None = None) -> Tensor:
        """Gradient in a tile of the logits before temperature, [C, V]. `Logits.begin` chose the chunk."""
        student_CV, teacher_CV = self.logits.tile(columns)
        labels_C = self.labels_T[rows] - columns.start
        gradient_CV: Tensor = self.kernels.gradient_(
            student_CV, teacher_CV, labels_C, coefficients.row, masked=self.logits.masked, out=out
        )
        if coefficients.top_Ck is not None and coefficients.tokens_Ck is not None and gradient_CV.shape[1]:
            start = self.vocab.start + columns.start
            owned_Ck, column_Ck = tile.locate(coefficients.tokens_Ck - start, gradient_CV.shape[1])
            part_Ck = torch.where(owned_Ck, coefficients.top_Ck, 0).to(gradient_CV.dtype)
            gradient_CV.scatter_add_(1, column_Ck, part_Ck)
        return gradient_CV

    def _collect(
        self, student: StudentSums, teacher: TeacherSums | None, extra_NC: Tensor, pulls: list[Pull]
    ) -> Coefficients:
        def total(name: str) -> Tensor | None:
            parts = [part for pull in pulls if (part := getattr(pull, name)) is not None]
            return torch.stack(parts).sum(0) / self.temperature if parts else None

        constant_C = total("constant")
        row = RowCoefficients(
            max=student.max,
            constant=torch.zeros_like(student.max) if constant_C is None else constant_C,
            label=total("label"),
            student=total("student"),
            teacher=total("teacher"),
            drawn=total("drawn"),
            mixture=total("mixture"),
        )
        if teacher is not None:
            keep = 0.5 if self.divergence.keep is None else self.divergence.keep
            row = replace(
                row,
                teacher_max=teacher.max,
                log_sum=student.sum.log(),
                teacher_log_sum=teacher.sum.log(),
                keep=keep,
            )
        top_Ck = total("top_Ck")
        return Coefficients(row, None if top_Ck is None else TopTokens.unpacked(extra_NC).token_Ck.long(), top_Ck)

    def _top_tokens(self, student_CV: Tensor, teacher_CV: Tensor, columns: slice) -> TopTokens:
        token_V = torch.arange(columns.start, columns.stop, device=student_CV.device) + self.vocab.start
        return TopTokens(student_CV, teacher_CV, token_V.expand_as(student_CV)).best(self.top)

    def _join_top(self, packed_RNC: Tensor) -> Tensor:
        first, *others = (TopTokens.unpacked(packed_NC).real() for packed_NC in packed_RNC)
        for other in others:
            first = first.beside(other)
        return first.best(self.top).packed(self.top)

    def _measure_mixture(self, sums_KC: Tensor, keep: float) -> Tensor:
        student, teacher = StudentSums.of(sums_KC), TeacherSums.of(sums_KC)
        row = RowCoefficients(
            max=student.max,
            constant=student.max,
            teacher_max=teacher.max,
            log_sum=student.sum.log(),
            teacher_log_sum=teacher.sum.log(),
            keep=keep,
        )
        found = [
            self.kernels.measure_mixture(*self.logits.tile(columns), row, masked=self.logits.masked)
            for columns in self.tiles
        ]
        return gather(torch.stack(found).sum(0), self.vocab.group).sum(0)


def kernels(options: HeadOptions, device: torch.device) -> ModuleType:
    """The module with the elementwise functions."""
    if options.kernels == "torch" or (options.kernels == "auto" and device.type != "cuda"):
        return tile
    try:
        from sdpg_megatron.head import tile_triton
    except ImportError as error:
        if options.kernels == "auto":
            return tile
        raise ImportError(
            "head kernels: found no triton, expected it for kernels=triton. Fix: pip install triton"
        ) from error
    return tile_triton
