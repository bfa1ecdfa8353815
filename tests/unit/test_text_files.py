"""Text files are UTF-8 whatever the locale is."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("sdpg_megatron", "tools")
READ = """
import locale, sys
from pathlib import Path
from sdpg_megatron.data.readers import read_rows
assert locale.getpreferredencoding(False) != "UTF-8", "a locale that this test is not about"
print(ascii([row.values for name in sys.argv[1:] for row in read_rows(Path(name))]))
"""


def violations(source: str) -> Iterator[int]:
    """Lines of calls that open text in the locale's encoding."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(word.arg in ("encoding", None) for word in node.keywords):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        words = {word.arg: word.value for word in node.keywords}
        constants = [value.value for value in [*node.args[:2], *words.values()] if isinstance(value, ast.Constant)]
        modes = [text for text in constants if isinstance(text, str) and text and set(text) <= set("rwaxbt+")]
        if (
            name in ("read_text", "write_text")
            or (name == "open" and isinstance(node.func, ast.Name) and not any("b" in mode for mode in modes))
            or (name == "open" and modes and not any("b" in mode for mode in modes))
            or (name in ("run", "Popen", "check_output") and {"text", "universal_newlines"} & words.keys())
        ):
            yield node.lineno


def test_no_text_file_depends_on_the_locale() -> None:
    files = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 200
    found = [f"{file.relative_to(ROOT)}:{line}" for file in files for line in violations(file.read_text("utf-8"))]
    assert found == []


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("path.read_text()", 1),
        ("path.write_text('é')", 1),
        ("path.read_text(encoding='utf-8')", 0),
        ("open(path)", 1),
        ("open(path, 'rb')", 0),
        ("path.open('w')", 1),
        ("path.open('ab', buffering=0)", 0),
        ("os.open(path, os.O_RDONLY)", 0),
        ("subprocess.run(line, text=True)", 1),
        ("subprocess.run(line, encoding='utf-8')", 0),
    ],
)
def test_a_violation_is_found(source: str, count: int) -> None:
    assert len(list(violations(source))) == count


def test_data_is_read_under_any_locale(tmp_path: Path) -> None:
    rows = [{"question": "Wie groß? ½ \u2212 \U0001f600", "answer": "é"}]
    (tmp_path / "a.jsonl").write_text(json.dumps(rows[0], ensure_ascii=False), encoding="utf-8")
    (tmp_path / "a.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8-sig")
    (tmp_path / "a.csv").write_text(f"question,answer\r\n{rows[0]['question']},é\r\n", encoding="utf-8", newline="")
    files = [str(tmp_path / name) for name in ("a.jsonl", "a.json", "a.csv")]
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-c", READ, *files]
    read = subprocess.run(line, env={**os.environ, **plain}, capture_output=True, encoding="ascii")
    assert read.returncode == 0, read.stderr
    assert ast.literal_eval(read.stdout) == rows * 3
