"""A successful response to the same question as the teacher's context."""

from __future__ import annotations

from typing import Any

import pytest

from sdpg_megatron.batching.collate import PackingLayout, collate
from sdpg_megatron.batching.peer_context import describe_contexts, with_peers, without_thinking
from sdpg_megatron.batching.samples import make_samples
from sdpg_megatron.config import DataConfig, ObjectiveConfig
from sdpg_megatron.data.render import Renderer
from sdpg_megatron.errors import ConfigError
from sdpg_megatron.objectives import build_objective
from sdpg_megatron.records import Group, Prompt, ScoredGroup
from tests.completions import make_completion
from tests.tiny import tiny_tokenizer

TEMPLATE = "{question}|{context}|{answer}"
SDPO = ObjectiveConfig(name="sdpo")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def renderer(tokenizer: Any) -> Renderer:
    return Renderer(DataConfig(train=(), peer_template=TEMPLATE), tokenizer)


def group(*rewards: float, texts: tuple[str, ...] = ("zero", "one", "two", "three")) -> ScoredGroup:
    history = ({"role": "system", "content": "Be brief."},)
    prompt = Prompt("p", (1, 2), (3, 4, 5), "46", question="12 + 34?", history=history)
    completions = tuple(
        make_completion((7, 8), (-1.0, -1.0), "stop", 0, text) for text, _ in zip(texts, rewards, strict=False)
    )
    return ScoredGroup(Group(prompt, completions), rewards, tuple(r - 0.5 for r in rewards))


def read(
    scored: ScoredGroup, renderer: Renderer, tokenizer: Any, least: float = 1.0, longest: int = 999, **how: bool
) -> list[Any]:
    """The response that the teacher reads before each of a group's own."""
    (found,) = with_peers([scored], renderer, least, longest, **how)
    assert found.teacher_prompts is not None
    texts = [None if tokens is None else tokenizer.decode(tokens) for tokens in found.teacher_prompts]
    return [None if text is None else text.split("|46")[0].split("?|")[1] for text in texts]


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ((0, 1, 0, 1), ["one", "three", "one", "one"]),
        ((1, 1, 1, 1), ["one", "zero", "zero", "zero"]),
        ((0, 0, 1, 0), ["two", "two", None, "two"]),
        ((0, 0, 0, 0), [None] * 4),
    ],
)
def test_each_response_gets_the_first_success_of_another(
    renderer: Renderer, tokenizer: Any, rewards: tuple[float, ...], expected: list[str | None]
) -> None:
    assert read(group(*rewards), renderer, tokenizer) == expected


def test_a_success_has_the_least_reward_or_more(renderer: Renderer, tokenizer: Any) -> None:
    assert read(group(0.4, 0.5, 0.9), renderer, tokenizer, least=0.5) == ["one", "two", "one"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no tags", "no tags"),
        ("<think>a\nb</think>\n\n46", "46"),
        ("<think>a</think>so <think>b</think> 46", "so 46"),
        ("the template opened it</think>\n46", "46"),
        ("<think>cut off", "<think>cut off"),
        ("<think>only this</think>\n", ""),
    ],
)
def test_thoughts_are_removed(text: str, expected: str) -> None:
    assert without_thinking(text) == expected


def test_a_response_is_shown_without_its_thoughts_where_that_is_asked_for(renderer: Renderer, tokenizer: Any) -> None:
    scored = group(1, 1, 1, texts=("<think>all</think>", "<think>some</think>one", "two"))
    assert read(scored, renderer, tokenizer, strip_thinking=True) == ["one", "two", "one"]
    assert read(scored, renderer, tokenizer)[1] == "<think>all</think>"


def test_the_whole_prompt_is_rendered_with_its_history(renderer: Renderer, tokenizer: Any) -> None:
    (found,) = with_peers([group(1, 0)], renderer, 1.0, 999)
    assert found.teacher_prompts is not None and found.teacher_prompts[1] is not None
    assert tokenizer.decode(found.teacher_prompts[1]) == (
        "<bos><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n12 + 34?|zero|46<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_a_prompt_that_is_too_long_is_none(renderer: Renderer, tokenizer: Any) -> None:
    scored = group(1, 1, 0, texts=("short", "long " * 40, "x"))
    (free,) = with_peers([scored], renderer, 1.0, 999)
    assert free.teacher_prompts is not None and free.teacher_prompts[1] is not None
    exact = len(free.teacher_prompts[1])
    assert read(scored, renderer, tokenizer, longest=exact) == [None, "short", "short"]
    assert read(scored, renderer, tokenizer, longest=exact - 1) == [None, None, None]


def test_shipped_and_faulty_templates(tokenizer: Any) -> None:
    (found,) = with_peers([group(1, 0)], Renderer(DataConfig(train=()), tokenizer), 1.0, 999)
    assert found.teacher_prompts is not None and found.teacher_prompts[1] is not None
    assert "zero" in tokenizer.decode(found.teacher_prompts[1])
    with pytest.raises(ConfigError, match=r"data\.peer_template: .*did you mean 'peer'"):
        Renderer(DataConfig(train=(), peer_template="pear"), tokenizer)


def test_what_is_without_context_is_not_distilled_and_is_counted(renderer: Renderer) -> None:
    groups = with_peers([group(0, 1, 0), group(0, 0)], renderer, 1.0, 999)
    samples = make_samples(groups, SDPO, distill_enabled=build_objective(SDPO, 1).distill_enabled, outcome=False)
    assert [s.gate for s in samples] == [True, False, True, False, False]
    assert tuple(samples[0].teacher_prompt) == groups[0].teacher_prompt(0) != groups[0].group.prompt.teacher_tokens
    batch = collate(samples, PackingLayout(packed=False))
    assert batch.teacher is not None and batch.teacher.tokens_BS.shape[0] == 2
    assert batch.gates_T.tolist() == [1, 1, 0, 0, 1, 1, 0, 0, 0, 0]
    assert describe_contexts(groups)["distill/without_context"].value == 3
    assert describe_contexts([group(1, 0)]) == {}


def test_without_peers_the_teacher_reads_what_the_data_says() -> None:
    scored = group(1, 0)
    samples = make_samples([scored], SDPO, distill_enabled=build_objective(SDPO, 1).distill_enabled)
    assert [s.teacher_prompt.tolist() for s in samples] == [[3, 4, 5]] * 2
