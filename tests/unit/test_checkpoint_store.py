"""What lies in a checkpoints folder: what counts, what is kept, what is swept, and what is said of damage."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdpg_megatron.checkpoint import store as store_module
from sdpg_megatron.checkpoint.files import FileSum, find_damage, fsync_and_hash
from sdpg_megatron.checkpoint.state import MANIFEST, RunState, complete_checkpoints
from sdpg_megatron.checkpoint.store import CheckpointStore
from sdpg_megatron.config import CheckpointConfig
from sdpg_megatron.errors import CheckpointError
from sdpg_megatron.observe.files import fsync_path


class Alone:
    """The only rank."""

    rank, world, is_main = 0, 1, True

    def gather_all(self, value: Any) -> list[Any]:
        return [value]


def store_in(folder: Path, **config: Any) -> CheckpointStore:
    return CheckpointStore(folder, Alone(), CheckpointConfig(**config))  # type: ignore[arg-type]


def state_of(step: int) -> RunState:
    return RunState(step=step, cursor={}, seconds=0.0, baseline={}, evaluated=True, config={}, model="m", data="d")


def add(store: CheckpointStore, *steps: int) -> None:
    """Checkpoints of one file, put in place as real ones are."""
    for step in steps:
        partial = store._make_partial(step)
        (partial / "weights").write_text(f"of step {step}")
        state = state_of(step)
        store._put_in_place(partial, state)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_are_kept_and_every_so_many(tmp_path: Path) -> None:
    add(store_in(tmp_path, keep=2, keep_every=4), *range(1, 12))
    assert names(tmp_path) == ["latest", *(f"step_{step:08d}" for step in (4, 8, 10, 11))]
    assert (tmp_path / "latest").read_text() == "step_00000011\n"


def test_old_ones_go_only_when_the_new_one_is_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_in(tmp_path, keep=1)
    add(store, 1)
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if target.name == "step_00000002":
            raise OSError(28, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="No space left"):
        add(store, 2)
    assert names(tmp_path) == ["latest", "step_00000001"]
    assert store.newest() == (tmp_path / "step_00000001", RunState.read(tmp_path / "step_00000001" / MANIFEST))


def test_one_that_cannot_be_removed_is_no_reason_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = store_in(tmp_path, keep=1)
    add(store, 1)

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(store, "_remove", lambda path: path.exists() and refuse(path))
    add(store, 2)
    assert "step_00000001: could not be removed" in caplog.text
    found = store.newest()
    assert found is not None and found[1].step == 2


def test_the_disk_knows_that_one_is_out_of_sight_before_any_of_it_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_in(tmp_path)
    add(store, 1)
    calls: list[tuple[str, str]] = []

    def recorded(name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def act(path: Path, *arguments: Any) -> Any:
            calls.append((name, path.name.replace(tmp_path.name, "parent").split(".")[0]))
            return inner(path, *arguments)

        return act

    monkeypatch.setattr(Path, "rename", recorded("rename", Path.rename))
    monkeypatch.setattr(store_module, "fsync_path", recorded("flush", fsync_path))
    monkeypatch.setattr(shutil, "rmtree", recorded("remove", shutil.rmtree))
    store._remove(tmp_path / "step_00000001")
    assert calls == [("rename", "step_00000001"), ("flush", "parent"), ("remove", "step_00000001")]
    assert names(tmp_path) == ["latest"]


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    store = store_in(tmp_path, keep=2)
    add(store, 1, 2)
    (tmp_path / "step_00000002" / "old").touch()
    add(store, 2)
    assert names(tmp_path / "step_00000002") == [MANIFEST, "weights"]


def test_only_whole_ones_count(tmp_path: Path) -> None:
    add(store_in(tmp_path, keep=9), 2, 10, 100000000)
    for name in ("step_00000012.1a2b.partial", "step_x", "step_7", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / MANIFEST).touch()
    (tmp_path / "step_00000014").mkdir()
    found = [path.name for path in complete_checkpoints(tmp_path)]
    assert found == ["step_00000002", "step_00000010", "step_100000000"]


def test_what_was_left_unfinished_is_swept_and_the_pointer_put_right(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    add(store, 1, 2)
    (tmp_path / "step_00000003.ab.partial" / "deep").mkdir(parents=True)
    shutil.rmtree(tmp_path / "step_00000002")
    store.sweep()
    assert names(tmp_path) == ["latest", "step_00000001"]
    assert (tmp_path / "latest").read_text() == "step_00000001\n"


def test_nothing_is_pointed_at_where_nothing_is_complete(tmp_path: Path) -> None:
    """As where the only one was damaged, and removed as the error says."""
    store = store_in(tmp_path)
    add(store, 1)
    shutil.rmtree(tmp_path / "step_00000001")
    store.sweep()
    assert names(tmp_path) == []


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert store_in(tmp_path / "nowhere").newest() is None
    store_in(tmp_path / "nowhere").sweep()
    assert not (tmp_path / "nowhere").exists()


def test_a_newest_without_manifest_is_not_passed_over(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    add(store, 1, 2)
    (tmp_path / "step_00000002" / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json: found .*No such file.*continues from step_00000001"):
        store.newest()


def test_the_only_one_being_damaged_means_to_start_again(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    add(store, 1)
    (tmp_path / "step_00000001" / MANIFEST).write_text("{}")
    with pytest.raises(CheckpointError, match="restarts the run: there is no older checkpoint"):
        store.newest()


@pytest.mark.parametrize(
    ("content", "said"), [("of step", "found 7 bytes, expected 9"), ("of step 3", "found sha256"), (None, "No such")]
)
def test_files_are_held_against_the_manifest(tmp_path: Path, content: str | None, said: str) -> None:
    store = store_in(tmp_path)
    add(store, 1, 2)
    path, state = store.newest() or pytest.fail()
    store.check(path, state)
    (path / "weights").unlink() if content is None else (path / "weights").write_text(content)
    with pytest.raises(CheckpointError, match=f"{path / 'weights'}: found .*continues from step_00000001") as error:
        store.check(path, state)
    assert said in str(error.value)


def test_sizes_alone_do_not_see_a_flipped_byte(tmp_path: Path) -> None:
    store = store_in(tmp_path, verify="sizes")
    add(store, 1)
    path, state = store.newest() or pytest.fail()
    (path / "weights").write_text("of step 3")
    store.check(path, state)
    (path / "weights").write_text("of step")
    with pytest.raises(CheckpointError, match="7 bytes"):
        store.check(path, state)


def test_files_that_came_later_do_not_matter(tmp_path: Path) -> None:
    """As the model that ``sdpg-megatron eval`` puts there."""
    store = store_in(tmp_path)
    add(store, 1)
    path, state = store.newest() or pytest.fail()
    (path / "model").mkdir()
    (path / "model" / "config.json").touch()
    store.check(path, state)


def test_a_sum_is_what_other_tools_make(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    expected = FileSum(3, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
    assert fsync_and_hash(tmp_path / "f") == expected
    assert find_damage(tmp_path, {"f": expected}, digests=True) is None


def test_damage_is_found_by_several_threads(tmp_path: Path) -> None:
    sums = {}
    for number in range(9):
        (tmp_path / str(number)).write_bytes(bytes([number]))
        sums[str(number)] = fsync_and_hash(tmp_path / str(number))
    seen: list[int] = []
    assert find_damage(tmp_path, sums, digests=True, threads=3, checked=seen.append) is None
    assert sum(seen) == 9
    for changed in ("7", "2"):
        (tmp_path / changed).write_bytes(b"x")
        found = find_damage(tmp_path, sums, digests=True, threads=3)
        assert f"{tmp_path / changed}: found sha256" in str(found)


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "a" * 5000, "."])
def test_a_name_that_no_file_can_have_is_damage(tmp_path: Path, name: str) -> None:
    expected = FileSum(tmp_path.stat().st_size, "")
    damage = find_damage(tmp_path, {name: expected}, digests=True)
    assert isinstance(damage, CheckpointError)
    assert str(damage).encode()


@pytest.mark.parametrize(
    ("number", "fix"),
    [(errno.EROFS, "choose a path"), (errno.EACCES, "get the right to write"), (errno.EDQUOT, "free space")],
)
@pytest.mark.parametrize("place", ["mkdir", "rename", "replace"])
def test_whatever_the_disk_says_is_told_and_the_last_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, number: int, fix: str
) -> None:
    """As the new folder is made, as it is put in place, and as the manifest is."""
    store = store_in(tmp_path, keep=1)
    add(store, 1)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    partial = store._make_partial(2)
    monkeypatch.setattr(Path, place, refuse)
    state = state_of(2)
    with pytest.raises(CheckpointError, match=rf"could not be written: .*{os.strerror(number)}.* MiB free.*Fix: {fix}"):
        store._on_main(lambda: store._make_partial(2) if place == "mkdir" else store._put_in_place(partial, state))
    monkeypatch.undo()
    store.sweep()
    assert names(tmp_path) == ["latest", "step_00000001"]


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    store = store_in(tmp_path / "checkpoints")
    with pytest.raises(CheckpointError, match=r"checkpoints: could not be written: .*Fix: remove or rename the file"):
        store.save(None, state_of(1))  # type: ignore[arg-type]
