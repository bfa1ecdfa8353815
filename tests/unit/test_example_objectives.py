"""Objectives from outside the package: the examples against plain formulas, and errors of classes that do not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sdpg_megatron import ObjectiveConfig, StepContext, TokenLoss, TokenTerms, build_objective, load_config
from sdpg_megatron.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
CONTEXT = StepContext(0, 10)
SEQUENCE_T = torch.tensor([0, 0, 0, 1, 1, 2])
ADVANTAGE_Q = torch.tensor([1.0, -0.5, 0.25], dtype=torch.float64)


@pytest.fixture(autouse=True)
def _root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT)


def terms(seed: int = 0, spread: float = 0.5) -> TokenTerms:
    generator = torch.Generator().manual_seed(seed)
    old_T = -torch.rand(6, generator=generator, dtype=torch.float64) - 0.1
    now_T = (old_T + spread * torch.randn(6, generator=generator, dtype=torch.float64)).requires_grad_()
    return TokenTerms(
        logprob_T=now_T, divergence_T=None, old_logprob_T=old_T, reference_logprob_T=None,
        advantage_T=ADVANTAGE_Q[SEQUENCE_T], gate_T=torch.zeros(6, dtype=torch.float64),
        sequence_T=SEQUENCE_T, num_sequences=3,
    )  # fmt: skip


def objective(name: str, **fields: Any) -> Any:
    return build_objective(ObjectiveConfig(name=f"examples.objectives.{name}", **fields), 10)


def gradient(loss: TokenLoss, given: TokenTerms, weights_T: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad((loss.loss_T * weights_T).sum(), given.logprob_T)[0]


def test_cispo_keeps_the_gradient_of_clipped_tokens() -> None:
    given = terms(spread=2.0)
    found = gradient(objective("cispo:CISPO", options={"max_ratio": 1.5}).loss(given, CONTEXT), given, torch.ones(6))
    ratio_T = (given.logprob_T - given.old_logprob_T).exp().detach()
    assert (ratio_T > 1.5).any()
    torch.testing.assert_close(found, -ratio_T.clamp(max=1.5) * given.advantage_T)


def test_gspo_is_the_clipped_ratio_of_whole_responses() -> None:
    given, fields = terms(), {"clip_low": 0.2, "clip_high": 0.3}
    lengths_Q = torch.bincount(SEQUENCE_T)
    found = gradient(objective("gspo:GSPO", **fields).loss(given, CONTEXT), given, 1 / lengths_Q[SEQUENCE_T])
    log_ratio_Q = torch.zeros(3, dtype=torch.float64).index_add_(0, SEQUENCE_T, given.logprob_T - given.old_logprob_T)
    ratio_Q = (log_ratio_Q / lengths_Q).exp()
    clipped_Q = ratio_Q.clamp(0.8, 1.3)
    loss = torch.maximum(-ratio_Q * ADVANTAGE_Q, -clipped_Q * ADVANTAGE_Q).sum()
    torch.testing.assert_close(found, torch.autograd.grad(loss, given.logprob_T)[0])
    assert (clipped_Q != ratio_Q).any() and (clipped_Q == ratio_Q).any()


def test_gspo_needs_sequence_ids_and_all_tokens_at_once() -> None:
    gspo = objective("gspo:GSPO")
    assert gspo.reads_sequences and (gspo.config.clip_high, gspo.config.aggregation) == (4e-4, "sequence-mean")
    with pytest.raises(ValueError, match="sequence_T"):
        gspo.loss(replace(terms(), sequence_T=None), CONTEXT)


def test_leave_one_out_compares_with_the_other_responses() -> None:
    rloo = objective("leave_one_out:LeaveOneOut")
    assert rloo.advantages((1.0, 0.0, 0.0, 1.0)) == pytest.approx((2 / 3, -2 / 3, -2 / 3, 2 / 3))
    assert rloo.advantages((0.1,) * 7) == (0.0,) * 7
    assert rloo.required_passes(CONTEXT).teacher and rloo.distill_enabled(0.5)


def test_a_field_that_is_set_wins_over_the_class(tmp_path: Path) -> None:
    text = f"run_dir: {tmp_path}\nsteps: 20\nmodel: {{path: m}}\ndata: {{train: [t.jsonl]}}\n"
    (tmp_path / "run.yaml").write_text(text)
    overrides = [
        "objective.name=examples.objectives.cispo:CISPO",
        "objective.alpha=0.1",
        "objective.options.max_ratio=4",
    ]
    config = load_config(tmp_path / "run.yaml", overrides).objective
    assert (config.alpha, config.beta, config.options) == (0.1, 0.0, {"max_ratio": 4})


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"name": "examples.objectives.cispo:CISPOO"}, r"objective\.name: .*did you mean 'CISPO'"),
        ({"name": "examples.objectives.none:X"}, r"objective\.name: .*a module that imports"),
        ({"name": "examples.objectives.cispo:CISPO", "options": {"max_ration": 2}}, r"did you mean 'max_ratio'"),
        ({"name": "collections:Counter"}, r"objective\.name: .*a subclass of sdpg_megatron\.Objective"),
    ],
)
def test_a_class_that_does_not_fit_is_refused(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        build_objective(ObjectiveConfig(**fields), 10)
