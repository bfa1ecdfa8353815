"""Hook of slime's rollout manager: ship the teacher's prompt of each sample to the actors.

A sample's teacher prompt is ``sample.metadata["sdpg_teacher_prompt"]``, or the result of the function
`sdpg.teacher_prompt`: text, chat messages, token ids, or None for a sample without a teacher.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sdpg_megatron.config.external import load_object
from sdpg_megatron.errors import ConfigError, DataError
from sdpg_megatron.objectives import build_objective, passes_of_run
from sdpg_megatron.plugins.slime.settings import SlimeSettings, read_settings

if TYPE_CHECKING:
    from sdpg_megatron.records import TokenIds

METADATA_KEY = "sdpg_teacher_prompt"
"""Key of the teacher's prompt in a sample's metadata."""
SHIPPED_AS = "prompt"
"""Key of the training data that slime ships to the actors and never fills."""


def convert(args: Any, samples: Sequence[Any]) -> dict[str, Any]:
    """Convert samples as slime does, and add the teacher's prompts (``--custom-convert-samples-to-train-data-path``).

    Raises:
        ConfigError: see `read_settings`; or the conversion of this version of slime is not found.
        DataError: a sample without a teacher prompt, or with an invalid one.
    """
    settings = read_settings(args)
    data: dict[str, Any] = _convert_by_slime(args, samples)
    data[SHIPPED_AS] = teacher_prompts(args, settings, samples)
    return data


def teacher_prompts(args: Any, settings: SlimeSettings, samples: Sequence[Any]) -> list[TokenIds]:
    """Teacher prompt of each sample as token ids; empty for a sample without a teacher.

    Raises:
        DataError: see `convert`.
    """
    steps = settings.config.total_optimizer_steps
    if not passes_of_run(build_objective(settings.config.objective, steps), steps).privileged:
        return [np.empty(0, np.int32) for _ in samples]
    read: Callable[[Any, Any], Any] = _from_metadata
    if settings.teacher_prompt is not None:
        read = load_object("sdpg.teacher_prompt", settings.teacher_prompt)
    return [_token_ids(args, sample, read(args, sample)) for sample in samples]


def _from_metadata(args: Any, sample: Any) -> Any:
    metadata = sample.metadata or {}
    if METADATA_KEY not in metadata:
        raise DataError(
            _name(sample),
            f"no {METADATA_KEY!r} in its metadata",
            "the teacher's prompt: text, chat messages, token ids, or None for a sample without a teacher",
            "add it to the metadata of the data (--metadata-key) or in your rollout function, or set "
            "sdpg.teacher_prompt to a function (args, sample)",
        )
    return metadata[METADATA_KEY]


def _token_ids(args: Any, sample: Any, prompt: Any) -> TokenIds:
    """Token ids of a prompt, rendered and encoded as slime does with the student's."""
    if prompt is None:
        return np.empty(0, np.int32)
    ids = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    if _is_list_of(ids, Mapping):
        tools = (sample.metadata or {}).get("tools")
        options = getattr(args, "apply_chat_template_kwargs", None) or {}
        ids = _tokenizer(args.hf_checkpoint).apply_chat_template(
            ids, tools=tools, tokenize=False, add_generation_prompt=True, **options
        )
    if isinstance(ids, str):
        ids = _tokenizer(args.hf_checkpoint).encode(ids, add_special_tokens=False)
    if not _is_list_of(ids, int) or min(ids) < 0:
        expected = "text, a list of chat messages or a list of token ids, not empty; or None"
        raise DataError(f"{_name(sample)}: teacher prompt", repr(prompt)[:200], expected, "correct it")
    return np.array(ids, np.int32)


def _is_list_of(value: Any, kind: type) -> bool:
    """True for a list or tuple of such items that is not empty."""
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(item, kind) for item in value)


def _name(sample: Any) -> str:
    return f"sample {sample.index} of group {sample.group_index}"


@functools.cache
def _tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=True)  # as slime loads it


def _convert_by_slime(args: Any, samples: Sequence[Any]) -> dict[str, Any]:
    """Call the conversion that slime runs without ``--custom-convert-samples-to-train-data-path``.

    It is a method of slime's rollout manager, which reads only the attributes set here.
    """
    rollout: Any = importlib.import_module("slime.ray.rollout")
    kind = rollout.RolloutManager
    actor = getattr(kind, "__ray_metadata__", None)
    manager = object.__new__(kind if actor is None else actor.modified_class)
    manager.args = args
    manager.custom_convert_samples_to_train_data_func = None
    path = getattr(args, "custom_reward_post_process_path", None)
    manager.custom_reward_post_process_func = None if path is None else rollout.load_function(path)
    try:
        convert_samples = manager._convert_samples_to_train_data
    except AttributeError as error:
        found = "a slime without RolloutManager._convert_samples_to_train_data"
        fix = "write the conversion yourself, and set its 'prompt' by sdpg_megatron.plugins.slime.samples"
        raise ConfigError("slime", found, "the slime that docs/plugin.md names", fix) from error
    converted: dict[str, Any] = convert_samples(list(samples))
    return converted
