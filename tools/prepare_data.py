"""Convert public mathematics data sets to JSONL: one train.jsonl, and a file for each evaluation set.

    python tools/prepare_data.py data --train dapo-math-17k --eval aime-2024 aime-2025 amc-2023
    python tools/prepare_data.py data --train downloads/dapo-math-17k.parquet --eval downloads/aime_2024

A source is a known name, which is downloaded from the Hugging Face hub, or a Parquet, JSONL, JSON or CSV file, or a
folder of them. Every row has question, answer, source and, for sets with worked solutions, context. Text after
[TEACHER_CONTEXT_TOKEN] in the public SDPG files is context. A repeated question is kept once. A question with
conflicting answers is dropped. Evaluation questions are removed from the training file. Questions are compared as text,
ignoring case, whitespace, dollar signs and a few LaTeX spellings. The report counts dropped rows.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import lru_cache
from pathlib import Path

from sdpg_megatron.answers import canonical, decimal_text, last_boxed, same
from sdpg_megatron.data.chats import read_chat, split_context
from sdpg_megatron.data.examples import reveals
from sdpg_megatron.data.instructions import INSTRUCTIONS, bare, either, without_closing
from sdpg_megatron.data.readers import Row, file_format, read_rows
from sdpg_megatron.errors import DataError, SdpgError
from sdpg_megatron.observe.reading_progress import RowProgress

FOLDER_FORMATS = (".parquet", ".jsonl", ".csv")
"""Formats read from a folder. A .json file in a folder often describes the data set."""
TRAIN = "train.jsonl"


@dataclass(frozen=True)
class Published:
    """Data set on the hub."""

    repository: str
    train: str
    """Glob pattern of the training files."""
    eval: str
    """Glob pattern of the evaluation files; the same for sets with a single split."""


PUBLISHED = {
    "dapo-math-17k": Published("BytedTsinghua-SIA/DAPO-Math-17k", "data/*.parquet", "data/*.parquet"),
    "aime-2024": Published("HuggingFaceH4/aime_2024", "data/*.parquet", "data/*.parquet"),
    "aime-2025": Published("opencompass/AIME2025", "*.jsonl", "*.jsonl"),
    "amc-2023": Published("math-ai/amc23", "*.parquet", "*.parquet"),
    "gsm8k": Published("openai/gsm8k", "main/train-*.parquet", "main/test-*.parquet"),
    "math": Published("EleutherAI/hendrycks_math", "*/train-*.parquet", "*/test-*.parquet"),
    "math-500": Published("HuggingFaceH4/MATH-500", "test.jsonl", "test.jsonl"),
    "dapo-math-17k-en": Published("open-r1/DAPO-Math-17k-Processed", "en/*.parquet", "en/*.parquet"),
}

QUESTIONS = ("problem", "Problem", "question", "prompt")
ANSWERS = ("answer", "Answer")
SOLUTIONS = ("solution", "Solution", "context")
GSM8K_MARK = "####"
GSM8K_CALCULATION = re.compile(r"<<[^<>]*>>")
ANSWER_CONTEXT = re.compile(
    rf"\s*(?:{either('The correct answer to this problem is:')})\s*(?P<answer>.*?)\s*"
    rf"(?:{either('Use this to verify your reasoning, but show your full solution process.')})?\s*",
    re.DOTALL | re.IGNORECASE,
)
"""Context of the public SDPG files. It has only the answer if that is one line, or the answer of the row."""
SOLUTION_CONTEXT = re.compile(
    rf"\s*\[Hint\].*?(?:{either('A common way to solve this is:')})(?P<solution>.*)\[Instruction\].*", re.DOTALL
)
"""Context in the SDPG paper (figure 4): answer, worked solution and an instruction."""


@dataclass(frozen=True)
class Problem:
    question: str
    answer: str
    """Empty if the row has none."""
    context: str | None
    source: str

    @property
    def key(self) -> str:
        return question_key(self.question)

    def line(self, instruction: str) -> str:
        template = instruction if "{question}" in instruction else "{question}" + instruction
        question = template.replace("{question}", self.question)
        values = {"question": question, "answer": self.answer, "source": self.source}
        return json.dumps(values | ({"context": self.context} if self.context else {}), ensure_ascii=False) + "\n"


@dataclass
class Kept:
    """Problems of one output file by question, and counts of dropped rows."""

    problems: dict[str, Problem] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    conflicts: set[str] = field(default_factory=set)

    def add(self, problem: Problem) -> None:
        """Keep the problem if its question is new; drop the question permanently if its answers differ."""
        key = problem.key
        self.counts["rows"] += 1
        first = self.problems.get(key)
        if not problem.answer:
            self.counts["without an answer"] += 1
        elif reveals(problem.question, problem.context, problem.answer):
            self.counts["with solution or answer in the question"] += 1
        elif key in self.conflicts:
            self.counts["with conflicting answers"] += 1
        elif first is None:
            self.problems[key] = problem
        elif same(first.answer, problem.answer):
            self.counts["repeated" if first.source == problem.source else "repeated in another source"] += 1
        else:
            del self.problems[key]
            self.conflicts.add(key)
            self.counts["with conflicting answers"] += 2

    def drop(self, keys: set[str]) -> None:
        """Drop evaluation problems."""
        for key in keys & self.problems.keys():
            del self.problems[key]
            self.counts["evaluated on"] += 1

    def report(self, name: str) -> str:
        dropped = [f"{count} {reason}" for reason, count in sorted(self.counts.items()) if reason != "rows"]
        return f"{name}: {len(self.problems)} of {self.counts['rows']} rows" + "".join(f", {part}" for part in dropped)


@lru_cache(maxsize=1 << 16)
def question_key(question: str) -> str:
    """Key of a question that is equal for different spellings."""
    text = unicodedata.normalize("NFKC", question).casefold()
    text = re.sub(r"\\(?:left|right|displaystyle|[,;:! ])|\\?\$|\\[()\[\]]", "", text)
    return re.sub(r"\\[dt]frac", r"\\frac", re.sub(r"\s+", "", text)).rstrip(".")


def parse(row: Row, source: str) -> Problem:
    """Parse a row in any of the published layouts.

    Raises:
        DataError: a row without the columns of a known layout, without a question, or with more than one turn.
    """
    question, answer, context = _chat(row) if isinstance(row.values.get("prompt"), list) else _columns(row)
    text = bare(question)
    if not text:
        raise DataError(row.where, f"instructions without a question: {question!r}", "a question", "remove the row")
    return Problem(text, canonical(answer), context, source)


def _chat(row: Row) -> tuple[str, str, str | None]:
    """Parse the layout of DAPO-Math-17k: a chat, and the answer in `reward_model`."""
    messages, reward = row.values["prompt"], row.values.get("reward_model")
    assert isinstance(messages, list)
    chat = read_chat(row.where, "prompt", messages)
    if any(message["role"] != "system" for message in chat.history):
        raise _unusable(row, "prompt", "one question, after at most a system message")
    answer = _first(row, ["ground_truth"], reward) if isinstance(reward, Mapping) else None
    if answer is None:
        raise _unusable(row, "reward_model", "a mapping with ground_truth, text or a number")
    return chat.question, answer, _worked(chat.context, answer) or chat.reply


def _columns(row: Row) -> tuple[str, str, str | None]:
    """Parse a question with an answer, a solution, or both; in GSM8K the answer contains both."""
    question = _first(row, QUESTIONS)
    answer, solution = _first(row, ANSWERS), _first(row, SOLUTIONS)
    if question is None or (answer is None and solution is None):
        raise _unusable(row, "", f"one of {', '.join(QUESTIONS)} and one of {', '.join((*ANSWERS, *SOLUTIONS))}")
    question, context = split_context(row.where, "of the question", question)
    if answer is None and solution is not None:
        if "prompt" in row.values:  # DAPO-Math-17k-Processed: its solution is only the answer
            return question, solution, _worked(context, solution)
        boxed = last_boxed(solution) or ""
        return question, boxed, _worked(context, boxed) or solution
    assert answer is not None
    worked, mark, final = answer.rpartition(GSM8K_MARK)
    if mark:
        return question, final, GSM8K_CALCULATION.sub("", worked).strip()
    return question, answer, _worked(context, answer) or solution


def _worked(context: str | None, answer: str) -> str | None:
    """Worked solution in the context of a public SDPG file; None if there is only the answer."""
    if context is None:
        return None
    context = without_closing(context)
    if found := ANSWER_CONTEXT.fullmatch(context):
        stated = found["answer"]
        if "\n" not in stated or stated.split() == answer.split():
            return None
    found = SOLUTION_CONTEXT.fullmatch(context)
    return (found["solution"] if found else context).strip() or None


def _first(row: Row, names: Sequence[str], values: Mapping[str, object] | None = None) -> str | None:
    """First of the columns with text or a number, as text; None without one."""
    for name in names:
        value = (row.values if values is None else values).get(name)
        if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
            try:
                return decimal_text(value)
            except ValueError as error:
                expected = "text or a finite number"
                raise DataError(row.where, f"{error} in column {name!r}", expected, "correct the row") from error
        if isinstance(value, str) and value.strip():
            return value
        if isinstance(value, bool) and name in (*ANSWERS, "ground_truth"):
            return str(value)
    return None


def _unusable(row: Row, column: str, expected: str) -> DataError:
    columns = f"the columns {', '.join(row.values)}"
    found = f"{row.values.get(column)!r} in column {column!r}" if column else columns
    return DataError(row.where, found, expected, "pass a file as it was published, or rename its columns")


def label(source: str) -> str:
    """Name of a source in rows and file names."""
    if source in PUBLISHED or Path(source).is_dir():
        return Path(source).name
    return Path(source.removesuffix(".gz")).stem


def files_of(source: str, split: str) -> list[Path]:
    """List the files of a source, downloaded if necessary.

    Raises:
        DataError: no such file or data set, or a failed download.
    """
    if published := PUBLISHED.get(source):
        pattern = published.train if split == "train" else published.eval
        folder = fetch(published.repository, pattern)
        return _found(source, sorted(folder.glob(pattern)))
    path = Path(source)
    if path.is_dir():
        return _found(source, sorted(file for file in path.rglob("*") if file_format(file) in FOLDER_FORMATS))
    if not path.exists():
        expected = f"a file, a folder, or one of {', '.join(PUBLISHED)}"
        raise DataError(source, "no such file", expected, "correct it")
    return [path]


def _found(source: str, files: list[Path]) -> list[Path]:
    if not files:
        raise DataError(source, "no files", f"{', '.join(FOLDER_FORMATS)} files", "check the source")
    return files


def fetch(repository: str, pattern: str) -> Path:
    """Download the matching files of a data set on the hub; return their folder."""
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(repository, repo_type="dataset", allow_patterns=[pattern]))
    except Exception as error:  # errors of network, hub and library have many types
        fix = "download the files by other means, and pass their path"
        raise DataError(repository, f"{type(error).__name__}: {error}", "a data set to download", fix) from error


def read(source: str, split: str) -> Iterator[Problem]:
    for file in files_of(source, split):
        for row in read_rows(file):
            yield parse(row, label(source))


def prepare(train: Sequence[str], evaluation: Sequence[str]) -> dict[str, Kept]:
    """Collect the problems of each output file.

    Raises:
        DataError: an unreadable source, two evaluation sets with the same name, or no training problems.
    """
    outputs: dict[str, Kept] = {}
    for source in evaluation:
        name = f"{label(source)}.jsonl"
        if name in outputs or name == TRAIN:
            raise DataError(source, f"the name {name} a second time", "another", "rename the file or folder")
        outputs[name] = _collect([source], "eval")
    held_out = {key for kept in outputs.values() for key in kept.problems.keys() | kept.conflicts}
    kept = _collect(train, "train")
    kept.drop(held_out)
    if train and not kept.problems:
        raise DataError(", ".join(train), kept.report("nothing left"), "problems to train on", "use other sources")
    return ({TRAIN: kept} if train else {}) | outputs


def _collect(sources: Sequence[str], split: str) -> Kept:
    kept = Kept()
    with RowProgress() as progress:
        for source in sources:
            for problem in read(source, split):
                kept.add(problem)
                if kept.counts["rows"] % 1000 == 0:
                    progress(kept.counts["rows"])
    return kept


def write(folder: Path, outputs: Mapping[str, Kept], instruction: str) -> None:
    """Write all files to a temporary folder, then move them into place, so that no partial file is visible."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".prepare-", dir=folder) as staging:
        for name, kept in outputs.items():
            with (Path(staging) / name).open("w", encoding="utf-8") as file:
                file.writelines(problem.line(instruction) for problem in kept.problems.values())
        for name in outputs:
            (Path(staging) / name).replace(folder / name)


def shared(outputs: Mapping[str, Kept]) -> Iterator[str]:
    """Report problems that evaluation sets have in common. Each set keeps them."""
    sets = [(name, kept.problems.keys()) for name, kept in outputs.items() if name != TRAIN]
    for index, (name, keys) in enumerate(sets):
        for other, others in sets[index + 1 :]:
            if common := len(keys & others):
                yield f"{name} and {other}: {common} problems in common"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Convert public mathematics data sets to JSONL.")
    parser.add_argument("folder", type=Path, help="output folder")
    known = ", ".join(PUBLISHED)
    parser.add_argument("--train", nargs="+", default=[], metavar="SOURCE", help=f"a path, or one of {known}")
    parser.add_argument("--eval", nargs="+", default=[], metavar="SOURCE", help="as --train; one file per source")
    parser.add_argument(
        "--instruction",
        choices=INSTRUCTIONS,
        default="boxed",
        help="added to each question (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    if not options.train and not options.eval:
        parser.error("expected --train or --eval with at least one source")
    try:
        outputs = prepare(options.train, options.eval)
        write(options.folder, outputs, INSTRUCTIONS[options.instruction])
    except (SdpgError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    report = [kept.report(str(options.folder / name)) for name, kept in outputs.items()]
    sys.stdout.write("\n".join([*report, *shared(outputs)]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
