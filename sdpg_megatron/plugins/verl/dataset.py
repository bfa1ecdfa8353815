"""verl's data set with a teacher prompt in each row.

data.custom_cls.path=pkg://sdpg_megatron.plugins.verl.dataset data.custom_cls.name=PrivilegedDataset
"""

from __future__ import annotations

import importlib
from typing import Any

from sdpg_megatron.errors import DataError
from sdpg_megatron.plugins.verl.rows import TEACHER_KEY

COLUMN = "teacher_prompt"
"""Default of ``data.teacher_prompt_key``."""

_datasets: Any = importlib.import_module("verl.utils.dataset.rl_dataset")
_tokenizers: Any = importlib.import_module("verl.utils.tokenizer")


class PrivilegedDataset(_datasets.RLHFDataset):  # type: ignore[misc]
    """verl's `RLHFDataset` whose rows have a column with the teacher's chat messages.

    The messages are those of the prompt, with the privileged context. Their tokens, by the chat template and its
    options that also render the prompt, travel in the row's ``extra_info``, which every trainer of verl hands on.
    """

    def __getitem__(self, item: int) -> dict[str, Any]:
        """
        Raises:
            DataError: the row has no teacher prompt.
        """
        row: dict[str, Any] = super().__getitem__(item)
        column = self.config.get("teacher_prompt_key", COLUMN)
        if not (messages := row.pop(column, None)):
            expected = "chat messages, as in the prompt"
            fix = "write the teacher's messages there, or set +data.teacher_prompt_key to their column"
            raise DataError(f"row {item}, column {column}", f"no messages (columns {sorted(row)})", expected, fix)
        tokens = self.tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, **self.apply_chat_template_kwargs
        )
        extra = {**row["extra_info"], TEACHER_KEY: list(_tokenizers.normalize_token_ids(tokens))}
        return {**row, "extra_info": extra}
