"""Peer context: the teacher's prompt shows a successful response to the same question (SDPO, arXiv 2601.20802)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from sdpg_megatron.data.render import Renderer
from sdpg_megatron.observe.metrics import Metric, Reduction
from sdpg_megatron.records import Completion, ScoredGroup

_THOUGHT = re.compile(r"<think>.*?</think>\s*", re.DOTALL)


def without_thinking(text: str) -> str:
    """Remove ``<think>...</think>`` from a response, also if the chat template opened the tag."""
    return _THOUGHT.sub("", text).rpartition("</think>")[2].lstrip()


def with_peers(
    groups: Sequence[ScoredGroup],
    renderer: Renderer,
    least_reward: float,
    longest: int,
    *,
    strip_thinking: bool = False,
) -> list[ScoredGroup]:
    """Add teacher prompts that show, for each response, the first other successful response of its group.

    A response gets no teacher prompt if no other response is successful, or if the prompt is too long.

    Args:
        least_reward: lowest reward of a successful response.
        longest: maximum tokens of a teacher prompt.
        strip_thinking: remove thinking from the response shown. A response of thinking alone is skipped.
    """

    def shown(completion: Completion) -> str:
        return without_thinking(completion.text) if strip_thinking else completion.text

    def added(scored: ScoredGroup) -> ScoredGroup:
        texts = [
            shown(completion) if reward >= least_reward else ""
            for completion, reward in zip(scored.group.completions, scored.rewards, strict=True)
        ]
        return _with_peers(scored, texts, renderer, longest)

    return [added(scored) for scored in groups]


def _with_peers(scored: ScoredGroup, texts: Sequence[str], renderer: Renderer, longest: int) -> ScoredGroup:
    """`texts`: the text to show of each response, empty if it is not successful."""
    completions = scored.group.completions
    # The first success is shown to all others, the second to the first.
    successes = [number for number, text in enumerate(texts) if text][:2]
    prompts = {number: renderer.with_peer(scored.group.prompt, texts[number]) for number in successes}
    chosen = (next((other for other in successes if other != number), None) for number in range(len(completions)))
    found = (None if other is None else prompts[other] for other in chosen)
    fitting = tuple(prompt if prompt is not None and len(prompt) <= longest else None for prompt in found)
    return replace(scored, teacher_prompts=fitting)


def describe_contexts(groups: Sequence[ScoredGroup]) -> dict[str, Metric]:
    """Count the responses without a teacher prompt; no metric if the teacher's context is from the data."""
    prompts = [prompt for scored in groups for prompt in scored.teacher_prompts or ()]
    if not prompts:
        return {}
    return {"distill/without_context": Metric(float(prompts.count(None)), Reduction.SUM)}
