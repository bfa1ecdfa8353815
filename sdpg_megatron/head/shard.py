"""Vocabulary shard of a rank's output matrix."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True, slots=True)
class VocabShard:
    """Vocabulary columns ``start, start + 1, ...``, one per row of this rank's output matrix."""

    start: int
    """This rank's first column in the whole vocabulary."""
    valid: int
    """Number of tokens in the whole vocabulary. Columns from here on are padding and never read."""
    group: ProcessGroup | None
    """Tensor-parallel group that shards the vocabulary; None if this rank holds all of it."""

    @property
    def ranks(self) -> int:
        return 1 if self.group is None else self.group.size()

    def tokens(self, weight_VH: Tensor) -> Tensor:
        """View of the rows without padding; may be empty."""
        return weight_VH[: max(0, self.valid - self.start)]
