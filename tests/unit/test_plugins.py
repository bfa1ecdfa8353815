"""The parts for host programs: wrapped schedules, weights from a reducer, reports, and Megatron-LM's arguments."""

from __future__ import annotations

import itertools
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sdpg_megatron.architecture import read_architecture
from sdpg_megatron.batching.collate import PackingLayout
from sdpg_megatron.batching.samples import Sample
from sdpg_megatron.errors import ConfigError
from sdpg_megatron.mcore.forward_step import DeviceMetric
from sdpg_megatron.objectives.base import TokenMetric
from sdpg_megatron.observe.metrics import Metric, Reduction
from sdpg_megatron.plugins.batch import host_batch, token_weights
from sdpg_megatron.plugins.megatron_lm.arguments import check_model_arguments, model_flags
from sdpg_megatron.plugins.report import pairs, sums_and_counts, weighted_sums
from sdpg_megatron.plugins.schedule import prepared_schedule
from tests.tiny import write_tiny_model

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


def namespace(flags: list[str]) -> Namespace:
    """What Megatron-LM's parser makes of them, as far as the model is concerned."""
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
