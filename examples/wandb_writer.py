"""Metrics to Weights & Biases (pip install wandb), beside metrics.jsonl and TensorBoard:

    WANDB_PROJECT=sdpg sdpg-megatron train my.yaml 'writers=[examples.wandb_writer:WandbWriter]'

`WANDB_MODE=offline` writes below `run_dir` alone. A run that continues appends to the same W&B run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import wandb

from sdpg_megatron import RunConfig


class WandbWriter:
    """One W&B run per `run_dir`. `train/step` is the x-axis, as a continued run may write a step again."""

    def __init__(self, config: RunConfig) -> None:
        folder = config.run_dir.resolve()
        self._run = wandb.init(
            id=hashlib.sha256(str(folder).encode()).hexdigest()[:16],
            name=folder.name,
            dir=folder,
            config=config.model_dump(mode="json"),
            resume="allow",
        )
        self._run.define_metric("*", step_metric="train/step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "train/step": step})

    def close(self) -> None:
        self._run.finish()
