"""The methods, composed of policy, distillation and reference losses. `METHODS` is the table of names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor

from sdpg_megatron.config import ObjectiveConfig
from sdpg_megatron.config.external import load_object
from sdpg_megatron.errors import ConfigError
from sdpg_megatron.objectives.base import Objective, RequiredPasses, StepContext, TokenLoss, TokenMetric, TokenTerms
from sdpg_megatron.objectives.distillation import BetaSchedule, distillation_loss, sampled_token_distillation
from sdpg_megatron.objectives.policy import bounded_exp, policy_loss
from sdpg_megatron.objectives.reference import reference_loss


class GRPO(Objective):
    """L_policy + alpha L_ref, without a teacher.

    "grpo": arXiv 2402.03300. "dapo": higher upper clip, one mean over all tokens, no reference (2503.14476, eq. 8); its
    dynamic sampling and overlong penalty act on groups and rewards, before the loss. "rpg": SDPG with beta = 0
    (2606.04036).
    """

    def loss(self, terms: TokenTerms, context: StepContext) -> TokenLoss:
        policy = policy_loss(terms, self.config)
        return policy + reference_loss(terms, self.config) if self.config.alpha else policy


class SDPG(GRPO):
    """L_policy + beta(k) m KL(p || SG q) + alpha L_ref (arXiv 2606.04036). With beta(k) = 0 this is RPG."""

    def __init__(self, config: ObjectiveConfig, total_steps: int) -> None:
        super().__init__(config, total_steps)
        self.schedule = beta_schedule(config, total_steps)

    def required_passes(self, context: StepContext) -> RequiredPasses:
        return replace(super().required_passes(context), teacher=self.schedule.at(context.step) > 0)

    def distill_enabled(self, advantage: float) -> bool:
        return advantage > 0 or not self.config.gate

    def loss(self, terms: TokenTerms, context: StepContext) -> TokenLoss:
        beta = self.schedule.at(context.step)
        return super().loss(terms, context) + distillation_loss(terms, self.config, beta, context)


class RLSD(GRPO):
    """GRPO with the advantages A [(1 - l) + l clip((q/p)^sign(A), 1 - c, 1 + c)], detached (arXiv 2604.03128).

    q and p are the teacher's and the student's probability of the sampled token; l falls from `credit` to 0. With
    `credit_ratio` "rollout" q and p are taken once per rollout, before its first update (2604.03128); with "current" at
    each mini-batch (2606.04036, appendix B).
    """

    def __init__(self, config: ObjectiveConfig, total_steps: int) -> None:
        super().__init__(config, total_steps)
        self.schedule = BetaSchedule(config.credit, 0, config.credit_decay_steps, config.credit_decay_steps)
        self._once = config.credit_ratio == "rollout"

    def required_passes(self, context: StepContext) -> RequiredPasses:
        passes = super().required_passes(context)
        if not self.schedule.at(context.step):
            return passes
        return replace(passes, teacher_logprob=True) if self._once else replace(passes, teacher=True)

    def distill_enabled(self, advantage: float) -> bool:
        return advantage > 0 if self.config.gate else advantage != 0

    def loss(self, terms: TokenTerms, context: StepContext) -> TokenLoss:
        share = self.schedule.at(context.step)
        if not share:
            return super().loss(terms, context)
        scale_T = self._scale(terms)
        clipped_T = scale_T.clamp(1 - self.config.credit_clip, 1 + self.config.credit_clip)
        weight_T = torch.where(terms.gate_T > 0, (1 - share) + share * clipped_T, 1.0)
        metrics = {
            "credit/share": TokenMetric(torch.full_like(weight_T, share)),
            "credit/weight": TokenMetric(weight_T),
            "credit/clip_fraction": TokenMetric((scale_T != clipped_T).float(), mask_T=terms.gate_T > 0),
        }
        weighted = replace(terms, advantage_T=terms.advantage_T * weight_T)
        return super().loss(weighted, context) + TokenLoss(torch.zeros_like(weight_T), metrics)

    def _scale(self, terms: TokenTerms) -> Tensor:
        """(q/p)^sign(A); 1 for a micro-batch without an open gate."""
        if terms.teacher_logprob_T is not None:
            student_T = terms.old_logprob_T if self._once else terms.logprob_T.detach()
            return bounded_exp((terms.teacher_logprob_T - student_T) * terms.advantage_T.sign())
        if terms.any_open_gate:
            raise ValueError("credit > 0 and an open gate need the teacher's log-probs")
        return torch.ones_like(terms.gate_T)


class Distillation(Objective):
    """beta(k) m D(p, SG q) + alpha L_ref, without a policy loss: rewards are only reported.

    "opsd": JSD from the initial weights, which read a worked solution (arXiv 2601.18734). "opcd": KL(p || SG q), to
    distil a context into the weights (2602.12275). "sdpo": JSD over the student's top tokens from an average of past
    weights that read another successful response, times SG[min(rho, 2)] (2601.20802).
    """

    def __init__(self, config: ObjectiveConfig, total_steps: int) -> None:
        super().__init__(config, total_steps)
        self.schedule = beta_schedule(config, total_steps)

    def required_passes(self, context: StepContext) -> RequiredPasses:
        distills, sampled = self.schedule.at(context.step) > 0, self.config.distill_loss == "clipped_ratio"
        return RequiredPasses(
            teacher=distills and not sampled,
            teacher_logprob=distills and sampled,
            reference=self.config.alpha > 0,
            policy_loss=False,
        )

    def distill_enabled(self, advantage: float) -> bool:
        return advantage > 0 or not self.config.gate

    def loss(self, terms: TokenTerms, context: StepContext) -> TokenLoss:
        # The pipeline schedule runs backward through every micro-batch, also through those without an open gate.
        term = distillation_loss if self.config.distill_loss == "divergence" else sampled_token_distillation
        loss = TokenLoss(0 * terms.logprob_T) + term(terms, self.config, self.schedule.at(context.step), context)
        return loss + reference_loss(terms, self.config) if self.config.alpha else loss


METHODS: Mapping[str, type[Objective]] = MappingProxyType(
    {
        "sdpg": SDPG,
        "rpg": GRPO,
        "grpo": GRPO,
        "dapo": GRPO,
        "rlsd": RLSD,
        "opsd": Distillation,
        "opcd": Distillation,
        "sdpo": Distillation,
    }
)
"""Class of each `objective.name`. `config/method_defaults.py` has the fields in which they differ."""


class EntropyBonus(Objective):
    """Another objective's loss minus coefficient * H, with H the policy's entropy over the whole vocabulary."""

    def __init__(self, objective: Objective, coefficient: float) -> None:
        super().__init__(objective.config, objective.total_steps)
        self.objective = objective
        self.coefficient = coefficient
        self.reads_sequences = objective.reads_sequences

    def advantages(self, rewards_G: Sequence[float]) -> tuple[float, ...]:
        return self.objective.advantages(rewards_G)

    def required_passes(self, context: StepContext) -> RequiredPasses:
        return replace(self.objective.required_passes(context), every_token=True)

    def distill_enabled(self, advantage: float) -> bool:
        return self.objective.distill_enabled(advantage)

    def loss(self, terms: TokenTerms, context: StepContext) -> TokenLoss:
        """Raises `ValueError` if the terms have no entropy."""
        if terms.entropy_T is None:
            raise ValueError("an entropy bonus needs the entropy of the policy")
        loss = self.objective.loss(terms, context)
        return replace(loss, loss_T=loss.loss_T - self.coefficient * terms.entropy_T)


def beta_schedule(config: ObjectiveConfig, total_steps: int) -> BetaSchedule:
    """Schedule of the distillation weight, by the configuration's beta and ramps."""
    return BetaSchedule.build(config.beta, config.beta_warmup_steps, config.beta_decay_steps, total_steps)


def build_objective(config: ObjectiveConfig, total_steps: int) -> Objective:
    """Build the objective `config.name`, with its entropy bonus, for a run of `total_steps` optimizer steps.

    Raises:
        ConfigError: `config.name` is neither a method of this package nor ``module:Class`` of an `Objective`.
    """
    kind = METHODS[config.name] if config.name in METHODS else load_object("objective.name", config.name)
    if not (isinstance(kind, type) and issubclass(kind, Objective)):
        expected = "a subclass of sdpg_megatron.Objective"
        raise ConfigError("objective.name", config.name, expected, "derive the class from it")
    objective = kind(config, total_steps)
    return EntropyBonus(objective, config.entropy_coefficient) if config.entropy_coefficient else objective


def passes_of_run(objective: Objective, total_steps: int) -> RequiredPasses:
    """The passes that any step of a run needs, from a few of its steps; see `Objective.required_passes`."""
    probes = {step for step in (0, 1, total_steps // 2, total_steps - 1) if 0 <= step < total_steps}
    steps = [objective.required_passes(StepContext(step, total_steps)) for step in sorted(probes)]
    return RequiredPasses(
        teacher=any(passes.teacher for passes in steps),
        teacher_logprob=any(passes.teacher_logprob for passes in steps),
        reference=any(passes.reference for passes in steps),
        every_token=any(passes.every_token for passes in steps),
        policy_loss=any(passes.policy_loss for passes in steps),
    )
