"""Eight samples for slime, and this package's own training steps over them, by `Policy`'s passes."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.dist.test_step import config_of
from tests.host.slime_model import ModelSample

VOCAB = 300
OBJECTIVE = {"alpha": 0.3, "beta": 0.7, "beta_warmup_steps": 0, "beta_decay_steps": 0}
REWARDS = (1.2, -0.7, -0.3, -0.2, 0.9, 0.4, -1.1, 0.8)
SIZES = ((5, 6), (4, 3), (7, 4), (3, 8), (30, 2), (20, 2), (6, 5), (4, 9))
"""Lengths of prompt and response. Under context parallelism the third pair has no response token on one rank."""
STOPPED = {0: 4, 7: 2}
"""Samples that end with a stop token of the model (tests/tiny.py). In others such a token may occur by chance."""
UNTAUGHT = (2, 5)
"""Samples without a teacher prompt; the second has a positive advantage."""

# --- the samples, for slime and for this package


def made_samples(kind: Any, *, shared_rollout: bool = True) -> list[Any]:
    """Eight samples: some tokens and one sample are masked, and two samples may be of one rollout."""
    draw = random.Random(5)
    found = []
    for index, ((prompt, response), reward) in enumerate(zip(SIZES, REWARDS, strict=True)):
        tokens = [draw.randrange(VOCAB) for _ in range(prompt + response)]
        context = [draw.randrange(VOCAB) for _ in range(4)]
        if index in STOPPED:
            tokens[-1] = STOPPED[index]
        found.append(
            kind(
                index=index,
                tokens=tokens,
                response_length=response,
                reward=reward,
                rollout_id=index - (index == 7 and shared_rollout),
                loss_mask=[1, 1, 0, 0, 1, 1] if index == 0 else None,
                rollout_log_probs=[draw.uniform(-6, -5) for _ in range(response)],
                remove_sample=index == 6,
                metadata={"sdpg_teacher_prompt": None if index in UNTAUGHT else context + tokens[:prompt]},
            )
        )
    return found


def made_logprobs(index: int, seed: int) -> torch.Tensor:
    """Log-probs of a sample's response under the old policy or the reference."""
    generator = torch.Generator().manual_seed(100 * seed + index)
    return -5 - torch.rand(SIZES[index][1], generator=generator)


OLD, REFERENCE = 1, 2


# --- models


def built_model(folder: Path, layout: dict[str, Any], *, per_token: bool) -> tuple[list[Any], Any, Any]:
    from megatron.core.transformer.module import Float16Module

    from sdpg_megatron.architecture import read_architecture
    from sdpg_megatron.mcore import parallel
    from sdpg_megatron.mcore.model import build_chunks, load_weights
    from sdpg_megatron.mcore.optimizer import wrap

    config = config_of(folder, {"optimizer.distributed": False, **layout})
    ranks, arch = parallel.initialize(config.parallel, 0), read_architecture(folder)
    chunks = build_chunks(arch, config.model, config.parallel, ranks)
    load_weights(chunks, folder, arch, ranks)
    for chunk in chunks:
        chunk.config.calculate_per_token_loss = per_token
    if config.model.dtype == "bfloat16":  # as slime wraps its models; the last stage returns float32
        chunks = [Float16Module(chunk.config, chunk) for chunk in chunks]
    return wrap(chunks, config.optimizer), arch, ranks


def whole_gradients(chunks: list[Any], arch: Any, ranks: Any) -> dict[str, torch.Tensor]:
    """Gradients of the whole model by Hugging Face names."""
    from sdpg_megatron.mcore.model import named_parameters
    from sdpg_megatron.weights import WeightStream

    gradients = {name: p.main_grad for name, p in named_parameters(chunks)}
    groups = {"tp_group": ranks.tensor_group, "pp_group": ranks.pipeline_group, "expert_group": ranks.expert_group}
    buckets = WeightStream(gradients, arch, **groups, expert_tensor=ranks.expert_tensor_size)
    return {name: tensor.clone() for bucket in buckets for name, tensor in bucket}


@torch.no_grad()
def disturb(chunks: list[Any]) -> None:
    """Change the weights in place, as an optimizer step does, and alike on all layouts."""
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.mul_(1.05)


# --- training steps


@dataclass
class Sums:
    """Sums of one step on this rank: the loss, the absolute values of its terms, and the weighted KL."""

    loss: list[Tensor] = field(default_factory=list)
    sizes: list[Tensor] = field(default_factory=list)
    kl: list[Tensor] = field(default_factory=list)


def own_training(
    folder: Path,
    objective: dict[str, Any],
    *,
    per_token: bool,
    steps: Sequence[Sequence[int]],
    layout: dict[str, Any],
    old_from_rollout: bool = False,
) -> list[dict[str, Any]]:
    """Loss, KL and gradients of each step. The weights change between the steps.

    Args:
        steps: samples of each step. With one step, 6 and 7 are of one rollout.
        layout: tensor or context parallelism.
        old_from_rollout: the old policy's log-probs are the rollout's.
    """
    from sdpg_megatron.mcore.policy import Policy
    from sdpg_megatron.objectives import StepContext, build_objective

    fields = {f"objective.{name}": value for name, value in objective.items()}
    fields |= {"optimizer.distributed": False, "optimizer.minibatches": len(steps), **layout}
    config = config_of(folder, fields)
    chunks, arch, ranks = built_model(folder, layout, per_token=True)
    total = 4 * len(steps)
    policy = Policy(config, arch, build_objective(config.objective, total), ranks, chunks, gathers_late=False)
    samples = own_samples(policy.objective, len(steps) == 1, per_token)
    policy.begin(0)
    contexts = [StepContext(number, total, _scale(config, samples, members)) for number, members in enumerate(steps)]
    given = [_micro_batches(policy, config, samples, members, old_from_rollout) for members in steps]
    prepared = [_prepared(policy, config, *step) for step in zip(given, contexts, strict=True)]
    found = []
    for members, context, batches in zip(steps, contexts, prepared, strict=True):
        if context.step:
            disturb(chunks)
        sums = _train(policy, batches, context)
        if per_token:
            norm = sum(max(1.0, float(samples[i][1].sum())) for i in members)
        else:
            norm = len(members) - (len(steps) == 1)
        gathered = ranks.gather_all([float(sum(part)) / norm for part in (sums.loss, sums.sizes, sums.kl)])
        # Tensor-parallel ranks compute the same numbers.
        loss, size, kl = np.sum(gathered[:: ranks.tensor_size], axis=0).tolist()
        gradients = {name: x / norm for name, x in whole_gradients(chunks, arch, ranks).items()}
        report = {"loss": loss, **({"distill/kl": kl} if sums.kl else {})}
        found.append({"report": report, "size": size, "gradients": gradients})
    return found


def _scale(config: Any, samples: Sequence[Any], members: Sequence[int]) -> float:
    """`StepContext.distill_scale`."""
    if config.objective.distill_average == "all":
        return 1.0
    gated = sum(float(samples[i][1][samples[i][0].gates].sum()) for i in members)
    return sum(float(samples[i][1].sum()) for i in members) / gated


def _micro_batches(
    policy: Any, config: Any, samples: Sequence[Any], members: Sequence[int], old_from_rollout: bool
) -> list[Any]:
    """Micro-batches in another split than slime's."""
    from sdpg_megatron.batching.collate import PackingLayout, collate
    from sdpg_megatron.plugins.batch import local_tokens

    layout, batches = PackingLayout.of(config, policy.ranks), []
    for part in (members[:3], members[3:]):
        here = local_tokens([SIZES[i][0] for i in part], [SIZES[i][1] for i in part], layout)
        batch = collate([samples[i][0] for i in part], layout)
        old_T = torch.cat([made_logprobs(i, OLD) for i in part])[here]
        batches.append(
            dataclasses.replace(
                batch,
                weights_T=torch.cat([torch.from_numpy(samples[i][1]) for i in part])[here],
                old_logprobs_T=batch.rollout_logprobs_T if old_from_rollout else old_T,
                reference_logprobs_T=torch.cat([made_logprobs(i, REFERENCE) for i in part])[here],
            )
        )
    return batches


def _prepared(policy: Any, config: Any, batches: list[Any], context: Any) -> list[Any]:
    """Run the passes before the first update."""
    from sdpg_megatron.batching.step_batch import with_corrections

    needed = policy.objective.required_passes(context)
    if config.objective.correction != "none":
        batches = with_corrections(batches, config.objective, policy.ranks.context_group)
    if needed.teacher_logprob:
        batches = policy.with_teacher_logprobs(batches)
    return policy.with_early_teacher(batches) if needed.teacher else batches


def _train(policy: Any, batches: list[Any], context: Any) -> Sums:
    """Run the training pass; its gradients are sums over tokens."""
    from sdpg_megatron.mcore.forward_step import hidden_states
    from sdpg_megatron.mcore.passes import run_schedule

    step, sums = policy.forward_step(context), Sums()

    def forward_step(data: Iterator[Any], model: Any) -> Any:
        batch = next(data)

        def loss(hidden: Tensor) -> Any:
            total, metrics = step.loss_and_metrics(batch, model, hidden)
            sums.loss.append(total.detach())
            sums.sizes.append(metrics["train/loss"].values_T.abs().sum())
            if "distill/kl" in metrics:
                sums.kl.append((metrics["distill/kl"].values_T * batch.gates_T * batch.weights_T).sum())
            return total, torch.tensor(0, dtype=torch.int), {}

        return hidden_states(model, batch.student), loss

    ready = policy.with_late_teacher(batches, context)
    for chunk in policy.chunks:
        chunk.zero_grad_buffer()
    run_schedule(policy.chunks, forward_step, ready)
    return sums


def own_samples(objective: Any, shared: bool, per_token: bool) -> list[tuple[Any, np.ndarray[Any, Any]]]:
    """Samples with their tokens' weights in slime's denominator."""
    from sdpg_megatron.batching.samples import Sample

    given = made_samples(ModelSample, shared_rollout=shared)
    masks = [np.zeros(s.response_length) if s.remove_sample else s.loss_mask for s in given]
    masks = [
        np.array([1] * s.response_length if m is None else m, np.float32) for s, m in zip(given, masks, strict=True)
    ]
    rollouts = Counter[int]()
    for sample, mask in zip(given, masks, strict=True):
        rollouts[sample.rollout_id] += int(mask.sum())
    found = []
    for sample, mask in zip(given, masks, strict=True):
        response = np.array(sample.tokens[-sample.response_length :], np.int32)
        teacher = sample.metadata["sdpg_teacher_prompt"]
        gates = (mask > 0) & (teacher is not None) & objective.distill_enabled(sample.reward)
        if not objective.config.distill_stop_tokens:
            gates = gates & ~np.isin(response, list(STOPPED.values()))
        made = Sample(
            student_prompt=np.array(sample.tokens[: -sample.response_length], np.int32),
            teacher_prompt=np.array(teacher or [], np.int32),
            response=response,
            logprobs=np.array(sample.rollout_log_probs, np.float32),
            advantage=sample.reward,
            gates=gates,
            weight=1.0,
        )
        found.append((made, mask if per_token else mask / np.float32(max(1, rollouts[sample.rollout_id]))))
    return found
