"""The difference of trainer and rollout engine: what is reported, and what it does to the loss."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from sdpg_megatron.config import ObjectiveConfig
from sdpg_megatron.objectives.mismatch import correction, effective_sample_size, mismatch
from sdpg_megatron.observe.metrics import Metric, Reduction, merge

LOG_WEIGHT_T = torch.tensor([0.0, 0.5, -0.5, 1.0, -1.0, 3.0])
ROLLOUT_T = torch.tensor([-1.0, -2.0, -0.1, -3.0, -0.5, -4.0])
SEQUENCE_T = torch.tensor([0, 0, 0, 2, 2, 3])


def corrected(old_T: Tensor, rollout_T: Tensor, sequence_T: Tensor, config: ObjectiveConfig) -> Tensor:
    return correction(old_T, rollout_T, config, sequence_T=sequence_T, sequences=4)


def weights(**config: Any) -> Tensor:
    return corrected(ROLLOUT_T + LOG_WEIGHT_T, ROLLOUT_T, SEQUENCE_T, ObjectiveConfig(**config))


def test_truncation_bounds_the_weight_above_alone() -> None:
    found_T = weights(correction="truncate", correction_bound=2.0)
    assert_close(found_T, LOG_WEIGHT_T.exp().clamp(max=2.0))
    assert found_T[4] == pytest.approx(math.exp(-1))


def test_a_mask_leaves_out_what_lies_outside_the_bound_or_its_inverse() -> None:
    found_T = weights(correction="mask", correction_bound=2.0)
    assert_close(found_T, torch.tensor([1.0, math.exp(0.5), math.exp(-0.5), 0.0, 0.0, 0.0]))


def test_a_sequence_has_the_geometric_mean_of_its_tokens_weights() -> None:
    found_T = weights(correction="truncate", correction_level="sequence", correction_bound=100.0)
    assert_close(found_T, torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, math.exp(3.0)]))
    masked_T = weights(correction="mask", correction_level="sequence", correction_bound=2.0)
    assert_close(masked_T, torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.0]))


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_no_tokens_have_no_weights(level: str) -> None:
    none_T = torch.zeros(0)
    config = ObjectiveConfig(correction="mask", correction_level=level)  # type: ignore[arg-type]
    assert corrected(none_T, none_T, torch.zeros(0, dtype=torch.int64), config).shape == (0,)


def test_a_weight_beyond_float32_stays_finite() -> None:
    config = ObjectiveConfig(correction="truncate", correction_bound=1e30)
    far_T = torch.tensor([200.0])
    assert corrected(far_T, torch.zeros(1), torch.zeros(1, dtype=torch.int64), config).isfinite().all()


def test_what_is_reported() -> None:
    found = mismatch(ROLLOUT_T + LOG_WEIGHT_T, ROLLOUT_T)
    means = {name: float(metric.values_T.mean()) for name, metric in found.items()}
    assert means["rollout/logprob_diff_mean"] == pytest.approx(1.0)
    assert found["rollout/logprob_diff_max"].reduction is Reduction.MAX
    expected_T = LOG_WEIGHT_T.exp() - 1 - LOG_WEIGHT_T
    assert_close(found["rollout/kl"].values_T, expected_T, rtol=1e-5, atol=1e-6)
    assert found["rollout/kl"].values_T.min() >= 0


def test_the_effective_sample_size_is_of_all_parts_together() -> None:
    """Of two micro-batches of other sizes as of one."""
    parts = [
        {name: Metric(float(m.values_T.mean()), m.reduction, float(m.values_T.numel())) for name, m in found.items()}
        for found in (
            mismatch(ROLLOUT_T[:2] + LOG_WEIGHT_T[:2], ROLLOUT_T[:2]),
            mismatch(ROLLOUT_T[2:] + LOG_WEIGHT_T[2:], ROLLOUT_T[2:]),
        )
    ]
    weight_T = LOG_WEIGHT_T.exp()
    expected = float(weight_T.sum() ** 2 / (weight_T.numel() * weight_T.square().sum()))
    assert effective_sample_size(merge(parts))["rollout/effective_sample_size"].value == pytest.approx(expected)
    assert expected < 0.5
    same = mismatch(ROLLOUT_T, ROLLOUT_T)
    alike = {n: Metric(float(m.values_T.mean()), m.reduction, 6.0) for n, m in same.items()}
    assert effective_sample_size(alike)["rollout/effective_sample_size"].value == 1


def test_no_effective_sample_size_of_nothing() -> None:
    assert effective_sample_size({}) == {}
    empty = {n: Metric(0.0, m.reduction, 0.0) for n, m in mismatch(torch.zeros(0), torch.zeros(0)).items()}
    assert effective_sample_size(empty) == {}
