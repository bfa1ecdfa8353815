"""Who may import whom: down the rooms of the house only, and Megatron and SGLang in their own rooms only."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import sdpg_megatron

ROOT = Path(sdpg_megatron.__file__).parent
PACKAGE = "sdpg_megatron"

FLOORS = (
    ("__main__", "launch"),
    ("cli", "plugins"),
    ("train", "convert"),
    ("batching", "checkpoint", "estimate", "runtime"),
    ("mcore", "rollout"),
    ("data", "rewards", "objectives", "head", "weights", "evaluation"),
    ("observe",),
    ("architecture",),
    ("config",),
    ("records", "answers", "hf_files", "process"),
    ("errors", "__init__"),
)
"""From the top. A room imports itself and lower floors, never a neighbour on its own floor."""
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
CONFINED = {
    "megatron": ("mcore", "checkpoint", "convert", "estimate", "plugins"),
    "sglang": ("rollout/sglang", "rollout/transports"),
}
"""Third-party packages, and the only places that import them."""


def imports(source: str, package: str) -> Iterator[str]:
    """Dotted names that `source` imports anywhere, also inside functions; relative ones resolved against `package`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parent, *([node.module] if node.module else [])])
            # `from sdpg_megatron import config` imports a room; `from sdpg_megatron.config import load` does not
            yield from (f"{module}.{alias.name}" for alias in node.names) if module == PACKAGE else [module]


def violations(path: str, source: str) -> list[str]:
    """What `source`, at `path` relative to the package, imports and must not."""
    room = path.split("/")[0].removesuffix(".py")
    assert room in LEVEL, f"{room} has no floor yet: give it one in FLOORS"
    package = ".".join([PACKAGE, *path.split("/")[:-1]])
    found = []
    for name in imports(source, package):
        top, *rest = name.split(".")
        if top == PACKAGE and rest and rest[0] in LEVEL and rest[0] != room and LEVEL[rest[0]] <= LEVEL[room]:
            found.append(f"{path}: {room} imports {name}")
        if top in CONFINED and not path.startswith(CONFINED[top]):
            found.append(f"{path}: imports {name}")
    return found


def test_imports_go_down_only() -> None:
    files = sorted(ROOT.rglob("*.py"))
    assert len(files) > 20
    assert [v for file in files for v in violations(file.relative_to(ROOT).as_posix(), file.read_text())] == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("observe/progress.py", "from sdpg_megatron.train.loop import run"),
        ("head/torch_head.py", "from ..objectives import base"),
        ("config/load.py", "def f():\n    from sdpg_megatron import observe"),
        ("rollout/hf.py", "import sdpg_megatron.mcore.compat.device"),
        ("head/torch_head.py", "from megatron.core import parallel_state"),
        ("train/loop.py", "import megatron.core as mc"),
        ("rollout/hf.py", "import sglang"),
    ],
)
def test_a_violation_is_found(path: str, source: str) -> None:
    assert len(violations(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("train/loop.py", "from sdpg_megatron.mcore import device\nfrom . import batch"),
        ("mcore/compat/device.py", "from megatron.core import parallel_state"),
        ("rollout/sglang/client.py", "import sglang"),
        ("cli.py", "from sdpg_megatron import __version__"),
    ],
)
def test_what_is_allowed_passes(path: str, source: str) -> None:
    assert violations(path, source) == []


def test_a_public_class_name_has_one_meaning() -> None:
    trees = (ast.parse(file.read_text(encoding="utf-8")) for file in ROOT.rglob("*.py"))
    names = Counter(node.name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef))
    assert [name for name, count in names.items() if count > 1 and not name.startswith("_")] == []
