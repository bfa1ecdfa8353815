"""Checkpoints of a run: Megatron's distributed format for tensors, one manifest beside it.

A checkpoint is complete or absent: it is written aside and renamed when its manifest, the last file, is in place.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.optimizer import get_param_id_to_sharded_param_map, make_sharded_optimizer_tensor

from sdpg_megatron.checkpoint.state import MANIFEST, PARTIAL, PREFIX, RunState, complete_checkpoints
from sdpg_megatron.errors import CheckpointError
from sdpg_megatron.mcore import torch_adam
from sdpg_megatron.mcore.learner import Learner
from sdpg_megatron.mcore.parallel import Ranks

_TEACHER = "teacher"
# The layout of optimizer shards that can be read back under any other parallel layout.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


class CheckpointStore:
    """The checkpoints under one folder. Every rank calls `save` and `load`; only the main rank renames and deletes."""

    def __init__(self, folder: Path, ranks: Ranks, keep: int) -> None:
        self._folder = folder
        self._ranks = ranks
        self._keep = keep

    def complete(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return complete_checkpoints(self._folder)

    def latest(self) -> Path | None:
        """The newest complete checkpoint as the main rank sees it: file systems may show ranks different things."""
        found = self.complete() if self._ranks.is_main else []
        return self._ranks.gather_all(found[-1] if found else None)[0]

    def save(self, learner: Learner, state: RunState) -> Path:
        """Write a checkpoint of this step and drop those beyond the newest `keep`.

        Raises:
            CheckpointError: the disk refused; earlier checkpoints are untouched.
        """
        target = self._folder / f"{PREFIX}{state.step:08d}"
        partial = target.with_name(target.name + PARTIAL)
        if self._ranks.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        try:
            dist_checkpointing.save(sharded_state(learner), str(partial))
        except OSError as error:
            raise CheckpointError(f"{partial}: could not be written: {error}. Fix: free or repair the disk") from error
        dist.barrier()
        if self._ranks.is_main:
            state.write(partial / MANIFEST)
            _flush(partial)
            shutil.rmtree(target, ignore_errors=True)
            os.rename(partial, target)
            _flush(self._folder)
            for old in self.complete()[: -self._keep]:
                shutil.rmtree(old)
        dist.barrier()
        return target

    def load(self, path: Path, learner: Learner) -> None:
        """Fill the learner with a checkpoint's tensors.

        Raises:
            CheckpointError: the tensors do not fit the model.
        """
        torch_adam.make_state(learner.optimizer)
        try:
            loaded = dist_checkpointing.load(sharded_state(learner, is_loading=True), str(path))
        except (dist_checkpointing.core.CheckpointingException, RuntimeError, KeyError) as error:
            raise CheckpointError(
                f"{path}: found tensors that do not fit the model ({error}), expected those of model.path. "
                "Fix: continue with the model and parallel settings of the run"
            ) from error
        for name, chunk in _named_chunks(learner):
            chunk.load_state_dict(loaded[name])
        torch_adam.load_state_dict(learner.optimizer, loaded["optimizer"])
        learner.scheduler.load_state_dict(loaded["opt_param_scheduler"])
        for number, kept in enumerate(learner.teacher.kept):
            kept.copy_(loaded[_TEACHER][number])


def sharded_state(learner: Learner, *, is_loading: bool = False) -> dict[str, Any]:
    """Model, optimizer and schedule as Megatron's sharded state dict, under the keys that Megatron-LM uses.

    And a teacher that is neither the model nor where the run started from, under keys with a prefix.
    """
    metadata: dict[str, Any] = {**_METADATA}  # Megatron adds the groups of the present layout to it
    state: dict[str, Any] = {
        name: chunk.sharded_state_dict(metadata=metadata) for name, chunk in _named_chunks(learner)
    }
    teacher = _teacher_state(state, learner)
    state["optimizer"] = learner.optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)
    state["opt_param_scheduler"] = learner.scheduler.state_dict()
    return {**state, _TEACHER: teacher} if teacher else state


def _teacher_state(model_state: dict[str, Any], learner: Learner) -> dict[int, Any]:
    """The teacher's weights by the number of their parameter, each cut as the model's own; empty for none to keep."""
    if not learner.teacher.kept:
        return {}
    parameters = [parameter for chunk in learner.chunks for parameter in chunk.parameters()]
    sharded = get_param_id_to_sharded_param_map(model_state, parameters)
    return {
        number: make_sharded_optimizer_tensor(sharded[number], kept, _TEACHER)
        for number, kept in enumerate(learner.teacher.kept)
    }


def _flush(folder: Path) -> None:
    """Ask the disk to keep the entries of a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _named_chunks(learner: Learner) -> list[tuple[str, Any]]:
    modules = [chunk.module for chunk in learner.chunks]
    if len(modules) == 1:
        return [("model", modules[0])]
    return [(f"model{number}", module) for number, module in enumerate(modules)]
