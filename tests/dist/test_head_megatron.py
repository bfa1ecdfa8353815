"""The head inside a Megatron model: what reaches the vocabulary matrix through megatron-core's own wrapper.

Models here are in float64, as are the wrapper's buffers, unless the test is about rounding. The twin is the same model
on one process without wrapper, schedule or head: dense logits and autograd.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from sdpg_megatron.config import RunConfig
from tests.dist.test_step import config_of, scored_groups
from tests.head_twin import Problem, dense, dense_terms, make_problem
from tests.pool import RankPool
from tests.tiny import write_tiny_model

CLOSE = {"rtol": 1e-9, "atol": 1e-13}


@dataclass(frozen=True)
class Variant:
    """How a step is run; what it computes must not depend on any of this."""

    world: int = 1
    tensor: int = 1
    pipeline: int = 1
    sequence: bool = False
    micro_batch_size: int = 8
    main_grad: bool = True
    schedule: str = "grad_in_forward"
    overlap: bool = False
    """Reduce each bucket of gradients while the backward pass goes on, and with the distributed optimizer gather each
    bucket of weights while the next forward pass does."""
    loss_scale: float = 1.0

    def config(self, folder: Path) -> RunConfig:
        return config_of(
            folder,
            {
                "parallel.tensor": self.tensor,
                "parallel.pipeline": self.pipeline,
                "parallel.sequence": self.sequence,
                "optimizer.micro_batch_size": self.micro_batch_size,
                "head.main_grad": self.main_grad,
                "head.schedule": self.schedule,
                "head.chunk_rows": 8,
                "objective.alpha": 0.0,
                "rollout.temperature": 0.7,
            },
        )


def step_batches(config: RunConfig, vocab: int, ranks: Any) -> list[Any]:
    from sdpg_megatron import objectives
    from sdpg_megatron.batching.collate import PackingLayout
    from sdpg_megatron.batching.micro_batches import Limit
    from sdpg_megatron.batching.samples import make_samples
    from sdpg_megatron.batching.step_batch import build_step

    distill_enabled = objectives.build_objective(config.objective, config.total_optimizer_steps).distill_enabled
    return build_step(
        make_samples(scored_groups(vocab), config.objective, distill_enabled=distill_enabled),
        regularized=True,
        limit=Limit.of(config),
        layout=PackingLayout.of(config, ranks),
        device=torch.device("cpu"),
    ).micro_batches


def build_model(config: RunConfig, ranks: Any, dtype: str) -> tuple[Any, list[Any]]:
    """Architecture, and chunks with the folder's weights."""
    from sdpg_megatron.architecture import read_architecture
    from sdpg_megatron.mcore.model import build_chunks, load_weights

    arch = read_architecture(config.model.path)
    chunks = build_chunks(arch, config.model.model_copy(update={"dtype": dtype}), config.parallel, ranks)
    load_weights(chunks, config.model.path, arch, ranks)
    return arch, chunks


def wrap(chunks: list[Any], layout: Variant, *, float32: bool, distributed: bool) -> list[Any]:
    """`float32`: buffers in that type, else in the weights'."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )

    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=float32,
        overlap_grad_reduce=layout.overlap,
        use_distributed_optimizer=distributed,
        overlap_param_gather=layout.overlap and distributed,
        bucket_size=10_000 if layout.overlap else None,  # several buckets in the smallest of models
    )
    wrapped = [DistributedDataParallel(chunk.config, ddp_config, chunk) for chunk in chunks]
    wrapped[0].config.finalize_model_grads_func = finalize_model_grads
    wrapped[0].config.no_sync_func = wrapped[0].no_sync
    if layout.loss_scale != 1:
        wrapped[0].config.grad_scale_func = lambda loss: loss * layout.loss_scale
    return wrapped


def exact_norm(norm: Any, hidden: Tensor) -> Tensor:
    """The model's own norm without its detour through float32, whose rounding would hide all else."""
    scale: Tensor = torch.rsqrt(hidden.square().mean(-1, keepdim=True) + norm.eps)
    return hidden * scale * norm.weight


in_float64 = mock.patch("sdpg_megatron.mcore.layers.RMSNorm.forward", exact_norm)


@in_float64
def gradients(folder: Path, layout: Variant) -> dict[str, Tensor]:
    """One step's gradients under Hugging Face names, on rank 0."""
    from sdpg_megatron import objectives
    from sdpg_megatron.mcore import parallel, passes
    from sdpg_megatron.mcore.forward_step import ForwardStep
    from sdpg_megatron.mcore.head import Head
    from sdpg_megatron.mcore.model import named_parameters, output_weight
    from sdpg_megatron.objectives.base import StepContext
    from sdpg_megatron.weights import WeightStream

    config = layout.config(folder)
    ranks = parallel.initialize(config.parallel, 0)
    arch, chunks = build_model(config, ranks, "float64")
    wrapped = wrap(chunks, layout, float32=False, distributed=False)
    batches = step_batches(config, arch.vocab_size, ranks)
    distill_enabled = passes.teacher_hidden(wrapped, batches)
    batches = [dataclasses.replace(b, teacher_hidden_GH=x) for b, x in zip(batches, distill_enabled, strict=True)]
    objective = objectives.build_objective(config.objective, config.total_optimizer_steps)
    head = Head.build(config, arch.vocab_size, ranks.tensor_group, wrapped)
    passes.run_schedule(wrapped, ForwardStep(objective, StepContext(0, 4), head), batches)
    if ranks.on_last_stage:
        assert output_weight(wrapped[-1]).grad_added_to_main_grad is layout.main_grad
    main = {name: parameter.main_grad for name, parameter in named_parameters(wrapped)}
    assert {tensor.dtype for tensor in main.values()} == {torch.float64}
    buckets = WeightStream(main, arch, tp_group=ranks.tensor_group, pp_group=ranks.pipeline_group)
    return {name: tensor / layout.loss_scale for bucket in buckets for name, tensor in bucket}


@in_float64
def twin_gradients(folder: Path) -> dict[str, Tensor]:
    """The same by dense logits and autograd, all samples in one batch, on a bare model."""
    from sdpg_megatron import objectives
    from sdpg_megatron.mcore import parallel
    from sdpg_megatron.mcore.forward_step import hidden_states, rows, token_terms
    from sdpg_megatron.mcore.model import named_parameters, output_weight
    from sdpg_megatron.objectives.base import StepContext
    from sdpg_megatron.weights import WeightStream

    config = Variant(micro_batch_size=64).config(folder)
    ranks = parallel.initialize(config.parallel, 0)
    arch, (model,) = build_model(config, ranks, "float64")
    (batch,) = step_batches(config, arch.vocab_size, ranks)
    with torch.no_grad():
        teacher_GH = rows(hidden_states(model, batch.teacher), batch.teacher)
    terms = dense_terms(
        Problem(
            hidden_TH=rows(hidden_states(model, batch.student), batch.student),
            weight_VH=output_weight(model),
            labels_T=batch.labels_T,
            teacher_GH=teacher_GH,
            rows_G=batch.gated_rows_G,
            valid=arch.vocab_size,
            upstream_3T=torch.empty(0),
            temperature=config.rollout.temperature,
        )
    )
    objective = objectives.build_objective(config.objective, config.total_optimizer_steps)
    loss_T = objective.loss(token_terms(batch, terms, slice(None)), StepContext(0, 4)).loss_T
    named = dict(named_parameters([model]))
    share = float(1.0 / torch.tensor(batch.num_tokens))  # as megatron-core has it: in float32
    found = torch.autograd.grad((loss_T * batch.weights_T).sum() * share, list(named.values()))
    buckets = WeightStream(
        dict(zip(named, found, strict=True)), arch, tp_group=ranks.tensor_group, pp_group=ranks.pipeline_group
    )
    return {name: tensor for bucket in buckets for name, tensor in bucket}


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tied = request.param == "tied"
    return write_tiny_model(tmp_path_factory.mktemp("llama"), "llama", tied=tied, seed=3, layers=2)


@pytest.fixture(scope="module")
def expected(model: Path, ranks: RankPool) -> dict[str, Tensor]:
    return ranks.run(twin_gradients, 1, model)[0]


LAYOUTS = {
    "one_micro_batch": Variant(micro_batch_size=64),
    "micro_batches": Variant(),
    "recompute": Variant(schedule="recompute"),
    "without_main_grad": Variant(main_grad=False),
    "scaled": Variant(loss_scale=1024.0),
    "scaled_recompute": Variant(loss_scale=1024.0, schedule="recompute"),
    "pp2": Variant(world=2, pipeline=2),
    "pp2_recompute": Variant(world=2, pipeline=2, schedule="recompute"),
    "pp2_scaled": Variant(world=2, pipeline=2, loss_scale=1024.0),
    "pp2_without_main_grad": Variant(world=2, pipeline=2, main_grad=False),
    "tp2": Variant(world=2, tensor=2),
    "tp2_sp": Variant(world=2, tensor=2, sequence=True),
    "tp2_pp2_sp": Variant(world=4, tensor=2, pipeline=2, sequence=True),
    "dp2": Variant(world=2),
    "dp2_overlap": Variant(world=2, overlap=True),
    "dp2_overlap_recompute": Variant(world=2, overlap=True, schedule="recompute"),
    "dp2_pp2_overlap": Variant(world=4, pipeline=2, overlap=True),
}


UNTIED = ("micro_batches", "pp2", "tp2_pp2_sp")
"""Layouts that are tried with an output matrix of its own as well."""
MODELS = [*(("tied", layout) for layout in LAYOUTS), *(("untied", layout) for layout in UNTIED)]
tied = pytest.mark.parametrize("model", ["tied"], indirect=True)


@pytest.mark.parametrize(("model", "layout"), MODELS, indirect=["model"])
def test_the_wrappers_buffers_hold_the_twins_gradient(
    model: Path, expected: dict[str, Tensor], ranks: RankPool, layout: str
) -> None:
    found = ranks.run(gradients, LAYOUTS[layout].world, model, LAYOUTS[layout])[0]
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(found[name], gradient, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("model", ["tied", "untied"], indirect=True)
def test_the_comparison_is_about_something(model: Path, expected: dict[str, Tensor]) -> None:
    """Tied, the matrix has gradients both of the head, in all rows, and of the embedding, in those of read tokens."""
    assert all(gradient.abs().max() > 1e-4 for gradient in expected.values())
    embedding_VH = expected["model.embed_tokens.weight"]
    tied = "lm_head.weight" not in expected
    head_VH = embedding_VH if tied else expected["lm_head.weight"]
    assert head_VH.abs().amax(1).min() > 0
    assert tied or embedding_VH.eq(0).all(1).any()


# --- the distributed optimizer, which hands a rank its own part of the gradients alone: compared by what is learned


def trained(folder: Path, layout: Variant) -> tuple[list[float], dict[str, Tensor]]:
    """Gradient norms of two updates, and the weights after them."""
    from sdpg_megatron import objectives
    from sdpg_megatron.architecture import read_architecture
    from sdpg_megatron.mcore import parallel
    from sdpg_megatron.mcore import policy_trainer as learning
    from sdpg_megatron.objectives.base import StepContext

    config = layout.config(folder)
    ranks = parallel.initialize(config.parallel, 0)
    objective = objectives.build_objective(config.objective, config.total_optimizer_steps)
    with mock.patch.object(
        learning, "wrap", lambda chunks, _: wrap(chunks, layout, float32=True, distributed=config.optimizer.distributed)
    ):
        policy_trainer = learning.PolicyTrainer(config, read_architecture(folder), objective, ranks)
    assert not layout.overlap or len(policy_trainer.chunks[0].bucket_groups) > 1
    batches = step_batches(config, policy_trainer.arch.vocab_size, ranks)
    steps = [policy_trainer.update(batches, StepContext(step, 4)) for step in range(2)]
    for chunk in policy_trainer.chunks:
        chunk.start_param_sync(force_sync=True)
    norms = [metrics["optimizer/grad_norm"].value for metrics in steps]
    return norms, {name: weight.clone() for name, weight in policy_trainer.named_weights().items()}


@tied
@pytest.mark.parametrize("schedule", ["grad_in_forward", "recompute"])
def test_a_distributed_optimizer_that_overlaps_learns_the_same(model: Path, ranks: RankPool, schedule: str) -> None:
    """Gradients reduced bucket by bucket during the backward pass, weights gathered so during the forward pass."""
    ((norms, weights),) = ranks.run(trained, 1, model, Variant(schedule=schedule, main_grad=False))
    for found_norms, found in ranks.run(trained, 2, model, Variant(world=2, schedule=schedule, overlap=True)):
        assert found_norms == pytest.approx(norms, rel=1e-5)
        for name, weight in weights.items():
            assert_close(found[name], weight, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


# --- bfloat16 weights


def bfloat16_gradient(folder: Path, layout: Variant) -> tuple[Tensor, Tensor]:
    """(float32 gradient of the output matrix from two backward passes, float64 gradient of the same numbers)."""
    from sdpg_megatron.head import TeacherRows
    from sdpg_megatron.mcore import parallel
    from sdpg_megatron.mcore.head import Head
    from sdpg_megatron.mcore.model import output_weight

    config = layout.config(folder)
    ranks = parallel.initialize(config.parallel, 0)
    arch, chunks = build_model(config, ranks, "bfloat16")
    (wrapped,) = wrap(chunks, layout, float32=True, distributed=False)
    weight_VH = output_weight(wrapped)
    expected_VH = torch.zeros(weight_VH.shape, dtype=torch.float64)
    head = Head.build(config, arch.vocab_size, ranks.tensor_group, [wrapped])
    for seed in range(2):
        random = make_problem(
            rows=40,
            columns=weight_VH.shape[0],
            valid=arch.vocab_size,
            hidden=arch.hidden_size,
            gated=20,
            seed=seed,
            temperature=config.rollout.temperature,
        )
        problem = dataclasses.replace(random.to(torch.bfloat16), weight_VH=weight_VH.detach())
        hidden_TH = problem.hidden_TH.clone().requires_grad_()
        teacher = TeacherRows(problem.teacher_GH, problem.rows_G)
        loss, _ = head.loss(wrapped, hidden_TH, problem.labels_T, teacher, problem.loss)
        (loss * layout.loss_scale).backward()
        expected_VH += layout.loss_scale * dense(problem).weight_grad_VH
    assert weight_VH.main_grad.dtype == torch.float32
    return weight_VH.main_grad.clone(), expected_VH


@tied
@pytest.mark.parametrize("schedule", ["grad_in_forward", "recompute"])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_a_gradient_of_bfloat16_weights_is_never_rounded_to_bfloat16(
    model: Path, ranks: RankPool, schedule: str, scale: float
) -> None:
    single = {"rtol": 2e-5, "atol": 2e-5 * scale}
    ((found_VH, expected_VH),) = ranks.run(bfloat16_gradient, 1, model, Variant(schedule=schedule, loss_scale=scale))
    assert_close(found_VH.double(), expected_VH, **single)
    assert not torch.allclose(expected_VH.bfloat16().double(), expected_VH, **single)
    # Through autograd it is, twice: which this comparison would have seen.
    through_autograd = Variant(schedule=schedule, loss_scale=scale, main_grad=False)
    ((rounded_VH, _),) = ranks.run(bfloat16_gradient, 1, model, through_autograd)
    assert not torch.allclose(rounded_VH.double(), expected_VH, **single)
    assert_close(rounded_VH.double(), expected_VH, rtol=2**-7, atol=2**-7 * scale)
