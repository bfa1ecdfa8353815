"""SDPG in a custom training loop: a stock GPTModel with Megatron's schedules, DDP and optimizer.

This package provides the forward step and the objective. Runs on GPUs and CPUs:

    python examples/plugin.py
    torchrun --nproc-per-node 4 examples/plugin.py --tensor 2 --pipeline 2
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig

import sdpg_megatron as sdpg
from sdpg_megatron import MicroBatch, ObjectiveConfig, ParallelConfig, SequenceBatch, StepContext

VOCAB, STEPS = 120, 5


def your_model(tensor: int, pipeline: int) -> DistributedDataParallel:
    """Model of the custom loop. `calculate_per_token_loss` and Megatron's `finalize_model_grads` are required."""
    config = TransformerConfig(
        num_layers=4,
        hidden_size=64,
        num_attention_heads=4,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        pipeline_dtype=torch.float32,
        normalization="RMSNorm",
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        calculate_per_token_loss=True,
        finalize_model_grads_func=finalize_model_grads,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
    )
    model = GPTModel(
        config,
        sdpg.local_block_spec(config, vp_stage=None),
        vocab_size=128,
        max_sequence_length=64,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope",
    )
    return DistributedDataParallel(config, DistributedDataParallelConfig(use_distributed_optimizer=True), model)


def your_batch() -> MicroBatch:
    """Two responses of three tokens to one prompt. The first was correct and is distilled."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(VOCAB, shape, generator=generator)

    responses, prompt, context = draw(2, 3), draw(1, 5), draw(1, 4)
    student = torch.cat([prompt.expand(2, -1), responses], dim=1)
    teacher = torch.cat([context, prompt, responses[:1]], dim=1)
    gate = torch.tensor([1.0, 0.0]).repeat_interleave(3)
    return MicroBatch(
        student=SequenceBatch(student, torch.tensor([4, 5, 6, 12, 13, 14])),
        teacher=SequenceBatch(teacher, torch.tensor([8, 9, 10])),
        gated_rows_G=torch.tensor([0, 1, 2]),
        labels_T=responses.flatten(),
        sequence_T=torch.tensor([0, 0, 0, 1, 1, 1]),
        advantages_T=torch.tensor([1.0, -1.0]).repeat_interleave(3),
        gates_T=gate,
        weights_T=torch.ones(6),
        rollout_logprobs_T=torch.full((6,), -4.8),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--pipeline", type=int, default=1)
    options = parser.parse_args()
    ranks = sdpg.initialize(ParallelConfig(tensor=options.tensor, pipeline=options.pipeline), seed=0)
    model = your_model(options.tensor, options.pipeline)
    optimizer = get_megatron_optimizer(OptimizerConfig(lr=1e-3, use_distributed_optimizer=True), [model])
    objective = sdpg.build_objective(
        ObjectiveConfig(alpha=0.0, beta=0.5, beta_warmup_steps=0, beta_decay_steps=0), STEPS
    )
    head = sdpg.Head(vocab_size=VOCAB, tensor_group=ranks.tensor_group)

    for step in range(STEPS):
        batch = your_batch().to(sdpg.training_device())
        context = StepContext(step, STEPS)
        if objective.required_passes(context).teacher:
            (rows,) = sdpg.teacher_hidden([model], [batch])
            batch = dataclasses.replace(batch, teacher_hidden_GH=rows)
        model.zero_grad_buffer()
        optimizer.zero_grad()
        reports: list[dict[str, Any]] = get_forward_backward_func()(
            forward_step_func=sdpg.ForwardStep(objective, context, head),
            data_iterator=iter([batch]),
            model=model,
            num_microbatches=1,
            seq_length=batch.student.tokens_BS.shape[1],
            micro_batch_size=batch.student.tokens_BS.shape[0],
            forward_only=False,
        )
        optimizer.step()
        for report in reports:  # only on the last pipeline stage
            numbers = {name: metric.read().value for name, metric in report.items()}
            sys.stdout.write(f"step {step}: loss {numbers['train/loss']:+.4f}, KL {numbers['distill/kl']:.4f}\n")
    sdpg.shutdown()


if __name__ == "__main__":
    main()
