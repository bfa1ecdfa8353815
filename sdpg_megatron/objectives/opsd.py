"""OPSD: on-policy self-distillation from the initial weights, who read a worked solution (arXiv 2601.18734)."""

from __future__ import annotations

from sdpg_megatron.objectives.distillation import Distillation


class OPSD(Distillation):
    """JSD(p, SG q) over the whole vocabulary, averaged over a response's tokens and then over responses."""

    name = "opsd"
