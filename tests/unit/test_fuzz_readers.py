"""Whatever stands in a file, readers give an answer or an error of the package."""

from __future__ import annotations

import dataclasses
import gzip
import json
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save

from sdpg_megatron.architecture import Architecture, read_architecture
from sdpg_megatron.checkpoint.files import FileSum, find_damage
from sdpg_megatron.checkpoint.pickles import read_tensor_list
from sdpg_megatron.checkpoint.prefetched_rollouts import PrefetchedRollouts, read_prefetched, write_prefetched
from sdpg_megatron.checkpoint.state import RunState
from sdpg_megatron.config import DataConfig
from sdpg_megatron.config.load import load_config
from sdpg_megatron.convert.arguments import arguments_of, check_arguments
from sdpg_megatron.convert.command import convert
from sdpg_megatron.convert.inspect import inspect
from sdpg_megatron.convert.tensors import CheckpointTensors
from sdpg_megatron.convert.torch_dist import TorchDist
from sdpg_megatron.data.cursor import Cursor
from sdpg_megatron.data.examples import parse_row
from sdpg_megatron.data.readers import read_rows
from sdpg_megatron.errors import SdpgError
from sdpg_megatron.objectives.advantages import group_advantages
from sdpg_megatron.records import Group, Prompt, ScoredGroup
from sdpg_megatron.weights import read_folder
from sdpg_megatron.weights.map import hf_shapes
from tests.completions import make_completion
from tests.tiny import write_tiny_model

FUZZ = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

FUZZ_CHECKPOINTS = settings(FUZZ, max_examples=50, deadline=None)

numbers = st.none() | st.booleans() | st.integers() | st.floats()
values = st.recursive(
    numbers | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """`content` with some bytes changed, cut out or put in."""
    found = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(found)))
        found[at : at + draw(st.integers(0, 4))] = draw(st.binary(max_size=4))
    return bytes(found)


@st.composite
def retold(draw: st.DrawFn, tree: dict[str, Any]) -> dict[str, Any]:
    """`tree` with other values at some of its keys."""
    found: dict[str, Any] = json.loads(json.dumps(tree))
    for _ in range(draw(st.integers(1, 3))):
        place = found
        key = draw(st.sampled_from(sorted(place)))
        while isinstance(place[key], dict) and place[key] and draw(st.booleans()):
            place = place[key]
            key = draw(st.sampled_from(sorted(place)))
        place[key] = draw(values)
    return found


def answers(read: Callable[[], object]) -> None:
    with suppress(SdpgError):
        read()


# --- configuration

TREE = {
    "run_dir": "runs/x",
    "steps": 4,
    "model": {"path": "model", "dtype": "float32"},
    "parallel": {"tensor": 2},
    "data": {"train": ["a.jsonl"], "eval": []},
    "rollout": {"group_size": 4, "sglang": {"servers": 2, "ports": [1, 2]}},
    "objective": {"name": "sdpg", "beta": 0.1},
    "optimizer": {"lr": 1e-5, "warmup_steps": 0},
    "eval": {"k": [1], "samples": 4},
}


@FUZZ
@given(content=st.binary(max_size=60) | damaged(yaml.safe_dump(TREE).encode()))
@example(content=b"a: 2001-99-99")
@example(content=b"{[]: 1}")
@example(content=b"1: 2")
@example(content=b"steps: " + b"9" * 5000)
@example(content=b"[" * 5000)
@example(content=b"a: !!python/object/apply:os.getcwd []")
def test_configuration_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.yaml").write_bytes(content)
    answers(lambda: load_config(tmp_path / "run.yaml"))


@FUZZ
@given(tree=retold(TREE))
def test_configurations(tmp_path: Path, tree: dict[str, Any]) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8", errors="surrogatepass")
    answers(lambda: load_config(tmp_path / "run.yaml"))


@FUZZ
@given(
    override=st.text(max_size=20)
    | st.builds("{}={}".format, st.sampled_from(["steps", "data.train", "x.y"]), st.text())
)
@example(override="steps=2001-99-99")
@example(override="steps=" + "[" * 5000)
def test_overrides(tmp_path: Path, override: str) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(TREE))
    answers(lambda: load_config(tmp_path / "run.yaml", [override]))


# --- rows of data


@FUZZ
@given(content=st.binary(max_size=60) | damaged(b'{"question": "1 + 1", "answer": 2}\n\n{"prompt": []}\n'))
@example(content=b"[" * 100_000)
@example(content=b"9" * 5000)
@example(content=b"\xff\xfe")
@example(content=b'{"question": "\\ud800", "answer": "x"}')
def test_jsonl(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    answers(lambda: [parse_row(row, DataConfig(train=())) for row in read_rows(tmp_path / "rows.jsonl")])


@FUZZ_CHECKPOINTS
@given(
    name=st.sampled_from(["rows.json", "rows.csv", "rows.jsonl.gz", "rows.csv.gz"]),
    content=st.binary(max_size=60)
    | damaged(b'[{"question": "1 + 1", "answer": 2},\n{"prompt": []}]\n')
    | damaged(b'question,answer\n"a\nb",2\n')
    | damaged(gzip.compress(b'question,answer\n"a, b",2\n')),
)
def test_other_text_formats(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    answers(lambda: [parse_row(row, DataConfig(train=())) for row in read_rows(tmp_path / name)])


@FUZZ
@given(
    row=st.dictionaries(
        st.sampled_from(["question", "answer", "context", "prompt", "messages", "reward_model"]),
        values | st.lists(st.fixed_dictionaries({"role": values, "content": values}), max_size=2),
    )
)
def test_rows(tmp_path: Path, row: dict[str, Any]) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    for needed in (False, True):
        answers(
            lambda: [
                parse_row(row, DataConfig(train=()), context_needed=needed)  # noqa: B023
                for row in read_rows(tmp_path / "rows.jsonl")
            ]
        )


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path_factory.mktemp("parquet") / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"question": ["1 + 1"] * 3, "answer": ["2"] * 3}), path)
    return path.read_bytes()


@FUZZ
@given(data=st.data())
def test_parquet(tmp_path: Path, parquet: bytes, data: st.DataObject) -> None:
    (tmp_path / "rows.parquet").write_bytes(data.draw(damaged(parquet)))
    answers(lambda: list(read_rows(tmp_path / "rows.parquet")))


# --- models


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(
        tmp_path_factory.mktemp("m") / "model", "qwen3", tied=True, seed=8, layers=1, hidden=8, heads=2
    )


@pytest.fixture(scope="module")
def copy(model: Path) -> Path:
    return Path(shutil.copytree(model, model.parent / "copy"))


def read_whole(folder: Path) -> None:
    answers(lambda: list(read_folder(folder, bucket_bytes=1 << 20)))
    inspect(folder)


@FUZZ
@given(data=st.data())
def test_safetensors_headers(model: Path, copy: Path, data: st.DataObject) -> None:
    content = (model / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    changed = data.draw(damaged(content[:header]) | st.binary(max_size=40))
    (copy / "model.safetensors").write_bytes(changed + content[header : data.draw(st.sampled_from([None, -1, header]))])
    shutil.copyfile(model / "config.json", copy / "config.json")
    read_whole(copy)


@FUZZ
@given(data=st.data())
def test_tensors_of_other_names_shapes_and_types(model: Path, copy: Path, data: st.DataObject) -> None:
    tensors = load_file(model / "model.safetensors")
    name = data.draw(st.sampled_from(sorted(tensors)))
    tensor = tensors.pop(name)
    kinds = [tensor.int(), tensor.flatten(), tensor[:0], tensor.sum(), tensor.bool(), tensor[None].contiguous()]
    tensors[data.draw(st.sampled_from([name, "lm_head.weight", "x"]))] = data.draw(st.sampled_from(kinds))
    (copy / "model.safetensors").write_bytes(save(tensors))
    shutil.copyfile(model / "config.json", copy / "config.json")
    read_whole(copy)


@FUZZ
@given(data=st.data())
def test_config_json(model: Path, copy: Path, data: st.DataObject) -> None:
    config = json.loads((model / "config.json").read_text())
    older = {"rope_scaling": None, "rope_theta": 1e4, "head_dim": 4, "layer_types": ["full_attention"]}
    tree = data.draw(retold(config | older) | retold({**config, **older, "rope_parameters": None}))
    (copy / "config.json").write_text(json.dumps(tree))
    answers(lambda: read_architecture(copy))


@FUZZ
@given(data=st.data())
def test_bytes_of_config_json(model: Path, copy: Path, data: st.DataObject) -> None:
    content = data.draw(damaged((model / "config.json").read_bytes()) | st.sampled_from([b"[" * 100_000, b"9" * 5000]))
    (copy / "config.json").write_bytes(content)
    answers(lambda: read_architecture(copy))


@FUZZ
@given(index=values | st.fixed_dictionaries({"weight_map": values}) | st.just("[" * 100_000))
def test_indices(model: Path, copy: Path, index: Any) -> None:
    (copy / "model.safetensors").unlink(missing_ok=True)
    shutil.copyfile(model / "config.json", copy / "config.json")
    text = index if isinstance(index, str) else json.dumps(index)
    (copy / "model.safetensors.index.json").write_text(text)
    read_whole(copy)


# --- checkpoints

STATE = RunState(
    step=3, cursor={"position": 7}, seconds=1.5, baseline={}, evaluated=True, config={}, model="m", data="d"
)


@FUZZ
@given(data=st.data())
def test_manifests(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "manifest.json"
    STATE.write(path)
    content = path.read_bytes()
    more = [b"[" * 100_000, b"9" * 5000, b'{"format": []}', b"\xff"]
    path.write_bytes(
        data.draw(
            damaged(content)
            | st.builds(lambda tree: json.dumps(tree).encode(), retold(json.loads(content)))
            | st.sampled_from(more)
        )
    )
    answers(lambda: RunState.read(path))


@FUZZ
@given(content=st.binary(max_size=60))
def test_descriptions_of_tensors(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    answers(lambda: read_tensor_list(tmp_path))


@pytest.fixture(scope="module")
def megatron(model: Path) -> Path:
    target = model.parent / "megatron"
    convert(model, target, console=Console(quiet=True))
    return target


@pytest.fixture
def bounded() -> Iterator[None]:
    """What a damaged pickle asks for in memory is refused, as on a machine that has no more."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**31, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def read_checkpoint(folder: Path, arch: Architecture) -> None:
    """All that a conversion reads."""
    checkpoint = TorchDist(folder)
    answers(lambda: check_arguments(arguments_of(checkpoint), arch, "args"))
    tensors = CheckpointTensors(checkpoint, arch)
    for name, shape in hf_shapes(arch).items():
        answers(lambda: tensors.rows(name, 0, shape[0]))  # noqa: B023


@pytest.mark.parametrize("name", [".metadata", "common.pt", "metadata.json", "__0_0.distcp"])
@pytest.mark.usefixtures("bounded")
@FUZZ_CHECKPOINTS
@given(data=st.data())
def test_damaged_checkpoints(model: Path, megatron: Path, name: str, data: st.DataObject) -> None:
    path = megatron / "release" / name
    content = path.read_bytes()
    try:
        path.write_bytes(data.draw(damaged(content) | st.builds(content.__getitem__, cuts(len(content)))))
        answers(lambda: inspect(megatron))
        answers(lambda: read_checkpoint(megatron / "release", read_architecture(model)))
    finally:
        path.write_bytes(content)


def cuts(length: int) -> st.SearchStrategy[slice]:
    return st.integers(0, length).map(slice)


@FUZZ_CHECKPOINTS
@given(
    files=st.dictionaries(st.text(max_size=4) | st.sampled_from(["a", ".", "..", "a\0"]), st.integers(0, 9), max_size=4)
)
def test_files_of_manifests(tmp_path: Path, files: dict[str, int]) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    path = tmp_path / "manifest.json"
    dataclasses.replace(STATE, files={name: FileSum(size, "x") for name, size in files.items()}).write(path)
    damage = find_damage(tmp_path, RunState.read(path).files, digests=True, threads=2)
    assert (damage is None) == (not files) and str(damage).encode()


@FUZZ_CHECKPOINTS
@given(state=values.filter(lambda value: isinstance(value, dict)) | retold(Cursor(5, 1, True).state()))
@example(state={**Cursor(5, 1, True).state(), "position": "3"})
@example(state={**Cursor(5, 1, True).state(), "epoch": None})
@example(state={**Cursor(5, 1, True).state(), "position": -10})
@example(state={**Cursor(5, 1, True).state(), "position": 6})
def test_data_cursors(state: dict[str, Any]) -> None:
    for size in (5, None):
        answers(lambda: Cursor.from_state(state, size).take(7))  # noqa: B023


class Prompts:
    size = 9

    def __getitem__(self, index: int) -> Prompt:
        return Prompt(f"train.jsonl:{index}", (1,), (2,), "3")

    def describe(self) -> str:
        return "nine"


@FUZZ_CHECKPOINTS
@given(data=st.data())
def test_responses_that_were_drawn_ahead(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "drawn.safetensors"
    completion = make_completion((5, 6), (-0.1, -0.2), "stop", 4, "five", np.zeros((3, 2, 2), np.uint8))
    group = Group(Prompts()[2], (completion, completion))
    write_prefetched(
        path, PrefetchedRollouts((2,), (ScoredGroup(group, (1.0, 0.0), group_advantages((1.0, 0.0)), failures=0),))
    )
    content, arrays = path.read_bytes(), load_arrays(path)
    path.write_bytes(data.draw(damaged(content)))
    answers(lambda: read_prefetched(path, Prompts()))
    for name in data.draw(st.sets(st.sampled_from(sorted(arrays)), min_size=1)):
        arrays[name] = np.array(data.draw(st.lists(st.integers(-9, 9) | st.floats(), max_size=3)))
    words = data.draw(st.none() | values | st.lists(values, min_size=2, max_size=2))
    if words is not None:
        arrays["words"] = np.frombuffer(json.dumps(words).encode(), np.uint8)
    save_arrays(arrays, path)
    answers(lambda: read_prefetched(path, Prompts()))
