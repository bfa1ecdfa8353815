"""Rollout engine on SGLang servers: a synchronous interface to a pool, with one thread for all communication."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from sdpg_megatron.architecture import read_architecture
from sdpg_megatron.config import SGLangConfig
from sdpg_megatron.errors import ConfigError, RolloutError, ServerError, WeightError
from sdpg_megatron.records import Group, Prompt
from sdpg_megatron.rollout.base import Bucket, OnProgress, Sampling, Stop, WeightsWanted, never
from sdpg_megatron.rollout.sglang.build import Keys, ServedModel, make_pool, make_processes, make_router, make_transport
from sdpg_megatron.rollout.sglang.client import Client
from sdpg_megatron.rollout.sglang.event_loop import LoopThread, unless
from sdpg_megatron.rollout.sglang.groups import GroupSource
from sdpg_megatron.rollout.sglang.pool import Pool
from sdpg_megatron.rollout.sglang.publish import Publisher, PublishReport, WeightsChangedError
from sdpg_megatron.rollout.sglang.server_handle import ServerHandle
from sdpg_megatron.weights import hf_shapes

__all__ = ["SGLangEngine", "ServedModel"]

logger = logging.getLogger(__name__)

WEIGHTS = "weights"
MEMORY = frozenset({WEIGHTS, "kv_cache", "cuda_graph"})
"""SGLang's tags of releasable memory."""
IDLE_SECONDS = 30.0
"""Time for a paused server to become idle."""


class SGLangEngine:
    """A `RolloutEngine` on one or more servers.

    `Sampling.seed` has no effect: SGLang seeds requests only in its deterministic mode, in which all responses of a
    group would be equal.
    """

    def __init__(
        self,
        config: SGLangConfig,
        model: ServedModel,
        *,
        run_dir: Path,
        nonce: str,
        seed: int = 0,
        publishes: bool = True,
        on_progress: OnProgress | None = None,
    ) -> None:
        """Start the servers, or attach to those at `config.urls`, and wait until all answer.

        Args:
            run_dir: servers log to logs/sglang-<i>.log in it.
            nonce: prefix of this run's weight versions, distinct from other runs on the same servers.
            publishes: True in one process of a run. The other engines attach to its `urls`, and `follow` tells them the
                version.
            on_progress: called from another thread with the numbers of finished and all groups during `generate`.

        Raises:
            RolloutError: a server does not start, does not answer in time, or does not fit the run.
            ConfigError: a key's environment variable is not set.
        """
        if not publishes and not config.urls:
            raise ConfigError("rollout.sglang.urls", (), "the publishing engine's urls", "attach to them")
        self._config = config
        self._model = model
        self._architecture = read_architecture(model.folder)
        self._nonce = nonce
        self._on_progress = on_progress
        self._version = -1
        self._fruitless = self._vain = 0
        self._publisher: Publisher | None = None
        self._router: Client | None = None
        keys = Keys.read(config)
        processes = [] if config.urls else make_processes(config, model, keys, run_dir=run_dir, seed=seed)
        thread = LoopThread("sglang")
        self._thread: LoopThread | None = thread
        self._pool = thread.run(make_pool(config, model, keys, processes, publishes=publishes))
        try:
            thread.run(self._pool.start())
            self._router = thread.run(make_router(config, keys))
            if publishes:
                transport = make_transport(config, model, run_dir=run_dir, nonce=nonce)
                self._publisher = Publisher(transport, hf_shapes(self._architecture), thread)
        except BaseException:
            self.close()
            raise

    # --- RolloutEngine

    @property
    def weight_version(self) -> int:
        """See `RolloutEngine`; -1 also after a failed publish, and after `release`."""
        return self._version

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, stop: Stop = never) -> list[Group]:
        """See `RolloutEngine`. Failed requests are retried, on another server if possible.

        If `stop` returns True, all requests are cancelled, and the servers abort them.

        Raises:
            RolloutError: also if `attempts` publishes in a row did not help.
        """
        thread = self._open()
        if self._version < 0:
            raise RolloutError("generate: no complete set of weights was published. Fix: publish first")
        source = GroupSource(
            pool=self._pool,
            stop_ids=self._model.stop_ids,
            tokenizer=self._model.tokenizer,
            attempts=self._config.attempts,
            concurrency=self._config.concurrency * len(self._pool.handles),
            layers=self._architecture.num_layers,
            router=self._router,
        )
        try:
            groups = thread.run(unless(stop, source.collect(prompts, sampling, self._version, self._on_progress)))
        except WeightsWanted as wanted:
            self._count_vain(wanted)
            raise
        self._vain = 0
        return groups

    def publish(self, version: int, buckets: Iterable[Bucket]) -> None:
        """See `RolloutEngine`. A server that fails is left out until a later publish; if all fail, `generate` raises
        `WeightsWanted`.

        Raises:
            WeightError: see `RolloutEngine`.
            RolloutError: `attempts` publishes in a row reached none of the servers.
        """
        self._publish(version, buckets, verify=False)

    def _publish(self, version: int, buckets: Iterable[Bucket], *, verify: bool) -> PublishReport:
        thread, wire = self._open(), self._wire(version)
        assert self._publisher is not None, "this process follows another's engine"
        self._version = -1
        handles = thread.run(self._targets(wire, current=verify))
        clients = [handle.client for handle in handles]
        prepare = partial(allocate_rest, self._pool)
        report = self._publisher.publish(clients, wire, buckets, prepare=prepare, verify=verify)
        thread.run(self._settle(handles, report))
        self._count_fruitless(report)
        self._version = version
        return report

    def close(self) -> None:
        """See `RolloutEngine`. Stops the servers that this engine started."""
        thread, self._thread = self._thread, None
        self._version = -1
        if thread is not None:
            try:
                if self._publisher is not None:
                    self._publisher.close()
            finally:
                if self._router is not None:
                    thread.run(self._router.close())
                thread.run(self._pool.close())
                thread.close()

    @property
    def closed(self) -> bool:
        return self._thread is None

    # --- SharedEngine

    @property
    def urls(self) -> tuple[str, ...]:
        """URLs of the servers, for the engines of other processes."""
        return tuple(handle.url for handle in self._pool.handles)

    def follow(self, version: int) -> None:
        """Use a version that another process publishes before the next `generate` here."""
        self._open().run(self._expect(self._wire(version)))
        self._version = version

    def verify(self, version: int, buckets: Iterable[Bucket]) -> None:
        """Publish `version` again to every server that serves it, over random values, and compare checksums.

        The stream is read to its end. A server that fails otherwise waits for the next publish.

        Raises:
            WeightError: a server's weights are not as before; names servers and parameters.
            RolloutError: `version` is not the current one, or as `publish`.
        """
        stream = iter(buckets)
        if version != self._version:
            deque(stream, maxlen=0)  # its source is collective
            raise RolloutError(f"verify: version {version} is not the current one. Fix: publish it first")
        report = self._publish(version, stream, verify=True)
        if changed := [error for error in report.failures.values() if isinstance(error, WeightsChangedError)]:
            raise WeightError("\n".join(map(str, changed)))
        if not report.served:
            logger.warning("no server's weights were verified: none serves version %d", version)

    def release(self) -> None:
        """Release the servers' memory. They serve nothing until `resume` and the next publish.

        Called on the publishing engine, without requests in flight.
        """
        thread = self._open()
        self._version = -1
        thread.run(release_memory(self._pool))

    def resume(self) -> None:
        """Allocate the servers' memory for weights; `publish` allocates the KV cache."""
        self._open().run(resume_memory(self._pool))

    # --- in the loop

    async def _expect(self, wire: str | None) -> list[ServerHandle]:
        """Set the current version; return the servers to publish it to."""
        self._pool.expect(wire)
        return self._pool.targets()

    async def _targets(self, wire: str, *, current: bool) -> list[ServerHandle]:
        """The servers to publish to: those that serve the current version, or all."""
        ready = self._pool.ready()
        self._pool.expect(wire)
        return ready if current else await self._pool.reachable()

    async def _settle(self, handles: Sequence[ServerHandle], report: PublishReport) -> None:
        for handle in handles:
            if handle.client in report.served:
                self._pool.admit(handle, report.version)
        failed = (handle for handle in handles if handle.client in report.failures)
        await asyncio.gather(*(self._judge(handle, report.failures[handle.client]) for handle in failed))

    async def _judge(self, handle: ServerHandle, error: ServerError) -> None:
        """Keep a server that did not get the weights for the next publish, if it is healthy."""
        logger.warning("%s did not get the weights: %s", handle.url, error)
        if handle.released or handle.ended or not await handle.client.alive():
            self._pool.mark_lost(handle, str(error))

    # --- helpers

    def _open(self) -> LoopThread:
        if self._thread is None:
            raise RolloutError("the engine is closed")
        return self._thread

    def _wire(self, version: int) -> str:
        return f"{self._nonce}-{version}"

    def _count_vain(self, wanted: WeightsWanted) -> None:
        """Raises `RolloutError` if `attempts` publishes in a row led to `WeightsWanted` without a finished group."""
        self._vain = 0 if wanted.done else self._vain + 1
        if self._vain >= self._config.attempts:
            raise RolloutError(f"no group was finished between {self._vain} publishes; the last: {wanted}") from wanted

    def _count_fruitless(self, report: PublishReport) -> None:
        """Raises `RolloutError` if `attempts` publishes in a row reached no server."""
        self._fruitless = 0 if report.served else self._fruitless + 1
        if self._fruitless >= self._config.attempts:
            reasons = "\n".join(f"{client.url}: {error}" for client, error in report.failures.items())
            raise RolloutError(f"{self._fruitless} publishes in a row reached no server; the last:\n{reasons}")


# --- memory of servers that share the trainer's devices
#
#   release: pause, wait until idle, release all             the trainer loads its state, trains, offloads it
#   resume:  allocate the weights' memory                     without content
#   publish: send the weights, then allocate the rest         the KV cache is empty
#
# SGLang's scheduler exits if memory is released while requests run, or allocated twice: a server without memory
# stays paused, and its `ServerHandle` records the released parts.
# Source: sglang.srt.managers.scheduler_components.weight_updater of SGLang 0.5.23.


async def release_memory(pool: Pool) -> None:
    """Release the memory of every server. A server that fails is lost, and restarted only after `resume`."""
    pool.hold_starts(True)
    await pool.settled()
    pool.expect(None)
    await asyncio.gather(*(_release(pool, handle) for handle in pool.targets() if not handle.released))
    await pool.ended()


async def _release(pool: Pool, handle: ServerHandle) -> None:
    try:
        await handle.client.pause()
        await handle.client.flush_cache(wait=IDLE_SECONDS)
        await handle.client.release_memory(sorted(MEMORY))
        handle.released = MEMORY
    except ServerError as error:
        pool.mark_lost(handle, f"could not give its memory back: {error}")


async def resume_memory(pool: Pool) -> None:
    """Allocate the weights' memory on the servers, and allow restarts of lost ones."""
    pool.hold_starts(False)
    await asyncio.gather(*(_allocate_weights(pool, handle) for handle in pool.targets() if WEIGHTS in handle.released))


async def _allocate_weights(pool: Pool, handle: ServerHandle) -> None:
    try:
        await handle.client.resume_memory([WEIGHTS])
        handle.released -= {WEIGHTS}
    except ServerError as error:
        pool.mark_lost(handle, f"could not take its memory again: {error}")


async def allocate_rest(pool: Pool, client: Client) -> None:
    """Allocate the rest of a server's memory once its weights are in place. Raises `ServerError`."""
    for handle in pool.handles:
        if handle.client is client and handle.released:
            await client.resume_memory(sorted(handle.released))
            handle.released = frozenset()
