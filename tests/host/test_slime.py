"""The slime plugin: hooks called as slime calls them give the numbers of this package's own training step.

Each test runs with a small model of slime (tests/host/slime_model.py), and with slime's own modules where SDPG_SLIME
names a checkout.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from sdpg_megatron.errors import ConfigError, DataError
from tests.dist.test_step import config_of
from tests.host import slime_contract as contract
from tests.host.slime_reference import (
    OBJECTIVE,
    OLD,
    REFERENCE,
    built_model,
    disturb,
    made_logprobs,
    made_samples,
    own_training,
    whole_gradients,
)
from tests.pool import RankPool

SDPG = {"objective": OBJECTIVE, "columns": "valid"}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2_sp": (2, {"parallel.tensor": 2, "parallel.sequence": True}),
    "pp2": (2, {"parallel.pipeline": 2}),
    "vpp2": (2, {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2}),
    "cp2": (2, {"parallel.context": 2}),
    "dp2": (2, {}),
}


# --- slime's side


def slime_training(
    kind: str, folder: Path, layout: dict[str, Any], changes: dict[str, Any], *, optimize: bool = False
) -> list[dict[str, Any]] | None:
    """Reports and gradients of each step of a rollout, on rank 0. The weights change between the steps.

    Args:
        optimize: by Megatron's optimizer.
    """
    from sdpg_megatron.mcore.optimizer import build_optimizer
    from sdpg_megatron.plugins.slime import hooks

    hooks._TRAINER = hooks.SlimeTrainer()
    slime, args = contract.slime(kind), contract.arguments(folder, **{"sdpg": SDPG, **changes})
    chunks, arch, ranks = built_model(folder, layout, per_token=args.calculate_per_token_loss)
    optimizer = build_optimizer(chunks, config_of(folder, layout).optimizer) if optimize else None
    if args.overlap_param_gather:  # slime turns the hooks off for a rollout's first step
        for chunk in chunks:
            chunk.disable_forward_pre_hook(param_sync=False)
            chunk.start_param_sync = mock.Mock(wraps=chunk.start_param_sync)
    args.padded_vocab_size = arch.padded_vocab(ranks.tensor_size)
    sizes = {"dp_size": ranks.data_size, "cp_size": ranks.context_size, "vpp_size": len(chunks)}
    sizes |= {"microbatch_group_size_per_vp_stage": ranks.pipeline_size}
    data = slime.convert(args, made_samples(slime.sample, shared_rollout=args.global_batch_size == 7))
    data = contract.actor_data(slime, args, data, sizes, ranks.data)
    if ranks.on_last_stage:
        for key, seed in (("log_probs", OLD), ("ref_log_probs", REFERENCE)):
            lengths = zip(data["partition"], data["total_lengths"], data["response_lengths"], strict=True)
            data[key] = [slime.sliced(made_logprobs(i, seed), total, length) for i, total, length in lengths]
    slime.advantages(args, data)
    contract.load_function(args.rollout_data_postprocess_path)(args, 0, data)
    slime.logged(args, data)
    iterators = [slime.iterator(data, data["micro_batch_indices"]) for _ in chunks]
    found = []
    for step, (count, size) in enumerate(zip(data["num_microbatches"], data["global_batch_sizes"], strict=True)):
        if step == 1 and not optimize:
            disturb(chunks)
        report = slime_step(slime, args, step, chunks, iterators, count, size)
        gathered: list[Any] = [None] * ranks.world
        torch.distributed.all_gather_object(gathered, report)
        found.append({"report": next(filter(None, gathered)), "gradients": whole_gradients(chunks, arch, ranks)})
        if optimizer is not None:
            optimizer.step()
        if args.overlap_param_gather:
            chunk = chunks[0]
            found[-1]["gathered"] = mock.call(force_sync=True) in chunk.start_param_sync.mock_calls
            if step == 0:
                chunk.enable_forward_pre_hook()
    before_log_prob = contract.load_function(args.custom_megatron_before_log_prob_hook_path)
    before_log_prob(args, chunks, "")
    assert all("forward" not in vars(getattr(bare(chunk), "output_layer", bare(chunk))) for chunk in chunks)
    return found if ranks.is_main else None


def slime_step(
    slime: Any, args: Any, step: int, chunks: list[Any], iterators: list[Any], count: int, size: int
) -> dict[str, float]:
    """One training step as slime runs it; the report is empty but on the last stage."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    for chunk in chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    contract.load_function(args.custom_megatron_before_train_step_hook_path)(args, 0, step, chunks, None, None)

    def forward_step(iterator: Any, model: Any) -> tuple[torch.Tensor, Any]:
        batch = slime.get_batch(iterator, contract.TRAIN_KEYS, args.data_pad_size_multiplier, args.allgather_cp)
        return model(**model_inputs(batch)), functools.partial(slime.loss_function, args, batch, count, size)

    losses = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=count,
        seq_length=64,
        micro_batch_size=1,
        forward_only=False,
    )
    if not losses:
        return {}
    found: dict[str, float] = slime.reduced(losses, per_token=args.calculate_per_token_loss, batch_size=size)
    return found


def model_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    return {
        "input_ids": batch["tokens"],
        "position_ids": None,
        "attention_mask": None,
        "labels": None,
        "packed_seq_params": batch["packed_seq_params"],
        "loss_mask": batch["full_loss_masks"],
    }


def bare(chunk: Any) -> Any:
    from megatron.core.utils import unwrap_model

    return unwrap_model([chunk])[0]


# --- comparison

ONE_STEP = (tuple(range(8)),)
TWO_STEPS = ((0, 1, 2, 3), (4, 5, 6, 7))


@functools.cache
def expected(
    folder: Path,
    ranks: RankPool,
    layout: str = "one",
    per_token: bool = True,
    steps: tuple[tuple[int, ...], ...] = ONE_STEP,
    dtype: str = "float32",
    old_from_rollout: bool = False,
    **fields: Any,
) -> list[dict[str, Any]]:
    """`own_training` with these fields of `objective`.

    Tensor and context parallelism are compared with themselves: they add in another order, which is 2e-6 of a gradient.
    """
    world, overrides = LAYOUTS[layout] if layout in ("tp2_sp", "cp2") else LAYOUTS["one"]
    options = {"per_token": per_token, "steps": steps, "old_from_rollout": old_from_rollout}
    options["layout"] = {**overrides, "model.dtype": dtype}
    found: list[dict[str, Any]] = ranks.run(own_training, world, folder, {**OBJECTIVE, **fields}, **options)[0]
    return found


def assert_same(found: dict[str, Any], own: dict[str, Any]) -> None:
    """Equal to 1e-6; the loss relative to the sum of its terms' sizes, as they cancel."""
    assert found["report"]["loss"] == pytest.approx(own["report"]["loss"], rel=0, abs=1e-6 * own["size"])
    if "distill/kl" in own["report"]:
        assert found["report"]["distill/kl"] == pytest.approx(own["report"]["distill/kl"], rel=1e-6)
    assert found["gradients"].keys() == own["gradients"].keys()
    worst = {name: contract.relative(found["gradients"][name], own["gradients"][name]) for name in own["gradients"]}
    assert max(worst.values()) < 1e-6, {name: error for name, error in worst.items() if error >= 1e-6}


# --- tests of a training step


@contract.needs_slime
def test_slimes_calls_are_those_of_the_contract() -> None:
    """In the modules that cannot be imported, for want of Megatron-LM's training program."""
    folder = "slime/backends/megatron_utils"
    for path, name, call in (
        ("actor.py", "rollout_data_postprocess", "(self.args, rollout_id, rollout_data)"),
        ("model.py", "custom_before_log_prob_hook", "(args, model, store_prefix)"),
        (
            "model.py",
            "custom_before_train_step_hook",
            "(args, rollout_id, step_id, model, optimizer, opt_param_scheduler)",
        ),
        ("initialize.py", "custom_init", "(args)"),
    ):
        (found,) = contract.calls(f"{folder}/{path}", name)
        assert found.endswith(name + call)
    batches = contract.calls(f"{folder}/model.py", "get_batch")
    assert any(all(repr(key) in call for key in contract.TRAIN_KEYS) for call in batches)


@contract.with_contract
@pytest.mark.parametrize("per_token", [True, False], ids=["per_token", "per_rollout"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_numbers_are_those_of_this_packages_step(
    folder: Path, ranks: RankPool, kind: str, layout: str, per_token: bool
) -> None:
    world, overrides = LAYOUTS[layout]
    changes = {"calculate_per_token_loss": per_token}
    found = ranks.run(slime_training, world, kind, folder, overrides, changes)[0]
    (own,) = expected(folder, ranks, layout, per_token)
    assert_same(found[0], own)
    (alone,) = expected(folder, ranks, "one", per_token)
    for name, gradient in alone["gradients"].items():
        assert contract.relative(found[0]["gradients"][name], gradient) < 5e-6, name
    assert own["report"]["distill/kl"] > 1e-3
    assert all(gradient.abs().max() > 0 for gradient in own["gradients"].values())


@contract.with_contract
@pytest.mark.parametrize("teacher", ["current", "rollout"])
def test_the_teacher_of_a_rollouts_second_step(folder: Path, ranks: RankPool, kind: str, teacher: str) -> None:
    """Its weights are the current ones, or those before the first update."""
    objective = {**OBJECTIVE, "teacher": teacher}
    two = {"rollout_batch_size": 8, "global_batch_size": 4, "sdpg": {**SDPG, "objective": objective}}
    found = ranks.run(slime_training, 2, kind, folder, {"parallel.pipeline": 2}, two)[0]
    own = expected(folder, ranks, steps=TWO_STEPS, teacher=teacher)
    for step, own_step in zip(found, own, strict=True):
        assert_same(step, own_step)
    other = expected(folder, ranks, steps=TWO_STEPS, teacher="current" if teacher == "rollout" else "rollout")
    assert own[1]["report"]["distill/kl"] != pytest.approx(other[1]["report"]["distill/kl"], rel=1e-3)


@contract.with_contract
@pytest.mark.parametrize(
    ("layout", "fields"),
    [
        ("dp2", {"distill_average": "gated"}),
        ("cp2", {"correction": "mask", "correction_level": "sequence", "correction_bound": 1.2}),
        ("pp2", {"name": "rlsd", "alpha": 0.0, "beta": 0.0}),
        ("one", {"distill_stop_tokens": False}),
        ("cp2", {"name": "examples.objectives.gspo:GSPO", "clip_low": 0.9, "clip_high": 9.0}),
    ],
    ids=["gated", "correction", "rlsd", "stop_tokens", "gspo"],
)
def test_options_of_the_objective(
    folder: Path, ranks: RankPool, kind: str, layout: str, fields: dict[str, Any]
) -> None:
    world, overrides = LAYOUTS[layout]
    changes = {"sdpg": {**SDPG, "objective": {**OBJECTIVE, **fields}}}
    found = ranks.run(slime_training, world, kind, folder, overrides, changes)[0]
    (own,) = expected(folder, ranks, layout, **fields)
    assert_same(found[0], own)
    (plain,) = expected(folder, ranks)
    assert own["report"]["loss"] != pytest.approx(plain["report"]["loss"], rel=1e-3)


@contract.with_contract
def test_the_old_policy_may_be_the_rollouts(folder: Path, ranks: RankPool, kind: str) -> None:
    found = ranks.run(slime_training, 1, kind, folder, {}, {"use_rollout_logprobs": True})[0]
    (own,) = expected(folder, ranks, old_from_rollout=True)
    assert_same(found[0], own)
    (plain,) = expected(folder, ranks)
    assert own["report"]["loss"] != pytest.approx(plain["report"]["loss"], rel=1e-3)


@contract.with_contract
def test_sixteen_bits(folder: Path, ranks: RankPool, kind: str) -> None:
    """Megatron's wrapper returns the hidden states in float32."""
    found = ranks.run(slime_training, 1, kind, folder, {"model.dtype": "bfloat16"}, {})[0]
    (own,) = expected(folder, ranks, dtype="bfloat16")
    assert found[0]["report"]["distill/kl"] == pytest.approx(own["report"]["distill/kl"], rel=1e-2)
    for name, gradient in own["gradients"].items():
        assert contract.relative(found[0]["gradients"][name], gradient) < 2e-2, name


@contract.with_contract
def test_weights_that_megatron_gathers_late(folder: Path, ranks: RankPool, kind: str) -> None:
    """The teacher of a rollout's second step reads the updated weights."""
    two = {"rollout_batch_size": 8, "global_batch_size": 4}
    plain = {"optimizer.distributed": True}
    late = {**plain, "optimizer.overlap_grad_reduce": True, "optimizer.overlap_param_gather": True}
    first, second = ranks.run(slime_training, 2, kind, folder, plain, two, optimize=True)[0]
    overlap = {**two, "overlap_param_gather": True}
    found = ranks.run(slime_training, 2, kind, folder, late, overlap, optimize=True)[0]
    assert found[0]["report"] == pytest.approx(first["report"], rel=1e-5, abs=1e-7)
    assert found[1]["report"] == pytest.approx(second["report"], rel=1e-5, abs=1e-7)
    assert [step["gathered"] for step in found] == [False, True]  # at once, before any rank's passes
    unmoved = ranks.run(slime_training, 2, kind, folder, {}, two)[0]
    assert second["report"]["distill/kl"] != pytest.approx(unmoved[1]["report"]["distill/kl"], rel=1e-3)


# --- what else an actor does


def slime_log_probs(slime: Any, args: Any, chunks: list[Any], data: dict[str, Any]) -> list[torch.Tensor]:
    """slime's pass for log-probs, without a pipeline."""
    contract.load_function(args.custom_megatron_before_log_prob_hook_path)(args, chunks, "")
    iterator, found = slime.iterator(data, data["micro_batch_indices"]), []
    with torch.no_grad():
        for _ in data["micro_batch_indices"]:
            batch = slime.get_batch(iterator, contract.TRAIN_KEYS, args.data_pad_size_multiplier, False)
            found += slime.log_probs(args, chunks[0](**model_inputs(batch)), batch)
    return found


def slime_ratio(
    kind: str, folder: Path, layout: dict[str, Any], columns: str
) -> tuple[float, list[torch.Tensor], list[torch.Tensor]]:
    """Mean importance ratio to slime's own log-probs of the same weights, and these before and after the step."""
    from sdpg_megatron.plugins.slime import hooks

    hooks._TRAINER = hooks.SlimeTrainer()
    slime, args = contract.slime(kind), contract.arguments(folder, sdpg={**SDPG, "columns": columns}, num_rollout=1)
    chunks, arch, ranks = built_model(folder, layout, per_token=True)
    args.padded_vocab_size = arch.padded_vocab(ranks.tensor_size)
    sizes = {"dp_size": 1, "cp_size": 1, "vpp_size": 1, "microbatch_group_size_per_vp_stage": 1}
    data = contract.actor_data(slime, args, slime.convert(args, made_samples(slime.sample)), sizes, 0)
    before = data["log_probs"] = data["ref_log_probs"] = slime_log_probs(slime, args, chunks, data)
    slime.advantages(args, data)
    contract.load_function(args.rollout_data_postprocess_path)(args, 0, data)
    iterator = slime.iterator(data, data["micro_batch_indices"])
    report = slime_step(slime, args, 0, chunks, [iterator], len(data["micro_batch_indices"]), 7)
    return report["policy/ratio"], before, slime_log_probs(slime, args, chunks, data)


@contract.with_contract
@pytest.mark.parametrize("layout", ["one", "tp2_sp"])
def test_slimes_log_probs_count_padded_columns_and_the_default_too(
    folder: Path, ranks: RankPool, kind: str, layout: str
) -> None:
    world, overrides = LAYOUTS[layout]
    ratio, before, after = ranks.run(slime_ratio, world, kind, folder, overrides, "padded")[0]
    # The masked tokens count 0, and each sample at least one token.
    tokens = sum(max(1, n) for n in (4, 3, 4, 8, 2, 2, 0, 9))
    assert ratio == pytest.approx((tokens - 1) / tokens, rel=1e-6)
    for one, other in zip(before, after, strict=True):  # the output layer returns logits again
        torch.testing.assert_close(one, other)
    valid, *_ = ranks.run(slime_ratio, world, kind, folder, overrides, "valid")[0]
    assert valid > 1.05 * ratio


def slime_errors(folder: Path) -> dict[str, str]:
    """Messages for calls that are missing or do not fit, by name."""
    from megatron.core import parallel_state

    from sdpg_megatron.plugins.slime import hooks

    slime, args = contract.slime("model"), contract.arguments(folder, sdpg=SDPG)
    chunks, _, _ = built_model(folder, {}, per_token=True)
    sizes = {"dp_size": 1, "cp_size": 1, "vpp_size": 1, "microbatch_group_size_per_vp_stage": 1}

    def data(**changes: Any) -> dict[str, Any]:
        found = contract.actor_data(slime, args, slime.convert(args, made_samples(slime.sample)), sizes, 0)
        slime.advantages(args, found)
        return {**found, **changes}

    def said(function: Any, *given: Any) -> str:
        try:
            function(*given)
        except (ConfigError, DataError) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    def fresh() -> Any:
        hooks._TRAINER = hooks.SlimeTrainer()
        return hooks

    without = data()
    del without["prompt"]
    prompts = data()["prompt"]
    found = {
        "no convert": said(fresh().postprocess, args, 0, without),
        "steps": said(fresh().postprocess, args, 3, data(num_microbatches=[2, 2])),
        "images": said(fresh().postprocess, args, 0, data(multimodal_train_inputs=[{}])),
        "token": said(fresh().postprocess, args, 0, data(prompt=[np.array([384], np.int32), *prompts[1:]])),
        "no postprocess": said(fresh().before_train_step, args, 0, 0, chunks, None, None),
    }
    fresh()
    hooks.postprocess(args, 0, data())
    chunks[0].role = "critic"
    hooks.before_train_step(args, 0, 0, chunks, None, None)
    found["critic"] = "changed" if "forward" in vars(bare(chunks[0]).output_layer) else ""
    batch = {"unconcat_tokens": [torch.tensor([1])]}
    found["no step hook"] = said(hooks.loss, args, batch, torch.zeros(1, 4, 64), torch.sum)
    assert parallel_state.model_parallel_is_initialized()
    return found


def test_missing_calls_are_named(folder: Path, ranks: RankPool) -> None:
    (found,) = ranks.run(slime_errors, 1, folder)
    assert found.pop("critic") == ""
    for name, part in {
        "no convert": "ConfigError: --custom-convert-samples-to-train-data-path",
        "steps": "ConfigError: rollout 3: found '2 training steps', expected 1 steps",
        "images": "DataError: slime's samples: found multimodal_train_inputs",
        "token": "DataError: teacher prompt: found token id 384, expected ids below",
        "no postprocess": "ConfigError: --rollout-data-postprocess-path",
        "no step hook": "ConfigError: --custom-megatron-before-train-step-hook-path",
    }.items():
        assert found.pop(name).startswith(part)
    assert not found


def routing_stages(folder: Path) -> tuple[set[str], set[str]]:
    """Values of slime's variable in the teacher's pass and in the training pass."""
    from sdpg_megatron.plugins.slime import hooks

    hooks._TRAINER = hooks.SlimeTrainer()
    slime, args = contract.slime("model"), contract.arguments(folder, sdpg=SDPG)
    chunks, _, _ = built_model(folder, {}, per_token=True)
    sizes = {"dp_size": 1, "cp_size": 1, "vpp_size": 1, "microbatch_group_size_per_vp_stage": 1}
    data = contract.actor_data(slime, args, slime.convert(args, made_samples(slime.sample)), sizes, 0)
    data["log_probs"] = [made_logprobs(i, OLD) for i in data["partition"]]
    data["ref_log_probs"] = [made_logprobs(i, REFERENCE) for i in data["partition"]]
    slime.advantages(args, data)
    hooks.postprocess(args, 0, data)
    seen: dict[bool, set[str]] = {True: set(), False: set()}
    bare(chunks[0]).register_forward_pre_hook(
        lambda module, _: seen[module.training].add(os.environ[hooks.ROUTING_STAGE])
    )
    os.environ[hooks.ROUTING_STAGE] = "replay_backward"
    try:
        iterator = slime.iterator(data, data["micro_batch_indices"])
        slime_step(slime, args, 0, chunks, [iterator], len(data["micro_batch_indices"]), 7)
    finally:
        del os.environ[hooks.ROUTING_STAGE]
    return seen[False], seen[True]


def test_the_teachers_pass_replays_no_experts(folder: Path, ranks: RankPool) -> None:
    assert ranks.run(routing_stages, 1, folder) == [({"fallthrough"}, {"replay_backward"})]
