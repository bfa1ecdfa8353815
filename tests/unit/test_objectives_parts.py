"""The parts of the objectives: advantages, schedules, ratios, reference terms, aggregation."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from sdpg_megatron.config import ObjectiveConfig
from sdpg_megatron.objectives.advantages import group_advantages, sequence_weights
from sdpg_megatron.objectives.base import RequiredPasses, StepContext
from sdpg_megatron.objectives.distillation import BetaSchedule, clip
from sdpg_megatron.objectives.methods import METHODS, build_objective, passes_of_run
from sdpg_megatron.objectives.policy import bounded_exp, clipped_ratio
from sdpg_megatron.objectives.reference import reference_term, reference_value

AGGREGATIONS = ("token-mean", "group-token-mean", "sequence-mean")


def test_advantages_are_relative_to_the_group() -> None:
    assert group_advantages([1.0, 0.0, 0.0, 0.0]) == pytest.approx(
        [0.75 / (0.1875**0.5 + 1e-6)] + 3 * [-0.25 / (0.1875**0.5 + 1e-6)], rel=1e-14
    )
    assert group_advantages(torch.tensor([2.0, 4.0])) == pytest.approx([-1 / (1 + 1e-6), 1 / (1 + 1e-6)], rel=1e-14)


@pytest.mark.parametrize(
    ("deviation", "scale"), [("population", 0.1875**0.5 + 1e-6), ("sample", 0.25**0.5 + 1e-6), ("none", 1.0)]
)
def test_the_deviation_of_a_group_is_a_choice(deviation: Any, scale: float) -> None:
    expected = [0.75 / scale, *3 * [-0.25 / scale]]
    assert group_advantages([1.0, 0.0, 0.0, 0.0], deviation) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("deviation", ["population", "sample", "none"])
@pytest.mark.parametrize("reward", [0.0, 0.1, 1.0, -3.3])
def test_equal_rewards_open_no_gate(reward: float, deviation: Any) -> None:
    assert group_advantages([reward] * 7, deviation) == (0.0,) * 7


def test_beta_rises_and_falls_as_in_the_paper() -> None:
    schedule = BetaSchedule.build(2.0, None, None, 400)
    assert (schedule.warmup_steps, schedule.decay_steps) == (50, 350)
    expected = {1: 2 / 50, 25: 1, 50: 2, 225: 1, 399: 2 / 350, 400: 0, 401: 0}
    assert {k: schedule.at(k - 1) for k in expected} == pytest.approx(expected)


@pytest.mark.parametrize(
    ("warmup", "decay", "total", "expected"),
    [
        (None, None, 24, (3, 21)),
        (None, None, 1, (0, 1)),
        (None, 0, 40, (5, 0)),
        (None, 38, 40, (2, 38)),
        (0, None, 40, (0, 35)),
        (20, None, 40, (20, 20)),
        (7, 9, 40, (7, 9)),
    ],
)
def test_ramps_left_open_are_scaled_to_the_run(warmup: Any, decay: Any, total: int, expected: tuple[int, int]) -> None:
    schedule = BetaSchedule.build(1.0, warmup, decay, total)
    assert (schedule.warmup_steps, schedule.decay_steps) == expected


def test_zero_steps_turn_a_side_off() -> None:
    def betas(warmup: int, decay: int) -> list[float]:
        return [BetaSchedule(1.0, warmup, decay, 9).at(step) for step in (0, 1, 7, 8)]

    assert betas(0, 0) == [1.0, 1.0, 1.0, 1.0]
    assert betas(4, 0) == [0.25, 0.5, 1.0, 1.0]
    assert betas(0, 4) == [1.0, 1.0, 0.25, 0.0]


@pytest.mark.parametrize(
    ("mode", "weight"),
    [
        ("urkl", lambda r: r),
        ("ufkl", lambda r: 1 - torch.exp(-r)),
        ("fkl", lambda r: -torch.exp(-r)),
        ("rkl", lambda r: r + 1),
    ],
)
def test_reference_values_have_the_stated_gradient_weights(mode: Any, weight: Any) -> None:
    r_T = torch.linspace(-19.9, 25, 41, dtype=torch.float64, requires_grad=True)
    (gradient_T,) = torch.autograd.grad(reference_value(mode, r_T).sum(), r_T)
    assert_close(gradient_T, weight(r_T.detach()), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("mode", ["urkl", "ufkl", "fkl", "rkl"])
def test_far_from_the_reference_gradients_stay_finite_and_the_bound_is_reported(mode: Any) -> None:
    logprob_T = torch.tensor([-300.0, -0.1, -21.0, -1.0], requires_grad=True)
    term = reference_term(mode, logprob_T, torch.tensor([-0.1, -300.0, -0.5, -1.0]))
    (gradient_T,) = torch.autograd.grad(term.loss_T.sum(), logprob_T)
    assert gradient_T.isfinite().all() and term.loss_T.isfinite().all()
    assert gradient_T[0] < 0, "a token that became too rare must still be pulled back"
    assert term.metrics["reference/bounded_fraction"].values_T.tolist() == [1.0, 0.0, 1.0, 0.0]
    assert term.metrics["reference/kl"].values_T.min() >= 0


def test_bounded_exp_goes_on_along_its_tangent() -> None:
    x_T = torch.tensor([-900.0, 0.0, 19.0, 20.0, 21.0, 500.0], dtype=torch.float64, requires_grad=True)
    y_T = bounded_exp(x_T)
    (slope_T,) = torch.autograd.grad(y_T.sum(), x_T)
    edge = torch.tensor(20.0, dtype=torch.float64).exp()
    assert_close(y_T.detach()[:4], x_T.detach()[:4].exp(), rtol=1e-15, atol=0)
    assert_close(y_T.detach()[4:], torch.stack((2 * edge, 481 * edge)), rtol=1e-15, atol=0)
    assert_close(slope_T, torch.cat((x_T.detach()[:4].exp(), edge.expand(2))), rtol=1e-15, atol=0)


def test_ratio_loss_does_not_overflow_without_a_dual_clip() -> None:
    logprob_T = torch.tensor([-0.1, -0.1, -400.0], requires_grad=True)
    loss = clipped_ratio(
        logprob_T,
        torch.tensor([-400.0, -400.0, -0.1]),
        torch.tensor([1.0, -1.0, -1.0]),
        clip_low=0.2,
        clip_high=0.28,
        dual_clip=None,
    )
    (gradient_T,) = torch.autograd.grad(loss.loss_T.sum(), logprob_T)
    assert loss.loss_T.isfinite().all() and gradient_T.isfinite().all()
    assert gradient_T[0] == 0 and gradient_T[1] > 0 and gradient_T[2] == 0
    assert loss.metrics["policy/ratio_bounded_fraction"].values_T.tolist() == [1.0, 1.0, 0.0]


def test_a_clipped_divergence_keeps_the_sign_and_direction_of_its_gradient() -> None:
    """Value bound * sign; gradient bound / size. Inside the bound, and at 0, nothing is changed."""
    divergence_T = torch.tensor([0.0, 1.5, -1.5, 2.0, -2.0, 8.0, -8.0, 1e30, -1e30], dtype=torch.float64)
    leaf_T = divergence_T.clone().requires_grad_()
    clipped_T = clip(leaf_T, 2.0)
    (gradient_T,) = torch.autograd.grad(clipped_T.sum(), leaf_T)
    assert_close(clipped_T.detach(), divergence_T.clamp(-2, 2), rtol=1e-15, atol=0)
    expected_T = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.25, 0.25, 2e-30, 2e-30], dtype=torch.float64)
    assert_close(gradient_T, expected_T, rtol=1e-15, atol=0)
    assert torch.equal(leaf_T.detach(), divergence_T)


def test_a_clipped_divergence_pulls_where_the_free_one_does() -> None:
    """Through what the divergence is made of: one direction, a smaller step; a plain clamp gives no step."""
    logits_V = torch.tensor([3.0, -2.0, 0.5], dtype=torch.float64, requires_grad=True)
    logq_V = torch.tensor([-30.0, -0.1, -5.0], dtype=torch.float64)

    def divergence() -> torch.Tensor:
        logp_V = logits_V.log_softmax(0)
        return (logp_V.exp() * (logp_V - logq_V)).sum()[None]

    (free_V,) = torch.autograd.grad(divergence().sum(), logits_V)
    (clipped_V,) = torch.autograd.grad(clip(divergence(), 4.0).sum(), logits_V)
    size = float(divergence().detach())
    assert_close(clipped_V, free_V * 4 / size, rtol=1e-13, atol=0)
    assert size > 20 and clipped_V.abs().min() > 0


def test_aggregations_are_the_means_they_are_named_after() -> None:
    lengths, groups = [2, 5, 1, 4], ["a", "a", "b", "b"]
    generator = torch.Generator().manual_seed(0)
    losses = [torch.randn(n, generator=generator, dtype=torch.float64) for n in lengths]
    flat = torch.cat(losses)
    expected = {
        "token-mean": flat.mean(),
        "sequence-mean": torch.stack([loss.mean() for loss in losses]).mean(),
        "group-token-mean": (torch.cat(losses[:2]).mean() + torch.cat(losses[2:]).mean()) / 2,
    }
    for aggregation in AGGREGATIONS:
        weights = sequence_weights(lengths, groups, aggregation)
        # Any split of the sequences into micro-batches adds up to the same: each token keeps its weight.
        for split in ([4], [1, 3], [2, 2], [1, 1, 1, 1]):
            parts, first = [], 0
            for size in split:
                batch = range(first, first + size)
                parts.append(sum((weights[i] * losses[i].sum() for i in batch), torch.zeros(())))
                first += size
            assert_close(torch.stack(parts).sum() / sum(lengths), expected[aggregation], rtol=1e-14, atol=1e-14)


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 3)), min_size=1),
    st.sampled_from(AGGREGATIONS),
    st.randoms(),
)
def test_weights_sum_to_the_number_of_tokens_in_any_order(pairs: Any, aggregation: Any, random: Any) -> None:
    lengths, groups = zip(*pairs, strict=True)
    weights = sequence_weights(lengths, groups, aggregation)
    assert sum(w * n for w, n in zip(weights, lengths, strict=True)) == pytest.approx(sum(lengths))
    order = list(range(len(pairs)))
    random.shuffle(order)
    shuffled = sequence_weights([lengths[i] for i in order], [groups[i] for i in order], aggregation)
    assert shuffled == tuple(weights[i] for i in order)


@given(
    name=st.sampled_from(list(METHODS)),
    total=st.integers(1, 40),
    warmup=st.none() | st.integers(0, 40),
    decay=st.none() | st.integers(0, 40),
    fields=st.fixed_dictionaries(
        {},
        optional={"alpha": st.just(0.1), "credit_decay_steps": st.integers(0, 40), "entropy_coefficient": st.just(0.1)},
    ),
)
def test_a_few_steps_say_what_a_whole_run_needs(
    name: str, total: int, warmup: int | None, decay: int | None, fields: dict[str, Any]
) -> None:
    ramps = {"beta_warmup_steps": warmup, "beta_decay_steps": decay}
    objective = build_objective(ObjectiveConfig(name=name, **ramps, **fields), total)
    required_passes = [objective.required_passes(StepContext(step, total)) for step in range(total)]
    names = [field.name for field in dataclasses.fields(RequiredPasses)]
    assert passes_of_run(objective, total) == RequiredPasses(
        **{n: any(getattr(one, n) for one in required_passes) for n in names}
    )


def test_what_a_run_needs_does_not_take_longer_for_a_longer_run() -> None:
    class Counting:
        calls = 0

        def required_passes(self, context: StepContext) -> RequiredPasses:
            self.calls += 1
            return RequiredPasses()

    objective: Any = Counting()
    passes_of_run(objective, 10**9)
    assert objective.calls <= 4
