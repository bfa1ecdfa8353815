"""Groups of responses from a pool of servers: each is requested until it is complete and of the current version."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sdpg_megatron.errors import RolloutError, ServerError
from sdpg_megatron.records import Completion, Group, Prompt
from sdpg_megatron.rollout.base import OnProgress, Sampling, WeightsWanted, compact
from sdpg_megatron.rollout.sglang.client import Client, GeneratedSample
from sdpg_megatron.rollout.sglang.event_loop import together
from sdpg_megatron.rollout.sglang.pool import Pool
from sdpg_megatron.rollout.sglang.server_handle import ServerHandle

if TYPE_CHECKING:
    from sdpg_megatron.records import Routing

BACKOFF, BACKOFF_LIMIT = 0.5, 10.0
"""Seconds before the second attempt, doubled for each further one up to the limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSource:
    """Requests groups from a pool."""

    pool: Pool
    stop_ids: Sequence[int]
    tokenizer: Any
    attempts: int
    """Maximum requests per group."""
    concurrency: int
    """Groups in flight."""
    layers: int = 0
    """Number of the model's layers, if experts are recorded."""
    router: Client | None = None
    """Gets all requests, and forwards each to one of the servers."""

    async def collect(
        self, prompts: Sequence[Prompt], sampling: Sampling, version: int, on_progress: OnProgress | None = None
    ) -> list[Group]:
        """Generate one group per prompt, in order.

        Args:
            version: the current version, for the records.
            on_progress: called in the event loop's thread; must be fast.

        Raises:
            WeightsWanted: no server has the current weights; holds the finished groups.
            RolloutError: a group could not be completed.
        """
        done: dict[int, Group] = {}
        places = iter(range(len(prompts)))

        async def work() -> None:
            for place in places:
                done[place] = await self._group(prompts[place], sampling, version)
                if on_progress:
                    on_progress(len(done), len(prompts))

        try:
            with self.pool.generating():
                await self.pool.refresh()
                await together(work() for _ in range(min(self.concurrency, len(prompts))))
        except WeightsWanted as wanted:
            raise WeightsWanted(str(wanted), done) from None
        return [done[place] for place in range(len(prompts))]

    async def _group(self, prompt: Prompt, sampling: Sampling, version: int) -> Group:
        """Request one group until it is complete, each time from the least loaded server."""
        last: ServerError | None = None
        for attempt in range(self.attempts):
            if attempt:
                await asyncio.sleep(_backoff(attempt))
            handle = await self.pool.acquire()
            try:
                samples = await self._ask(handle, prompt, sampling)
                return Group(prompt, tuple(self._completion(prompt, sample, version) for sample in samples))
            except ServerError as error:
                if not error.retryable:
                    raise
                last = error
            finally:
                self.pool.release(handle)
        raise RolloutError(f"prompt {prompt.uid}: no whole group in {self.attempts} attempts; the last: {last}")

    async def _ask(self, handle: ServerHandle, prompt: Prompt, sampling: Sampling) -> list[GeneratedSample]:
        """Request a group once. Raises `ServerError` if that fails, or if the group is incomplete or of another
        version."""
        asked, client = ((handle,), handle.client) if self.router is None else (self.pool.ready(), self.router)
        try:
            samples = await self.pool.run(asked, client.generate(prompt.student_tokens, sampling, self.stop_ids))
        except ServerError as error:
            if error.retryable and self.router is None:
                self.pool.report(handle, error)
            raise
        if any(sample.finish_reason == "abort" for sample in samples):
            raise ServerError(client.url, "/generate", "an aborted response", retryable=True)
        found = frozenset().union(*(sample.versions for sample in samples))
        if found != {self.pool.version}:
            outdated = ServerError(
                client.url, "/generate", f"a response of weights {', '.join(sorted(found))}", retryable=True
            )
            if self.router is None:
                self.pool.outdated(handle)
            else:
                await self._review(outdated)
            raise outdated
        for sample in samples:
            self._check_end(client, sample, sampling)
            if sampling.experts:
                self._check_experts(client, prompt, sample)
        return samples

    async def _review(self, outdated: ServerError) -> None:
        """Check all servers' versions, as a router's answer does not name the server.

        Raises:
            WeightsWanted: a server has other weights than the current ones.
            RolloutError: all have the current ones.
        """
        await self.pool.review()
        if len(self.pool.ready()) < len(self.pool.targets()):
            raise WeightsWanted(f"{outdated}. Fix: publish again", {})
        if len(self.pool.ready()) == len(self.pool.handles):
            fix = "Fix: the router must have the run's servers and no others; rollout.sglang.urls names them"
            raise RolloutError(f"{outdated}, which no server of the run has. {fix}")

    def _check_end(self, client: Client, sample: GeneratedSample, sampling: Sampling) -> None:
        """Check that a response ends with a stop token or has its full length: a cut one must not be trained on."""
        if sample.finish_reason == "length" and len(sample.tokens) != sampling.max_tokens:
            found = f"a response cut at {len(sample.tokens)} of {sampling.max_tokens} tokens: its context is too small"
            raise ServerError(client.url, "/generate", found)
        if sample.finish_reason == "stop" and (not sample.tokens or sample.tokens[-1] not in self.stop_ids):
            found = f"a response that ends without any of {list(self.stop_ids)}: the server stops at other tokens, too"
            fix = "Fix: name all of them as eos_token_id in the model's generation_config.json"
            raise ServerError(client.url, "/generate", f"{found}. {fix}")

    def _check_experts(self, client: Client, prompt: Prompt, sample: GeneratedSample) -> None:
        """Check that all tokens but the last have the same number of experts in each layer."""
        tokens = len(prompt.student_tokens) + len(sample.tokens) - 1
        if sample.experts is None:
            fix = "Fix: start the server with --enable-return-routed-experts, or turn rollout.replay_routing off"
            raise ServerError(client.url, "/generate", f"a response without its experts. {fix}")
        if not sample.experts or len(sample.experts) % (4 * tokens * self.layers):
            found = f"{len(sample.experts)} bytes of experts for {tokens} tokens and {self.layers} layers"
            raise ServerError(client.url, "/generate", found)

    def _completion(self, prompt: Prompt, sample: GeneratedSample, version: int) -> Completion:
        tokens = len(prompt.student_tokens) + len(sample.tokens) - 1
        experts: Routing | None = None
        if sample.experts is not None:
            experts = compact(np.frombuffer(sample.experts, "<i4").reshape(tokens, self.layers, -1))
        return Completion(
            tokens=np.array(sample.tokens, np.int32),
            logprobs=np.array(sample.logprobs, np.float32),
            finish_reason=sample.finish_reason,
            weight_version=version,
            text=self.tokenizer.decode(sample.tokens, skip_special_tokens=True),
            experts=experts,
        )


def _backoff(attempt: int) -> float:
    """Random delay in seconds between half and all of the doubling bound, to spread the retries."""
    bound = min(BACKOFF * 2.0 ** (attempt - 1), BACKOFF_LIMIT)
    return random.SystemRandom().uniform(bound / 2, bound)
