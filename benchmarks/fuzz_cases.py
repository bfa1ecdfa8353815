"""Cases of benchmarks/fuzz.py: commands with random configurations, data, model folders and environments.

A case depends only on a `random.Random`, so its seed and number reproduce it.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import signal
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel

from sdpg_megatron.config import RunConfig

Stdout = Literal["file", "closed", "full", "gone"]

MODELS = ("llama", "qwen3", "qwen3_moe")
RUN, CHECKPOINT, VERIFIER = "run", "megatron", "drawn_verifier"
VERIFIER_CODE = """
import sys
def good(prompt, response): return float(len(response) % 2)
def raises(prompt, response): raise ValueError(response)
def none(prompt, response): pass
def nan(prompt, response): return float("nan")
def text(prompt, response): return "1.0"
def ends(prompt, response): sys.exit(3)
def dictionary(prompt, response): return {"score": 1.0}
async def later(prompt, response): return 1.0
def keep(group): return True
number = 3
"""
VERIFIERS = [
    *(f"{VERIFIER}:{name}" for name in ("good", "raises", "none", "nan", "text", "ends", "dictionary", "later")),
    *("number", "math", "answer", "exact", "reasoning_gym", f"{VERIFIER}:number", f"{VERIFIER}:absent", "os:getcwd"),
    *("absent:f", ":", "a:b:c", ""),
]

SCALARS: Sequence[Any] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 10**6, 2**31, 2**63, 2**64, 10**30, 0.0, -0.5, 0.5, 1e-300, 1e300),
    *(
        float("inf"),
        float("-inf"),
        float("nan"),
        "",
        " ",
        "auto",
        "local",
        "te",
        "3",
        "1e3",
        "a b",
        "\u00e9\u4e16",
        "\x00",
    ),
    *(
        "~",
        "$HOME",
        "/",
        ".",
        "..",
        "/dev/null",
        "/proc/self",
        "nowhere/at/all",
        "a" * 5000,
        "{question}",
        "{",
        "http://x",
    ),
)
TEXTS = (
    *("0o17", "017", "1:30", "1_000", "0x1F", ".inf", "-.INF", ".nan", "~", "on", "No", "2001-01-01", "2001-99-99"),
    *("1e3", "1.", "'", '"', "[", "{", "[1, 2", "{a: 1}", "&a 1", "*a", "!!python/object:os.system", "!!int x", "- -"),
    *("@", "`", "%", "\t", "? a", "a: b: c", "#", "a #b", "9" * 5000, "\ud800", "\x85", "\ufeff1"),
)
NAMES = (
    "lr", "group_size", "learning_rate", "tensor_model_parallel_size", "tp", "bf16", "wandb", "n", "rollout.n",
    "kl_coef", "model", "objective.alpah", "Steps", "steps ", "", "1", "None", "optimizer.betas", "num_train_epochs",
    "eval.steps",
)  # fmt: skip
VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID",
    "SLURM_NTASKS", "LC_ALL", "LANG", "HOME", "TMPDIR", "COLUMNS", "TERM", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS",
    "PATH", "USER", "SDPG_SGLANG_PYTHON", "HF_HOME", "TORCHELASTIC_RUN_ID", "NO_COLOR", "FORCE_COLOR",
    "PYTHONIOENCODING", "http_proxy",
)  # fmt: skip
VALUES = (
    "", "0", "1", "-1", "2", "abc", "C", "POSIX", "nowhere", "/nowhere", "1e9", "99999999999", " 1", "0.0.0.0",
    "dumb", "é",
)  # fmt: skip
ENCODINGS = ("ascii", "latin-1", "utf-16", "ascii:strict", "utf-8:strict")
ROWS = ("question", "answer", "context", "prompt", "messages", "conversations", "reward_model", "extra_info", "level")
CONTENT = (
    b"", b"\0", b"\xff\xfe", b"[" * 100_000, b"9" * 5000, b"null", b"{}", b"[]", b"\xef\xbb\xbf{}",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", b"<html>404</html>", b'{"a": NaN}',
)  # fmt: skip


@dataclass(slots=True)
class Case:
    """A call of the command line."""

    kind: str
    arguments: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    stdout: Stdout = "file"
    signals: list[tuple[float, int]] = field(default_factory=list)
    """(seconds after the start, signal number)."""
    limit: float = 60.0
    """Seconds after which the call counts as hanging."""


def draw_case(draw: random.Random, prepared: Path, folder: Path) -> Case:
    """Draw a case and write its files to the empty `folder`.

    Args:
        prepared: folder written by `benchmarks.fuzz.prepare`.
    """
    (folder / f"{VERIFIER}.py").write_text(VERIFIER_CODE)
    kinds: dict[Callable[[random.Random, Path, Path], Case], float] = {
        configuration: 30, rows: 20, model_folder: 20, checkpoint: 7, command_line: 8, environment: 10, run: 5,
    }  # fmt: skip
    (kind,) = draw.choices(list(kinds), list(kinds.values()))
    return kind(draw, prepared, folder)


# --- kinds of cases


def configuration(draw: random.Random, prepared: Path, folder: Path) -> Case:
    """Fields with other values, unknown fields, and invalid YAML."""
    tree = base(draw, prepared, folder)
    for _ in range(draw.randint(1, 3)):
        change(draw, tree)
    path = write_config(draw, folder, tree)
    return Case("configuration", [*reading(draw), path, *overrides(draw, 0.4)])


def rows(draw: random.Random, prepared: Path, folder: Path) -> Case:
    """Data files with unexpected structure, damaged and empty ones."""
    tree = base(draw, prepared, folder)
    names = [write_rows(draw, folder / f"rows{number}") for number in range(draw.randint(1, 2))]
    tree["data"][draw.choice(["train", "train", "eval"])] = names
    for name in ("question_key", "answer_key", "context_key", "context_template", "overlong"):
        if draw.random() < 0.1:
            tree["data"][name] = draw.choice([*ROWS, "solution", "feedback", "{question} {context}", "truncate"])
    tree["reward"] = {"verifier": draw.choice(VERIFIERS)}
    return Case("rows", ["train", write_config(draw, folder, tree), "--dry-run"])


def model_folder(draw: random.Random, prepared: Path, folder: Path) -> Case:
    """Hugging Face folders with changed, damaged, missing and unexpected files."""
    tree = base(draw, prepared, folder)
    model = shutil.copytree(tree["model"]["path"], folder / "model")
    for _ in range(draw.randint(1, 2)):
        damage_model(draw, model)
    tree["model"]["path"] = str(model)
    path = write_config(draw, folder, tree)
    calls = [
        *([["train", path, "--dry-run"]] * 4),
        ["plan", path],
        ["inspect", str(model)],
        ["convert", str(model), str(folder / "out")],
        ["eval", str(model), "--out", str(folder / "out"), f"data.eval=[{folder / 'train.jsonl'}]", "--dry-run"],
    ]
    return Case("model folder", draw.choice(calls))


def checkpoint(draw: random.Random, prepared: Path, folder: Path) -> Case:
    """Runs and checkpoints with damaged and missing files."""
    source = draw.choice([RUN, CHECKPOINT])
    found = shutil.copytree(prepared / source, folder / source, symlinks=True)
    files = sorted(path for path in found.rglob("*") if path.is_file())
    for _ in range(draw.randint(1, 2)):
        damage_file(draw, draw.choice(files))
    calls = [
        ["inspect", str(found), *draw.choice([[], ["--json"], ["--digests"]])],
        ["convert", str(found), str(folder / "out")],
        ["compare", str(found / "eval"), str(prepared / RUN / "eval")],
    ]
    if source == RUN:
        calls.append(
            ["train", str(prepared / "run.yaml"), f"run_dir={found}", *draw.choice([[], ["steps=3"], ["seed=1"]])]
        )
        calls.append(["eval", str(found), "--out", str(folder / "out"), "--dry-run"])
    return Case("checkpoint", draw.choice(calls))


def command_line(draw: random.Random, prepared: Path, folder: Path) -> Case:
    """Invalid arguments in random order."""
    path = write_config(draw, folder, base(draw, prepared, folder))
    words = [
        *("train", "eval", "plan", "compare", "convert", "inspect", "--dry-run", "--out", "--step", "--json", "--gpu"),
        *(
            "--like",
            "--dtype",
            "--to",
            "--verify",
            "--shard-gb",
            "--ranks",
            "--version",
            "--help",
            "-",
            "--",
            "-x",
            "=",
            "a=",
            "=a",
        ),
        *(
            path,
            path,
            str(folder),
            str(prepared / RUN),
            str(folder / "out"),
            "steps=1",
            "steps",
            "nan",
            "-1",
            "megatron",
            "H100",
        ),
    ]
    head = draw.choice(["train", "eval", "plan", "compare", "convert", "inspect", draw.choice(words)])
    arguments = [head, *(draw.choice([*words, draw.choice(TEXTS)]) for _ in range(draw.randint(0, 4)))]
    if head in ("train", "eval"):
        arguments.append("--dry-run")
    return Case("command line", [word.replace("\0", "").encode(errors="replace").decode() for word in arguments])


def environment(draw: random.Random, prepared: Path, folder: Path) -> Case:
    """Variables of launchers and locales, a closed, full or broken standard output, and signals."""
    tree = base(draw, prepared, folder)
    model = folder / draw.choice(["model", "mod\u00e8le \u4e16", os.fsdecode(b"m\xff")])
    model.symlink_to(tree["model"]["path"])
    if model.name.isprintable():
        tree["model"]["path"] = str(model)
    path = write_config(draw, folder, tree)
    call = draw.choice([["train", path, "--dry-run"], ["plan", path], ["inspect", str(model)]])
    variables = {name: draw.choice(VALUES) for name in draw.sample(VARIABLES, draw.randint(0, 3))}
    if draw.random() < 0.3:
        variables["PYTHONIOENCODING"] = draw.choice(ENCODINGS)
    stdout = draw.choice(typing.get_args(Stdout))
    return Case("environment", call, variables, stdout, signals(draw, 0.2))


def run(draw: random.Random, prepared: Path, folder: Path) -> Case:
    """Training for one step with a changed field, another verifier, a signal or a broken standard output."""
    tree = base(draw, prepared, folder)
    tree["reward"] = {"verifier": draw.choice(VERIFIERS), "timeout": 5}
    if draw.random() < 0.5:
        section = draw.choice(["objective", "optimizer", "eval", "checkpoint", "alarms", "selection"])
        change(draw, tree, [name for name in fields() if name.startswith(section)])
    case = Case("run", ["train", write_config(draw, folder, tree), *overrides(draw, 0.2)], limit=240)
    case.stdout, case.signals = draw.choice([*typing.get_args(Stdout), "file", "file"]), signals(draw, 0.3)
    return case


# --- parts of cases


def base(draw: random.Random, prepared: Path, folder: Path) -> dict[str, Any]:
    """A valid configuration: one step of a tiny model."""
    data = [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(6)]
    for name, part in (("train", data[:4]), ("eval", data[4:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    files = {name: [str(folder / f"{name}.jsonl")] for name in ("train", "eval")}
    return {
        "run_dir": str(folder / "runs" / "drawn"),
        "steps": 1,
        "model": {"path": str(prepared / draw.choice(MODELS))},
        "data": {**files, "max_prompt_tokens": 200},
        "rollout": {"prompts_per_step": 2, "group_size": 2, "max_response_tokens": 4},
        "optimizer": {"warmup_steps": 0, "micro_batch_size": 4},
        "eval": {"samples": 1},
    }


def fields(model: type[BaseModel] = RunConfig, prefix: str = "") -> list[str]:
    """Dotted names of all sections and fields."""
    found = []
    for name, info in model.model_fields.items():
        found.append(prefix + name)
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            found += fields(info.annotation, f"{prefix}{name}.")
    return found


def choices(name: str) -> list[Any]:
    """Values of a field with a `Literal` type; empty for other types."""
    model: Any = RunConfig
    for part in name.split("."):
        model = model.model_fields[part].annotation if hasattr(model, "model_fields") else None
    found: list[Any] = []
    for kind in typing.get_args(model) if isinstance(model, types.UnionType) else [model]:
        found += typing.get_args(kind) if typing.get_origin(kind) is Literal else []
    return found


def value(draw: random.Random, depth: int = 2) -> Any:
    """A random scalar or, less often, a list or mapping of scalars."""
    match draw.randrange(8) if depth else 0:
        case 6:
            return [value(draw, depth - 1) for _ in range(draw.randint(0, 3))]
        case 7:
            return {str(draw.choice(SCALARS))[:20]: value(draw, depth - 1) for _ in range(draw.randint(0, 3))}
        case _:
            return draw.choice(SCALARS)


def change(draw: random.Random, tree: dict[str, Any], names: Sequence[str] | None = None) -> None:
    """Change the value of a field, or add an unknown field."""
    name = draw.choice(list(names or fields())) if names or draw.random() < 0.85 else draw.choice(NAMES)
    *sections, last = name.split(".")
    for section in sections:
        inner = tree.setdefault(section, {})
        if not isinstance(inner, dict):
            return
        tree = inner
    offered = choices(name) if name in fields() else []
    tree[last] = draw.choice(offered) if offered and draw.random() < 0.6 else value(draw)


def overrides(draw: random.Random, chance: float) -> list[str]:
    if draw.random() >= chance:
        return []
    name = draw.choice([*fields(), *NAMES])
    text = draw.choice(TEXTS) if draw.random() < 0.5 else str(draw.choice(SCALARS))
    return [f"{name}={text}".replace("\0", "").encode(errors="replace").decode()]


def reading(draw: random.Random) -> list[str]:
    """A command that reads a configuration without training."""
    return draw.choice([["train", "--dry-run"], ["train", "--dry-run"], ["plan"]])


def write_config(draw: random.Random, folder: Path, tree: dict[str, Any]) -> str:
    path = folder / "run.yaml"
    text = yaml.safe_dump(tree, allow_unicode=draw.random() < 0.5)
    if draw.random() < 0.1:
        lines = text.splitlines()
        lines.insert(draw.randint(0, len(lines)), draw.choice([*TEXTS, *lines, "steps: 7", "rollout:", "model: {}"]))
        text = "\n".join(lines)
    content = text.encode(errors="surrogatepass")
    path.write_bytes(damaged(draw, content) if draw.random() < 0.05 else content)
    return str(path)


def write_rows(draw: random.Random, stem: Path) -> str:
    """Write a data file of a few rows. Returns its name."""
    table = [row(draw) for _ in range(draw.randint(0, 4))]
    content = "".join(json.dumps(entry) + "\n" for entry in table).encode()
    suffix = draw.choice([".jsonl", ".jsonl", ".jsonl", ".json", ".csv", ".jsonl.gz", ".parquet", ".txt", ""])
    if suffix == ".json":
        content = json.dumps(table).encode()
    elif suffix == ".csv":
        content = "\n".join([",".join(ROWS[:2]), *(f'"{draw.choice(TEXTS)}",{n}' for n in range(3))]).encode(
            errors="replace"
        )
    elif suffix == ".parquet":
        content = parquet(draw, table)
    elif suffix.endswith(".gz"):
        content = gzip.compress(content)
    if draw.random() < 0.25:
        content = draw.choice([damaged(draw, content), draw.choice(CONTENT)])
    path = stem.with_suffix(suffix)
    path.write_bytes(content)
    return str(path if draw.random() < 0.95 else draw.choice([path.parent, path / "x", f"{path.parent}/*{suffix}"]))


def row(draw: random.Random) -> dict[str, Any]:
    found: dict[str, Any] = {"question": "What is 1 + 1?", "answer": "2"}
    for _ in range(draw.randint(0, 2)):
        chat = [
            {"role": draw.choice(["user", "system", "x"]), "content": value(draw, 1)} for _ in range(draw.randint(0, 3))
        ]
        marked = [
            {"role": "user", "content": draw.choice(["a[TEACHER_CONTEXT_TOKEN]b", "[TEACHER_CONTEXT_TOKEN]", "\ud800"])}
        ]
        found[draw.choice(ROWS)] = draw.choice([value(draw), chat, marked, {"ground_truth": value(draw, 0)}])
    if draw.random() < 0.2:
        del found[draw.choice(["question", "answer"])]
    return found


def parquet(draw: random.Random, table: list[dict[str, Any]]) -> bytes:
    """Parquet bytes with columns of random types. A table that Arrow rejects becomes a table of text."""
    import pyarrow
    import pyarrow.parquet

    transport = pyarrow.BufferOutputStream()
    kind = draw.choice(
        [pyarrow.float32(), pyarrow.int8(), pyarrow.bool_(), pyarrow.decimal128(12, 2), pyarrow.date32()]
    )
    columns = {
        "question": ["1 + 1"] * 3,
        "answer": pyarrow.array([1, 0, 1]).cast(pyarrow.int32()).cast(kind, safe=False),
    }
    try:
        found = pyarrow.Table.from_pylist(table) if table and draw.random() < 0.5 else pyarrow.table(columns)
    except (pyarrow.ArrowException, OverflowError, ValueError):
        found = pyarrow.table({"question": ["1 + 1"], "answer": ["2"]})
    pyarrow.parquet.write_table(found, transport)
    return bytes(transport.getvalue())


def damage_model(draw: random.Random, model: Path) -> None:
    """Add a fault that is typical of downloads and conversions."""
    files = sorted(path for path in model.iterdir() if path.is_file())
    configs = [path for path in files if path.suffix == ".json"]
    if not configs or draw.random() < 0.4:
        return damage_file(draw, draw.choice(files)) if files else None
    path = draw.choice(configs)
    try:
        tree = json.loads(path.read_bytes())
    except (ValueError, RecursionError):  # damaged by an earlier fault
        return None
    if not isinstance(tree, dict):
        return None
    more = [
        "rope_parameters",
        "rope_scaling",
        "auto_map",
        "chat_template",
        "tokenizer_class",
        "quantization_config",
        "architectures",
    ]
    for _ in range(draw.randint(1, 2)):
        tree[draw.choice([*tree, *more])] = draw.choice([value(draw), 1, 2, 300, 4096, "LlamaTokenizer", [0, 299, 300]])
    path.write_text(json.dumps(tree))
    return None


def damage_file(draw: random.Random, path: Path) -> None:
    if not path.is_file():
        return
    content = path.read_bytes()
    path.unlink()
    match draw.randrange(6):
        case 0:
            return
        case 1:
            path.symlink_to("../blobs/gone")
        case 2:
            path.mkdir()
        case 3:
            path.write_bytes(draw.choice(CONTENT))
        case 4:
            path.write_bytes(content[: draw.randint(0, len(content))])
        case _:
            path.write_bytes(damaged(draw, content))


def damaged(draw: random.Random, content: bytes) -> bytes:
    """Content with some bytes changed, removed or inserted."""
    found = bytearray(content)
    for _ in range(draw.randint(1, 3)):
        at = draw.randint(0, len(found))
        found[at : at + draw.randint(0, 4)] = draw.randbytes(draw.randint(0, 4))
    return bytes(found)


def signals(draw: random.Random, chance: float) -> list[tuple[float, int]]:
    if draw.random() >= chance:
        return []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    return sorted((draw.uniform(0, 3), int(draw.choice(numbers))) for _ in range(draw.randint(1, 2)))
