"""Run the methods of verl's engine on CPUs, on one tiny Qwen3, and write what came of them.

    torchrun ... -m tests.host.verl_cpu <model folder> <output folder> <layout> <check> ...

verl builds models with Megatron-Bridge, which needs a GPU. Here its registry makes the engine, and its constructor
runs, but the model is this package's: `make_engine` replaces ``initialize``.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import json
import os
import random
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["VERL_USE_EXTERNAL_MODULES"] = "sdpg_megatron.plugins.verl"
os.environ["VERL_ENGINE_VENDOR"] = "sdpg"

import torch
import torch.distributed as dist
import yaml

from sdpg_megatron import errors
from sdpg_megatron.architecture import read_architecture
from sdpg_megatron.config import ModelConfig, OptimizerConfig, ParallelConfig
from sdpg_megatron.mcore import parallel, passes
from sdpg_megatron.mcore.forward_step import ForwardStep, read_reports
from sdpg_megatron.mcore.head import Head
from sdpg_megatron.mcore.model import build_chunks, load_weights, named_parameters
from sdpg_megatron.mcore.optimizer import wrap
from sdpg_megatron.objectives import StepContext, build_objective
from sdpg_megatron.observe.metrics import merge
from tests.host.verl_batches import TEMPERATURE, batch_of, drawn_rows, padded_batch

LAYOUTS: dict[str, dict[str, Any]] = {
    "single": {},
    "tensor": {"tensor": 2, "sequence": True},
    "pipeline": {"pipeline": 2},
    "virtual": {"pipeline": 2, "virtual_pipeline": 2},
    "context": {"context": 2},
    "data": {},
}
SDPG = {"alpha": 0.3, "beta": 0.7, "beta_warmup_steps": 0, "beta_decay_steps": 0, "clip_high": 0.3}
STEPS = 8


# --- the engine


def make_engine(
    folder: Path, layout: dict[str, Any], objective: dict[str, Any], out: Path, *, per_token: bool = False
) -> Any:
    """Engine from verl's registry, with this package's model in place of Megatron-Bridge's."""
    from verl.utils.megatron.optimizer import (
        get_megatron_optimizer,
        get_megatron_optimizer_param_scheduler,
        init_megatron_optim_config,
    )
    from verl.workers.config import McoreEngineConfig, McoreOptimizerConfig
    from verl.workers.engine import EngineRegistry

    path = out / f"sdpg-{dist.get_rank()}.yaml"
    path.write_text(yaml.safe_dump({"objective": objective}))
    os.environ["SDPG_CONFIG"] = str(path)
    engine_config = McoreEngineConfig(
        tensor_model_parallel_size=layout.get("tensor", 1),
        pipeline_model_parallel_size=layout.get("pipeline", 1),
        virtual_pipeline_model_parallel_size=layout.get("virtual_pipeline"),
        context_parallel_size=layout.get("context", 1),
        sequence_parallel=layout.get("sequence", False),
        use_distributed_optimizer=False,
        use_dynamic_bsz=False,
    )
    hf_config = SimpleNamespace(vocab_size=read_architecture(folder).vocab_size, architectures=["Qwen3ForCausalLM"])
    model_config = SimpleNamespace(
        model_type="language_model",
        hf_config=hf_config,
        local_path=str(folder),
        mtp=SimpleNamespace(enable=False, enable_train=False),
        tokenizer=SimpleNamespace(pad_token_id=0),
    )
    optimizer_config = McoreOptimizerConfig(lr=1e-3, total_training_steps=STEPS, lr_warmup_steps=0)
    engine = EngineRegistry.new(
        model_type="language_model",
        backend="megatron",
        model_config=model_config,
        engine_config=engine_config,
        optimizer_config=optimizer_config,
        checkpoint_config=None,
    )
    engine.module = make_chunks(folder, layout, per_token=per_token)
    engine.tf_config = engine.module[0].config
    settings = init_megatron_optim_config(optimizer_config, use_distributed_optimizer=False, bf16=False)
    engine.optimizer = get_megatron_optimizer(engine.module, settings)
    engine.lr_scheduler = get_megatron_optimizer_param_scheduler(engine.optimizer, optimizer_config)
    return engine


def make_chunks(folder: Path, layout: dict[str, Any], *, per_token: bool) -> list[Any]:
    """Model chunks in DDP; `per_token`: Megatron's calculate_per_token_loss."""
    arch, ranks = read_architecture(folder), parallel.current()
    config = ParallelConfig(**layout)
    bare = build_chunks(arch, ModelConfig.model_validate({"path": folder, "spec": "local"}), config, ranks)
    load_weights(bare, folder, arch, ranks)
    for chunk in bare:
        chunk.config.calculate_per_token_loss = per_token
    return wrap(bare, OptimizerConfig(distributed=False))


def actor(**changes: Any) -> Any:
    """verl's ActorConfig, and its PPO loss as its worker gives it to an engine."""
    from verl.workers.config import ActorConfig
    from verl.workers.utils.losses import ppo_loss

    needed = {"strategy": "megatron", "rollout_n": 2, "ppo_micro_batch_size_per_gpu": 2}
    given = {"use_kl_loss": True, "clip_ratio_high": 0.3, "clip_ratio_c": 10.0, **changes}
    return partial(ppo_loss, config=ActorConfig(**needed, **given))


def gradients(chunks: list[Any]) -> dict[str, torch.Tensor]:
    return {name: parameter.main_grad.clone() for name, parameter in named_parameters(chunks)}


def differences(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative difference of the whole gradient, and the largest of one parameter's, each the maximum over ranks."""
    assert found.keys() == expected.keys()
    assert all(grad.norm() > 0 for grad in expected.values())
    squares = torch.tensor([[float((found[n] - g).norm()), float(g.norm())] for n, g in expected.items()]) ** 2
    whole, parts = squares.sum(0), squares[:, 0] / squares[:, 1]
    values = torch.stack([whole[0] / whole[1], parts.max()]).sqrt()
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return {"whole": float(values[0]), "worst": float(values[1])}


def trained(engine: Any, data: Any, loss: Any) -> tuple[float, dict[str, float], dict[str, torch.Tensor]]:
    """Loss, metrics and gradients of a training pass, the first two as on the last stage."""
    for chunk in engine.module:
        chunk.zero_grad_buffer()
    output = engine.forward_backward_batch(data, loss)
    found = None
    if output:
        assert output["model_output"] == {}
        metrics = {name: metric.aggregate() for name, metric in output["metrics"].items()}
        found = sum(output["loss"]), metrics
    everywhere = [entry for entry in parallel.current().gather_all(found) if entry]
    # as verl's worker reports it: the sum over micro-batches, averaged over data-parallel ranks
    return sum(entry[0] for entry in everywhere) / len(everywhere), everywhere[0][1], gradients(engine.module)


# --- checks, each of which returns what the test reads


def check_equal(folder: Path, layout: dict[str, Any], out: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The engine, in both of Megatron's forms of the loss, and this package's forward step on the same samples."""
    found: dict[str, Any] = {}
    for form, per_token in (("mean", False), ("per_token", True)):
        engine = make_engine(folder, layout, SDPG, out, per_token=per_token)
        # one micro-batch: the interleaved schedule fills it up to a round of two
        data = batch_of(rows, len(rows)) if layout.get("virtual_pipeline") else batch_of(rows)
        loss, metrics, grads = trained(engine, data, actor())
        found[form] = {"loss": loss, "kl": metrics["distill/kl"], "metrics": metrics}
        if not layout.get("context"):
            expected, kl, reference = own(folder, layout, rows)
            found[form] |= {"expected": expected, "expected_kl": kl, "differences": differences(grads, reference)}
        if dist.get_rank() == 0:
            torch.save(grads, out / f"grads-{form}.pt")
    return found


def own(
    folder: Path, layout: dict[str, Any], rows: list[dict[str, Any]]
) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Loss, KL and gradients by `ForwardStep` over `padded_batch`."""
    from sdpg_megatron.config import ObjectiveConfig

    chunks, ranks = make_chunks(folder, layout, per_token=True), parallel.current()
    objective = build_objective(ObjectiveConfig.model_validate(SDPG), STEPS)
    head = Head(read_architecture(folder).vocab_size, ranks.tensor_group)
    head = dataclasses.replace(head, options=dataclasses.replace(head.options, temperature=TEMPERATURE))
    batch = padded_batch(rows)
    (teacher,) = passes.teacher_hidden(chunks, [batch])
    batch = dataclasses.replace(batch, teacher_hidden_GH=teacher)
    reports = passes.run_schedule(chunks, ForwardStep(objective, StepContext(0, STEPS), head), [batch])
    local = merge(read_reports(reports)) if ranks.tensor == 0 else {}
    metrics = merge(ranks.gather_all(local))
    return metrics["train/loss"].value, metrics["distill/kl"].value, gradients(chunks)


def check_verl(folder: Path, layout: dict[str, Any], out: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Without distillation, the engine and verl's own engine with its PPO loss: aggregations, importance weights."""
    objective = {"name": "rpg", "clip_high": 0.3, "ratio_weighted_regularizers": False}
    full = make_engine(folder, layout, {**objective, "alpha": 0.3, "entropy_coefficient": 0.1}, out)
    terms = {"kl_loss_type": "mse", "kl_loss_coef": 0.3, "entropy_coeff": 0.1}
    found = {}
    for mode in ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"):
        chosen = {"loss_agg_mode": mode}
        found[mode] = compared(full, rows, actor(**chosen), actor(**chosen, **terms))
    draw = random.Random(6)
    weighted = [
        {**row, "rollout_is_weights": torch.tensor([draw.uniform(0.5, 2) for _ in row["responses"]])} for row in rows
    ]
    bare, plain = make_engine(folder, layout, {**objective, "alpha": 0.0}, out), actor(use_kl_loss=False)
    found["weighted"] = compared(bare, weighted, plain, plain)
    return found


def compared(engine: Any, rows: list[dict[str, Any]], ours: Any, theirs: Any) -> dict[str, Any]:
    """A training pass of the engine and one of the class of verl that it extends, with a PPO loss each."""
    loss, _, grads = trained(engine, batch_of(rows), ours)
    for chunk in engine.module:
        chunk.zero_grad_buffer()
    output = type(engine).__bases__[0].forward_backward_batch(engine, batch_of(rows), theirs)
    expected = sum(output["loss"])
    return {"loss": loss, "expected": expected, "differences": differences(grads, gradients(engine.module))}


def check_dynamic(folder: Path, layout: dict[str, Any], out: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Micro-batches by tokens, verl's default, give the gradients of those by samples."""
    from verl.utils import tensordict_utils as tu

    engine = make_engine(folder, layout, SDPG, out)
    expected = trained(engine, batch_of(rows), actor())
    data = batch_of(rows)
    tu.assign_non_tensor(data, use_dynamic_bsz=True, max_token_len_per_gpu=32)
    loss, _, grads = trained(engine, data, actor())
    return {"loss": loss, "expected": expected[0], "differences": differences(grads, expected[2])}


def check_padded(folder: Path, layout: dict[str, Any], out: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Padded sequences (use_remove_padding False) give the gradients of packed ones."""
    engine = make_engine(folder, layout, SDPG, out)
    expected = trained(engine, batch_of(rows), actor())
    padded = make_engine(folder, layout, SDPG, out)
    padded.engine_config.use_remove_padding = False
    loss, _, grads = trained(padded, batch_of(rows), actor())
    return {"loss": loss, "expected": expected[0], "differences": differences(grads, expected[2])}


def check_layout_of_v0(folder: Path, layout: dict[str, Any], out: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Fields that are padded, as the older trainer gives them, give the gradients of nested ones."""
    from verl.utils import tensordict_utils as tu
    from verl.workers.utils.padding import left_right_2_no_padding

    engine = make_engine(folder, layout, SDPG, out)
    expected = trained(engine, batch_of(rows), actor())
    widths = {name: max(len(row[name]) for row in rows) for name in ("prompts", "responses")}

    def padded(row: dict[str, Any]) -> dict[str, Any]:
        left = widths["prompts"] - len(row["prompts"])
        right = widths["responses"] - len(row["responses"])
        whole = torch.nn.functional.pad(row["input_ids"], (left, right))
        mask = torch.nn.functional.pad(torch.ones_like(row["input_ids"]), (left, right))
        per_token = {
            name: torch.nn.functional.pad(row[name], (0, right))
            for name in ("responses", "response_mask", "advantages", "old_log_probs", "ref_log_prob")
        }
        return {
            **per_token,
            "prompts": whole[: widths["prompts"]],
            "input_ids": whole,
            "attention_mask": mask,
            "position_ids": (mask.cumsum(0) - 1).clamp(min=0),
            "extra_info": row["extra_info"],
        }

    data = batch_of([padded(row) for row in rows])
    data = left_right_2_no_padding(data)
    tu.assign_non_tensor(data, temperature=TEMPERATURE)
    loss, _, grads = trained(engine, data, actor())
    return {"loss": loss, "expected": expected[0], "differences": differences(grads, expected[2])}


def check_log_probs(folder: Path, layout: dict[str, Any], out: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Forward-only calls give verl's own result, also from a batch without teacher prompts."""
    engine = make_engine(folder, layout, SDPG, out)
    stock = type(engine).__bases__[0]
    bare = [{**row, "extra_info": {}} for row in rows]
    ours = engine.infer_batch(batch_of(bare))["model_output"]
    with torch.no_grad():
        theirs = stock.forward_backward_batch(engine, batch_of(bare), None, forward_only=True)["model_output"]
    same = all(torch.equal(ours[name].values(), theirs[name].values()) for name in theirs)
    return {"names": sorted(theirs), "same": same}


def check_worker(folder: Path, layout: dict[str, Any], out: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Three updates of verl's worker, each of two mini-batches, and the metrics as its trainer logs them."""
    from verl.utils import tensordict_utils as tu
    from verl.utils.metric import reduce_metrics
    from verl.workers.engine_workers import TrainingWorker

    engine = make_engine(folder, layout, {**SDPG, "beta_warmup_steps": 4}, out)
    before = {name: parameter.detach().clone() for name, parameter in named_parameters(engine.module)}
    worker = TrainingWorker.__new__(TrainingWorker)  # its constructor needs Ray
    worker.engine, worker.engine_config, worker.loss_fn = engine, engine.engine_config, actor()
    worker.model_config = {"use_remove_padding": True}
    worker.device_name, worker.flops_counter = "cpu", None
    worker.profiler = SimpleNamespace(step=lambda: None, check_enable=lambda: False, rank=0)
    updates = []
    for _ in range(3):
        data = batch_of(rows)
        tu.assign_non_tensor(data, mini_batch_size=len(rows) // 2, global_batch_size=len(rows) // 2)
        output = TrainingWorker.train_mini_batch(worker, data)
        updates.append({name: float(value) for name, value in reduce_metrics(tu.get(output, "metrics")).items()})
    changed = [not torch.equal(before[name], parameter) for name, parameter in named_parameters(engine.module)]
    return {"updates": updates, "changed": all(changed)}


def check_errors(folder: Path, layout: dict[str, Any], out: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Messages of what the engine refuses in a batch or in verl's loss."""
    engine = make_engine(folder, layout, SDPG, out)
    bare = [{**row, "extra_info": {"index": 0}} for row in rows]
    without_reference = [{name: row[name] for name in row if name != "ref_log_prob"} for row in rows]

    def message(call: Callable[[], Any]) -> str:
        try:
            call()
        except errors.SdpgError as error:
            return f"{type(error).__name__}: {error}"
        return ""

    found = {
        "teacher": message(lambda: engine.forward_backward_batch(batch_of(bare), actor())),
        "reference": message(lambda: engine.forward_backward_batch(batch_of(without_reference), actor())),
        "entropy": message(lambda: engine.forward_backward_batch(batch_of(rows), actor(entropy_coeff=0.1))),
        "loss": message(lambda: engine.forward_backward_batch(batch_of(rows), partial(max, config=None))),
    }
    with torch.no_grad():
        dict(named_parameters(engine.module))["decoder.final_layernorm.weight"][0] = torch.nan
    found["finite"] = message(lambda: engine.forward_backward_batch(batch_of(rows), actor()))
    return found


def check_trainer(folder: Path, layout: dict[str, Any], out: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Teacher prompts from a file to the engine's batch, through verl's data set, agent loop worker and iterator."""
    from omegaconf import OmegaConf
    from transformers import AutoTokenizer
    from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, AgentLoopOutput
    from verl.trainer.ppo.v1 import agent_loop_tq
    from verl.utils import tensordict_utils as tu
    from verl.utils.dataset.rl_dataset import collate_fn, get_dataset_class

    from sdpg_megatron.plugins.verl.rows import teacher_prompts

    tokenizer = AutoTokenizer.from_pretrained(folder)
    questions = ["What is 12 + 34?", "46"]
    lines = [
        {
            "data_source": "made",
            "prompt": [{"role": "user", "content": question}],
            "teacher_prompt": [{"role": "user", "content": f"{question} The answer is {number}."}],
            "extra_info": {"index": number},
        }
        for number, question in enumerate(questions)
    ]
    path = out / "train.json"
    path.write_text(json.dumps(lines))
    custom = {"path": "pkg://sdpg_megatron.plugins.verl.dataset", "name": "PrivilegedDataset"}
    config = OmegaConf.create({"custom_cls": custom, "cache_dir": str(out), "filter_overlong_prompts": False})
    dataset = get_dataset_class(config)(str(path), tokenizer, config)
    prompts = tu.get_tensordict(collate_fn([dataset[0], dataset[1]]))
    worker = agent_loop_tq.AgentLoopWorkerTQ.__ray_metadata__.modified_class.__new__(
        agent_loop_tq.AgentLoopWorkerTQ.__ray_metadata__.modified_class
    )
    stored: list[Any] = []

    async def put(**options: Any) -> None:
        stored.append(options["fields"])

    async def nothing(*_: Any, **__: Any) -> None: ...

    agent_loop_tq.tq.async_kv_batch_put = put
    worker._compute_score = worker._compute_teacher_logprobs = nothing
    worker._compute_multi_modal_inputs = lambda *_: {}
    worker._compute_position_ids = lambda ids, *_: torch.arange(ids.shape[1])[None]
    for number in range(2):
        row = {name: _row(prompts.get(name), number) for name in prompts.keys()}  # noqa: SIM118
        output = AgentLoopOutput(
            prompt_ids=[5] * (number + 2),
            response_ids=[6] * (number + 3),
            response_mask=[1] * (number + 3),
            metrics=AgentLoopMetrics(),
            extra_fields={},
        )
        given = {**row, "uid": str(number), "session_id": 0, "global_steps": 1}
        asyncio.run(worker._agent_loop_postprocess(output, validate=False, **given))
    data = tu.concat_tensordict([_nested(fields) for fields in stored])
    (shuffled,) = tu.make_iterator(data, mini_batch_size=2, epochs=1, dataloader_kwargs={"shuffle": False})
    found = teacher_prompts(shuffled, 2)
    assert found is not None
    return {"found": [tokenizer.decode(prompt) for prompt in found], "fields": sorted(map(str, data.keys()))}


def _row(field: Any, number: int) -> Any:
    """A sample's value, as verl's worker takes it from the trainer's batch."""
    return field[number] if isinstance(field, torch.Tensor) else field[number].data


def _nested(fields: Any) -> Any:
    """Fields as TransferQueue returns them: one row's tensors become nested ones."""
    fields = copy.copy(fields)
    for name in list(fields.keys()):
        if isinstance(fields.get(name), torch.Tensor) and fields[name].dim() == 2:
            fields[name] = torch.nested.as_nested_tensor(list(fields[name].unbind()), layout=torch.jagged)
    return fields


CHECKS: dict[str, Callable[[Path, dict[str, Any], Path, list[dict[str, Any]]], dict[str, Any]]] = {
    "equal": check_equal,
    "verl": check_verl,
    "dynamic": check_dynamic,
    "padded": check_padded,
    "v0": check_layout_of_v0,
    "log_probs": check_log_probs,
    "worker": check_worker,
    "errors": check_errors,
    "trainer": check_trainer,
}


def main() -> None:
    folder, out, name, *checks = sys.argv[1:]
    layout = LAYOUTS[name]
    ranks = parallel.initialize(ParallelConfig(**layout), seed=0)
    rows = drawn_rows(read_architecture(Path(folder)).vocab_size)
    here = rows[ranks.data :: ranks.data_size]
    from verl.workers.engine import EngineRegistry

    found: dict[str, Any] = {"engine": EngineRegistry.get_engine_cls("language_model", "megatron").__name__}
    for check in checks:
        found[check] = CHECKS[check](Path(folder), layout, Path(out), here)
    if dist.get_rank() == dist.get_world_size() - 1:
        (Path(out) / f"{name}.json").write_text(json.dumps(found))
    dist.barrier()
    parallel.shutdown()


if __name__ == "__main__":
    main()
