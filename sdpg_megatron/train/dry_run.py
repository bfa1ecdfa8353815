"""Dry runs of ``train`` and ``eval``: every check that can be made before the first step. Nothing is written.

The configuration, the model's description and the data have been read when these functions are called.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from sdpg_megatron.checkpoint.branch import BranchRequest
from sdpg_megatron.checkpoint.state import fingerprint
from sdpg_megatron.config import RunConfig
from sdpg_megatron.mcore.shapes import walk
from sdpg_megatron.process.ranks import RankEnvironment
from sdpg_megatron.records import Prompt
from sdpg_megatron.rewards.pool import check_verifier
from sdpg_megatron.train.inputs import Inputs, ModelInputs, check_run_dir
from sdpg_megatron.train.presence import check_unlocked
from sdpg_megatron.train.start import find_start
from sdpg_megatron.train.subject import Subject
from sdpg_megatron.weights import check_values


def check_run(
    config: RunConfig,
    inputs: Inputs,
    branch_from: BranchRequest | None,
    ranks: int,
    environment: RankEnvironment,
) -> Iterator[str]:
    """Check what `inputs` leaves open of a run; yields lines for the user as the checks pass.

    The weights are read as a whole, the verifier is called once, and the model is built on the meta device by the main
    rank.

    Args:
        ranks: of the run.

    Raises:
        SdpgError: as a run's start.
    """
    check_unlocked(config.run_dir)
    start = find_start(config, branch_from, lambda: fingerprint(config.model.path), inputs.prompts.digest)
    yield from start.describe(config)
    check_values(config.model.path, inputs.arch)  # a run checks what each rank loads
    yield from _check_generation(config, inputs.prompts[0], ranks, environment)
    if environment.is_main:
        yield from map(str, walk(config, ranks))


def check_evaluation(
    subject: Subject,
    inputs: ModelInputs,
    files: Mapping[str, list[Prompt]],
    folder: Path,
    environment: RankEnvironment,
) -> Iterator[str]:
    """Check what reading the model's description and the data leaves open of an evaluation into `folder`.

    Raises:
        SdpgError: as an evaluation's start.
    """
    check_run_dir(folder)
    if subject.checkpoint is None:
        check_values(subject.config.model.path, inputs.arch)
    yield from _check_generation(subject.config, next(iter(files.values()))[0], environment.world_size, environment)


def _check_generation(config: RunConfig, prompt: Prompt, ranks: int, environment: RankEnvironment) -> Iterator[str]:
    """The verifier and the servers."""
    yield str(check_verifier(config.reward, prompt))
    if config.rollout.engine == "sglang":
        from sdpg_megatron.rollout.sglang.preflight import check_servers

        check_servers(config, _on_one_machine(environment, ranks))


def _on_one_machine(environment: RankEnvironment, ranks: int) -> RankEnvironment:
    """The environment as a launcher would set it, where there is none and this machine has a GPU for every rank."""
    if environment.local_world_size is not None:
        return environment
    return replace(
        environment, world_size=ranks, local_world_size=ranks if ranks <= torch.cuda.device_count() else None
    )
