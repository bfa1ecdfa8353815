"""Make a host's model return last hidden states instead of logits while the head computes the loss.

For hosts that call the model themselves. `sdpg_megatron.ForwardStep` needs none of this.

Shapes: B sequences, S length, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from sdpg_megatron.mcore.output_layer import Handover, hidden_instead_of_logits


class HiddenOutput:
    """Switch for the output of this rank's model chunks: logits, or last hidden states.

    The output layer is still called, so its hooks run.
    """

    def __init__(self, chunks: Sequence[nn.Module]) -> None:
        """`chunks`: this rank's chunks of a GPTModel, wrapped or bare."""
        self._chunks = chunks
        self._stack = ExitStack()
        self._handover: Handover | None = None

    def install(self) -> None:
        """Return hidden states [B, S, H] until `restore`, complete on every tensor-parallel rank. Idempotent.

        Raises:
            ConfigError: the output layer is more than a product with its weight, or the model has layers for
                multi-token prediction.
        """
        (last,) = unwrap_model([self._chunks[-1]])
        if self._handover is None and last.post_process:
            self._handover = self._stack.enter_context(hidden_instead_of_logits(last))

    def restore(self) -> None:
        """Return logits again. Idempotent."""
        self._stack.close()
        self._handover = None

    def check(self, output_BSH: Tensor) -> None:
        """Check, once per model, that the model's output is what its output layer was given.

        Raises:
            ConfigError: the model changes its logits after the output layer.
        """
        assert self._handover is not None, "install first, on the last pipeline stage"
        self._handover.check(output_BSH)
