"""Make a GPTModel return its last hidden states instead of logits, and refuse models where this is wrong.

The head computes logits as hidden states times the output weight. For a model that changes its logits further (a
soft-cap, a scale, a bias, an adapter) the losses would be of another distribution.

Shapes: S sequence, B batch, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, gather_from_sequence_parallel_region
from torch import Tensor

from sdpg_megatron.errors import ConfigError

CHECKED = "sdpg_output_checked"
"""Attribute set on a model after `Handover.check` passed."""


class Handover:
    """Hidden states that a forward pass returns instead of logits."""

    def __init__(self, gpt: Any) -> None:
        self._gpt = gpt
        self._hidden_SBH: Tensor | None = None

    def give(self, hidden_SBH: Tensor) -> Tensor:
        """Replace the output layer's forward: return its input, complete on every tensor-parallel rank."""
        if self._gpt.output_layer.sequence_parallel:
            # The backward of this gather reduce-scatters, which sums the head's partial gradient once.
            hidden_SBH = gather_from_sequence_parallel_region(hidden_SBH, tensor_parallel_output_grad=True)
        self._hidden_SBH = hidden_SBH
        return hidden_SBH

    @torch.no_grad()
    def check(self, output_BSH: Tensor) -> None:
        """Check once per model that its output equals the hidden states, scaled at most by Megatron's MuP.

        Raises:
            ConfigError: the model changes its logits after the output layer.
        """
        gpt, hidden_SBH = self._gpt, self._hidden_SBH
        if getattr(gpt, CHECKED, False) or output_BSH.is_meta:
            return
        if hidden_SBH is None:
            raise _refused("no call of its output layer", "one call of it in each forward pass")
        if getattr(gpt.config, "use_mup", False) and type(gpt)._scale_logits is GPTModel._scale_logits:
            hidden_SBH = gpt._scale_logits(hidden_SBH)  # linear: scaled states give scaled logits
        expected_BSH = hidden_SBH.transpose(0, 1).to(output_BSH.dtype)
        if output_BSH.shape != expected_BSH.shape or not _same(output_BSH, expected_BSH):
            raise _refused("logits that it changes after its output layer", "the output layer's product as its logits")
        setattr(gpt, CHECKED, True)


@contextmanager
def hidden_instead_of_logits(gpt: Any) -> Iterator[Handover]:
    """Make a GPTModel on the last stage return its last hidden states.

    The output layer is still called, so its hooks (for example parameter gathering) run. Replacing its forward works
    with all supported megatron-core versions; only 0.19 has an `output_processor` for this.

    Raises:
        ConfigError: the output layer is more than a product with its weight, or the model has layers for multi-token
            prediction.
    """
    _check_layer(gpt)
    handover = Handover(gpt)

    def forward(hidden_SBH: Tensor, **_: Any) -> tuple[Tensor, None]:
        return handover.give(hidden_SBH), None

    gpt.output_layer.forward = forward
    try:
        yield handover
    finally:
        del gpt.output_layer.forward


def _check_layer(gpt: Any) -> None:
    layer = gpt.output_layer
    if getattr(gpt.config, "mtp_num_layers", None):
        raise _refused(f"mtp_num_layers={gpt.config.mtp_num_layers}", "no layers for multi-token prediction")
    if getattr(type(layer), "forward", None) is not ColumnParallelLinear.forward or "forward" in vars(layer):
        found = f"an output layer with a custom forward ({type(layer).__qualname__})"
        raise _refused(found, "Megatron's ColumnParallelLinear.forward")
    if layer.bias is not None:
        raise _refused("an output layer with a bias", "one without")


def _refused(found: str, expected: str) -> ConfigError:
    fix = "remove it, or compute the logits in your own forward step and use sdpg_megatron.head.logits_terms"
    return ConfigError("GPTModel", found, expected, fix)


def _same(one: Tensor, other: Tensor) -> bool:
    """True if two tensors are equal, with NaN equal to NaN."""
    return bool(((one == other) | (one.isnan() & other.isnan())).all())
