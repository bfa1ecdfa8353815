"""Routers of a mixture of experts: auxiliary losses, and replay of given routing choices.

A router needs the sequence of each token and, for replay, its experts. Each token therefore gets a number in this
rank's step. The numbers are passed to the model instead of Megatron's padding mask, so that schedules, pipeline stages
and recomputation deliver them to every layer.

Shapes: B sequences of a micro-batch, S padded length, N positions of this rank's step plus one for padding, T tokens of
a router's call, E experts, K experts per token, L layers, Q sequences of a micro-batch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn
from torch.nn import functional

from sdpg_megatron.config import ModelConfig
from sdpg_megatron.observe.metrics import Metric, Reduction
from sdpg_megatron.records import MicroBatch, SequenceBatch


@dataclass(frozen=True, slots=True)
class RouterStep:
    """Inputs of this rank's routers for one optimizer step. Index 0 of N is padding."""

    sequence_N: Tensor
    """int64: index of each token's sequence in its micro-batch; 0 for padding."""
    share_N: Tensor
    """float32: 1 / number of tokens of that sequence; 0 for padding."""
    sequences: int
    """Maximum number of sequences of a micro-batch."""
    aux_scale: float
    """Factor of the load-balancing loss, summed over tokens, before Megatron divides the gradients."""
    z_scale: float
    """Factor of the z-loss, summed over tokens, before Megatron divides the gradients."""
    experts_NLK: Tensor | None
    """int16: experts of each token, -1 for the router's choice; None: the router's choice everywhere."""


class Router(TopKRouter):  # type: ignore[misc]
    """Megatron's router with losses that do not depend on micro-batch split or padding, and with replay.

    megatron-core's losses are means over a micro-batch, assume equally long sequences, and are scaled differently by
    0.16 and 0.19 if gradients are divided by the number of tokens.
    """

    step: RouterStep | None = None
    numbers_T: Tensor | None = None
    """Token numbers of the current call, indices into N of `RouterStep`."""
    sums: Tensor | None = None
    """float32 [2]: load-balancing loss and z-loss, summed over this rank's tokens of the step so far."""
    replayed: Tensor | None = None
    """int64 [2]: replayed tokens whose experts differ from the router's choice, and all replayed tokens."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.router_replay = _Replay(self)

    def routing(self, logits: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Logits [S, B, E] -> probabilities and choices, [T, E]."""
        probs_TE, chosen_TE = super().routing(logits, *args, **kwargs)
        # Only forwards with a backward count: not forward-only passes, nor the first forward under recomputation.
        step, numbers_T = self.step, self.numbers_T
        if step is not None and numbers_T is not None and (step.aux_scale or step.z_scale) and torch.is_grad_enabled():
            probs_TE = self._with_losses(probs_TE, chosen_TE, logits.flatten(0, 1).float(), numbers_T, step)
        return probs_TE, chosen_TE

    def _with_losses(
        self, probs_TE: Tensor, chosen_TE: Tensor, logits_TE: Tensor, numbers_T: Tensor, step: RouterStep
    ) -> Tensor:
        """Return the same probabilities, with a backward pass that adds the gradients of the losses."""
        real_T = numbers_T > 0
        balance = z = logits_TE.new_zeros(())
        if step.aux_scale:
            balance = (self._loads(chosen_TE & real_T[:, None], numbers_T, step) * logits_TE.softmax(-1)).sum()
        if step.z_scale:
            z = (logits_TE.logsumexp(-1).square() * real_T).sum()
        found = torch.stack([balance, z]).detach()
        self.sums = found if self.sums is None else self.sums + found
        with_losses: Tensor = MoEAuxLossAutoScaler.apply(probs_TE, step.aux_scale * balance + step.z_scale * z)
        return with_losses

    def _loads(self, chosen_TE: Tensor, numbers_T: Tensor, step: RouterStep) -> Tensor:
        """float32 [T, E]: share of each expert in the choices of a token's sequence, times E; 0 for padding."""
        sequence_T = step.sequence_N[numbers_T]
        count_QE = torch.zeros(step.sequences, chosen_TE.shape[1], device=chosen_TE.device)
        count_QE.index_add_(0, sequence_T, chosen_TE.float())
        if self.tp_cp_group.size() > 1:  # sequences are sharded over these ranks
            dist.all_reduce(count_QE, group=self.tp_cp_group)
        scale_T = step.share_N[numbers_T] * (chosen_TE.shape[1] / int(self.topk))
        return count_QE[sequence_T] * scale_T[:, None]


class _Replay:
    """Replay object that Megatron calls instead of top-k. Megatron's own class does not support padding."""

    layer_number: int | None = None
    """Set by megatron-core 0.19."""

    def __init__(self, router: Router) -> None:
        self._router = router

    def get_replay_topk(
        self, scores_TE: Tensor, topk: int, groups: int | None, group_topk: int | None, own_topk: Callable[..., Any]
    ) -> tuple[Tensor, Tensor]:
        """Scores and indices of the K experts of each token, [T, K]."""
        scores_TK, own_TK = own_topk(scores_TE, topk, groups, group_topk)
        step, numbers_T = self._router.step, self._router.numbers_T
        if step is None or step.experts_NLK is None or numbers_T is None:
            return scores_TK, own_TK
        given_TK = step.experts_NLK[numbers_T, self._router.layer_number - 1].to(own_TK.dtype)
        chosen_TK = given_TK.where(given_TK >= 0, own_TK)
        if torch.is_grad_enabled():
            differs_T = (chosen_TK.sort().values != own_TK.sort().values).any(-1)
            found = torch.stack([differs_T.sum(), (given_TK[:, 0] >= 0).sum()])
            self._router.replayed = found if self._router.replayed is None else self._router.replayed + found
        return scores_TE.gather(1, chosen_TK), chosen_TK


def use_own_router(layer: Any) -> None:
    """Replace the router in a layer spec by `Router`."""
    mlp = layer.submodules.mlp
    parts = mlp.keywords["submodules"] if isinstance(mlp, partial) else mlp.submodules  # megatron-core 0.19, or 0.16
    parts.router = Router


def deliver_numbers(chunk: nn.Module) -> None:
    """Make the MoE layers of a chunk pass the token numbers to their routers instead of using them as a mask."""

    def deliver(mixture: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        numbers_BS = kwargs.pop("padding_mask", None)
        mixture.router.numbers_T = None if numbers_BS is None else numbers_BS.T.flatten()
        return args, kwargs

    for module in chunk.modules():
        if isinstance(module, MoELayer):
            module.register_forward_pre_hook(deliver, with_kwargs=True)


def as_padding_mask(gpt: Any, numbers_BS: Tensor | None) -> Tensor | None:
    """Token numbers in the form that a chunk expects of a padding mask.

    Under sequence parallelism only the first chunk shards its mask; the others get the shard.
    """
    if numbers_BS is None or gpt.pre_process or not gpt.config.sequence_parallel:
        return numbers_BS
    local_SB: Tensor = scatter_to_sequence_parallel_region(numbers_BS.T.contiguous())
    return local_SB.T


class Routing:
    """Controls the routers of this rank's chunks."""

    def __init__(self, chunks: Sequence[nn.Module], config: ModelConfig, layers: int) -> None:
        """`layers`: number of layers of the whole model."""
        self._routers = [module for chunk in chunks for module in chunk.modules() if isinstance(module, Router)]
        self._aux, self._z, self._layers = config.router_aux_loss, config.router_z_loss, layers
        self._tokens = 0

    @contextmanager
    def step(self, batches: Sequence[MicroBatch]) -> Iterator[Sequence[MicroBatch]]:
        """Prepare the routers for passes over the micro-batches that this yields, with numbered tokens.

        Collective over the data-parallel ranks if router losses are enabled.
        """
        scale = self._count(batches) if self._aux or self._z else 0.0
        for router in self._routers:
            router.sums = router.replayed = None
        if not scale and all(batch.student.experts_BSLK is None for batch in batches):
            yield batches
            return
        numbered, sequence_N, share_N = number_tokens(batches)
        sequences = max(batch.student.count for batch in batches)
        experts_NLK = number_experts(batches)
        step = RouterStep(sequence_N, share_N, sequences, self._aux * scale, self._z * scale, experts_NLK)
        for router in self._routers:
            router.step = step
        try:
            yield numbered
        finally:
            for router in self._routers:
                router.step = router.numbers_T = None

    def _count(self, batches: Sequence[MicroBatch]) -> float:
        """Ratio of response tokens to all tokens, over all ranks. Collective over data- and context-parallel ranks.

        Megatron divides gradients by the number of response tokens, but router losses are means over all tokens.
        """
        tokens_here = torch.stack([(_sequence(batch.student) >= 0).sum() for batch in batches]).sum()
        total = torch.stack([torch.full_like(tokens_here, sum(b.num_tokens for b in batches)), tokens_here])
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        responses, tokens = total.tolist()
        self._tokens = int(tokens)
        return int(responses) / max(self._tokens, 1)

    def metrics(self) -> dict[str, Metric]:
        """This rank's contribution to the last step's metrics, means over tokens and layers. Merge over all ranks."""
        found = [router.sums for router in self._routers if router.sums is not None]
        sums = torch.stack(found).sum(0).tolist() if found else [0.0, 0.0]
        parts = (("train/router_aux_loss", self._aux, sums[0]), ("train/router_z_loss", self._z, sums[1]))
        count = max(self._tokens, 1) * self._layers
        losses = {name: Metric(total / count, Reduction.SUM) for name, coefficient, total in parts if coefficient}
        replayed = [router.replayed for router in self._routers if router.replayed is not None]
        if not replayed:
            return losses
        differ, given = torch.stack(replayed).sum(0).tolist()
        return {**losses, "rollout/routing_difference": Metric(differ / max(given, 1), Reduction.MEAN, given)}


def number_tokens(batches: Sequence[MicroBatch]) -> tuple[list[MicroBatch], Tensor, Tensor]:
    """Number the positions of a step's student sequences from 1; padding has 0.

    Returns:
        The micro-batches with numbers, and `sequence_N` and `share_N` of `RouterStep`.
    """
    numbered = []
    device = batches[0].labels_T.device
    sequences, shares = [torch.zeros(1, dtype=torch.int64, device=device)], [torch.zeros(1, device=device)]
    first = 1
    for batch in batches:
        sequence_BS, sizes_Q = _sequence(batch.student), batch.student.sizes_Q
        assert sizes_Q is not None
        positions_BS = torch.arange(first, first + sequence_BS.numel(), device=device).view_as(sequence_BS)
        first += sequence_BS.numel()
        sequences.append(sequence_BS.flatten().clamp(min=0))
        # Padding has sequence -1, which selects the appended infinity: its share is 0.
        shares.append(1 / functional.pad(sizes_Q.float(), (0, 1), value=math.inf)[sequence_BS.flatten()])
        student = dataclasses.replace(batch.student, numbers_BS=positions_BS.where(sequence_BS >= 0, 0))
        numbered.append(dataclasses.replace(batch, student=student))
    return numbered, torch.cat(sequences), torch.cat(shares)


def number_experts(batches: Sequence[MicroBatch]) -> Tensor | None:
    """Experts of each token by its number (see `number_tokens`), int16 [N, L, K]; None if none are given."""
    given = [batch.student.experts_BSLK for batch in batches if batch.student.experts_BSLK is not None]
    if not given:
        return None
    padding_1LK = given[0].new_full((1, *given[0].shape[2:]), -1)
    parts = [padding_1LK]
    for batch in batches:
        experts_BSLK = batch.student.experts_BSLK
        own = padding_1LK.expand(batch.student.tokens_BS.numel(), -1, -1)
        parts.append(own if experts_BSLK is None else experts_BSLK.flatten(0, 1))
    return torch.cat(parts)


def _sequence(batch: SequenceBatch) -> Tensor:
    assert batch.sequence_BS is not None, "routers need the sequence of each token"
    return batch.sequence_BS
