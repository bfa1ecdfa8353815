"""Dry runs of ``train`` and ``eval``: all checks that need no training step. Nothing is written.

The caller has read the configuration, the model's description and the data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from sdpg_megatron.checkpoint.branch import BranchRequest, explain_damage
from sdpg_megatron.checkpoint.files import find_damage
from sdpg_megatron.checkpoint.state import CHECKPOINT_FOLDER, MANIFEST, RunState, check_same_model, fingerprint
from sdpg_megatron.config import CheckpointConfig, RunConfig
from sdpg_megatron.estimate.shapes import walk
from sdpg_megatron.evaluation.results import Request, Results
from sdpg_megatron.process.rank_environment import RankEnvironment
from sdpg_megatron.records import Prompt
from sdpg_megatron.rewards.pool import check_verifier
from sdpg_megatron.runtime.run_lock import check_unlocked
from sdpg_megatron.train.eval_target import EvalTarget
from sdpg_megatron.train.inputs import Inputs, ModelInputs
from sdpg_megatron.train.run_dir import EXPORT_FOLDER, check_writable
from sdpg_megatron.train.start import find_start
from sdpg_megatron.weights import check_values


def check_run(
    config: RunConfig,
    inputs: Inputs,
    branch_from: BranchRequest | None,
    ranks: int,
    environment: RankEnvironment,
) -> Iterator[str]:
    """Check a run beyond reading its inputs; yield lines for the user as the checks pass.

    The weights and the checkpoint that the run continues from are read completely. The main rank alone calls the
    verifier once, checks the requirements of servers, and builds the model on the meta device.

    Args:
        ranks: number of ranks of the run.

    Raises:
        SdpgError: as at a run's start.
    """
    check_unlocked(config.run_dir)
    start = find_start(config, branch_from, lambda: fingerprint(config.model.path), inputs.prompts.digest)
    yield from start.describe(config)
    if start.checkpoint is not None and start.state is not None:
        _check_checkpoint(start.checkpoint, start.state, config.checkpoint, config.run_dir)
    check_values(config.model.path, inputs.arch)  # a run checks what each rank loads
    if environment.is_main:
        yield from _check_generation(config, inputs.prompts[0], ranks, environment)
        yield from map(str, walk(config, ranks))


def check_evaluation(
    eval_target: EvalTarget,
    inputs: ModelInputs,
    files: Mapping[str, list[Prompt]],
    folder: Path,
    environment: RankEnvironment,
) -> Iterator[str]:
    """Check an evaluation into `folder` beyond reading its inputs.

    Raises:
        SdpgError: as at an evaluation's start.
    """
    from sdpg_megatron.train.eval_command import for_evaluation

    check_writable(folder)
    model, checkpoint = eval_target.config.model.path, eval_target.checkpoint
    if checkpoint is not None:
        model = checkpoint / EXPORT_FOLDER  # an evaluation exports its weights to this folder
        state = RunState.read(checkpoint / MANIFEST)
        check_same_model(state, fingerprint(eval_target.config.model.path))
        _check_checkpoint(checkpoint, state, eval_target.config.checkpoint, eval_target.config.run_dir)
    else:
        check_values(model, inputs.arch)
    config = for_evaluation(eval_target.config, model, folder)
    if (model / "config.json").exists():
        Results.check(folder, Request.of(config, files, model=eval_target.name, fingerprint=fingerprint(model)))
    if environment.is_main:
        prompt = next(iter(files.values()))[0]
        yield from _check_generation(config, prompt, environment.world_size, environment)


def _check_checkpoint(path: Path, state: RunState, config: CheckpointConfig, run_dir: Path) -> None:
    """Raise `CheckpointError` if a file is missing or does not match the manifest."""
    damage = find_damage(path, state.files, digests=config.verify == "digests")
    if damage is not None:
        raise explain_damage(damage, path, run_dir / CHECKPOINT_FOLDER)


def _check_generation(config: RunConfig, prompt: Prompt, ranks: int, environment: RankEnvironment) -> Iterator[str]:
    """Check the verifier and the servers."""
    yield str(check_verifier(config.reward, prompt))
    if config.rollout.engine == "sglang":
        from sdpg_megatron.rollout.sglang.preflight import check_servers, check_trainer

        check_trainer(config, "cuda" if torch.cuda.is_available() else "cpu")
        check_servers(config, _on_one_machine(environment, ranks))


def _on_one_machine(environment: RankEnvironment, ranks: int) -> RankEnvironment:
    """Complete the environment of a process without a launcher, if this machine has a GPU for every rank."""
    if environment.local_world_size is not None:
        return environment
    local = ranks if ranks <= torch.cuda.device_count() else None
    return replace(environment, world_size=ranks, local_world_size=local)
