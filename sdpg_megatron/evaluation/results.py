"""Folder of an evaluation: request, results of each problem, and scores.

    evaluation.json      model, settings and data; written first
    NAME.jsonl           results of the data file NAME, one problem per line
    summary.json         scores of every data file and the content of evaluation.json; written last

Every file is written to a temporary name and renamed, so it is complete or absent. An interrupted evaluation continues
with the data files that have no results yet.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdpg_megatron.config import RunConfig
from sdpg_megatron.errors import EvaluationError
from sdpg_megatron.evaluation.estimators import Estimate, draw_sizes
from sdpg_megatron.evaluation.problems import Problem, as_lines, read_problems
from sdpg_megatron.evaluation.scores import Scores, score
from sdpg_megatron.observe.files import write_whole, writing
from sdpg_megatron.records import Prompt

logger = logging.getLogger(__name__)

REQUEST_FILE, SUMMARY_FILE = "evaluation.json", "summary.json"
SETTINGS = (
    "seed", "model.dtype", "data.system", "data.max_prompt_tokens", "data.overlong", "reward.verifier",
    "reward.timeout", "reward.failure_reward", "rollout.engine", "eval.samples", "eval.temperature", "eval.top_p",
    "eval.max_response_tokens", "eval.k", "eval.responses",
)  # fmt: skip
"""Configuration fields that an evaluation depends on."""


@dataclass(frozen=True, slots=True)
class DataFile:
    """Size and content of a data file."""

    problems: int
    digest: str
    """Digest of questions and answers in order, independent of model and file format."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Model, settings and data of an evaluation."""

    model: str
    """Display name of the model."""
    fingerprint: str | None
    """Fingerprint of the folder with the weights; None for weights in the memory of a trainer."""
    settings: Mapping[str, Any]
    """Values of `SETTINGS`, as in JSON."""
    data: Mapping[str, DataFile]

    @classmethod
    def of(
        cls, config: RunConfig, files: Mapping[str, Sequence[Prompt]], *, model: str, fingerprint: str | None
    ) -> Request:
        tree = config.model_dump(mode="json")
        settings = {name: _lookup(tree, name) for name in SETTINGS}
        settings["eval.max_response_tokens"] = response_limit(config)
        settings["eval.k"] = list(config.eval.k or draw_sizes(config.eval.samples))
        data = {name: DataFile(len(prompts), _digest(prompts)) for name, prompts in files.items()}
        return cls(model=model, fingerprint=fingerprint, settings=settings, data=data)

    def difference(self, other: Request, free: Sequence[str] = ()) -> tuple[str, str, str] | None:
        """First difference in data or settings: its name, the value here and the value in `other`; None without one.

        Settings in `free` may differ.
        """
        for name in (*self.data, *other.data):
            here, there = (request.data.get(name) for request in (self, other))
            if here != there:
                return f"the data file {name!r}", _show(here), _show(there)
        for name in SETTINGS:
            if name not in free and self.settings[name] != other.settings[name]:
                return name, repr(self.settings[name]), repr(other.settings[name])
        return None


class Results:
    """Folder of an evaluation in progress. Methods that write raise `WriteError` on disk errors."""

    def __init__(self, folder: Path, request: Request) -> None:
        self.folder, self.request = folder, request

    @classmethod
    def start(cls, folder: Path, request: Request) -> Results:
        """Start an evaluation; existing results are replaced."""
        results = cls(folder, request)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / SUMMARY_FILE).unlink(missing_ok=True)
            for name in request.data:
                results.path(name).unlink(missing_ok=True)
        write_whole(folder / REQUEST_FILE, _json(request))
        return results

    @classmethod
    def start_or_continue(cls, folder: Path, request: Request) -> Results:
        """Continue the evaluation if the folder has a part of it, else start it.

        Raises:
            EvaluationError: as `check`.
        """
        return cls(folder, request) if cls.check(folder, request) else cls.start(folder, request)

    @staticmethod
    def check(folder: Path, request: Request) -> bool:
        """True if the folder has a part of this evaluation, False if it has no evaluation. Writes nothing.

        Raises:
            EvaluationError: the folder has another evaluation; names the difference.
        """
        if not (folder / REQUEST_FILE).exists():
            return False
        earlier = read_request(folder / REQUEST_FILE)
        where, fix = str(folder / REQUEST_FILE), "choose another folder with --out, or remove this one"
        if earlier.fingerprint != request.fingerprint:
            raise EvaluationError(where, f"results of {earlier.model}", f"results of {request.model}", fix)
        if difference := earlier.difference(request):
            name, before, now = difference
            raise EvaluationError(where, f"{name}: {before}", f"{now}, as requested", fix)
        return True

    def path(self, name: str) -> Path:
        """Path of the results of a data file."""
        return self.folder / f"{name}.jsonl"

    @property
    def missing(self) -> list[str]:
        """Data files without results."""
        return [name for name in self.request.data if not self.path(name).exists()]

    def write(self, name: str, problems: Sequence[Problem]) -> None:
        """Write the results of a data file."""
        write_whole(self.path(name), as_lines(problems))

    def finish(self) -> dict[str, Scores]:
        """Compute the scores of each data file and write the summary."""
        ks, seed = self.request.settings["eval.k"], self.request.settings["seed"]
        scores = {name: score(read_problems(self.path(name)), ks, seed=seed) for name in self.request.data}
        tree = dataclasses.asdict(self.request) | {"scores": {n: dataclasses.asdict(s) for n, s in scores.items()}}
        write_whole(self.folder / SUMMARY_FILE, json.dumps(tree, indent=2) + "\n")
        return scores


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A finished evaluation."""

    folder: Path
    request: Request
    scores: Mapping[str, Scores]

    @classmethod
    def read(cls, folder: Path) -> Evaluation:
        """Read an evaluation. Raises `EvaluationError` if the folder has no finished one."""
        path = folder / SUMMARY_FILE
        tree = _read(path)
        try:
            scores = {
                name: Scores(
                    fields["problems"],
                    fields["failures"],
                    {key: Estimate(**ends) for key, ends in fields["estimates"].items()},
                )
                for name, fields in tree["scores"].items()
            }
            return cls(folder, _request(tree), scores)
        except (KeyError, TypeError, AttributeError) as error:
            raise _invalid(path, repr(error)) from error

    def problems(self, name: str) -> list[Problem]:
        """Results of each problem of a data file. Raises `EvaluationError` if the file is damaged."""
        return read_problems(Results(self.folder, self.request).path(name))


def limit_responses(folder: Path, max_bytes: int) -> None:
    """Remove the text of responses from the oldest evaluations until all fit into `max_bytes`.

    The newest evaluation keeps its responses. Numbers, questions and answers are kept.

    Args:
        folder: folder of evaluations; their names sort from oldest to newest.

    Raises:
        WriteError: a disk error; every file is either unchanged or without responses.
    """
    evaluations = sorted(path.parent for path in folder.glob(f"*/{REQUEST_FILE}"))
    sizes = {path: _bytes(path) for path in evaluations}
    excess = sum(sizes.values()) - max_bytes
    for path in evaluations[:-1]:
        if excess <= 0:
            return
        try:
            _drop_responses(path)
        except EvaluationError as error:  # an earlier evaluation, which this run does not need
            logger.warning("responses are not removed: %s", error)
        excess -= sizes[path] - _bytes(path)


def _bytes(folder: Path) -> int:
    """Size of the files in a folder in bytes. Links are not followed."""
    return sum(file.lstat().st_size for file in folder.iterdir())


def _drop_responses(folder: Path) -> None:
    """Remove the text of responses from an evaluation, then set `eval.responses` in its settings to false.

    Raises:
        EvaluationError: the evaluation is damaged.
    """
    request = read_request(folder / REQUEST_FILE)
    if not request.settings["eval.responses"]:
        return
    results = Results(folder, dataclasses.replace(request, settings={**request.settings, "eval.responses": False}))
    for name in request.data:
        results.write(name, [problem.without_responses() for problem in read_problems(results.path(name))])
    results.finish()
    write_whole(folder / REQUEST_FILE, _json(results.request))


def response_limit(config: RunConfig) -> int:
    """Maximum response length of an evaluation in tokens."""
    return config.eval.max_response_tokens or config.rollout.max_response_tokens


def read_request(path: Path) -> Request:
    """Read a request. Raises `EvaluationError` if the file is damaged."""
    try:
        return _request(_read(path))
    except (KeyError, TypeError, AttributeError) as error:
        raise _invalid(path, repr(error)) from error


def _request(tree: Mapping[str, Any]) -> Request:
    return Request(
        model=tree["model"],
        fingerprint=tree["fingerprint"],
        settings={name: tree["settings"][name] for name in SETTINGS},
        data={name: DataFile(**fields) for name, fields in tree["data"].items()},
    )


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _invalid(path, error.strerror or str(error)) from error
    except (ValueError, RecursionError) as error:
        raise _invalid(path, str(error)) from error


def _invalid(path: Path, found: str) -> EvaluationError:
    fix = "name the folder of a finished evaluation, or finish it with the command that started it"
    return EvaluationError(str(path), found, "a file written by an evaluation", fix)


def _json(request: Request) -> str:
    return json.dumps(dataclasses.asdict(request), indent=2) + "\n"


def _digest(prompts: Sequence[Prompt]) -> str:
    text = json.dumps([[prompt.question, prompt.answer] for prompt in prompts], default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _lookup(tree: Any, name: str) -> Any:
    for part in name.split("."):
        tree = tree[part]
    return tree


def _show(data: DataFile | None) -> str:
    return "none" if data is None else f"{data.problems} problems, digest {data.digest}"
