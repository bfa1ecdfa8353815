"""Student and teacher prompts in the published chat templates, with their options, and by SmolLM2's own tokenizer."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from sdpg_megatron.config import DataConfig
from sdpg_megatron.data.examples import Example
from sdpg_megatron.data.render import Renderer
from sdpg_megatron.errors import ConfigError
from tests.tiny import BOS, tiny_tokenizer
from tools.prepare_smollm2 import FOLDER, default_cache

SMOLLM2 = default_cache() / FOLDER
EXAMPLE = Example(question="1 + 1?", answer="2")
TOLD = "1 + 1?\nThe correct answer to this problem is: 2"


def templates() -> Path | None:
    """TRL ships the published templates of the model families, as files; nothing of it is imported."""
    spec = importlib.util.find_spec("trl")
    places = spec.submodule_search_locations if spec else None
    return Path(places[0]) / "chat_templates" if places else None


def tokenizer(family: str) -> Any:
    """The tests' tokenizer with the chat template of a family: its text is the family's, its tokens are not."""
    folder = templates()
    if folder is None:
        pytest.skip("needs the chat templates in the package trl (scripts/setup.sh installs it)")
    tiny = tiny_tokenizer()
    tiny.chat_template = (folder / f"{family}.jinja").read_text()
    return tiny


def chatml(content: str, system: str = "", opening: str = "") -> str:
    first = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    return f"{first}<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n{opening}"


def llama3(content: str, system: str = "", preamble: str = "") -> str:
    def turn(role: str, text: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>"

    first = turn("system", preamble + system) if system or preamble else ""
    return BOS + first + turn("user", content) + "<|start_header_id|>assistant<|end_header_id|>\n\n"


QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
KNOWLEDGE = "Cutting Knowledge Date: December 2023\nToday Date: {}\n\n"
NO_THOUGHT = "<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    ("family", "fields", "frame"),
    [
        ("qwen3", {}, lambda text: chatml(text)),
        ("qwen3", {"template_options": {"enable_thinking": True}}, lambda text: chatml(text)),
        (
            "qwen3",
            {"template_options": {"enable_thinking": False}},
            lambda text: chatml(text, opening=NO_THOUGHT),
        ),
        ("qwen3", {"system": "Be brief."}, lambda text: chatml(text, "Be brief.")),
        ("qwen2_5", {}, lambda text: chatml(text, QWEN)),
        ("qwen2_5", {"system": "Be brief."}, lambda text: chatml(text, "Be brief.")),
        ("llama3", {}, lambda text: llama3(text)),
        ("llama3", {"system": "Be brief."}, lambda text: llama3(text, "Be brief.")),
        ("llama3_1", {}, lambda text: llama3(text, preamble=KNOWLEDGE.format("26 Jul 2024"))),
        (
            "llama3_1",
            {"template_options": {"date_string": "1 Jan 2026"}},
            lambda text: llama3(text, preamble=KNOWLEDGE.format("1 Jan 2026")),
        ),
    ],
)
def test_published_templates(family: str, fields: dict[str, Any], frame: Any) -> None:
    tiny = tokenizer(family)
    student, teacher = Renderer(DataConfig(**fields), tiny).render(EXAMPLE)
    assert tiny.decode(student) == frame("1 + 1?")
    assert tiny.decode(teacher) == frame(TOLD)
    own = [{"role": "system", "content": fields["system"]}] if "system" in fields else []
    options = fields.get("template_options", {})
    assert list(student) == tiny.apply_chat_template(
        [*own, {"role": "user", "content": "1 + 1?"}], add_generation_prompt=True, return_dict=False, **options
    )


@pytest.mark.model
@pytest.mark.skipif(not SMOLLM2.exists(), reason=f"needs {SMOLLM2}, which scripts/setup.sh prepares")
def test_smollm2() -> None:
    own = AutoTokenizer.from_pretrained(SMOLLM2)
    student, teacher = Renderer(DataConfig(), own).render(EXAMPLE)
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert own.decode(student) == chatml("1 + 1?", system)
    assert own.decode(teacher) == chatml(TOLD, system)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"enable_thnking": False}, "did you mean 'enable_thinking'"),
        ({"add_generation_prompt": False}, "'add_generation_prompt'"),
        ({"tokenize": False}, "'tokenize'"),
    ],
)
def test_an_option_that_the_template_does_not_leave_to_the_user_is_refused(options: dict[str, Any], names: str) -> None:
    tiny = tiny_tokenizer()
    tiny.chat_template += "{% if enable_thinking %}<think>{% endif %}"
    (student,) = Renderer(DataConfig(template_options={"enable_thinking": True}), tiny).students([EXAMPLE])
    assert tiny.decode(student).endswith("<think>")
    with pytest.raises(ConfigError, match=rf"data\.template_options: .*{names}"):
        Renderer(DataConfig(template_options=options), tiny)
