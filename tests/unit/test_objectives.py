"""Objectives against a dense float64 implementation written from the method's formulas."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from sdpg_megatron.config import ObjectiveConfig
from sdpg_megatron.head import HeadOptions, TeacherRows, VocabShard, head_terms
from sdpg_megatron.objectives import build_objective
from sdpg_megatron.objectives.base import RequiredPasses, StepContext, TokenLoss, TokenTerms
from tests.objective_samples import Sample
from tests.waits import Waits

EXACT = {"rtol": 1e-10, "atol": 1e-12}
ROWS, COLUMNS, HIDDEN = 12, 17, 5
TOTAL = 40
CONTEXT = StepContext(step=19, total_steps=TOTAL)
"""The schedules' k = 20: with warm-up 5 and decay 35 of 40, beta(20) = 20/35 of the peak."""
DECAYED = 20 / 35


def make_sample(near_policy: bool = True) -> Sample:
    """Three responses of four tokens, one of them with a positive advantage.

    `near_policy`: old log-probs that differ from the current ones, up to ratios of e^1.5 or so.
    """
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    hidden_TH, teacher_TH, weight_VH = normal(ROWS, HIDDEN), normal(ROWS, HIDDEN), normal(COLUMNS, HIDDEN)
    labels_T = torch.randint(0, COLUMNS, (ROWS,), generator=generator)
    logprob_T = (hidden_TH @ weight_VH.T).log_softmax(-1)[torch.arange(ROWS), labels_T]
    advantage_T = torch.tensor([1.3, -0.4, -0.9], dtype=torch.float64).repeat_interleave(4)
    noise_T = 0.7 * normal(ROWS)
    noise_T[1] = -1.0  # beyond the upper clip with a positive advantage
    noise_T[5] = -3.0  # beyond the dual clip of 10 with a negative advantage
    return Sample(
        hidden_TH,
        teacher_TH,
        weight_VH,
        labels_T,
        old_logprob_T=logprob_T + noise_T * near_policy,
        reference_logprob_T=logprob_T + 0.5 * normal(ROWS),
        advantage_T=advantage_T,
        gate_T=(advantage_T > 0).double(),
    )


def dense_loss(sample: Sample, logits_TV: Tensor, config: ObjectiveConfig, beta: float, alpha: float) -> Tensor:
    """Per-token loss by the book, token by token."""
    with torch.no_grad():
        q_TV = (sample.teacher_TH @ sample.weight_VH.T).softmax(-1)
    losses = []
    for t in range(ROWS):
        p_V = logits_TV[t].softmax(-1)
        logp = p_V[sample.labels_T[t]].log()
        rho = (logp - sample.old_logprob_T[t]).exp()
        advantage, rho_value = float(sample.advantage_T[t]), float(rho.detach())
        if config.policy == "reinforce":
            policy = -advantage * logp
        elif advantage >= 0:
            policy = -advantage * min(rho, torch.tensor(1 + config.clip_high, dtype=torch.float64))
        elif config.dual_clip is not None and rho_value > config.dual_clip:
            policy = -advantage * config.dual_clip * torch.ones((), dtype=torch.float64)
        else:
            policy = -advantage * max(rho, torch.tensor(1 - config.clip_low, dtype=torch.float64))
        weight = rho_value if config.ratio_weighted_regularizers else 1.0
        kl = (p_V * (p_V / q_TV[t]).log()).sum()
        r = logp - sample.reference_logprob_T[t]
        reference_loss = {
            "urkl": r**2 / 2,
            "ufkl": (-r).exp() + r,
            "fkl": (-r).exp(),
            "rkl": (r + 1) ** 2 / 2,
        }[config.reference]
        losses.append(policy + weight * (beta * sample.gate_T[t] * kl + alpha * reference_loss))
    return torch.stack(losses)


def package_loss(sample: Sample, hidden_TH: Tensor, weight_VH: Tensor, objective: Any) -> TokenLoss:
    """The same through the head, with teacher rows for open gates alone."""
    rows_G = sample.gate_T.nonzero()[:, 0]
    head = head_terms(
        hidden_TH,
        weight_VH,
        sample.labels_T,
        vocab=VocabShard(0, COLUMNS, None),
        teacher=TeacherRows(sample.teacher_TH[rows_G], rows_G),
        options=HeadOptions(chunk_rows=5),
    )
    terms = token_terms(sample, head.logprob_T, head.divergence_T)
    loss: TokenLoss = objective.loss(replace(terms, teacher_logprob_T=head.teacher_logprob_T), CONTEXT)
    return loss


def token_terms(sample: Sample, logprob_T: Tensor, divergence_T: Tensor | None) -> TokenTerms:
    return TokenTerms(
        logprob_T=logprob_T,
        divergence_T=divergence_T,
        old_logprob_T=sample.old_logprob_T,
        reference_logprob_T=sample.reference_logprob_T,
        advantage_T=sample.advantage_T,
        gate_T=sample.gate_T,
    )


def agree(sample: Sample, config: ObjectiveConfig, objective: Any, **weights: float) -> None:
    """Per-token values, and gradients in hidden states and matrix of a random mixture of them."""
    mixture_T = torch.linspace(-1, 2, ROWS, dtype=torch.float64)
    hidden_TH, weight_VH = (x.clone().requires_grad_() for x in (sample.hidden_TH, sample.weight_VH))
    loss_T = package_loss(sample, hidden_TH, weight_VH, objective).loss_T
    found = [loss_T, *torch.autograd.grad((mixture_T * loss_T).sum(), (hidden_TH, weight_VH))]
    loss_T = dense_loss(sample, hidden_TH @ weight_VH.T, config, **weights)
    expected = [loss_T, *torch.autograd.grad((mixture_T * loss_T).sum(), (hidden_TH, weight_VH))]
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, **EXACT)


@pytest.mark.parametrize("policy", ["ratio", "reinforce"])
@pytest.mark.parametrize("reference", ["urkl", "ufkl", "fkl", "rkl"])
@pytest.mark.parametrize("weighted", [True, False])
def test_sdpg_equals_the_dense_implementation(policy: Any, reference: Any, weighted: bool) -> None:
    config = ObjectiveConfig(
        policy=policy, reference=reference, beta=0.7, alpha=0.3, ratio_weighted_regularizers=weighted
    )
    agree(make_sample(), config, build_objective(config, TOTAL), beta=0.7 * DECAYED, alpha=0.3)


@pytest.mark.parametrize("term", ["outcome", "distillation", "reference"])
def test_sdpg_term_by_term(term: str) -> None:
    beta, alpha = (0.7 if term == "distillation" else 0.0), (0.3 if term == "reference" else 0.0)
    config = ObjectiveConfig(beta=beta, alpha=alpha, dual_clip=None)
    sample = make_sample()
    if term == "outcome":
        agree(sample, config, build_objective(config, TOTAL), beta=0.0, alpha=0.0)
        return
    flat = replace(sample, advantage_T=torch.zeros_like(sample.advantage_T))  # the gate stays open
    agree(flat, config, build_objective(config, TOTAL), beta=beta * DECAYED, alpha=alpha)


def test_grpo_equals_the_dense_implementation() -> None:
    config = ObjectiveConfig(name="grpo", alpha=0.3, clip_high=0.2, reference="fkl")
    agree(make_sample(), config, build_objective(config, TOTAL), beta=0.0, alpha=0.3)


def test_gated_average_scales_the_distillation_term_alone() -> None:
    config = ObjectiveConfig(beta=0.7, alpha=0.3, beta_warmup_steps=0, beta_decay_steps=0)
    terms = token_terms(make_sample(), make_sample().old_logprob_T, torch.ones(ROWS, dtype=torch.float64))
    objective = build_objective(config, TOTAL)
    plain_T = objective.loss(terms, CONTEXT).loss_T
    scaled_T = objective.loss(terms, replace(CONTEXT, distill_scale=3.0)).loss_T
    assert_close(scaled_T - plain_T, 2 * 0.7 * terms.gate_T)


def test_same_distribution_costs_nothing() -> None:
    """With teacher = student the distillation term vanishes in value and gradient, so that RPG remains."""
    sample = make_sample()
    same = replace(sample, teacher_TH=sample.hidden_TH)
    distilled, plain = (build_objective(ObjectiveConfig(beta=beta, alpha=0.3), TOTAL) for beta in (0.7, 0.0))
    results = []
    for objective in (distilled, plain):
        hidden_TH = same.hidden_TH.clone().requires_grad_()
        loss_T = package_loss(same, hidden_TH, same.weight_VH, objective).loss_T
        results.append((loss_T.detach(), *torch.autograd.grad(loss_T.sum(), hidden_TH)))
    for one, other in zip(*results, strict=True):
        assert_close(one, other, **EXACT)


def same_loss(one: ObjectiveConfig, other: ObjectiveConfig) -> None:
    """Values and gradients, to the bit."""
    sample = make_sample()
    found = []
    for config in (one, other):
        logprob_T = sample.old_logprob_T.clone() + torch.linspace(-1, 1, ROWS, dtype=torch.float64)
        terms = token_terms(sample, logprob_T.requires_grad_(), None)
        loss_T = build_objective(config, TOTAL).loss(terms, CONTEXT).loss_T
        found.append((loss_T, *torch.autograd.grad(loss_T.sum(), logprob_T)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_sdpg_without_beta_is_rpg() -> None:
    same_loss(ObjectiveConfig(beta=0.0, alpha=0.3), ObjectiveConfig(name="rpg", alpha=0.3))


def test_rlsd_without_credit_is_grpo() -> None:
    """And at the end of the credit's decay; then it needs no teacher either."""
    grpo = ObjectiveConfig(name="grpo")
    same_loss(ObjectiveConfig(name="rlsd", credit=0.0, dual_clip=None), grpo)
    same_loss(ObjectiveConfig(name="rlsd", credit_decay_steps=20, dual_clip=None), grpo)
    for config in (ObjectiveConfig(name="rlsd", credit=0.0), ObjectiveConfig(name="rlsd", credit_decay_steps=20)):
        assert build_objective(config, TOTAL).required_passes(CONTEXT) == RequiredPasses()


def test_dapo_with_equal_clips_is_grpo_with_a_token_mean() -> None:
    dapo = ObjectiveConfig(name="dapo", clip_high=0.2)
    grpo = ObjectiveConfig(name="grpo", aggregation="token-mean")
    same_loss(dapo, grpo)
    assert dapo.aggregation == grpo.aggregation


@pytest.mark.parametrize("name", ["sdpg", "rpg", "grpo", "dapo", "rlsd"])
def test_on_policy_clips_have_the_gradient_of_reinforce(name: Any) -> None:
    sample = make_sample(near_policy=False)
    gradients = []
    for policy in ("ratio", "reinforce", "clipped_reinforce"):
        objective = build_objective(ObjectiveConfig(name=name, policy=policy), TOTAL)
        hidden_TH = sample.hidden_TH.clone().requires_grad_()
        loss_T = package_loss(sample, hidden_TH, sample.weight_VH, objective).loss_T
        gradients.append(torch.autograd.grad(loss_T.sum(), hidden_TH)[0])
    assert_close(gradients[0], gradients[1], **EXACT)
    assert_close(gradients[2], gradients[1], **EXACT)


def test_a_clipped_token_keeps_a_gradient_where_the_clipped_loss_is_a_constant() -> None:
    """Rows 1 and 5 of the sample are beyond the upper clip and the dual clip."""
    sample = make_sample()
    logprob_T = (sample.hidden_TH @ sample.weight_VH.T).log_softmax(-1)[torch.arange(ROWS), sample.labels_T]
    found = []
    for policy in ("ratio", "clipped_reinforce"):
        leaf_T = logprob_T.clone().requires_grad_()
        objective = build_objective(ObjectiveConfig(name="rpg", policy=policy, alpha=0.0), TOTAL)
        loss_T = objective.loss(token_terms(sample, leaf_T, None), CONTEXT).loss_T
        found.append(torch.autograd.grad(loss_T.sum(), leaf_T)[0][[1, 5]].tolist())
    assert found[0] == [0, 0] and found[1] == pytest.approx([-1.28 * 1.3, 10 * 0.4])


@pytest.mark.parametrize("name", ["opsd", "opcd", "sdpo"])
def test_methods_without_a_verifier_do_not_read_rewards(name: Any) -> None:
    sample = make_sample()
    objective = build_objective(ObjectiveConfig(name=name), TOTAL)
    terms = token_terms(sample, sample.old_logprob_T, torch.ones(ROWS, dtype=torch.float64))
    loss_T = objective.loss(terms, CONTEXT).loss_T
    assert torch.equal(objective.loss(replace(terms, advantage_T=-terms.advantage_T), CONTEXT).loss_T, loss_T)
    assert_close(loss_T, terms.gate_T)
    assert not objective.required_passes(CONTEXT).policy_loss


def test_opsd_by_clipped_ratio_leaves_tokens_alone_that_the_teacher_finds_less_likely() -> None:
    sample = make_sample(near_policy=False)
    gap_T = torch.tensor([0.5, -0.5, 30.0, 0.5], dtype=torch.float64).repeat(3)
    terms = replace(
        token_terms(sample, sample.old_logprob_T.clone().requires_grad_(), None),
        teacher_logprob_T=sample.old_logprob_T + gap_T,
    )
    config = ObjectiveConfig(name="opsd", distill_loss="clipped_ratio", gate=True, distill_average="gated")
    loss = build_objective(config, TOTAL).loss(terms, replace(CONTEXT, distill_scale=3.0))
    expected_T = -3.0 * terms.gate_T * gap_T.clamp(0, 20)
    assert_close(loss.loss_T, expected_T)
    assert_close(torch.autograd.grad(loss.loss_T.sum(), terms.logprob_T)[0], expected_T)
    advantage = loss.metrics["distill/token_advantage"]
    assert advantage.mask_T is not None
    assert advantage.values_T[advantage.mask_T].tolist() == pytest.approx([0.5, 0, 20, 0.5])
    with pytest.raises(ValueError, match="teacher's log-probs"):
        build_objective(config, TOTAL).loss(replace(terms, teacher_logprob_T=None), CONTEXT)


@pytest.mark.parametrize("name", ["opsd", "opcd", "sdpo"])
def test_a_micro_batch_without_a_teacher_still_has_a_graph(name: Any) -> None:
    """The schedule runs backward through it."""
    sample = make_sample()
    terms = token_terms(sample, sample.old_logprob_T.clone().requires_grad_(), None)
    closed = replace(terms, gate_T=0 * terms.gate_T, any_open_gate=False)
    loss_T = build_objective(ObjectiveConfig(name=name), TOTAL).loss(closed, CONTEXT).loss_T
    (gradient_T,) = torch.autograd.grad(loss_T.sum(), terms.logprob_T)
    assert not loss_T.any() and not gradient_T.any()


def test_the_ratio_of_a_regulariser_can_be_bounded() -> None:
    sample = make_sample()
    terms = token_terms(sample, sample.old_logprob_T + 3, torch.ones(ROWS, dtype=torch.float64))
    free, bound = (
        build_objective(ObjectiveConfig(name="sdpo", regularizer_ratio_bound=bound), TOTAL).loss(terms, CONTEXT).loss_T
        for bound in (None, 1.5)
    )
    assert_close(free, math.exp(3) * terms.gate_T)
    assert_close(bound, 1.5 * terms.gate_T)


@pytest.mark.parametrize(("ratio", "student"), [("rollout", "old_logprob_T"), ("current", "logprob_T")])
def test_rlsd_divides_the_teachers_probability_by_the_students_of_the_same_moment(ratio: Any, student: str) -> None:
    sample = make_sample()
    current_T = sample.old_logprob_T - 0.15
    terms = replace(
        token_terms(sample, current_T, None),
        gate_T=torch.ones(ROWS, dtype=torch.float64),
        teacher_logprob_T=sample.old_logprob_T - 0.05,
    )
    config = ObjectiveConfig(name="rlsd", credit_ratio=ratio, credit=1.0, credit_decay_steps=0)
    weight_T = build_objective(config, TOTAL).loss(terms, CONTEXT).metrics["credit/weight"].values_T
    scale_T = (terms.teacher_logprob_T - getattr(terms, student)) * sample.advantage_T.sign()  # type: ignore[operator]
    assert_close(weight_T, scale_T.exp(), **EXACT)


def test_rlsd_scales_only_what_the_teacher_read_and_says_so() -> None:
    """Ratios e and 1/e to a right and a wrong response; a third has a closed gate."""
    sample = make_sample(near_policy=False)
    gate_T = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64).repeat_interleave(4)
    gap_T = torch.tensor([1.0, -0.1], dtype=torch.float64).repeat(6)
    terms = replace(
        token_terms(sample, sample.old_logprob_T, None),
        gate_T=gate_T,
        teacher_logprob_T=sample.old_logprob_T + gap_T,
    )
    loss = build_objective(ObjectiveConfig(name="rlsd", credit_decay_steps=0), TOTAL).loss(terms, CONTEXT)
    right, wrong = [1.2, math.exp(-0.1)], [0.8, math.exp(0.1)]
    expected_T = 0.5 + 0.5 * torch.tensor([*2 * right, *2 * wrong, *4 * [1.0]], dtype=torch.float64)
    assert_close(loss.loss_T, -sample.advantage_T * expected_T)
    assert_close(loss.metrics["credit/weight"].values_T, expected_T)
    fraction = loss.metrics["credit/clip_fraction"]
    assert fraction.mask_T is not None
    assert fraction.values_T[fraction.mask_T].tolist() == [1, 0] * 4
    with pytest.raises(ValueError, match="teacher's log-probs"):
        build_objective(ObjectiveConfig(name="rlsd"), TOTAL).loss(replace(terms, teacher_logprob_T=None), CONTEXT)


@pytest.mark.parametrize(
    ("config", "step", "expected"),
    [
        (ObjectiveConfig(beta=0.1, alpha=0.1), 20, RequiredPasses(teacher=True, reference=True)),
        (ObjectiveConfig(beta=0.1, alpha=0.0), 20, RequiredPasses(teacher=True, reference=False)),
        (ObjectiveConfig(beta=0.1, alpha=0.0), 0, RequiredPasses(teacher=True, reference=False)),
        (ObjectiveConfig(beta=0.1, alpha=0.0), 39, RequiredPasses(teacher=False, reference=False)),
        (ObjectiveConfig(beta=0.0, alpha=0.1), 20, RequiredPasses(teacher=False, reference=True)),
        (ObjectiveConfig(name="grpo", alpha=0.0), 20, RequiredPasses()),
        (ObjectiveConfig(name="grpo", alpha=0.1), 20, RequiredPasses(reference=True)),
        (ObjectiveConfig(name="dapo"), 20, RequiredPasses()),
        (ObjectiveConfig(name="rpg"), 20, RequiredPasses(reference=True)),
        (ObjectiveConfig(name="rlsd"), 0, RequiredPasses(teacher_logprob=True)),
        (ObjectiveConfig(name="rlsd", credit_ratio="current"), 0, RequiredPasses(teacher=True)),
        (ObjectiveConfig(name="rlsd", credit_decay_steps=40), 39, RequiredPasses()),
        (ObjectiveConfig(name="opsd"), 0, RequiredPasses(teacher=True, policy_loss=False)),
        (
            ObjectiveConfig(name="opsd", distill_loss="clipped_ratio"),
            0,
            RequiredPasses(teacher_logprob=True, policy_loss=False),
        ),
        (ObjectiveConfig(name="opcd"), 39, RequiredPasses(teacher=True, policy_loss=False)),
        (ObjectiveConfig(name="sdpo", alpha=0.1), 0, RequiredPasses(teacher=True, reference=True, policy_loss=False)),
    ],
)
def test_needs_follow_the_weights(config: ObjectiveConfig, step: int, expected: RequiredPasses) -> None:
    objective = build_objective(config, TOTAL)
    context = StepContext(step, TOTAL)
    assert objective.required_passes(context) == expected
    # What is not needed is not read either.
    sample = make_sample()
    ones_T = torch.ones(ROWS, dtype=torch.float64)
    terms = token_terms(sample, sample.old_logprob_T, ones_T if expected.teacher else None)
    terms = replace(terms, teacher_logprob_T=ones_T if expected.privileged else None)
    if not expected.reference:
        terms = replace(terms, reference_logprob_T=None)
    assert objective.loss(terms, context).loss_T.isfinite().all()


def test_the_divergence_clip_bounds_what_is_learned_and_is_reported() -> None:
    """Rows 0..3 have the open gate; their gradients keep their direction, those beyond the bound at its size."""
    sample = make_sample(near_policy=False)
    size_T = torch.tensor([0.5, -0.5, 4.0, -8.0], dtype=torch.float64).repeat(3)
    divergence_T = size_T.clone().requires_grad_()
    terms = token_terms(sample, sample.old_logprob_T, divergence_T)
    ramps = {"beta_warmup_steps": 0, "beta_decay_steps": 0}
    loss = build_objective(ObjectiveConfig(beta=0.7, alpha=0.3, divergence_clip=2.0, **ramps), TOTAL).loss(
        terms, CONTEXT
    )
    bare = build_objective(ObjectiveConfig(beta=0.0, alpha=0.3), TOTAL).loss(terms, CONTEXT)
    expected = [0.5, -0.5, 2.0, -2.0, *8 * [0.0]]
    assert_close(loss.loss_T - bare.loss_T, 0.7 * torch.tensor(expected, dtype=torch.float64))
    (gradient_T,) = torch.autograd.grad(loss.loss_T.sum(), divergence_T)
    assert gradient_T.tolist() == pytest.approx([0.7, 0.7, 0.7 / 2, 0.7 / 4, *8 * [0.0]])
    fraction = loss.metrics["distill/clip_fraction"]
    assert fraction.mask_T is not None
    assert fraction.values_T[fraction.mask_T].tolist() == [0, 0, 1, 1]
    reported = loss.metrics["distill/kl"].values_T[fraction.mask_T]
    assert reported.tolist() == [0.5, -0.5, 4.0, -8.0]


def test_without_a_divergence_clip_nothing_is_bounded() -> None:
    sample = make_sample()
    terms = token_terms(sample, sample.old_logprob_T, torch.full((ROWS,), 1e3, dtype=torch.float64))
    ramps = {"beta_warmup_steps": 0, "beta_decay_steps": 0}
    free = build_objective(ObjectiveConfig(beta=0.7, alpha=0.3, **ramps), TOTAL).loss(terms, CONTEXT)
    assert free.loss_T[:4].min() > 0.7 * 900
    assert "distill/clip_fraction" not in free.metrics


def test_a_missing_pass_is_an_error_only_where_it_counts() -> None:
    sample = make_sample()
    terms = token_terms(sample, sample.old_logprob_T, None)
    objective = build_objective(ObjectiveConfig(beta=0.1, alpha=0.1), TOTAL)
    with pytest.raises(ValueError, match="divergence"):
        objective.loss(terms, CONTEXT)
    with pytest.raises(ValueError, match="reference"):
        objective.loss(replace(terms, reference_logprob_T=None), CONTEXT)
    closed = replace(terms, gate_T=torch.zeros_like(terms.gate_T), any_open_gate=False)
    assert objective.loss(closed, CONTEXT).loss_T.isfinite().all()


@pytest.mark.parametrize("name", ["sdpg", "rlsd", "opcd", "opsd", "sdpo"])
@pytest.mark.parametrize("distill_enabled", [False, True])
def test_no_objective_waits_for_the_device(name: Any, distill_enabled: bool) -> None:
    """It is called for each chunk of the head's rows, also where no gate of the micro-batch is open."""
    sample = make_sample()
    divergence_T = torch.ones(ROWS, dtype=torch.float64) if distill_enabled else None
    terms = replace(
        token_terms(sample, sample.old_logprob_T.clone().requires_grad_(), divergence_T),
        gate_T=sample.gate_T if distill_enabled else torch.zeros_like(sample.gate_T),
        teacher_logprob_T=divergence_T,
        any_open_gate=distill_enabled,
    )
    with Waits() as waits:
        loss_T = build_objective(ObjectiveConfig(name=name), TOTAL).loss(terms, CONTEXT).loss_T
        torch.autograd.grad(loss_T.sum(), terms.logprob_T)
    assert not waits.found


def test_metrics() -> None:
    sample = make_sample()
    logprob_T = (sample.hidden_TH @ sample.weight_VH.T).log_softmax(-1)[torch.arange(ROWS), sample.labels_T]
    divergence_T = torch.arange(ROWS, dtype=torch.float64).requires_grad_()
    terms = token_terms(sample, logprob_T.requires_grad_(), divergence_T)
    loss = build_objective(ObjectiveConfig(beta=0.7, alpha=0.3), TOTAL).loss(terms, CONTEXT)
    assert not any(metric.values_T.requires_grad for metric in loss.metrics.values())
    means = {
        name: float(metric.values_T[... if metric.mask_T is None else metric.mask_T].mean())
        for name, metric in loss.metrics.items()
    }
    rho_T = (logprob_T.detach() - sample.old_logprob_T).exp()
    r_T = logprob_T.detach() - sample.reference_logprob_T
    rises, falls = sample.advantage_T > 0, sample.advantage_T < 0
    assert means["policy/ratio"] == pytest.approx(float(rho_T.mean()))
    assert means["policy/clip_low_fraction"] == pytest.approx(int((falls & (rho_T < 0.8)).sum()) / ROWS)
    assert means["policy/clip_high_fraction"] == pytest.approx(int((rises & (rho_T > 1.28)).sum()) / ROWS)
    assert means["policy/dual_clip_fraction"] == pytest.approx(1 / ROWS)
    assert min(means["policy/clip_low_fraction"], means["policy/clip_high_fraction"]) > 0
    assert means["reference/kl"] == pytest.approx(float(((-r_T).exp() - 1 + r_T).mean()))
    assert means["reference/bounded_fraction"] == 0
    assert means["distill/kl"] == pytest.approx(1.5)  # rows 0..3 have the open gate
    assert means["distill/gate_rate"] == pytest.approx(1 / 3)
    assert means["distill/beta"] == pytest.approx(0.7 * DECAYED)


def test_inputs_come_back_unmodified() -> None:
    sample = make_sample()
    terms = token_terms(sample, sample.old_logprob_T.clone(), torch.ones(ROWS, dtype=torch.float64))
    build_objective(ObjectiveConfig(beta=0.7, alpha=0.3), TOTAL).loss(terms, CONTEXT)
    fresh = make_sample()
    assert torch.equal(terms.logprob_T, fresh.old_logprob_T)
    for name in ("advantage_T", "gate_T", "old_logprob_T", "reference_logprob_T"):
        assert torch.equal(getattr(terms, name), getattr(fresh, name)), name
