"""A successful response to the same question as the teacher's context (SDPO, arXiv 2601.20802)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from sdpg_megatron.data.render import Renderer
from sdpg_megatron.observe.metrics import Metric, Reduction
from sdpg_megatron.records import Completion, ScoredGroup

_THOUGHT = re.compile(r"<think>.*?</think>\s*", re.DOTALL)


def without_thinking(text: str) -> str:
    """A response without ``<think>...</think>``, also where the chat template had opened the tag before it."""
    return _THOUGHT.sub("", text).rpartition("</think>")[2].lstrip()


def with_peers(
    groups: Sequence[ScoredGroup],
    renderer: Renderer,
    least_reward: float,
    longest: int,
    *,
    strip_thinking: bool = False,
) -> list[ScoredGroup]:
    """The same groups with teacher prompts that carry, for each response, the first successful other one.

    A response is without a teacher prompt where no other one is successful, or where the prompt would be too long.

    Args:
        least_reward: of a successful response.
        longest: tokens of a teacher prompt, at most.
        strip_thinking: remove the thoughts of the response that the prompt carries. One with nothing else is passed
            over.
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
    """`texts`: what a teacher prompt carries of each response, empty where it was no success."""
    completions = scored.group.completions
    # The first serves all others, the second the first.
    successes = [number for number, text in enumerate(texts) if text][:2]
    prompts = {number: renderer.with_peer(scored.group.prompt, texts[number]) for number in successes}
    chosen = (next((other for other in successes if other != number), None) for number in range(len(completions)))
    found = (None if other is None else prompts[other] for other in chosen)
    fitting = tuple(prompt if prompt is not None and len(prompt) <= longest else None for prompt in found)
    return replace(scored, teacher_prompts=fitting)


def describe_contexts(groups: Sequence[ScoredGroup]) -> dict[str, Metric]:
    """How many responses have nothing for the teacher to read, where that does not come from the data."""
    prompts = [prompt for scored in groups for prompt in scored.teacher_prompts or ()]
    if not prompts:
        return {}
    return {"distill/without_context": Metric(float(prompts.count(None)), Reduction.SUM)}
