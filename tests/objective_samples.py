"""What an objective reads, as its tests draw it. Shapes: T rows (response tokens), V columns, H hidden size."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """Random model outputs, float64, of whole responses one after another."""

    hidden_TH: Tensor
    teacher_TH: Tensor
    weight_VH: Tensor
    labels_T: Tensor
    old_logprob_T: Tensor
    reference_logprob_T: Tensor
    advantage_T: Tensor
    gate_T: Tensor
