"""Where a run's prompts come from."""

from __future__ import annotations

from typing import Any, Protocol

from sdpg_megatron.config import DataConfig
from sdpg_megatron.data.dataset import OnRows, PromptDataset
from sdpg_megatron.errors import ConfigError
from sdpg_megatron.records import Prompt


class PromptSource(Protocol):
    """Prompts by index. Every rank makes the same prompt of the same index, also in a later run."""

    @property
    def size(self) -> int | None:
        """Number of prompts; None for a source without end."""
        ...

    @property
    def digest(self) -> str:
        """Of what the prompts are: another one for other prompts."""
        ...

    def __getitem__(self, index: int) -> Prompt: ...

    def describe(self) -> str:
        """What there is, in a few words."""
        ...


def load_prompts(
    config: DataConfig,
    tokenizer: Any,
    seed: int,
    *,
    scored_by_metadata: bool = False,
    on_rows: OnRows = lambda rows: None,
) -> tuple[PromptSource, PromptDataset | None]:
    """The prompts to train on and, if there are any, the held-out ones.

    Args:
        tokenizer: transformers tokenizer with a chat template.
        seed: the run's.
        scored_by_metadata: Whether the verifier may read the other columns; see `PromptDataset.load`.
        on_rows: called with the number of rows read so far, of the held-out files first.

    Raises:
        ConfigError: no data file is named; the context template, the tokenizer or a reasoning-gym task cannot be used;
            `data.context_of` is "other" and no other problem fits.
        DataError: a row of a file cannot be used.
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
