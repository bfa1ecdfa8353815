"""One step on a made batch, through Megatron-LM's `pretrain()` or, with --own, through `PolicyTrainer`.

python -m tests.host.made_batch OUT <arguments of the run> [--own]
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdpg_megatron.batching.step_batch import StepBatch
from sdpg_megatron.mcore import parallel
from sdpg_megatron.mcore.model import named_parameters
from sdpg_megatron.mcore.policy import Policy
from sdpg_megatron.observe.metrics import Metric
from sdpg_megatron.weights import WeightStream
from tests.dist.test_step import scored_groups
from tests.host.megatron_lm_cpu import patch_megatron_lm


def gradients(policy: Policy) -> dict[str, Tensor]:
    """Whole gradients under their Hugging Face names. Collective."""
    ranks = policy.ranks
    shards = {name: parameter.main_grad for name, parameter in named_parameters(policy.chunks)}
    buckets = WeightStream(
        shards,  # type: ignore[arg-type]
        policy.arch,
        tp_group=ranks.tensor_group,
        pp_group=ranks.pipeline_group,
        expert_group=ranks.expert_group,
        expert_tensor=ranks.expert_tensor_size,
    )
    return {name: tensor.clone() for bucket in buckets for name, tensor in bucket}


def run(out: Path, own: bool) -> None:
    """Train on the made batch, and write metrics and gradients to `out` on the main rank."""
    from megatron.training import arguments as megatron_arguments
    from megatron.training import training

    from sdpg_megatron.plugins.megatron_lm import host as host_module
    from sdpg_megatron.plugins.megatron_lm.__main__ import DEFAULTS
    from sdpg_megatron.plugins.megatron_lm.__main__ import run as run_plugin
    from sdpg_megatron.plugins.megatron_lm.host import MegatronHost
    from sdpg_megatron.plugins.megatron_lm.steps import HostSteps

    class MadeSteps(HostSteps):
        """Steps on a made batch instead of rollouts."""

        def run(self, step: int) -> tuple[list[StepBatch], dict[str, Metric]]:
            groups = scored_groups(self._inputs.arch.vocab_size)
            return self.preparer.prepare(step, groups), {}

    found: dict[str, Any] = {}

    def save(policy: Policy, metrics: dict[str, float]) -> None:
        found.update(metrics=metrics, gradients=gradients(policy))
        if policy.ranks.is_main:
            torch.save(found, out)

    if own:
        from sdpg_megatron.plugins.megatron_lm.arguments import add_arguments, run_config

        args = megatron_arguments.parse_args(add_arguments)
        megatron_arguments.validate_args(args, DEFAULTS)
        own_step(run_config(args), save)
        return

    report = MegatronHost.report

    def reported(self: MegatronHost, reports: list[Any]) -> Any:
        result = report(self, reports)
        assert self._policy is not None
        metrics = {name: float(pair[0]) for name, pair in (result or [{}])[0].items()}
        everywhere: dict[str, float] = {}
        for part in self._policy.ranks.gather_all(metrics):
            everywhere |= part
        save(self._policy, everywhere)
        return result

    MegatronHost.report = reported  # type: ignore[method-assign]
    host_module.HostSteps = MadeSteps  # type: ignore[misc]
    with ExitStack() as stack:
        run_plugin(training, stack)


def own_step(config: Any, save: Any) -> None:
    """The same step by this package's own trainer."""
    from sdpg_megatron import objectives
    from sdpg_megatron.mcore.policy_trainer import PolicyTrainer
    from sdpg_megatron.train.inputs import load_inputs
    from sdpg_megatron.train.update import StepPreparer

    config = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"clip_grad": 0.0, "lr": 1e-3})})
    ranks = parallel.initialize(config.parallel, 0)
    inputs = load_inputs(config)
    trainer = PolicyTrainer(config, inputs.arch, objectives.build_objective(config.objective, 1), ranks)
    preparer = StepPreparer(config, inputs, trainer)
    (batch,) = preparer.prepare(0, scored_groups(inputs.arch.vocab_size))
    metrics = trainer.update(batch.micro_batches, replace(preparer.context(0, 0, batch)))
    save(trainer, {name: metric.value for name, metric in metrics.items()})


if __name__ == "__main__":
    path, *rest = sys.argv[1:]
    as_own = "--own" in rest
    sys.argv[1:] = [argument for argument in rest if argument != "--own"]
    patch_megatron_lm()
    run(Path(path), as_own)
