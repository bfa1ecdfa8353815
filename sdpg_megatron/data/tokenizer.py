"""Load the tokenizer and stop tokens of a Hugging Face folder, and check them against the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jinja2
import transformers
from transformers import AutoTokenizer

from sdpg_megatron.errors import ConfigError
from sdpg_megatron.hf_files import read_config, read_json

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""Vocabulary files; a folder needs one of them."""
SAMPLE = "What is 12 + 34?\n  Reply with\tonly the number."
"""Text for the round-trip check: spaces, a line break, a tab."""
SERVED_STOPS = ("<|eom_id|>", "<|content_model_end_sampling|>", "<|ifm|im_end|>")
"""Tokens that SGLang always stops at if the tokenizer has them, listed as end tokens or not."""
_REPLY = "81925"
"""Assistant message of the probe in `turn_end`."""


def load_tokenizer(folder: Path, vocab_size: int) -> Any:
    """Load a transformers tokenizer; check that it round-trips text and fits the embedding.

    Remote code in the folder is never run.

    Args:
        vocab_size: number of rows of the model's embedding.

    Raises:
        ConfigError: transformers cannot load the tokenizer; text does not survive encoding and decoding; or a token id
            is beyond the embedding.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ConfigError("model.path", str(folder), "a folder with a tokenizer", "copy the model's tokenizer there")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise many types, including bare Exception
        raise _unloadable(folder, error) from error
    _check_text_is_kept(folder, tokenizer)
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= vocab_size}
    if beyond:
        token, number = min(beyond.items(), key=lambda item: item[1])
        raise ConfigError(
            f"{folder}: tokenizer",
            f"{len(beyond)} tokens beyond the embedding, the first {token!r} = {number}",
            f"ids below config.json's vocab_size = {vocab_size}",
            "resize the model's embedding for its tokenizer (resize_token_embeddings), or remove the tokens",
        )
    return tokenizer


def _unloadable(folder: Path, error: Exception) -> ConfigError:
    config = folder / "tokenizer_config.json"
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    remote_code = read_json(config).get("auto_map") if config.is_file() else None
    if remote_code:
        return ConfigError(
            f"{config}: auto_map",
            remote_code,
            "a tokenizer class of transformers; code in the folder is never run",
            "save it as a tokenizer.json, with tokenizer_class PreTrainedTokenizerFast and no auto_map",
        )
    file = next(folder / name for name in TOKENIZER_FILES if (folder / name).is_file())
    expected = f"a tokenizer that transformers {transformers.__version__} can load"
    return ConfigError("model.path", f"{file}: {reason}", expected, "download the model's tokenizer files again")


def _check_text_is_kept(folder: Path, tokenizer: Any) -> None:
    tokens = tokenizer(SAMPLE, add_special_tokens=False).input_ids
    found = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
    if found != SAMPLE:
        version, kind = transformers.__version__, type(tokenizer).__name__
        raise ConfigError(
            f"{folder}: tokenizer",
            found,
            f"{SAMPLE!r}, which transformers {version} encoded and decoded by {kind}",
            'install another transformers, or set "tokenizer_class": "PreTrainedTokenizerFast" in '
            "tokenizer_config.json, which uses tokenizer.json unchanged",
        )


def stop_ids(folder: Path, vocab_size: int) -> tuple[int, ...]:
    """Stop tokens of generation_config.json and config.json together, as in SGLang.

    transformers uses only the former; the embedded engine gets all of them. The other special tokens of both files are
    checked, too.

    Args:
        vocab_size: number of rows of the model's embedding.

    Raises:
        ConfigError: neither file has a stop token, or an id is beyond the embedding.
    """
    files = {"config.json": read_config(folder)}
    if (folder / "generation_config.json").exists():
        files["generation_config.json"] = read_json(folder / "generation_config.json")
    for name, content in files.items():
        for key in ("eos_token_id", "bos_token_id", "pad_token_id"):
            # -1 means no padding token in older files
            least = -1 if key == "pad_token_id" else 0
            wrong = [number for number in _ids(content, key) if not _is_row(number, least, vocab_size)]
            if wrong:
                expected = f"ids below config.json's vocab_size = {vocab_size}"
                raise ConfigError(f"{folder / name}: {key}", content[key], expected, f"correct {key}")
    found = [number for content in reversed(files.values()) for number in _ids(content, "eos_token_id")]
    if not found:
        expected = "eos_token_id in generation_config.json or config.json"
        raise ConfigError("model.path", str(folder), expected, "add it to generation_config.json")
    return tuple(dict.fromkeys(found))


def _ids(content: Mapping[str, Any], key: str) -> list[Any]:
    found = content.get(key)
    if found is None:
        return []
    return found if isinstance(found, list) else [found]


def _is_row(number: object, least: int, vocab_size: int) -> bool:
    return type(number) is int and least <= number < vocab_size


def chat_template(tokenizer: Any) -> str:
    """Text of the tokenizer's chat template.

    Raises:
        ConfigError: no template, or several without a default.
    """
    found = tokenizer.chat_template
    if isinstance(found, dict) and found and "default" not in found:
        expected = "one chat template, or one named 'default'"
        fix = "write the one to use to chat_template.jinja, or name it 'default' in tokenizer_config.json"
        raise ConfigError("model.path", f"chat templates {', '.join(map(repr, sorted(found)))}", expected, fix)
    if not found:
        raise ConfigError("model.path", None, "a tokenizer with a chat template", "use an instruction-tuned model")
    template: str = found["default"] if isinstance(found, dict) else found
    return template


def check_stops(tokenizer: Any, stops: Iterable[int], options: Mapping[str, Any]) -> None:
    """Check that the end-of-turn tokens of tokenizer and chat template are stop tokens.

    Otherwise responses would continue to the length limit, or end only on a server.

    Args:
        stops: ids of the stop tokens.
        options: variables of the chat template.

    Raises:
        ConfigError: the tokenizer's end token, one of `SERVED_STOPS`, or the end-of-turn token of the chat template is
            not a stop token; or the chat template cannot be rendered.
    """
    known, added = tuple(stops), tokenizer.get_added_vocab()
    for name, number in (
        ("the tokenizer's end token", tokenizer.eos_token_id),
        ("the token that the chat template ends a turn with", turn_end(tokenizer, options)),
        *(("a token that SGLang stops at", added.get(token)) for token in SERVED_STOPS),
    ):
        if number is not None and number not in known:
            found = f"{number} ({tokenizer.convert_ids_to_tokens(number)})"
            fix = "add it to eos_token_id in the model's generation_config.json"
            raise ConfigError("model.path", found, f"{name} among the stop tokens {known}", fix)


def turn_end(tokenizer: Any, options: Mapping[str, Any]) -> int | None:
    """Special token with which the chat template ends an assistant's turn; None if the turn ends with plain text.

    Raises:
        ConfigError: the chat template is invalid.
    """
    chat_template(tokenizer)
    messages = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": _REPLY}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except (jinja2.TemplateSyntaxError, TypeError, ValueError, LookupError, AttributeError) as error:
        found = f"a chat template with an error: {' '.join(str(error).split())}"
        raise ConfigError("model.path", found, "one that renders a question and an answer", "correct it") from error
    except jinja2.TemplateError:  # the template refuses these messages; it may accept those of the data
        return None
    _, reply, rest = str(text).rpartition(_REPLY)
    if not reply:
        return None
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    tokens = tokenizer(rest, add_special_tokens=False).input_ids
    return next((number for number in tokens if number in special), None)
