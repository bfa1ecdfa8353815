"""Checkpoints of real learners: continued on the same layout bit for bit, on others to rounding; disks that refuse."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.dist.test_teachers import Run, start
from tests.pool import RankPool
from tests.tiny import write_tiny_model

EMA = {"objective.teacher": "ema", "objective.teacher_ema": 0.3}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2": (2, {"parallel.tensor": 2}),
    "pp2": (2, {"parallel.pipeline": 2}),
    "dp2": (2, {}),
    "cp2": (2, {"parallel.context": 2}),
    "dp2_overlap": (
        2,
        {
            "optimizer.overlap_grad_reduce": True,
            "optimizer.overlap_param_gather": True,
            "optimizer.bucket_size": 3000,
        },
    ),
    "vpp2": (2, {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2}),
    "tp2_pp2": (4, {"parallel.tensor": 2, "parallel.pipeline": 2}),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("qwen3"), "qwen3", tied=True, seed=3)


def store_of(run: Run, folder: Path) -> Any:
    from sdpg_megatron.checkpoint.store import CheckpointStore

    process: Any = multiprocessing.current_process()
    process._config["daemon"] = False  # the pool's workers are; Python lets no daemon fork, as saving does
    return CheckpointStore(folder, run.ranks, run.config.checkpoint)


def begin(model: Path, overrides: dict[str, Any]) -> Run:
    """After the first step: before it an optimizer has nothing to save."""
    run = start(model, overrides)
    run.step(0)
    return run


def state_at(step: int) -> Any:
    from sdpg_megatron.checkpoint.state import RunState

    return RunState(step=step, cursor={}, seconds=0.0, baseline={}, evaluated=True, config={}, model="m", data="d")


def whole_weights(run: Run) -> dict[str, Tensor]:
    from sdpg_megatron.train.export import stream_weights

    buckets = stream_weights(run.config, run.policy_trainer)
    return {name: tensor.clone() for bucket in buckets for name, tensor in bucket}


def save_and_go_on(model: Path, folder: Path, overrides: dict[str, Any]) -> tuple[list[float], dict[str, Tensor]]:
    """A checkpoint after the first step, the next while it is written; divergences and weights after that."""
    run = begin(model, {**EMA, **overrides})
    store = store_of(run, folder)
    store.save(run.policy_trainer, state_at(1))
    found = run.step(1)
    store.finish()
    return found, whole_weights(run)


def load_and_go_on(model: Path, folder: Path, overrides: dict[str, Any]) -> tuple[list[float], dict[str, Tensor]]:
    run = start(model, {**EMA, **overrides})
    store = store_of(run, folder)
    store.load(*store.newest(), run.policy_trainer)
    return run.step(1), whole_weights(run)


@pytest.mark.parametrize(("layout", "behind"), [("one", True), ("one", False), ("dp2", True), ("tp2_pp2", True)])
def test_the_same_layout_goes_on_bit_for_bit(
    model: Path, tmp_path: Path, ranks: RankPool, layout: str, behind: bool
) -> None:
    world, overrides = LAYOUTS[layout]
    overrides = {**overrides, "checkpoint.asynchronous": behind}
    expected, weights = ranks.run(save_and_go_on, world, model, tmp_path, overrides)[0]
    found, resumed = ranks.run(load_and_go_on, world, model, tmp_path, overrides)[0]
    assert found == expected
    assert weights.keys() == resumed.keys()
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001"]


def with_fused_adam(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function with learners whose AdamW is one kernel, as on a GPU."""
    from sdpg_megatron.mcore import optimizer, policy_trainer

    def build(chunks: Any, config: Any) -> Any:
        built = optimizer.build_optimizer(chunks, config)
        optimizer.fuse_torch_adam(built)
        return built

    with mock.patch.object(policy_trainer, "build_optimizer", build):
        return function(*args)


@pytest.mark.parametrize("world", [1, 2])
def test_fused_adam_goes_on_bit_for_bit(model: Path, tmp_path: Path, ranks: RankPool, world: int) -> None:
    expected, weights = ranks.run(with_fused_adam, world, save_and_go_on, model, tmp_path, {})[0]
    found, resumed = ranks.run(with_fused_adam, world, load_and_go_on, model, tmp_path, {})[0]
    assert found == expected and all(torch.equal(weights[name], resumed[name]) for name in weights)


def go_on_offloaded(model: Path, folder: Path, offload: bool) -> list[float]:
    """Divergences of the second step. Where the state was away before it, a checkpoint was written from there."""
    from sdpg_megatron.mcore.offload import _tensors

    run = begin(model, EMA)
    if offload:
        state = [(tensor, tensor.clone()) for tensor in _tensors(run.policy_trainer.optimizer)]

        def places() -> list[int]:
            assert all(torch.equal(tensor, values) for tensor, values in state)
            return [tensor.data_ptr() for tensor, _ in state]

        at_first = places()
        run.policy_trainer.offload()
        away = places()
        run.policy_trainer.offload()
        assert places() == away, "a second call moves nothing"
        moved = sum(here != there for here, there in zip(at_first, away, strict=True))
        assert moved >= 2 * len(run.policy_trainer.optimizer.chained_optimizers[0].optimizer.state)
        store_of(run, folder).save(run.policy_trainer, state_at(1))
        run.policy_trainer.onload()
        assert sum(here != there for here, there in zip(places(), away, strict=True)) == moved
    return run.step(1)


def test_offloaded_state_comes_back(model: Path, tmp_path: Path, ranks: RankPool) -> None:
    expected = ranks.run(go_on_offloaded, 1, model, tmp_path / "here", False)[0]
    assert ranks.run(go_on_offloaded, 1, model, tmp_path / "away", True)[0] == expected


def change_behind_a_save(model: Path, folder: Path, overrides: dict[str, Any]) -> tuple[list[int], int]:
    """Save, and change teacher and offloaded state meanwhile. Returns which tensors are wrong, and how many there are.

    Their memory is shared with forked processes, as pinned memory is.
    """
    from sdpg_megatron.checkpoint import writing
    from sdpg_megatron.mcore.offload import _tensors

    write = writing._write_and_hash

    def late(*args: Any, **options: Any) -> None:
        time.sleep(0.5)
        write(*args, **options)

    run = begin(model, overrides)
    run.policy_trainer.offload()
    for host in [*run.policy_trainer._offloaded._hosts, *run.policy_trainer.teacher.kept]:
        host.share_memory_()
    store = store_of(run, folder)
    state = [*run.policy_trainer.teacher.kept, *_tensors(run.policy_trainer.optimizer)]
    saved = [tensor.detach().clone() for tensor in state]
    with mock.patch.object(writing, "_write_and_hash", late):
        store.save(run.policy_trainer, state_at(1))
    assert store._pending.writing._staged, "kept for the writer"
    for tensor in state:
        tensor.detach().fill_(7)
    store.finish()
    run.policy_trainer.onload()
    store.load(*store.newest(), run.policy_trainer)
    now = [*run.policy_trainer.teacher.kept, *_tensors(run.policy_trainer.optimizer)]
    wrong = [number for number, (x, y) in enumerate(zip(now, saved, strict=True)) if not torch.equal(x, y)]
    return wrong, len(saved)


@pytest.mark.parametrize("teacher", [EMA, {"objective.teacher": "every", "objective.teacher_every": 2}])
def test_what_changes_behind_a_save_is_not_in_it(
    model: Path, tmp_path: Path, ranks: RankPool, teacher: dict[str, Any]
) -> None:
    overrides = {**teacher, "optimizer.distributed": False}
    wrong, count = ranks.run(change_behind_a_save, 1, model, tmp_path, overrides)[0]
    assert wrong == [] and count > 40


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("tp2", "pp2"),
        ("dp2", "tp2"),
        ("vpp2", "one"),
        ("one", "tp2_pp2"),
        ("tp2_pp2", "cp2"),
        ("cp2", "dp2"),
        ("dp2_overlap", "dp2"),
        ("tp2", "dp2_overlap"),
    ],
)
def test_another_layout_goes_on_to_rounding(
    model: Path, tmp_path: Path, ranks: RankPool, written: str, read: str
) -> None:
    """Weights, the optimizer's moments and step counts, the schedule and the teacher's own weights all come along."""
    expected, weights = ranks.run(save_and_go_on, LAYOUTS[written][0], model, tmp_path, LAYOUTS[written][1])[0]
    found, resumed = ranks.run(load_and_go_on, LAYOUTS[read][0], model, tmp_path, LAYOUTS[read][1])[0]
    assert found == pytest.approx(expected, rel=2e-4)
    for name, weight in weights.items():
        assert_close(resumed[name], weight, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def changed(model: Path, folder: Path, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What a learner of the configuration `after` has, once it has read the checkpoint of one of `before`."""
    run = begin(model, before)
    store = store_of(run, folder)
    state = dataclasses.replace(state_at(1), config=run.config.model_dump(mode="json"))
    store.save(run.policy_trainer, state)
    store.finish()
    moments = [dict(values) for values in state_tensors(run.policy_trainer.optimizer)]
    weights = whole_weights(run)
    other = start(model, after)
    store_of(other, folder).load(*store.newest(), other.policy_trainer)
    policy_trainer = other.policy_trainer
    same = {name: torch.equal(tensor, weights[name]) for name, tensor in whole_weights(other).items()}
    kept = [p.detach() for chunk in policy_trainer.chunks for p in chunk.parameters()]
    return {
        "groups": [dict(group, params=None) for group in policy_trainer.optimizer.param_groups],
        "num_steps": policy_trainer.scheduler.num_steps,
        "same_weights": all(same.values()),
        "same_moments": all(
            torch.equal(one[name], two[name])
            for one, two in zip(moments, state_tensors(policy_trainer.optimizer), strict=True)
            for name in ("exp_avg", "exp_avg_sq")
        ),
        "teacher_is_student": [torch.equal(a, b) for a, b in zip(policy_trainer.teacher.kept, kept, strict=False)],
        "next": other.step(1),
    }


def state_tensors(optimizer: Any) -> list[Any]:
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [values for part in parts for values in part.optimizer.state.values()]


def test_a_checkpoint_gives_the_optimizers_state_and_not_its_settings(
    model: Path, tmp_path: Path, ranks: RankPool
) -> None:
    """Another learning rate, other betas, and half the optimizer steps of a rollout."""
    settings = {"lr": 0.02, "min_lr": 0.01, "beta1": 0.5, "eps": 1e-3, "weight_decay": 0.3, "minibatches": 1}
    after = {**EMA, **{f"optimizer.{name}": value for name, value in settings.items()}}
    (found,) = ranks.run(changed, 1, model, tmp_path, EMA, after)
    assert found["same_weights"] and found["same_moments"]
    assert found["num_steps"] == 1  # of 2
    for group in found["groups"]:
        assert (group["lr"], group["max_lr"], group["min_lr"]) == (0.02, 0.02, 0.01)
        assert (tuple(group["betas"]), group["eps"]) == ((0.5, 0.999), 1e-3)
        assert group["weight_decay"] == 0.3 * group["wd_mult"]


@pytest.mark.parametrize(
    ("before", "after"),
    [("current", "ema"), ("ema", "every"), ("ema", "ema"), ("ema", "current")],
)
def test_another_kind_of_teacher_starts_from_the_student(
    model: Path, tmp_path: Path, ranks: RankPool, before: str, after: str
) -> None:
    overrides = [{**EMA, "objective.teacher": kind, "objective.teacher_every": 2} for kind in (before, after)]
    (found,) = ranks.run(changed, 1, model, tmp_path, *overrides)
    assert found["same_weights"] and found["same_moments"]
    assert bool(found["teacher_is_student"]) == (after != "current")
    assert all(found["teacher_is_student"]) == (before != after)
    assert len(found["next"]) == 2


def test_the_numbers_may_have_another_type_afterwards(model: Path, tmp_path: Path, ranks: RankPool) -> None:
    (found,) = ranks.run(changed, 1, model, tmp_path, EMA, {**EMA, "model.dtype": "bfloat16"})
    assert found["same_moments"]
    assert all(value > 0 for value in found["next"])


def damaged(model: Path, folder: Path) -> list[str]:
    """What loading says about each damage, done to the newest of two checkpoints and undone."""
    from sdpg_megatron.errors import CheckpointError

    run = begin(model, EMA)
    store = store_of(run, folder)
    for step in (1, 2):
        store.save(run.policy_trainer, state_at(step))
    store.finish()
    found = []
    newest, _ = store.newest()
    for name in ("__0_0.distcp", ".metadata", "metadata.json", "manifest.json"):
        path = newest / name
        content = path.read_bytes()
        flipped = content[:50] + bytes([content[50] ^ 1]) + content[51:]
        for damage in (content[: len(content) // 2], flipped, None):
            path.unlink() if damage is None else path.write_bytes(damage)
            try:
                store.load(*store.newest(), run.policy_trainer)
                found.append("nothing")
            except CheckpointError as error:
                found.append(str(error))
            path.write_bytes(content)
    store.load(*store.newest(), run.policy_trainer)
    return found


def test_damage_is_named_with_the_way_out(model: Path, tmp_path: Path, ranks: RankPool) -> None:
    (found,) = ranks.run(damaged, 1, model, tmp_path)
    assert len(found) == 12
    names = [name for name in ("__0_0.distcp", ".metadata", "metadata.json", "manifest.json") for _ in range(3)]
    for name, error in zip(names, found, strict=True):
        assert error.startswith(f"{tmp_path / 'step_00000002' / name}: found "), error
        assert error.endswith(
            f"remove {tmp_path / 'step_00000002'}: the same command then continues from step_00000001"
        )
    assert "bytes, expected" in found[0]
    assert "found sha256" in found[1]
    assert "No such file" in found[2]


def with_a_disk_that_refuses(model: Path, folder: Path, overrides: dict[str, Any], limited: int) -> tuple[str, bool]:
    """What a save says where one rank cannot write 64 KiB to a file, and that a later one works again."""
    from sdpg_megatron.errors import CheckpointError

    run = begin(model, {**EMA, **overrides})
    store = store_of(run, folder)
    store.save(run.policy_trainer, state_at(1))
    store.finish()
    _, hard = before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if run.ranks.rank == limited:
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
    said = "nothing"
    try:
        store.save(run.policy_trainer, state_at(2))
        store.finish()
    except CheckpointError as error:
        said = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    run.ranks.barrier()
    left = [path.name for path in sorted(folder.iterdir())]
    run.ranks.barrier()
    store.save(run.policy_trainer, state_at(3))
    store.finish()
    path, state = store.newest()
    store.load(path, state, run.policy_trainer)
    return said, left == ["latest", "step_00000001"] and state.step == 3


@pytest.mark.parametrize(("layout", "limited", "behind"), [("one", 0, False), ("tp2", 1, False), ("tp2", 1, True)])
def test_a_disk_that_refuses_leaves_the_last_checkpoint(
    model: Path, tmp_path: Path, ranks: RankPool, layout: str, limited: int, behind: bool
) -> None:
    world, overrides = LAYOUTS[layout]
    arguments = model, tmp_path, {**overrides, "checkpoint.asynchronous": behind}, limited
    for said, as_promised in ranks.run(with_a_disk_that_refuses, world, *arguments):
        assert "could not be written" in said
        assert "MiB free). Earlier checkpoints are untouched" in said
        assert as_promised


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MiB: room for one checkpoint of the tiny model."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "none", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a file system: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(model: Path, folder: Path) -> tuple[str, list[str]]:
    from sdpg_megatron.errors import CheckpointError

    run = begin(model, EMA)
    store = store_of(run, folder)
    store.save(run.policy_trainer, state_at(1))
    store.finish()
    try:
        store.save(run.policy_trainer, state_at(2))
        store.finish()
    except CheckpointError as error:
        store.load(*store.newest(), run.policy_trainer)
        return str(error), sorted(os.listdir(folder))
    return "nothing", []


def test_a_full_disk(model: Path, small_disk: Path, ranks: RankPool) -> None:
    ((said, left),) = ranks.run(fill, 1, model, small_disk)
    assert "could not be written" in said
    assert left == ["latest", "step_00000001"]


def without_a_writer(model: Path, folder: Path) -> tuple[str, list[str]]:
    """The process that writes behind the steps is killed."""
    from sdpg_megatron.errors import CheckpointError

    run = begin(model, {**EMA, "parallel.tensor": 2})
    store = store_of(run, folder)
    store.save(run.policy_trainer, state_at(1))
    store.finish()
    store.save(run.policy_trainer, state_at(2))
    if run.ranks.rank == 1:
        store._pending.writing._queue.async_calls[0].async_caller.process.kill()
    try:
        store.finish()
    except CheckpointError as error:
        return str(error), sorted(os.listdir(folder))
    return "nothing", []


def test_a_writer_that_is_killed_is_noticed(model: Path, tmp_path: Path, ranks: RankPool) -> None:
    for said, _ in ranks.run(without_a_writer, 2, model, tmp_path):
        assert "could not be written" in said
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_00000001"]


def draws(model: Path) -> tuple[bool, bool]:
    """Whether a training step left torch's and Megatron's generators as they were."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    run = start(model, EMA)
    before, tracked = torch.get_rng_state(), {k: v.clone() for k, v in get_cuda_rng_tracker().get_states().items()}
    run.step(0)
    after = get_cuda_rng_tracker().get_states()
    return torch.equal(before, torch.get_rng_state()), all(torch.equal(tracked[name], after[name]) for name in tracked)


def test_training_draws_nothing(model: Path, ranks: RankPool) -> None:
    """So that no generator's state has to be saved."""
    assert ranks.run(draws, 2, model) == [(True, True)] * 2
