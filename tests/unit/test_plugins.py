"""The parts for host programs: wrapped schedules, weights from a reducer, reports, and Megatron-LM's arguments."""

from __future__ import annotations

import itertools
import re
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from sdpg_megatron.architecture import read_architecture
from sdpg_megatron.batching.collate import PackingLayout, collate
from sdpg_megatron.batching.samples import Sample
from sdpg_megatron.errors import ConfigError
from sdpg_megatron.mcore.forward_step import DeviceMetric
from sdpg_megatron.objectives.base import TokenMetric
from sdpg_megatron.observe.metrics import Metric, Reduction
from sdpg_megatron.plugins.batch import host_batch, local_tokens, token_weights
from sdpg_megatron.plugins.megatron_lm.arguments import check_model_arguments, model_flags, run_config, warn_of_unused
from sdpg_megatron.plugins.report import pairs, sums_and_counts, weighted_sums
from sdpg_megatron.plugins.schedule import prepared_schedule
from tests.tiny import write_tiny_model
from tests.unit.test_collate import some_samples

CPU = torch.device("cpu")


class _Schedule:
    """Records what a schedule is called with, and reads its iterators as a schedule would."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, **options: Any) -> list[Any]:
        many = isinstance(options["data_iterator"], list)
        iterators = options["data_iterator"] if many else [options["data_iterator"]]
        read = [[next(iterator) for _ in range(options["num_microbatches"])] for iterator in iterators]
        self.calls.append({**options, "read": read if many else read[0]})
        return read[0]


@contextmanager
def doubled(chunks: list[Any], batches: list[int]) -> Iterator[list[int]]:
    yield [2 * batch for batch in batches]


def test_a_training_pass_gets_the_prepared_batches() -> None:
    schedule = _Schedule()
    run = prepared_schedule(schedule, doubled, lambda results: [-x for x in results])
    assert run(forward_step_func=print, data_iterator=iter([1, 2, 3]), model="m", num_microbatches=2) == [-2, -4]
    assert schedule.calls[0]["model"] == "m" and schedule.calls[0]["forward_step_func"] is print


def test_every_chunk_reads_the_same_batches() -> None:
    schedule = _Schedule()
    iterators = [iter([1, 2, 3]), iter([1, 2, 3])]
    prepared_schedule(schedule, doubled)(data_iterator=iterators, model=["a", "b"], num_microbatches=2)
    assert schedule.calls[0]["read"] == [[2, 4], [2, 4]]
    assert [next(iterator) for iterator in iterators] == [3, 3], "both of the host's iterators have advanced"


def test_a_forward_only_pass_goes_through() -> None:
    schedule = _Schedule()
    run = prepared_schedule(schedule, doubled, lambda results: [])
    assert run(data_iterator=iter([1, 2]), model="m", num_microbatches=2, forward_only=True) == [1, 2]


def test_weights_are_the_gradient_of_the_reducer() -> None:
    """Means of two sequences of 3 and 1 tokens, of which one is masked, over 2 sequences."""

    def reducer(values_T: Tensor) -> Tensor:
        masks = torch.tensor([1.0, 0.0, 1.0]), torch.tensor([1.0])
        parts = values_T.split([3, 1])
        return sum((x * mask).sum() / mask.sum() for x, mask in zip(parts, masks, strict=True)) / 2  # type: ignore[return-value]

    assert token_weights(reducer, 4).tolist() == [0.25, 0.0, 0.25, 0.5]
    assert token_weights(lambda values_T: torch.zeros(()), 0).tolist() == []


def test_a_report_in_a_hosts_forms() -> None:
    report = {
        "mean": DeviceMetric(torch.tensor(3.0), 4.0, Reduction.MEAN),
        "masked": DeviceMetric(torch.tensor(2.0), torch.tensor(5.0), Reduction.MEAN),
        "max": DeviceMetric(torch.tensor(9.0), 4.0, Reduction.MAX),
    }
    found = {name: pair.tolist() for name, pair in sums_and_counts(report, CPU).items()}
    assert found == {"mean": [12.0, 4.0], "masked": [10.0, 5.0]}
    merged = {"max": Metric(9.0, Reduction.MAX), "none": Metric(0.0, Reduction.MEAN, 0.0), "mean": Metric(3.0)}
    assert {name: pair.tolist() for name, pair in pairs(merged, CPU).items()} == {"max": [9.0, 1.0], "mean": [3.0, 1.0]}
    values_T, mask_T = torch.tensor([1.0, 2.0]), torch.tensor([True, False])
    tokens = {"all": TokenMetric(values_T), "masked": TokenMetric(values_T, mask_T=mask_T)}
    sums = weighted_sums(tokens, torch.tensor([0.5, 0.25]))
    assert {name: value.item() for name, value in sums.items()} == {"all": 1.0, "masked": 0.5}


def test_a_hosts_tensors_replace_those_of_the_samples() -> None:
    tokens = np.array([5, 6, 7], np.int32)
    sample = Sample(tokens, np.array([9, 5], np.int32), tokens[:2], np.zeros(2, np.float32), 1.0, np.ones(2, bool), 1.0)
    advantages_T = torch.tensor([0.5, -0.5])
    batch = host_batch([sample], PackingLayout(), advantages_T=advantages_T, old_logprobs_T=None)
    assert batch.advantages_T is advantages_T and batch.old_logprobs_T is None
    assert batch.student.rows_T.tolist() == [2, 3] and batch.labels_T.tolist() == [5, 6]
    with pytest.raises(ValueError, match="labels_T: expected one of"):
        host_batch([sample], PackingLayout(), labels_T=advantages_T)
    with pytest.raises(ValueError, match=r"weights_T: found shape \(1,\), expected \(2,\)"):
        host_batch([sample], PackingLayout(), weights_T=torch.ones(1))


@pytest.mark.parametrize("context", [0, 1])
def test_local_tokens_are_those_of_the_micro_batch(context: int) -> None:
    layout, samples = PackingLayout(context=context, context_size=2), some_samples()
    here = local_tokens([len(s.student_prompt) for s in samples], [len(s.response) for s in samples], layout)
    responses = torch.from_numpy(np.concatenate([s.response for s in samples]))
    assert collate(samples, layout).labels_T.tolist() == responses[here].tolist()
    assert 0 < int(here.sum()) < len(here)


def namespace(flags: list[str]) -> Namespace:
    """The model's arguments as Megatron-LM parses them."""
    named: dict[str, Any] = {}
    for flag, following in itertools.pairwise([*flags, "--"]):
        if flag.startswith("--"):
            value = True if following.startswith("--") else following
            named[flag[2:].replace("-", "_")] = float(value) if str(value).replace(".", "", 1).isdigit() else value
    named["norm_epsilon"] = float(named["norm_epsilon"])
    return Namespace(**named, padded_vocab_size=384)


def test_the_flags_of_a_folder_are_those_that_are_expected_of_it(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path, "qwen3_moe", tied=False, seed=0)
    arch = read_architecture(folder)
    flags = model_flags(arch, folder)
    check_model_arguments(namespace(flags), arch, folder)
    wrong = namespace(flags)
    wrong.hidden_size, wrong.padded_vocab_size = 96, 256
    with pytest.raises(ConfigError, match=r"--hidden-size: found 96, expected 64(.|\n)*padded_vocab_size: found 256"):
        check_model_arguments(wrong, arch, folder)


def host_arguments(config: Path, **changes: Any) -> Namespace:
    """Arguments of Megatron-LM that are not the model's, after its own checks."""
    arguments: dict[str, Any] = {
        **{"sdpg": config, "sdpg_set": [], "dataloader_type": "external", "calculate_per_token_loss": True},
        **{"fp16": False, "rampup_batch_size": None, "train_iters": 4, "mtp_num_layers": None, "num_experts": None},
        **{"attention_dropout": 0.0, "hidden_dropout": 0.0, "params_dtype": torch.float32, "micro_batch_size": 4},
        **{"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 1, "sequence_parallel": True},
        **{"virtual_pipeline_model_parallel_size": None, "context_parallel_size": 1, "transformer_impl": "local"},
        **{"expert_model_parallel_size": 1, "expert_tensor_parallel_size": 2, "lr": 1e-3, "min_lr": 0.0},
        **{"lr_warmup_iters": 0, "lr_decay_style": "constant", "adam_beta1": 0.9, "adam_beta2": 0.999},
        **{"adam_eps": 1e-8, "weight_decay": 0.01, "clip_grad": 1.0, "use_distributed_optimizer": True},
        **{"overlap_grad_reduce": False, "overlap_param_gather": False},
    }
    return Namespace(**{**arguments, **changes})


def write_host_config(folder: Path, **sections: Any) -> Path:
    path = folder / "run.yaml"
    tree = {"run_dir": "run", "model": {"path": "hf"}, "data": {"train": ["train.jsonl"]}, **sections}
    path.write_text(yaml.safe_dump(tree))
    return path


def test_arguments_decide_what_they_can(tmp_path: Path) -> None:
    path = write_host_config(tmp_path, optimizer={"lr": 1e-3, "minibatches": 2}, parallel=None)
    config = run_config(host_arguments(path, params_dtype=torch.bfloat16))
    assert (config.steps, config.parallel.tensor, config.parallel.sequence) == (2, 2, True)
    assert (config.model.dtype, config.model.spec, config.optimizer.micro_batch_size) == ("bfloat16", "local", 4)


@pytest.mark.parametrize(
    ("changes", "sections", "message"),
    [
        ({}, {"optimizer": {"lr": 1e-6}}, "optimizer.lr: found 1e-06, expected 0.001, as in Megatron-LM's arguments"),
        ({}, {"parallel": {"tensor": 4}}, "parallel.tensor: found 4, expected 2, as in Megatron-LM's arguments"),
        ({}, {"steps": 5}, "steps: found 5, expected 4, as in Megatron-LM's arguments"),
        ({}, {"model": {"path": "hf", "dtype": "bfloat16"}}, "model.dtype: found 'bfloat16', expected float32"),
        ({"train_iters": 3}, {"optimizer": {"minibatches": 2}}, "--train-iters: found 3, expected a multiple of"),
        ({"hidden_dropout": 0.1}, {}, "--hidden-dropout: found 0.1, expected 0"),
        ({"dataloader_type": "cyclic"}, {}, "--dataloader-type: found 'cyclic', expected external"),
        ({"calculate_per_token_loss": False}, {}, "--calculate-per-token-loss: found False"),
        ({"fp16": True}, {}, "--fp16: found True, expected float32 or --bf16"),
        ({"rampup_batch_size": [8, 8, 8]}, {}, "--rampup-batch-size: found [8, 8, 8], expected no ramp-up"),
        (
            {"num_experts": 4, "pipeline_model_parallel_size": 2, "moe_token_dispatcher_type": "allgather"},
            {},
            "--moe-token-dispatcher-type: found 'allgather', expected alltoall or flex",
        ),
        ({"mtp_num_layers": 1}, {}, "--mtp-num-layers: found 1, expected no multi-token prediction"),
        (
            {},
            {"objective": {"teacher": "ema"}},
            "objective.teacher: found 'ema', expected a teacher without separate",
        ),
        (
            {},
            {"rollout": {"engine": "sglang", "sglang": {"colocated": True, "transport": "shared"}}},
            "rollout.sglang.colocated: found True, expected false",
        ),
    ],
)
def test_contradictions_are_refused(
    changes: dict[str, Any], sections: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        run_config(host_arguments(write_host_config(tmp_path, **sections), **changes))


def test_fields_without_an_effect_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    alarms = {"gradient_every": 5, "window": 3}
    path = write_host_config(tmp_path, eval={"every": 2}, optimizer={"skip_limit": 3}, alarms=alarms)
    warn_of_unused(host_arguments(path))
    assert "no effect inside Megatron-LM: alarms.window, eval.every, optimizer.skip_limit" in caplog.text
