"""Fix checkpoints of the distributed optimizer with torch's AdamW, which it uses without apex and Transformer Engine.

megatron-core (0.16 to 0.19) saves this combination but cannot load it: it expects state that torch creates at the first
step, does not restore the per-parameter step count, and then makes all parameters share one count. This module can be
removed when a round trip through `fully_reshardable` works without it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor


@contextmanager
def loading(optimizer: Any) -> Iterator[None]:
    """Context in which a checkpoint is loaded into an optimizer; restores the step count of every parameter.

    On entry it allocates torch's optimizer state with dummy values, which ``optimizer.sharded_state_dict`` reads.
    """
    parts = _affected(optimizer)
    for part in parts:
        if not part.optimizer.state:
            part._init_optimizer_states_with_dummy_values()
        part._set_main_param_and_optimizer_states = functools.partial(_set_with_step, part)
    try:
        yield
    finally:
        for part in parts:
            del part._set_main_param_and_optimizer_states
    for part in parts:
        for values in part.optimizer.state.values():
            values["step"] = values["step"].clone()  # torch increments in place, so the tensor must not be shared


def _affected(optimizer: Any) -> list[DistributedOptimizer]:
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [
        part
        for part in parts
        if isinstance(part, DistributedOptimizer) and isinstance(part.optimizer, torch.optim.AdamW | torch.optim.Adam)
    ]


@torch.no_grad()  # not every format of megatron-core sets it under this
def _set_with_step(part: Any, model_param: Tensor, tensors: dict[str, Tensor]) -> None:
    """Set parameter and state, keeping the step count, which is restored with the parameter groups."""
    group, order = part.model_param_group_index_map[model_param]
    main_param = part.optimizer.param_groups[group]["params"][order]
    step = part.optimizer.state[main_param]["step"]
    DistributedOptimizer._set_main_param_and_optimizer_states(part, model_param, {**tensors, "step": step})
