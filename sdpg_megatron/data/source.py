"""Source of the prompts of a run: data files or reasoning-gym."""

from __future__ import annotations

from typing import Any, Protocol

from sdpg_megatron.config import DataConfig
from sdpg_megatron.data.dataset import OnRows, PromptDataset
from sdpg_megatron.errors import ConfigError
from sdpg_megatron.records import Prompt


class PromptSource(Protocol):
    """Prompts by index. The prompt of an index is the same on every rank and in later runs."""

    @property
    def size(self) -> int | None:
        """Number of prompts; None for an endless source."""
        ...

    @property
    def digest(self) -> str:
        """Digest of the content of the prompts."""
        ...

    def __getitem__(self, index: int) -> Prompt: ...

    def describe(self) -> str:
        """Short description for the log."""
        ...


def load_prompts(
    config: DataConfig,
    tokenizer: Any,
    seed: int,
    *,
    scored_by_metadata: bool = False,
    on_rows: OnRows = lambda rows: None,
) -> tuple[PromptSource, PromptDataset | None]:
    """Load the training prompts and the held-out prompts; the latter are None without evaluation data.

    Args:
        tokenizer: transformers tokenizer with a chat template.
        seed: seed of the run.
        scored_by_metadata: True if the verifier may read the other columns; see `PromptDataset.load`.
        on_rows: called with the number of rows read so far, starting with the held-out files.

    Raises:
        ConfigError: no data file; invalid context template, tokenizer or reasoning-gym task; or no other problem for
            `data.context_of: other`.
        DataError: an invalid row.
    """
    if config.reasoning_gym.tasks:
        try:
            from sdpg_megatron.data.gym import GymSource
        except ModuleNotFoundError as error:
            if error.name != "reasoning_gym":
                raise
            expected, fix = "the package reasoning_gym, which is not installed", "pip install -e '.[gym]'"
            raise ConfigError("data.reasoning_gym.tasks", sorted(config.reasoning_gym.tasks), expected, fix) from error
        source = GymSource(config, tokenizer, seed)
        return source, source.held_out
    if not config.train:
        raise ConfigError("data.train", [], "at least one file", "name one, or set data.reasoning_gym.tasks")
    held_out = None
    if config.eval:
        held_out = PromptDataset.load(config, config.eval, tokenizer, distill_enabled=False, on_rows=on_rows)
    prompts = PromptDataset.load(
        config,
        config.train,
        tokenizer,
        seed=seed,
        held_out=held_out,
        scored_by_metadata=scored_by_metadata,
        on_rows=on_rows,
    )
    return prompts, held_out
