"""The rollout engine beside the learner: it gets the weights, and both take turns where they share devices."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sdpg_megatron.config import RunConfig
from sdpg_megatron.mcore.policy_trainer import PolicyTrainer
from sdpg_megatron.rollout.base import Bucket, OnProgress, Stop
from sdpg_megatron.train.engines import start_rollouts
from sdpg_megatron.train.export import stream_weights
from sdpg_megatron.train.inputs import Inputs
from sdpg_megatron.train.phases import Phases


class Serving:
    """The rollout side of a run, with the learner's weights. Every rank calls every method."""

    def __init__(
        self,
        config: RunConfig,
        inputs: Inputs,
        policy_trainer: PolicyTrainer,
        phases: Phases,
        *,
        on_progress: OnProgress,
        stop: Stop,
    ) -> None:
        """Start what the configuration names; for the callbacks and what is raised see `start_rollouts`."""
        self._config, self._learner, self._phases = config, policy_trainer, phases
        self._current = False
        if self._colocated:  # servers divide up the memory that they find
            policy_trainer.offload()
            policy_trainer.ranks.barrier()
        self.rollouts = start_rollouts(config, inputs, policy_trainer.ranks, on_progress, stop)

    def publish(self, step: int) -> None:
        """Bring the weights after `step` to the engine, unless it has them; where it shares the learner's devices, it
        gets them back."""
        if self._current:
            return
        with self._phases("publish"):
            if self._colocated:
                self._learner.offload()
                self.rollouts.resume()
            self.rollouts.publish(step, self._weights)
            every = self._config.rollout.sglang.verify_every
            if every and step % every == 0:
                self.rollouts.verify(step, self._weights)
        self._current = True

    def trained(self, step: int) -> None:
        """The learner's weights are those after `step` from now on; the engine's are older."""
        self._current = False
        self.rollouts.trained(step)

    def make_room(self) -> None:
        """Take the devices from an engine that shares them, for training."""
        if self._colocated:
            with self._phases("switch"):
                self.rollouts.release()
                self._learner.onload()

    def close(self) -> None:
        self.rollouts.close()

    def _weights(self) -> Iterator[Bucket]:
        """This replica's weights as the engine wants them; every rank of the replica iterates."""
        served = self._config.rollout.sglang.dtype if self._config.rollout.engine == "sglang" else None
        return stream_weights(self._config, self._learner, getattr(torch, served) if served else None)

    @property
    def _colocated(self) -> bool:
        return self._config.rollout.engine == "sglang" and self._config.rollout.sglang.colocated
