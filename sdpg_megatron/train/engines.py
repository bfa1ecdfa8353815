"""Start the rollout engine and the verifiers of this rank."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Literal

import torch

from sdpg_megatron.config import RunConfig
from sdpg_megatron.mcore.compat import device
from sdpg_megatron.mcore.main_rank import on_main
from sdpg_megatron.mcore.parallel import ParallelState
from sdpg_megatron.rewards.pool import VerifierPool
from sdpg_megatron.rollout.base import OnProgress, RolloutEngine, Stop, never
from sdpg_megatron.rollout.hf import HFEngine
from sdpg_megatron.train.inputs import ModelInputs
from sdpg_megatron.train.rollouts import Rollouts

if TYPE_CHECKING:
    from sdpg_megatron.rollout.sglang.build import ServedModel


def start_rollouts(
    config: RunConfig, inputs: ModelInputs, ranks: ParallelState, on_progress: OnProgress, stop: Stop = never
) -> Rollouts:
    """Start the configured engine. Every rank calls it; all raise if servers cannot be started.

    Args:
        on_progress: called on the main rank, from another thread, as servers finish groups.
        stop: returns True once this rank wants a generation to end.
    """
    served = config.rollout.engine == "sglang"
    engine = _served(config, inputs, ranks, on_progress) if served else _embedded(config, inputs, ranks)
    verifiers = VerifierPool(config.reward) if ranks.leads_replica else None
    return Rollouts(ranks, engine, verifiers, shared=served, stop=stop)


def _embedded(config: RunConfig, inputs: ModelInputs, ranks: ParallelState) -> RolloutEngine | None:
    if not ranks.leads_replica:
        return None
    return HFEngine(
        config.model.path,
        batch_size=config.rollout.batch_size,
        device=device.training_device(),
        dtype=getattr(torch, config.model.dtype),
        tokenizer=inputs.tokenizer,
    )


def _served(
    config: RunConfig, inputs: ModelInputs, ranks: ParallelState, on_progress: OnProgress
) -> RolloutEngine | None:
    """Start or attach to the servers on the main rank; the other replicas' leaders attach to the same servers."""
    from sdpg_megatron.rollout.sglang.engine import SGLangEngine
    from sdpg_megatron.rollout.sglang.preflight import check_devices, check_group, check_python, check_trainer

    kind: Literal["cuda", "cpu"] = "cuda" if device.training_device().type == "cuda" else "cpu"
    check_trainer(config, kind)
    model = served_model(config, inputs, kind)
    engine: SGLangEngine | None = None

    def start() -> tuple[tuple[str, ...], str]:
        nonlocal engine
        check_devices(config.rollout.sglang, torch.cuda.device_count())
        check_group(config.rollout.sglang, torch.cuda.device_count())
        check_python(config.rollout.sglang, config.model.path)
        nonce = secrets.token_hex(4)
        engine = SGLangEngine(
            config.rollout.sglang, model, run_dir=config.run_dir, nonce=nonce, seed=config.seed, on_progress=on_progress
        )
        return engine.urls, nonce

    urls, nonce = on_main(ranks, start)
    if ranks.leads_replica and not ranks.is_main:
        attached = config.rollout.sglang.model_copy(update={"urls": urls})
        engine = SGLangEngine(attached, model, run_dir=config.run_dir, nonce=nonce, publishes=False)
    return engine


def served_model(config: RunConfig, inputs: ModelInputs, kind: Literal["cuda", "cpu"]) -> ServedModel:
    """Description of the run's model for the servers."""
    from sdpg_megatron.rollout.sglang.build import ServedModel

    rollout = config.rollout
    return ServedModel(
        folder=config.model.path,
        tokenizer=inputs.tokenizer,
        stop_ids=inputs.stop_ids,
        dtype=config.model.dtype,
        device=kind,
        prompt_tokens=config.data.max_prompt_tokens,
        response_tokens=max(rollout.max_response_tokens, config.eval.max_response_tokens or 0),
        experts=rollout.replay_routing,
    )
