"""Run Megatron-LM's `pretrain()` with SDPG; see the package's docstring and docs/plugin.md."""

from __future__ import annotations

import importlib
import inspect
import sys
from contextlib import ExitStack
from typing import Any

from sdpg_megatron.errors import LaunchError, SdpgError
from sdpg_megatron.mcore.compat import device, torch_adam
from sdpg_megatron.plugins.megatron_lm.arguments import add_arguments
from sdpg_megatron.plugins.megatron_lm.host import MegatronHost
from sdpg_megatron.plugins.schedule import prepared_schedule

DEFAULTS = {"eval_interval": 1000}
"""Arguments that Megatron-LM reads although nothing is evaluated."""


def main() -> None:
    """Train with the arguments of the command line. Every rank calls it. An error of the user ends the process."""
    try:
        with ExitStack() as stack:
            device.install()
            run(_import("megatron.training.training"), stack)
    except SdpgError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)


def run(training: Any, stack: ExitStack) -> None:
    """Call `pretrain()` of Megatron-LM 0.16 or newer.

    Args:
        training: module ``megatron.training.training``.
        stack: closes what the host opens.
    """
    arguments: Any = _import("megatron.training.arguments")
    get_args = _import("megatron.training").get_args
    host = MegatronHost(get_args, arguments.core_transformer_config_from_args, stack)
    _wrap_schedule(training, host)
    _wrap_loading(training)
    model_type = _import("megatron.core.enums").ModelType.encoder_or_decoder
    callbacks = {
        "train_valid_test_dataset_provider": host.data_provider,
        "model_provider": host.model_provider,
        "model_type": model_type,
        "forward_step_func": host.forward_step,
    }
    known = inspect.signature(training.pretrain).parameters
    container = next((name for name in ("cfg_container", "cfg") if name in known), None)
    if container is None:  # 0.16 and 0.17 parse the arguments themselves
        training.pretrain(**callbacks, extra_args_provider=add_arguments, args_defaults=DEFAULTS)
        return
    args = arguments.parse_and_validate_args(extra_args_provider=add_arguments, args_defaults=DEFAULTS)
    utils: Any = _import("megatron.training.argument_utils")
    training.pretrain(**{container: utils.pretrain_cfg_container_from_args(args)}, **callbacks)


def _wrap_schedule(training: Any, host: MegatronHost) -> None:
    """Make the training loop fetch schedules that collect rollouts and run the teacher first."""
    fetch = training.get_forward_backward_func

    def wrapped(*args: Any, **options: Any) -> Any:
        return prepared_schedule(fetch(*args, **options), host.prepare, host.report)

    training.get_forward_backward_func = wrapped


def _wrap_loading(training: Any) -> None:
    """Let Megatron-LM load checkpoints of its distributed optimizer with torch's AdamW."""
    load = training.load_checkpoint

    def wrapped(model: Any, optimizer: Any, *args: Any, **options: Any) -> Any:
        with torch_adam.loading(optimizer):
            return load(model, optimizer, *args, **options)

    training.load_checkpoint = wrapped


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        fix = "install megatron-core 0.17 or newer, or put a checkout of Megatron-LM on PYTHONPATH"
        raise LaunchError(name, f"no such module ({error.name})", "Megatron-LM's training program", fix) from error


if __name__ == "__main__":
    main()
