"""Fingerprint of a run's inputs: the model that it starts from, and its prompts."""

from __future__ import annotations

from dataclasses import dataclass

from sdpg_megatron.checkpoint.state import fingerprint
from sdpg_megatron.config import RunConfig
from sdpg_megatron.data.source import PromptSource
from sdpg_megatron.errors import ConfigError
from sdpg_megatron.mcore.parallel import ParallelState
from sdpg_megatron.process.rank_environment import RankEnvironment


@dataclass(frozen=True, slots=True)
class RunFingerprint:
    """Digests, the same in every call of a run."""

    model: str
    """`fingerprint` of the model's folder."""
    data: str
    """`PromptSource.digest`."""


def find_run_fingerprint(config: RunConfig, prompts: PromptSource, ranks: ParallelState) -> RunFingerprint:
    """Compute the digests of the model, once on each machine, and of the prompts. Every rank calls it.

    Raises:
        ConfigError: ranks differ; names the first that does.
    """
    first_here = ranks.is_main or RankEnvironment.read().local_rank == 0
    models = ranks.gather_all(fingerprint(config.model.path) if first_here else None)
    data = ranks.gather_all(prompts.digest)
    return RunFingerprint(_same("model.path", models), _same("data", data))


def _same(field: str, digests: list[str | None] | list[str]) -> str:
    expected = digests[0]
    assert expected is not None, "the first rank is the first of its machine"
    for rank, digest in enumerate(digests):
        if digest not in (None, expected):
            wanted = f"{expected} on rank {rank}, as on rank 0"
            raise ConfigError(field, digest, wanted, "give every machine the same files")
    return expected
