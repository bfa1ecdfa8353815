"""RLSD: the verifier says which way a response's tokens go, the privileged teacher how far (arXiv 2604.03128).

T response tokens.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sdpg_megatron.config import ObjectiveConfig
from sdpg_megatron.objectives.base import RequiredPasses, StepContext, TokenLoss, TokenMetric, TokenTerms
from sdpg_megatron.objectives.grpo import GRPO
from sdpg_megatron.objectives.ratios import bounded_exp
from sdpg_megatron.objectives.schedules import BetaSchedule


class RLSD:
    """GRPO with the advantages A [(1 - l) + l clip((q/p)^sign(A), 1 - c, 1 + c)], of which nothing has a gradient.

    q and p are the teacher's and the student's probability of the sampled token, l falls from `credit` to 0. With
    `credit_ratio` "rollout" both are taken once per rollout, before its first update (2604.03128), with "current" at
    each mini-batch (2606.04036, appendix B).
    """

    name = "rlsd"

    def __init__(self, config: ObjectiveConfig) -> None:
        self.config = config
        self.undistilled = GRPO(config)
        self.schedule = BetaSchedule(config.credit, 0, config.credit_decay_steps, config.credit_decay_steps)
        self._once = config.credit_ratio == "rollout"

    def required_passes(self, context: StepContext) -> RequiredPasses:
        required_passes = self.undistilled.required_passes(context)
        if not self.schedule.at(context.step):
            return required_passes
        return replace(required_passes, teacher_logprob=True) if self._once else replace(required_passes, teacher=True)

    def distill_enabled(self, advantage: float) -> bool:
        return advantage > 0 if self.config.gate else advantage != 0

    def loss(self, terms: TokenTerms, context: StepContext) -> TokenLoss:
        share = self.schedule.at(context.step)
        if not share:
            return self.undistilled.loss(terms, context)
        scale_T = self._scale(terms)
        clipped_T = scale_T.clamp(1 - self.config.credit_clip, 1 + self.config.credit_clip)
        weight_T = torch.where(terms.gate_T > 0, (1 - share) + share * clipped_T, 1.0)
        metrics = {
            "credit/share": TokenMetric(torch.full_like(weight_T, share)),
            "credit/weight": TokenMetric(weight_T),
            "credit/clip_fraction": TokenMetric((scale_T != clipped_T).float(), mask_T=terms.gate_T > 0),
        }
        weighed = replace(terms, advantage_T=terms.advantage_T * weight_T)
        return self.undistilled.loss(weighed, context) + TokenLoss(torch.zeros_like(weight_T), metrics)

    def _scale(self, terms: TokenTerms) -> Tensor:
        """(q/p)^sign(A); where a gate is closed it says nothing."""
        if terms.teacher_logprob_T is not None:
            student_T = terms.old_logprob_T if self._once else terms.logprob_T.detach()
            return bounded_exp((terms.teacher_logprob_T - student_T) * terms.advantage_T.sign())
        if terms.any_open_gate:
            raise ValueError("credit > 0 and an open gate need the teacher's log-probs")
        return torch.ones_like(terms.gate_T)
