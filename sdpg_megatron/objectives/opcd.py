"""OPCD: on-policy distillation of a context into the weights that are trained (arXiv 2602.12275)."""

from __future__ import annotations

from sdpg_megatron.objectives.distillation import Distillation


class OPCD(Distillation):
    """KL(p || SG q), averaged over a response's tokens and then over responses."""

    name = "opcd"
