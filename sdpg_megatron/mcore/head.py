"""Output head of a Megatron model: finds its matrix, shard and options for `sdpg_megatron.head`.

Shapes: T response tokens of a micro-batch, H hidden size, V padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from megatron.core.utils import unwrap_model
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from sdpg_megatron.config import RunConfig
from sdpg_megatron.head import (
    Divergence,
    ForwardKL,
    HeadOptions,
    HeadTerms,
    JensenShannon,
    ReverseKL,
    RowLoss,
    SampledToken,
    TeacherRows,
    TopK,
    VocabShard,
    head_gradient_squares,
    head_logprobs,
    head_loss,
)
from sdpg_megatron.mcore.model import output_weight


@dataclass(frozen=True, slots=True)
class Head:
    """Computes log-probs and losses from hidden rows and a model's output matrix."""

    vocab_size: int
    """Vocabulary size without Megatron's padding."""
    tensor_group: ProcessGroup
    options: HeadOptions = field(default_factory=HeadOptions)

    @classmethod
    def build(cls, config: RunConfig, vocab_size: int, tensor_group: ProcessGroup, chunks: Sequence[nn.Module]) -> Head:
        """Build the head of a run, with chunks that fit the free memory.

        Collective over `tensor_group` on the last pipeline stage.
        """
        head = cls(vocab_size, tensor_group, head_options(config))
        (last,) = unwrap_model([chunks[-1]])
        if not last.post_process:
            return head
        weight_VH = output_weight(chunks[-1])
        return replace(head, options=head.options.fitted(weight_VH, head.shard(weight_VH)))

    def loss(
        self,
        model: nn.Module,
        hidden_TH: Tensor,
        labels_T: Tensor,
        teacher: TeacherRows | None,
        loss: RowLoss,
        *,
        whole: bool = False,
    ) -> tuple[Tensor, HeadTerms]:
        """Loss summed over rows, and the detached terms. See `sdpg_megatron.head.head_loss`.

        Args:
            whole: call `loss` once for all rows instead of once per chunk (schedule "recompute").
        """
        weight_VH = output_weight(model)
        (gpt,) = unwrap_model([model])
        schedule = "recompute" if whole else self.options.schedule
        options = replace(self.options, schedule=schedule, reduce_hidden_grad=not gpt.output_layer.sequence_parallel)
        # Megatron's 16-bit wrapper returns float32.
        rows_TH = hidden_TH.to(weight_VH.dtype)
        return head_loss(
            rows_TH, weight_VH, labels_T, loss, vocab=self.shard(weight_VH), teacher=teacher, options=options
        )

    def logprobs(self, model: nn.Module, hidden_TH: Tensor, labels_T: Tensor) -> Tensor:
        """Log-probs without gradient. See `sdpg_megatron.head.head_logprobs`."""
        weight_VH = output_weight(model)
        rows_TH = hidden_TH.to(weight_VH.dtype)
        return head_logprobs(rows_TH, weight_VH, labels_T, vocab=self.shard(weight_VH), options=self.options)

    def teacher_logprobs(self, model: nn.Module, hidden_GH: Tensor, labels_G: Tensor) -> Tensor:
        """`logprobs` of the teacher's rows at the teacher's temperature, with the current output matrix of `model`."""
        teacher = replace(self, options=replace(self.options, temperature=self.options.temperatures[1]))
        return teacher.logprobs(model, hidden_GH, labels_G)

    def gradient_squares(
        self,
        model: nn.Module,
        hidden_TH: Tensor,
        labels_T: Tensor,
        teacher: TeacherRows | None,
        grads: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """See `sdpg_megatron.head.head_gradient_squares`. `grads`: gradients of the loss in log-prob and divergence."""
        weight_VH = output_weight(model)
        return head_gradient_squares(
            hidden_TH.to(weight_VH.dtype),
            weight_VH,
            labels_T,
            logprob_grad_T=grads[0],
            divergence_grad_T=grads[1],
            vocab=self.shard(weight_VH),
            teacher=teacher,
            options=self.options,
        )

    def shard(self, weight_VH: Tensor) -> VocabShard:
        """Vocabulary shard of this rank's rows of the matrix."""
        return VocabShard(self.tensor_group.rank() * weight_VH.shape[0], self.vocab_size, self.tensor_group)


def head_options(config: RunConfig) -> HeadOptions:
    """Head options of a run's configuration."""
    head = config.head
    return HeadOptions(
        divergence=divergence(config),
        temperature=config.rollout.temperature,
        teacher_temperature=config.objective.teacher_temperature,
        schedule=head.schedule,
        chunk_rows=head.chunk_rows,
        kernels=head.kernels,
        main_grad=head.main_grad,
        raises=False,  # `PolicyTrainer.update` skips the step on all ranks instead
    )


def divergence(config: RunConfig) -> Divergence:
    """Divergence of the distillation term."""
    objective = config.objective
    whole: dict[str, ReverseKL | ForwardKL | JensenShannon] = {
        "reverse_kl": ReverseKL(),
        "forward_kl": ForwardKL(),
        "jsd": JensenShannon(objective.jsd_beta),
    }
    if objective.divergence == "sampled_token":
        return SampledToken()
    return TopK(objective.top_k, whole[objective.divergence]) if objective.top_k else whole[objective.divergence]
