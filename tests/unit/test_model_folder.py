"""A model folder that a run cannot use is one error with file, found, expected and fix, before anything starts."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sdpg_megatron.architecture import Architecture, read_architecture
from sdpg_megatron.config import RunConfig
from sdpg_megatron.config.load import parse
from sdpg_megatron.convert.source import find_source
from sdpg_megatron.data.tokenizer import SAMPLE, check_stops, load_tokenizer, stop_ids, turn_end
from sdpg_megatron.errors import ConfigError, SdpgError
from sdpg_megatron.rollout import transformers_check
from sdpg_megatron.rollout.transformers_check import check_reading, inverse_frequencies
from sdpg_megatron.train.eval_target import find_eval_target
from sdpg_megatron.train.inputs import load_inputs, load_model_inputs
from tests.tiny import EOS, TURN_END, VOCAB, write_tiny_model

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("whole") / "model", "llama", tied=False, seed=1, layers=1)


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def run_of(folder: Path, **sections: Any) -> RunConfig:
    tree = {
        "run_dir": str(folder.parent / "run"),
        "steps": 1,
        "model": {"path": str(folder)},
        "data": {"train": [], "max_prompt_tokens": 64},
        "rollout": {"max_response_tokens": 8},
        "optimizer": {"warmup_steps": 0},
    }
    return parse({**tree, **sections})


def edit(file: str, **changes: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def edit_ends(value: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for name in ("config.json", "generation_config.json"):
            edit(name, eos_token_id=value)(folder)

    return change


def write(file: str, text: str) -> Callable[[Path], None]:
    return lambda folder: void((folder / file).write_text(text))


def void(_: object) -> None: ...


def remove(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).unlink()


def add_tokens(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|turn|>", "<|endturn|>"]})
    tokenizer.save_pretrained(folder)


def dangle(folder: Path) -> None:
    file = "model-00001-of-00001.safetensors"
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / file).symlink_to("../../blobs/gone")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, file)}))


def cut_embedding(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:290].clone()
    save_file(tensors, folder / "model.safetensors")


def name_templates(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    templates = [{"name": name, "template": "{{ messages }}"} for name in ("rag", "tool_use")]
    edit("tokenizer_config.json", chat_template=templates)(folder)


def strip_blanks(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["normalizer"] = {"type": "Replace", "pattern": {"Regex": "\\s+"}, "content": " "}
    path.write_text(json.dumps(content))


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "LFS tokenizer": (
        write("tokenizer.json", LFS),
        r"tokenizer\.json: a Git LFS pointer', expected a file with content.*git lfs pull",
    ),
    "LFS config": (write("config.json", LFS), r"config\.json: a Git LFS pointer"),
    "LFS weights": (write("model.safetensors", LFS), r"model\.safetensors: a Git LFS pointer"),
    "LFS template": (write("chat_template.jinja", LFS), r"chat_template\.jinja: a Git LFS pointer"),
    "empty tokenizer": (write("tokenizer.json", ""), r"tokenizer\.json: an empty file"),
    "empty weights": (write("model.safetensors", ""), r"model\.safetensors: an empty file"),
    "cut tokenizer": (
        write("tokenizer.json", '{"version": "1.0", "mod'),
        r"tokenizer\.json: .* expected valid JSON.*hf download",
    ),
    "cut generation config": (write("generation_config.json", "{"), r"generation_config\.json: .* valid JSON"),
    "hollow tokenizer": (
        write("tokenizer.json", "{}"),
        r"tokenizer\.json: \w+: .* expected a tokenizer that transformers",
    ),
    "list": (write("tokenizer_config.json", "[]"), r"tokenizer_config\.json: a list', expected a JSON object"),
    "no tokenizer": (remove("tokenizer.json"), "expected a folder with a tokenizer"),
    "no weights": (remove("model.safetensors"), r"found neither model\.safetensors nor .*index\.json"),
    "custom code": (
        edit("tokenizer_config.json", tokenizer_class="Mine", auto_map={"AutoTokenizer": ["mine.Mine", None]}),
        r"tokenizer_config\.json: auto_map: found .*mine\.Mine.* never run\. Fix: save it as a tokenizer\.json",
    ),
    "templates": (name_templates, r"found \"chat templates 'rag', 'tool_use'\", expected one .*named 'default'"),
    "no template": (remove("chat_template.jinja"), "expected a tokenizer with a chat template"),
    "template": (
        write("chat_template.jinja", "{% for m in messages %}{{ m.content }}"),
        "a chat template with an error",
    ),
    "template's filter": (write("chat_template.jinja", "{{ messages | strange }}"), "a chat template with an error"),
    "dangling link": (
        dangle,
        r"model-00001-of-00001\.safetensors: a link to \.\./\.\./blobs/gone, which does not exist",
    ),
    "padding": (
        edit("config.json", pad_token_id=VOCAB),
        r"config\.json: pad_token_id: found 300, expected ids below .*300",
    ),
    "beginning": (
        edit("generation_config.json", bos_token_id=1000),
        r"generation_config\.json: bos_token_id: found 1000",
    ),
    "end": (
        edit("generation_config.json", eos_token_id=[2, 4, 300]),
        r"eos_token_id: found \[2, 4, 300\], expected ids",
    ),
    "negative end": (edit("config.json", eos_token_id=-1), r"config\.json: eos_token_id: found -1"),
    "end in words": (edit("generation_config.json", eos_token_id=EOS), r"eos_token_id: found '<eos>', expected ids"),
    "no end": (edit_ends(None), r"expected eos_token_id in generation_config\.json"),
    "tokens beyond": (
        add_tokens,
        r"2 tokens beyond the embedding, the first '<\|turn\|>' = 300\", expected ids below .*300",
    ),
    "rows": (cut_embedding, r"embed_tokens\.weight' has shape \[290, 64\], expected \[300, 64\] from vocab_size = 300"),
    "turn's end": (
        edit("generation_config.json", eos_token_id=2),
        r"found '4 \(<\|im_end\|>\)', expected the token that the chat",
    ),
    "tokenizer's end": (
        edit_ends(4),
        r"found '2 \(<eos>\)', expected the tokenizer's end token",
    ),
    "blanks": (
        strip_blanks,
        r"tokenizer: found 'What is 12 \+ 34\? Reply with only the number\.', expected .*PreTrainedTokenizerFast",
    ),
    "rotary": (
        edit("config.json", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}),
        "rope_type",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_before_anything_starts(folder: Path, name: str) -> None:
    damage, message = FAULTS[name]
    damage(folder)
    with pytest.raises(SdpgError, match=rf"(?s){message}.*") as caught:
        load_model_inputs(run_of(folder))
    assert "Fix: " in str(caught.value)


@pytest.mark.parametrize("engine", ["hf", "sglang"])
def test_both_engines_ask_for_the_same_stop_tokens(folder: Path, engine: str) -> None:
    edit("generation_config.json", eos_token_id=2)(folder)
    with pytest.raises(ConfigError, match="the token that the chat template ends a turn with among the stop tokens"):
        load_model_inputs(run_of(folder, rollout={"engine": engine, "max_response_tokens": 8}))


def test_a_whole_folder_is_taken(whole: Path) -> None:
    inputs = load_model_inputs(run_of(whole))
    assert inputs.stop_ids == (2, 4)
    assert inputs.arch.vocab_size == VOCAB


def test_stop_ids_come_from_either_file(folder: Path) -> None:
    assert stop_ids(folder, VOCAB) == (2, 4)
    (folder / "generation_config.json").unlink()
    assert stop_ids(folder, VOCAB) == (2,)


def test_stop_ids_are_those_of_both_files_as_for_a_server(folder: Path) -> None:
    edit("config.json", eos_token_id=[4, 7])(folder)
    assert stop_ids(folder, VOCAB) == (2, 4, 7)
    edit("generation_config.json", eos_token_id=None)(folder)
    assert stop_ids(folder, VOCAB) == (4, 7)


def test_padding_of_minus_one_is_none(folder: Path) -> None:
    edit("config.json", pad_token_id=-1)(folder)
    assert stop_ids(folder, VOCAB) == (2, 4)


# --- where a turn ends


def tokenizer(folder: Path, template: str) -> Any:
    found = AutoTokenizer.from_pretrained(folder)
    found.chat_template = template
    return found


@pytest.mark.parametrize(
    ("template", "end"),
    [
        ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}", TURN_END),
        ("{% for m in messages %}{{ m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}", EOS),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", None),
        ("{% for m in messages %}{{ m.content | upper }} end{% endfor %}", None),
        ("{{ raise_exception('not these') }}", None),
        ("{% for m in messages %}{{ m.content }}{% if closed %}<|im_end|>{% endif %}{% endfor %}", TURN_END),
    ],
)
def test_the_token_that_ends_a_turn(whole: Path, template: str, end: str | None) -> None:
    found = tokenizer(whole, template)
    number = turn_end(found, {"closed": True})
    assert number == (None if end is None else found.convert_tokens_to_ids(end))


def test_a_turn_that_ends_with_a_stop_token_is_taken(whole: Path) -> None:
    found = AutoTokenizer.from_pretrained(whole)
    check_stops(found, (4, 2), {})
    found.add_tokens("<|eom_id|>")
    with pytest.raises(ConfigError, match=r"\(<\|eom_id\|>\)', expected a token that SGLang stops at among the stop"):
        check_stops(found, (4, 2), {})


# --- what transformers makes of the files


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen3_moe", "mixtral"])
def test_transformers_reads_what_the_trainer_reads(tmp_path: Path, family: Any) -> None:
    folder = write_tiny_model(tmp_path / "model", family, tied=False, seed=1, layers=1)
    for rope in ({"rope_type": "default", "rope_theta": 1e6}, LLAMA3):
        edit("config.json", rope_parameters=rope)(folder)
        check_reading(folder, read_architecture(folder))
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 7e4}))  # as transformers 4 writes it
    arch = read_architecture(folder)
    assert arch.rope_theta == 7e4
    check_reading(folder, arch)


def test_frequencies_are_those_of_transformers(tmp_path: Path) -> None:
    """The values of the file's own formula for Llama 3, from a model that transformers builds."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(hidden_size=512, num_attention_heads=4, head_dim=128, rope_parameters=LLAMA3)
    config.save_pretrained(tmp_path)
    arch = read_architecture(tmp_path)
    assert arch.rope_scaling == 8.0
    torch.testing.assert_close(
        inverse_frequencies(arch).float(), LlamaRotaryEmbedding(config=config).inv_freq, rtol=1e-6, atol=0
    )


class OldRotary:
    """The embedding of a transformers that does not know the file's keys: its default base."""

    attention_scaling = 1.0

    def __init__(self, config: Any) -> None:
        self.inv_freq = 1e4 ** -(torch.arange(0, 16, 2) / 16)


def test_a_transformers_that_takes_another_rotary_base_is_refused(folder: Path) -> None:
    edit("config.json", rope_parameters={"rope_type": "default", "rope_theta": 1e6})(folder)
    with mock.patch.object(transformers_check, "_rotary_class", lambda config: OldRotary):
        with pytest.raises(
            ConfigError, match=r"config\.json: rotary embedding: found 'base 10000 .*expected base 1e\+06 "
        ):
            check_reading(folder, read_architecture(folder))
        with pytest.raises(ConfigError, match="rotary embedding"):
            load_model_inputs(run_of(folder))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"rms_eps": 1e-3}, "rms_norm_eps"),
        ({"tied_embeddings": True}, "tie_word_embeddings"),
        ({"num_kv_heads": 4}, "num_key"),
    ],
)
def test_other_settings_that_transformers_reads_otherwise_are_refused(
    folder: Path, change: dict[str, Any], key: str
) -> None:
    arch: Architecture = dataclasses.replace(read_architecture(folder), **change)
    with pytest.raises(
        ConfigError, match=rf"config\.json: {key}.*transformers .* does not read the file as the trainer"
    ):
        check_reading(folder, arch)


def test_a_tokenizer_class_that_loses_blanks_is_refused(whole: Path) -> None:
    """As transformers 5.4 to 5.21 do with a byte-level tokenizer.json under the name LlamaTokenizer."""
    decode = PreTrainedTokenizerFast.decode

    def lossy(self: Any, *args: Any, **options: Any) -> str:
        return str(decode(self, *args, **options)).replace(" ", "")

    kind = type(AutoTokenizer.from_pretrained(whole))
    with (
        mock.patch.object(kind, "decode", lossy),
        pytest.raises(
            ConfigError, match=r"tokenizer: found 'Whatis12\+34\?.*encoded and decoded by \w+\. Fix: install"
        ),
    ):
        load_tokenizer(whole, VOCAB)
    assert SAMPLE.count(" ") > 5


# --- what is named instead of a folder


@pytest.mark.parametrize("read", [read_architecture, find_source, lambda path: find_eval_target(path, None, [])])
def test_the_id_of_a_hub_is_told_how_to_become_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Path], object]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SdpgError, match=r"found .*Fix: .*: hf download Qwen/Qwen3-4B --local-dir Qwen3-4B, and name"):
        read(Path("Qwen/Qwen3-4B"))
    os.makedirs("Qwen/Qwen3-4B")
    with pytest.raises(SdpgError, match=r"found .*Fix: check the path, or complete the folder"):
        read(Path("Qwen/Qwen3-4B"))
    for path in (Path("Qwen/Qwen"), tmp_path / "Qwen" / "Qwen"):  # beside a folder that is there
        with pytest.raises(SdpgError, match=rf"found .*Fix: check the path: there is no Qwen in {tmp_path}/Qwen$"):
            read(path)


def test_transformer_engine_that_is_not_there_is_refused(whole: Path) -> None:
    config = run_of(whole, model={"path": str(whole), "spec": "te", "dtype": "bfloat16"})
    with pytest.raises(
        ConfigError, match=r"^model\.spec: found 'te, and no GPU', .*Fix: pip install 'transformer-engine"
    ):
        load_inputs(config)
