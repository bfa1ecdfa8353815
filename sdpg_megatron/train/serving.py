"""Connect the rollout engine to the trainer: publish weights, and take turns on shared devices."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sdpg_megatron.config import RunConfig
from sdpg_megatron.mcore.policy import Policy
from sdpg_megatron.mcore.policy_trainer import PolicyTrainer
from sdpg_megatron.rollout.base import Bucket, OnProgress, Stop
from sdpg_megatron.train.engines import start_rollouts
from sdpg_megatron.train.export import stream_weights
from sdpg_megatron.train.inputs import Inputs
from sdpg_megatron.train.phases import Phases


class Serving:
    """Rollout engine of a run with the trainer's weights. Every rank calls every method."""

    def __init__(
        self,
        config: RunConfig,
        inputs: Inputs,
        policy: Policy,
        phases: Phases,
        *,
        on_progress: OnProgress,
        stop: Stop,
    ) -> None:
        """Start the configured engine; callbacks and errors as in `start_rollouts`.

        Args:
            policy: a `PolicyTrainer` if the engine is colocated.
        """
        self._config, self._policy, self._phases = config, policy, phases
        self._current = False
        self._colocated: PolicyTrainer | None = None
        if config.rollout.engine == "sglang" and config.rollout.sglang.colocated:
            assert isinstance(policy, PolicyTrainer), "only it can free its devices"
            self._colocated = policy
            policy.offload()  # servers size their pools by the free memory
            policy.ranks.barrier()
        self.rollouts = start_rollouts(config, inputs, policy.ranks, on_progress, stop)

    def publish(self, step: int) -> None:
        """Publish the weights after `step`, unless the engine has them. A colocated engine gets the devices."""
        if self._current:
            return
        with self._phases("publish"):
            if self._colocated is not None:
                self._colocated.offload()
                self.rollouts.resume()
            self.rollouts.publish(step, self._weights)
            every = self._config.rollout.sglang.verify_every
            if every and step % every == 0:
                self.rollouts.verify(step, self._weights)
        self._current = True

    def trained(self, step: int) -> None:
        """Record that the trainer's weights are now those after `step`, newer than the engine's."""
        self._current = False
        self.rollouts.trained(step)

    def free_devices(self) -> None:
        """Take the devices from a colocated engine, for training."""
        if self._colocated is not None:
            with self._phases("switch"):
                self.rollouts.release()
                self._colocated.onload()

    def close(self) -> None:
        self.rollouts.close()

    def _weights(self) -> Iterator[Bucket]:
        """This replica's weights in the engine's dtype; every rank of the replica iterates."""
        served = self._config.rollout.sglang.dtype if self._config.rollout.engine == "sglang" else None
        return stream_weights(self._config, self._policy, getattr(torch, served) if served else None)
