"""Endless prompts from reasoning-gym. Prompt i depends only on the seed and i."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import chain, count, islice
from typing import Any

import reasoning_gym
from reasoning_gym.factory import DATASETS

from sdpg_megatron.answers import normalized
from sdpg_megatron.config import DataConfig, GymTask
from sdpg_megatron.data.dataset import PromptDataset, digest_of, make_prompt
from sdpg_megatron.data.examples import Example
from sdpg_megatron.data.other_problem import is_other_problem, no_other_problem
from sdpg_megatron.data.render import Renderer
from sdpg_megatron.errors import ConfigError, did_you_mean
from sdpg_megatron.records import Prompt

FIELD = "data.reasoning_gym.tasks"
BLOCK = 500
"""Number of problems created from one seed of a task; every reasoning-gym task has at least as many."""
ATTEMPTS = 100
"""Maximum number of draws for one prompt."""
KEPT_BLOCKS = 16
"""Number of cached blocks per task. Creating one is expensive for tasks that read word lists."""
DIGESTED = 10
"""Number of prompts in the digest."""
VARYING = frozenset(
    {
        "codeio", "intermediate_integration", "isomorphic_strings", "knight_swap", "polynomial_multiplication",
        "ransom_note", "word_ladder",
    }
)  # fmt: skip
"""Tasks of reasoning-gym 0.1.25 with problems that do not depend on the seed alone. They iterate over sets of strings
or use the global random generator, so the ranks of a run would get different prompts."""


class GymSource:
    """Problems of weighted tasks. Task and entry are in the prompt metadata, for the verifier `reasoning_gym`."""

    size = None

    def __init__(self, config: DataConfig, tokenizer: Any, seed: int) -> None:
        """
        Args:
            tokenizer: transformers tokenizer with a chat template.

        Raises:
            ConfigError: an unknown task, invalid parameters, no text answer, or too few problems.
        """
        self._config = config
        self._seed = seed
        self._renderer = Renderer(config, tokenizer)
        self._tasks = config.reasoning_gym.tasks
        self._entries = lru_cache(maxsize=KEPT_BLOCKS * len(self._tasks))(self._make_entries)
        for name, task in self._tasks.items():
            _check(name, task)
        self._reserved: set[str] = set()
        self.held_out = self._hold_out(config.reasoning_gym.held_out)
        """None if `data.reasoning_gym.held_out` is 0."""
        for name in self._tasks:  # fail now rather than in the middle of the run
            example = self._fitting(name, self._candidates(name, "train", 0))
            self._context(name, 0, example)

    @property
    def digest(self) -> str:
        """Digest of the first prompts; the others follow from the same seed and code."""
        return digest_of(self[index] for index in range(DIGESTED))

    def __getitem__(self, index: int) -> Prompt:
        """Render prompt `index`. Raises `ConfigError` if no problem fits."""
        task = self._task("train", index)
        example = self._fitting(task, self._candidates(task, "train", index))
        student, teacher = self._renderer.render(example, self._context(task, index, example))
        limit = self._config.max_prompt_tokens
        return make_prompt(f"{task}:{index}", example, student, teacher, limit)

    def describe(self) -> str:
        return f"endless prompts of {', '.join(self._tasks)}"

    def _hold_out(self, wanted: int) -> PromptDataset | None:
        """Draw `wanted` distinct problems from separate streams and exclude them from training.

        A repeated problem is replaced by the next one of its task's second stream. That stream uses all problems of a
        block, so a task with too few problems is detected within seconds.
        """
        prompts: list[Prompt] = []
        seconds = {name: self._stream(name, "held out again") for name in self._tasks}
        for index in range(wanted):
            task = self._task("held out", index)
            example = self._fitting(task, chain(islice(self._candidates(task, "held out", index), 1), seconds[task]))
            self._reserved.add(normalized(example.question))
            tokens = self._renderer.students([example])[0]
            limit = self._config.max_prompt_tokens
            prompts.append(make_prompt(f"{task}:held-out-{index}", example, tokens, tokens, limit))
        return PromptDataset(tuple(prompts), digest=digest_of(prompts)) if prompts else None

    def _task(self, stream: str, index: int) -> str:
        names = sorted(self._tasks)
        weights = [self._tasks[name].weight for name in names]
        return random.Random(f"{self._seed}/{stream}/{index}").choices(names, weights)[0]

    def _fitting(self, task: str, candidates: Iterator[Example]) -> Example:
        """First of `ATTEMPTS` candidates that is not held out and not too long."""
        for example in islice(candidates, ATTEMPTS):
            if normalized(example.question) not in self._reserved and self._fits(example):
                return example
        raise ConfigError(
            f"{FIELD}.{task}",
            f"{ATTEMPTS} problems that are held out or longer than data.max_prompt_tokens",
            f"a task with more or shorter problems ({len(self._reserved)} are held out so far)",
            "change its parameters, lower data.reasoning_gym.held_out, or raise data.max_prompt_tokens",
        )

    def _context(self, task: str, index: int, example: Example) -> Example | None:
        """Another problem of the same task for `data.context_of: other`; None for the example's own context."""
        if self._config.context_of == "own":
            return None
        for other in self._candidates(task, "context", index):
            if is_other_problem(other, example) and self._fits(example, other):
                return other
        reason = f"with {task}, whose problems hardly differ in their answers, or are too long"
        raise no_other_problem(reason, "change the task's parameters")

    def _candidates(self, task: str, stream: str, index: int) -> Iterator[Example]:
        """Candidates for prompt `index`: problems at the same position of successive blocks."""
        block, position = divmod(index, BLOCK)
        for attempt in range(ATTEMPTS):
            yield self._example(task, self._entries(task, f"{stream}/{block}/{attempt}")[position])

    def _stream(self, task: str, stream: str) -> Iterator[Example]:
        """Endless stream of all problems of successive blocks."""
        for index in count():
            yield self._example(task, self._entries(task, f"{stream}/{index // BLOCK}")[index % BLOCK])

    def _make_entries(self, task: str, block: str) -> Any:
        """Create the reasoning-gym dataset of one block."""
        seed = random.Random(f"{self._seed}/{task}/{block}").getrandbits(31)
        return reasoning_gym.create_dataset(task, seed=seed, size=BLOCK, **self._tasks[task].parameters)

    def _example(self, task: str, entry: Mapping[str, Any]) -> Example:
        problem = {"task": task, "parameters": self._tasks[task].parameters, "entry": entry}
        return Example(question=entry["question"], answer=_answer(task, entry), metadata={"reasoning_gym": problem})

    def _fits(self, example: Example, context: Example | None = None) -> bool:
        limit = self._config.max_prompt_tokens
        return self._config.overlong == "truncate" or max(map(len, self._renderer.render(example, context))) <= limit


def _check(name: str, task: GymTask) -> None:
    field = f"{FIELD}.{name}"
    if name not in DATASETS:
        fix = did_you_mean(name, DATASETS) or "see reasoning-gym's list of tasks"
        raise ConfigError(field, name, "a task of reasoning-gym", fix)
    if name in VARYING:
        raise ConfigError(field, name, "a task whose problems depend on the seed alone", "use another task")
    if fixed := sorted({"seed", "size"} & task.parameters.keys()):
        raise ConfigError(f"{field}.parameters", fixed, "neither seed nor size: the run sets them", "remove them")
    try:
        entry = reasoning_gym.create_dataset(name, seed=0, size=BLOCK, **task.parameters)[0]
    except Exception as error:  # reasoning-gym uses assertions, not a specific error type
        expected = f"valid parameters of the task ({type(error).__name__}: {error})"
        raise ConfigError(f"{field}.parameters", task.parameters, expected, "correct them") from error
    _answer(name, entry)


def _answer(task: str, entry: Mapping[str, Any]) -> str:
    if not isinstance(entry["answer"], str) or not entry["answer"].strip():
        expected = "a task with a text answer, which the teacher needs"
        raise ConfigError(f"{FIELD}.{task}", f"the answer {entry['answer']!r}", expected, "use another task")
    return str(entry["answer"])
