"""The slime plugin in the rollout manager: teacher prompts of samples; and its configuration from slime's arguments."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from sdpg_megatron.errors import ConfigError, DataError
from sdpg_megatron.plugins.slime.samples import convert
from sdpg_megatron.plugins.slime.settings import PATHS, REFUSED, read_settings
from tests.host import slime_contract as contract
from tests.host.slime_model import ModelSample
from tests.host.slime_reference import made_samples
from tests.pool import RankPool
from tests.tiny import tiny_tokenizer

# --- the rollout manager


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    tiny_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def from_label(args: Any, sample: Any) -> str:
    return f"{args.hf_checkpoint[:1]}{sample.reward}"


def converted(args: Any, prompt: Any, **changes: Any) -> list[list[int]]:
    """Teacher prompts that arrive for two samples, of which the second has token ids."""
    slime = contract.slime("model")
    samples = made_samples(slime.sample)[:2]
    samples[0].metadata = {"sdpg_teacher_prompt": prompt, **changes}
    return [list(ids) for ids in slime.convert(args, samples)["prompt"]]


def test_a_teacher_prompt_is_text_messages_ids_or_none(tokenizer_folder: Path) -> None:
    args, tokenizer = contract.arguments(tokenizer_folder, use_kl_loss=True), tiny_tokenizer()
    second = made_samples(ModelSample)[1].metadata["sdpg_teacher_prompt"]
    assert converted(args, "What is 12?") == [tokenizer.encode("What is 12?", add_special_tokens=False), second]
    messages = [{"role": "user", "content": "What is 12?"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert converted(args, messages) == [tokenizer.encode(rendered, add_special_tokens=False), second]
    assert converted(args, (7, 8)) == converted(args, np.array([7, 8])) == [[7, 8], second]
    assert converted(args, None) == [[], second]


def test_a_function_may_make_the_teacher_prompt(tokenizer_folder: Path) -> None:
    args = contract.arguments(tokenizer_folder, sdpg={"teacher_prompt": f"{__name__}:from_label"})
    prompts = converted(args, None)
    assert [tiny_tokenizer().decode(ids) for ids in prompts] == ["/1.2", "/-0.7"]


def test_no_prompt_is_needed_without_a_teacher(tokenizer_folder: Path) -> None:
    args = contract.arguments(tokenizer_folder, sdpg={"objective": {"name": "grpo"}})
    assert converted(args, 3.5) == [[], []]


@pytest.mark.parametrize("prompt", ["", [], [1, -2], ["a"], 3.5, [{"role": "user"}, 3]])
def test_an_invalid_teacher_prompt_names_its_sample(tokenizer_folder: Path, prompt: Any) -> None:
    with pytest.raises(DataError, match="sample 0 of group 0: teacher prompt: found"):
        converted(contract.arguments(tokenizer_folder), prompt)


def test_a_missing_teacher_prompt_names_its_sample(folder: Path) -> None:
    slime, args = contract.slime("model"), contract.arguments(folder)
    samples = made_samples(slime.sample)
    samples[3].metadata = {}
    with pytest.raises(DataError, match="sample 3 of group 0: found no 'sdpg_teacher_prompt' in its metadata"):
        convert(args, samples)


def rows_of(kind: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Training data of slime's own conversion, and of the hook."""
    slime, args = contract.slime(kind), contract.arguments(folder)
    with_hook = slime.convert(args, made_samples(slime.sample))
    args.custom_convert_samples_to_train_data_path = f"{__name__}.own_conversion"
    return slime.convert(args, made_samples(slime.sample)), with_hook


def own_conversion(args: Any, samples: Sequence[Any]) -> dict[str, Any]:
    from sdpg_megatron.plugins.slime.samples import _convert_by_slime

    return _convert_by_slime(args, samples)


@contract.with_contract
def test_the_rest_is_slimes_own_conversion(folder: Path, ranks: RankPool, kind: str) -> None:
    ((own, found),) = ranks.run(rows_of, 1, kind, folder)
    assert len(found.pop("prompt")) == 8
    assert found == own
    assert {"tokens", "rewards", "loss_masks", "rollout_mask_sums"} <= set(own)


# --- arguments


def read_yaml(text: str) -> dict[str, Any]:
    """As slime reads ``--custom-config-path``: by YAML 1.1, where 1e-3 is text."""
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def test_the_yaml_file_sets_the_objective(folder: Path) -> None:
    text = "sdpg: {columns: valid, objective: {beta: 1e-3, gate: off, clip_high: 0.3}, head: {chunk_rows: 64}}"
    settings = read_settings(contract.arguments(folder, rollout_temperature=0.7, **read_yaml(text)))
    config = settings.config
    assert (config.objective.beta, config.objective.gate, config.objective.clip_high) == (1e-3, False, 0.3)
    assert (config.head.chunk_rows, config.rollout.temperature, settings.columns) == (64, 0.7, "valid")
    assert config.total_optimizer_steps == 4
    assert read_settings(contract.arguments(folder)).columns == "padded"


OTHERS: dict[str, Any] = {"loss_type": "policy_loss", "compute_advantages_and_returns": False, "mtp_num_layers": 1}
OTHERS |= {"rollout_top_p": 0.9, "entropy_coef": 0.1, "kl_loss_coef": 0.1}


@pytest.mark.parametrize("argument", [*REFUSED, *PATHS])
def test_an_argument_that_would_be_ignored_or_fail_is_refused(folder: Path, argument: str) -> None:
    value = None if argument in PATHS else OTHERS.get(argument, True)
    with pytest.raises(ConfigError, match=f"^--{argument.replace('_', '-')}: found .*, expected .*Fix: "):
        read_settings(contract.arguments(folder, **{argument: value}))


@pytest.mark.parametrize(
    ("changes", "sdpg", "message"),
    [
        ({"advantage_estimator": "gspo"}, {}, "--advantage-estimator: found 'gspo'"),
        ({}, {"colums": "valid"}, "sdpg.colums: found 'colums', expected a known key. Fix: did you mean 'columns'"),
        ({}, {"columns": "all"}, "sdpg.columns: found 'all', expected 'padded' or 'valid'"),
        ({}, {"teacher_prompt": 3}, "sdpg.teacher_prompt: found 3"),
        ({}, {"objective": {"aggregation": "token-mean"}}, "sdpg.objective.aggregation: found 'token-mean'"),
        ({}, {"objective": {"betta": 0.1}}, "objective.betta: found 'betta', expected a known key"),
        ({}, {"objective": {"teacher": "ema"}}, "sdpg.objective.teacher: found 'ema'"),
        ({}, {"objective": {"context": "peer"}}, "sdpg.objective.context: found 'peer'"),
        ({"use_kl_loss": False}, {}, "sdpg.objective.alpha: found 0.001, expected 0 without a reference"),
        ({"use_rollout_logprobs": True}, {"objective": {"correction": "mask"}}, "sdpg.objective.correction"),
        ({"global_batch_size": 1}, {"objective": {"policy": "reinforce"}}, "objective.policy: found 'reinforce'"),
        ({}, {"objective": {"beta_decay_steps": 9}}, "objective.beta_warmup_steps [+] objective.beta_decay_steps"),
        ({}, "objective", "sdpg: found 'objective', expected a mapping"),
    ],
)
def test_an_invalid_configuration_names_its_field(
    folder: Path, changes: dict[str, Any], sdpg: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_settings(contract.arguments(folder, **changes, sdpg=sdpg))
