"""The order of prompts: whole epochs, the same after a resume."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdpg_megatron.data.cursor import Cursor
from sdpg_megatron.errors import CheckpointError


@given(size=st.integers(1, 30), seed=st.integers(0, 9), counts=st.lists(st.integers(0, 70), max_size=6))
def test_every_epoch_is_a_permutation_however_it_is_taken(size: int, seed: int, counts: list[int]) -> None:
    cursor = Cursor(size, seed, shuffle=True)
    taken = [index for count in counts for index in cursor.take(count)]
    assert len(taken) == sum(counts)
    assert taken == Cursor(size, seed, shuffle=True).take(sum(counts))
    for start in range(0, len(taken) - size + 1, size):
        assert sorted(taken[start : start + size]) == list(range(size))
    assert cursor.epoch == len(taken) // size


@given(size=st.integers(1, 30), before=st.integers(0, 90), after=st.integers(0, 90), shuffle=st.booleans())
def test_a_resumed_cursor_goes_on_as_if_it_had_not_stopped(size: int, before: int, after: int, shuffle: bool) -> None:
    cursor = Cursor(size, 3, shuffle)
    cursor.take(before)
    resumed = Cursor.from_state(json.loads(json.dumps(cursor.state())), size)
    assert resumed.take(after) == cursor.take(after)
    assert resumed.state() == cursor.state()


def test_the_order_is_pinned() -> None:
    """A change of this order would break every run that resumes."""
    assert Cursor(8, 5, shuffle=True).take(16) == [6, 7, 1, 0, 5, 2, 3, 4, 5, 6, 3, 2, 4, 0, 1, 7]


def test_epochs_and_seeds_differ() -> None:
    taken = Cursor(50, 0, shuffle=True).take(100)
    assert taken[:50] != taken[50:]
    assert taken[:50] != Cursor(50, 1, shuffle=True).take(50)
    assert Cursor(3, 0, shuffle=False).take(7) == [0, 1, 2, 0, 1, 2, 0]


def test_an_endless_source_is_counted_through_and_resumed() -> None:
    cursor = Cursor(None, 0, shuffle=True)
    assert cursor.take(3) == [0, 1, 2]
    resumed = Cursor.from_state(json.loads(json.dumps(cursor.state())), None)
    assert resumed.take(2) == cursor.take(2) == [3, 4]
    assert resumed.epoch == 0
    with pytest.raises(CheckpointError, match="saved over infinitely many prompts, this dataset has 5"):
        Cursor.from_state(cursor.state(), 5)


def test_a_state_of_another_dataset_is_refused() -> None:
    state = Cursor(5, 0, shuffle=True).state()
    with pytest.raises(CheckpointError, match="saved over 5 prompts, this dataset has 6"):
        Cursor.from_state(state, 6)
    with pytest.raises(CheckpointError, match="no position"):
        Cursor.from_state({name: value for name, value in state.items() if name != "position"}, 5)
