"""slime's own modules from a checkout, with stubs for ray, SGLang and the accelerator, which a CPU cannot have."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.host.slime_contract import CHECKOUT, Slime, module_names


def _stubs() -> None:
    """Packages that slime imports and that no CPU needs."""

    def remote(*given: Any, **options: Any) -> Any:
        if not given:
            return remote
        return SimpleNamespace(__ray_metadata__=SimpleNamespace(modified_class=given[0]))

    ray = mock.MagicMock(name="ray", remote=remote, put=lambda value, **options: value, get=lambda value: value)
    sys.modules["ray"] = ray
    for name in (
        "ray.util",
        "ray.util.scheduling_strategies",
        "sglang",
        "sglang.srt",
        "sglang.srt.constants",
        "sglang_router",
        "pybase64",
        "slime.backends.sglang_utils.external",
        "slime.backends.sglang_utils.sglang_config",
        "slime.backends.sglang_utils.sglang_engine",
    ):
        sys.modules[name] = mock.MagicMock(name=name)


@functools.cache
def real() -> tuple[Slime, dict[str, ModuleType]]:
    """slime's own modules, but for `model.py` and `actor.py`, which need Megatron-LM's `megatron.training`."""
    for name in module_names():
        del sys.modules[name]
    sys.path.append(os.environ[CHECKOUT])  # it has a package `examples`, too
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    _stubs()
    base: Any = importlib.import_module("slime.utils.accelerator.base")
    accelerator: Any = importlib.import_module("slime.utils.accelerator")

    class Cpu(base.Accelerator):  # type: ignore[misc]
        name, device_type, communication_backend_name = "cpu", "cpu", "gloo"

    Cpu.__abstractmethods__ = frozenset()
    Cpu.is_available = lambda self: True
    Cpu.device = lambda self, index=None: torch.device("cpu")
    Cpu.current_device = lambda self: "cpu"
    accelerator.set_accelerator(Cpu())
    types: Any = importlib.import_module("slime.utils.types")
    rollout: Any = importlib.import_module("slime.ray.rollout")
    data: Any = importlib.import_module("slime.utils.data")
    batches: Any = importlib.import_module("slime.backends.megatron_utils.data")
    parallel: Any = importlib.import_module("slime.backends.megatron_utils.cp_utils")
    losses: Any = importlib.import_module("slime.backends.megatron_utils.loss")
    metrics: Any = importlib.import_module("slime.observability.train_metric_utils")

    def manager(args: Any) -> Any:
        found = object.__new__(rollout.RolloutManager.__ray_metadata__.modified_class)
        found.args, found.custom_reward_post_process_func = args, None
        found.custom_convert_samples_to_train_data_func = rollout.load_function(
            args.custom_convert_samples_to_train_data_path
        )
        return found

    def shipped(args: Any, train_data: dict[str, Any], sizes: dict[str, int], data_rank: int) -> dict[str, Any]:
        owner = manager(args)
        owner.train_parallel_config = sizes
        boxes = owner._split_train_data_by_dp(train_data)
        found: dict[str, Any] = data.process_rollout_data(args, boxes, data_rank, sizes["dp_size"])
        return found

    def logged(args: Any, rollout_data: dict[str, Any]) -> None:
        with mock.patch.object(metrics, "gather_log_data", return_value=None):  # to a tracker
            metrics.log_rollout_data(0, args, rollout_data)

    def log_probs(args: Any, logits: Tensor, batch: dict[str, Any]) -> list[Tensor]:
        lengths = {key: batch[key] for key in ("unconcat_tokens", "total_lengths", "response_lengths")}
        found: list[Tensor] = losses.get_log_probs_and_entropy(logits, args=args, **lengths)[1]["log_probs"]
        return found

    def reduced(given: list[dict[str, Any]], *, per_token: bool, batch_size: int) -> dict[str, float]:
        from megatron.core import parallel_state

        found: dict[str, float] = metrics.reduce_train_step_metrics(
            given,
            calculate_per_token_loss=per_token,
            step_global_batch_size=batch_size,
            cp_size=parallel_state.get_context_parallel_world_size(),
            dp_with_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        )
        return found

    found = Slime(
        sample=types.Sample,
        convert=lambda args, samples: manager(args)._convert_samples_to_train_data(samples),
        shipped=shipped,
        sliced=parallel.slice_log_prob_with_cp,
        advantages=losses.compute_advantages_and_returns,
        logged=logged,
        log_probs=log_probs,
        iterator=batches.DataIterator,
        get_batch=batches.get_batch,
        loss_function=losses.loss_function,
        reduced=reduced,
    )
    return found, {name: sys.modules[name] for name in module_names()}
