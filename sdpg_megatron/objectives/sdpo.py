"""SDPO: distillation from an average of past weights who read another response's success (arXiv 2601.20802)."""

from __future__ import annotations

from sdpg_megatron.objectives.distillation import Distillation


class SDPO(Distillation):
    """JSD(p, SG q) over the student's top tokens and a tail, times SG[min(rho, 2)], averaged over taught tokens."""

    name = "sdpo"
