"""Order of training prompts: seeded, endless and resumable.

The order depends only on dataset size and seed. Every data-parallel rank takes the indices of the whole step and uses
its part of them, so the prompts of a step do not depend on the number of ranks.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from sdpg_megatron.errors import CheckpointError


class Cursor:
    """Position in an endless sequence of epochs, each a permutation of the dataset; or in an endless source, with
    increasing indices."""

    def __init__(self, size: int | None, seed: int, shuffle: bool) -> None:
        """`size`: number of prompts; None for an endless source."""
        if size is not None and size < 1:
            raise ValueError(f"a cursor over {size} prompts")
        self._size = size
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = 0
        self._position = 0
        self._order = self._permutation()

    @property
    def epoch(self) -> int:
        """Epoch of the next index, from 0; always 0 for an endless source."""
        return self._epoch + (self._position // self._size if self._size is not None else 0)

    def take(self, count: int) -> list[int]:
        """Return the next `count` dataset indices, across epoch boundaries."""
        if self._size is None:
            self._position += count
            return list(range(self._position - count, self._position))
        taken: list[int] = []
        while len(taken) < count:
            if self._position == self._size:
                self._epoch, self._position = self._epoch + 1, 0
                self._order = self._permutation()
            part = self._order[self._position : self._position + count - len(taken)]
            self._position += len(part)
            taken += part
        return taken

    def state(self) -> dict[str, int | bool | None]:
        """State for `from_state`, as plain values."""
        return {
            "size": self._size,
            "seed": self._seed,
            "shuffle": self._shuffle,
            "epoch": self._epoch,
            "position": self._position,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], size: int | None) -> Cursor:
        """Restore a cursor over a dataset of `size` prompts; None for an endless source.

        Raises:
            CheckpointError: a field is missing or invalid, or the state was saved with another dataset size.
        """
        missing = {"size", "seed", "shuffle", "epoch", "position"} - state.keys()
        if missing:
            raise CheckpointError(f"data cursor: no {', '.join(sorted(missing))} in the saved state")
        if state["size"] != size:
            saved, found = ("infinitely many" if count is None else count for count in (state["size"], size))
            raise CheckpointError(
                f"data cursor: saved over {saved} prompts, this dataset has {found}. "
                "Fix: continue with the files and length limit of the run's start, or start a new run"
            )
        for name in ("seed", "epoch", "position"):
            bound = size if name == "position" else None
            if type(found := state[name]) is not int or (found < 0 and name != "seed") or (bound and found > bound):
                most = f"to {bound}" if bound else "or more"
                expected = "a whole number" if name == "seed" else f"a whole number, 0 {most}"
                raise CheckpointError(f"data cursor: found {name} {found!r}, expected {expected}")
        cursor = cls(size, state["seed"], bool(state["shuffle"]))
        cursor._epoch, cursor._position = state["epoch"], state["position"]
        cursor._order = cursor._permutation()
        return cursor

    def _permutation(self) -> Sequence[int]:
        if self._size is None:
            return ()
        return _shuffled(self._size, self._seed, self._epoch) if self._shuffle else range(self._size)


@lru_cache(maxsize=2)
def _shuffled(size: int, seed: int, epoch: int) -> tuple[int, ...]:
    """Permutation of an epoch. Cached, because every step restores a cursor from the state of the previous step."""
    # For a string seed Python guarantees the sequence of random() on every platform and version. It does not guarantee
    # shuffle(), and neither NumPy nor torch guarantees its permutations.
    generator = random.Random(f"{seed}/{epoch}")
    keys = [generator.random() for _ in range(size)]
    return tuple(sorted(range(size), key=keys.__getitem__))
