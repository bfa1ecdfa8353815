"""Where a rank's part of the output matrix lies in the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True, slots=True)
class VocabShard:
    """Columns ``start, start + 1, ...`` of the vocabulary, one for each row of a rank's output matrix."""

    start: int
    """This rank's first column in the whole vocabulary."""
    valid: int
    """Columns of the whole vocabulary that are tokens. From here on they are padding: never read, whatever it holds."""
    group: ProcessGroup | None
    """Tensor-parallel ranks, whose shards together are the vocabulary; None where this rank holds all of it."""

    @property
    def ranks(self) -> int:
        return 1 if self.group is None else self.group.size()

    def tokens(self, weight_VH: Tensor) -> Tensor:
        """The rows of a shard that belong to tokens: a view, possibly of no rows."""
        return weight_VH[: max(0, self.valid - self.start)]
