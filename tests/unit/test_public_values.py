"""Values and gradients of public code on one small batch: tests/fixtures/README.md says which code computed what.

Shapes: T response tokens, V columns.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from sdpg_megatron.config import ObjectiveConfig
from sdpg_megatron.head import (
    Divergence,
    HeadOptions,
    HeadTerms,
    JensenShannon,
    ReverseKL,
    TopK,
    VocabShard,
    logits_terms,
)
from sdpg_megatron.objectives import build_objective
from sdpg_megatron.objectives.advantages import group_advantages, sequence_weights
from sdpg_megatron.objectives.base import StepContext, TokenTerms

PUBLIC: dict[str, Any] = json.loads((Path(__file__).parents[1] / "fixtures" / "public_values.json").read_text())
PRECISION = 6e-13
"""The values have 12 decimals."""
ROUNDED = {"rtol": 0, "atol": PRECISION}
MASK_T = torch.tensor(PUBLIC["mask"], dtype=torch.bool).flatten()
LENGTHS = [sum(row) for row in PUBLIC["mask"]]
VOCAB = VocabShard(0, 5, None)
DIVERGENCES: dict[str, Divergence] = {
    "kl": ReverseKL(),
    "jsd_0.5": JensenShannon(0.5),
    "jsd_0.3": JensenShannon(0.3),
    "top2_tail_alpha0.5": TopK(2, JensenShannon(0.5)),
    "top2_tail_alpha1.0": TopK(2, ReverseKL()),
}
BOTH_TERMS = {"beta": PUBLIC["beta"], "alpha": PUBLIC["alpha"], "beta_warmup_steps": 0, "beta_decay_steps": 0}
CLIP = dict(zip(("clip_low", "clip_high", "dual_clip"), PUBLIC["clip"], strict=True))


def tokens(key: str) -> Tensor:
    """A per-token entry of the batch without its masked positions, float64 [T] or [T, V]."""
    values = torch.tensor(PUBLIC[key], dtype=torch.float64)
    return values.flatten(0, 1)[MASK_T] if values.dim() > 1 else values[MASK_T]


def head(logits_TV: Tensor, rows_G: Tensor, divergence: Divergence) -> HeadTerms:
    labels_T, options = tokens("y").long(), HeadOptions(divergence=divergence)
    return logits_terms(
        logits_TV, labels_T, vocab=VOCAB, teacher_GV=tokens("u")[rows_G], rows_G=rows_G, options=options
    )


def loss(logits_TV: Tensor, config: ObjectiveConfig, step: int, *, on_policy: bool = False) -> tuple[Tensor, Tensor]:
    """Loss of each token, [T], and their token mean."""
    advantage_T = torch.tensor(PUBLIC["A"], dtype=torch.float64).repeat_interleave(torch.tensor(LENGTHS))
    gate_T = (advantage_T > 0 if config.gate else advantage_T != 0).double()
    found = head(logits_TV, gate_T.nonzero()[:, 0], ReverseKL())
    terms = TokenTerms(
        logprob_T=found.logprob_T,
        divergence_T=found.divergence_T,
        old_logprob_T=found.logprob_T.detach() if on_policy else tokens("old"),
        reference_logprob_T=tokens("ref"),
        advantage_T=advantage_T,
        gate_T=gate_T,
        teacher_logprob_T=found.teacher_logprob_T,
    )
    loss_T = build_objective(config, 400).loss(terms, StepContext(step, 400)).loss_T
    weights = torch.tensor(sequence_weights(LENGTHS, range(len(LENGTHS)), "token-mean"), dtype=torch.float64)
    weight_T = weights.repeat_interleave(torch.tensor(LENGTHS))
    return loss_T, (weight_T * loss_T).sum() / sum(LENGTHS)


def agrees(key: str, config: ObjectiveConfig, step: int, *, on_policy: bool = False) -> None:
    public = PUBLIC[key]
    logits_TV = tokens("z").requires_grad_()
    loss_T, mean = loss(logits_TV, config, step, on_policy=on_policy)
    (gradient_TV,) = torch.autograd.grad(mean, logits_TV)
    assert_close(loss_T.detach(), torch.tensor(public["token"], dtype=torch.float64)[MASK_T], **ROUNDED)
    assert float(mean) == pytest.approx(public["loss"], rel=0, abs=PRECISION)
    assert float(gradient_TV.norm()) == pytest.approx(public["grad_norm"], rel=0, abs=PRECISION)
    if "grad_row0" in public:
        assert_close(gradient_TV[0], torch.tensor(public["grad_row0"], dtype=torch.float64), **ROUNDED)


@pytest.mark.parametrize("key", ["logp", "entropy"])
def test_log_probs_and_entropies_are_those_of_public_code(key: str) -> None:
    found = head(tokens("z"), torch.arange(sum(LENGTHS)), ReverseKL())
    assert_close({"logp": found.logprob_T, "entropy": found.entropy_T}[key], tokens(key), **ROUNDED)


@pytest.mark.parametrize("key", DIVERGENCES)
def test_divergences_are_those_of_public_code(key: str) -> None:
    found = head(tokens("z"), torch.arange(sum(LENGTHS)), DIVERGENCES[key])
    assert found.divergence_T is not None
    assert_close(found.divergence_T, tokens(key), **ROUNDED)


@pytest.mark.parametrize("reference", ["urkl", "ufkl", "fkl", "rkl"])
def test_sdpg_is_that_of_public_code(reference: Any) -> None:
    """Two mini-batches' worth of ratio, one of them beyond the dual clip; the regularizers are not weighted by it."""
    config = ObjectiveConfig(reference=reference, ratio_weighted_regularizers=False, **CLIP, **BOTH_TERMS)
    agrees(f"sdpg_{reference}", config, step=0)


def test_rlsd_is_that_of_public_code() -> None:
    """By its defaults, at the tenth step."""
    agrees("rlsd_step10_on_policy", ObjectiveConfig(name="rlsd"), step=9, on_policy=True)


def test_advantages_are_those_of_public_code_by_the_sample_deviation() -> None:
    rewards = [1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    public = PUBLIC["public_advantage_3of8"]
    assert group_advantages(rewards, "sample") == pytest.approx(public, rel=0, abs=PRECISION)
    assert group_advantages(rewards) != pytest.approx(public, rel=1e-2)


def test_every_row_is_compared() -> None:
    """The fixture has what its README lists, and each of its results stands in a test above."""
    given = {"z", "u", "y", "mask", "old", "ref", "A", "clip", "beta", "alpha", "public_advantage_2of8_note"}
    terms = {"logp", "entropy", "rlsd_step10_on_policy", "public_advantage_3of8"}
    methods = {f"sdpg_{reference}" for reference in ("urkl", "ufkl", "fkl", "rkl")}
    assert PUBLIC.keys() == given | terms | methods | DIVERGENCES.keys()
