"""Log of training responses: one file per step, one response per line, with a bound in bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sdpg_megatron.config import RolloutLogConfig
from sdpg_megatron.observe.files import json_line, write_whole, writing
from sdpg_megatron.records import ScoredGroup

FOLDER = "rollouts"


class RolloutLog:
    """Folder of a run's logged responses.

    Files are written atomically; a step that is trained again replaces its file.
    """

    def __init__(self, folder: Path, config: RolloutLogConfig) -> None:
        self._folder, self._config = folder, config
        self._limit = config.max_mib << 20

    def write(self, step: int, groups: Sequence[ScoredGroup], kept: Sequence[ScoredGroup]) -> None:
        """Write the responses of `step` that the configuration selects.

        Args:
            groups: all generated groups, in the order of their prompts.
            kept: the groups that selection kept.

        Raises:
            WriteError: the file could not be written.
        """
        if not self._config.groups or step % self._config.every:
            return
        learned = {id(scored) for scored in kept}
        lines: list[bytes] = []
        room = self._limit
        for scored in groups[: self._config.groups]:
            found = [json_line({"step": step, **row}) for row in _rows(scored, kept=id(scored) in learned)]
            room -= sum(map(len, found))
            if room < 0:
                break
            lines += found
        with writing(self._folder):
            self._folder.mkdir(exist_ok=True)
        write_whole(self._folder / f"step_{step:08d}.jsonl", b"".join(lines))
        self._remove_oldest()

    def _remove_oldest(self) -> None:
        with writing(self._folder):
            paths = sorted(self._folder.glob("step_*.jsonl"))
            sizes = [path.lstat().st_size for path in paths]  # of a link itself, not its target
            excess = sum(sizes) - self._limit
            for path, size in zip(paths, sizes, strict=True):
                if excess <= 0:
                    return
                path.unlink()
                excess -= size


def _rows(scored: ScoredGroup, *, kept: bool) -> Iterator[dict[str, Any]]:
    prompt, completions = scored.group.prompt, scored.group.completions
    errors = scored.errors or (None,) * len(completions)
    for number, completion in enumerate(completions):
        yield {
            "prompt": prompt.uid,
            **({"history": prompt.history} if prompt.history else {}),
            "question": prompt.question,
            "answer": prompt.answer_text,
            "sample": number,
            "response": completion.text,
            "reward": scored.rewards[number],
            "advantage": scored.advantages[number],
            "kept": kept,
            "tokens": len(completion.tokens),
            "finish_reason": completion.finish_reason,
            "weight_version": completion.weight_version,
            **({} if errors[number] is None else {"error": errors[number]}),
        }
