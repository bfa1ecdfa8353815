"""Plans of the shipped recipes, and what the command says."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sdpg_megatron.architecture import read_architecture
from sdpg_megatron.cli import main
from sdpg_megatron.config import RunConfig
from sdpg_megatron.errors import ConfigError
from sdpg_megatron.plan.advice import advise
from sdpg_megatron.plan.gpus import GPUS, find_gpu
from sdpg_megatron.plan.plan import Plan, make_plan
from sdpg_megatron.plan.shards import Grid, count_active, count_parameters
from sdpg_megatron.settings import load

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "examples" / "recipes"
CONFIGS = ROOT / "tests" / "fixtures" / "configs"
APART = ("rollout.sglang.colocated=false", "rollout.sglang.sink=broadcast", "rollout.sglang.mem_fraction=0.85")
PUBLISHED = {
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen2.5-7B-Instruct": 7_615_616_512,
    "Llama-3.1-8B-Instruct": 8_030_261_248,
}
"""Parameters, tied ones once."""
HARDWARE: dict[str, tuple[tuple[str, int, tuple[str, ...]], ...]] = {
    "qwen3-1.7b": (("H100", 8, ()), ("H100", 4, (*APART, "rollout.sglang.servers=4"))),
    "qwen3-4b": (("H100", 8, ()), ("H100", 4, (*APART, "rollout.sglang.servers=4"))),
    "qwen3-8b": (("H100", 8, ()), ("H100", 4, (*APART, "rollout.sglang.servers=2"))),
    "qwen2.5-7b": (("H100", 8, ()), ("H100", 4, (*APART, "rollout.sglang.servers=2"))),
    "llama-3.1-8b": (("H100", 8, ()), ("H100", 4, (*APART, "rollout.sglang.servers=2"))),
    "qwen3-30b-a3b": (("H200", 8, ()), ("H100", 16, APART)),
}
"""What each recipe says that it needs: GPU, ranks, and where the servers are."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders with a config.json and nothing else."""
    root = tmp_path_factory.mktemp("models")
    for config in CONFIGS.glob("*.json"):
        (root / config.stem).mkdir()
        shutil.copy(config, root / config.stem / "config.json")
    return root


def recipe(models: Path, name: str, *changes: str) -> RunConfig:
    config = load(RECIPES / f"{name}.yaml")
    return load(RECIPES / f"{name}.yaml", [f"model.path={models / config.model.path.name}", *changes])


def plan_of(models: Path, name: str, *changes: str, gpu: str = "H100", ranks: int | None = None) -> Plan:
    return make_plan(recipe(models, name, *changes), find_gpu(gpu), ranks)


def test_parameters_are_the_published_ones(models: Path) -> None:
    found = {name: count_parameters(read_architecture(models / name)) for name in PUBLISHED}
    assert found == PUBLISHED
    assert 2.5e9 < count_active(read_architecture(models / "Qwen3-30B-A3B")) < 3.3e9


def test_there_is_hardware_for_every_recipe() -> None:
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(HARDWARE)
    assert {path.stem for path in RECIPES.glob("*.sh")} == {*HARDWARE, "common"}


@pytest.mark.parametrize("name", HARDWARE)
def test_a_recipe_fits_its_hardware(models: Path, name: str) -> None:
    for gpu, ranks, changes in HARDWARE[name]:
        plan = plan_of(models, name, *changes, gpu=gpu, ranks=ranks)
        assert plan.fits, (gpu, plan.fullest.fullest, plan.over)
        assert plan.server is not None and plan.server.sequences >= 8
        assert advise(plan) == []


@pytest.mark.parametrize("method", ["grpo", "dapo", "rlsd", "opsd"])
@pytest.mark.parametrize("name", ["qwen3-1.7b", "qwen3-4b"])
def test_every_method_of_the_paper_fits(models: Path, name: str, method: str) -> None:
    plan = plan_of(models, name, f"objective.name={method}", ranks=8)
    assert plan.fits
    taught = method in ("rlsd", "opsd")
    assert ("teacher rows" in plan.fullest.phases["update"] and plan.load.taught > 0) == taught


@pytest.mark.parametrize(
    ("call", "place", "says"),
    [
        ("qwen3-1.7b.sh opsd", "colocated", "8 x H100"),
        ("qwen3-4b.sh sdpg-ufkl", "disaggregated", "4 x H100 (79.6 GiB), 4 more for servers"),
        ("qwen3-8b.sh", "disaggregated", "4 x H100 (79.6 GiB), 4 more for servers"),
        ("qwen2.5-7b.sh", "colocated", "8 x H100"),
        ("llama-3.1-8b.sh", "colocated", "8 x H100"),
        ("qwen3-30b-a3b.sh", "colocated", "8 x H200"),
        ("qwen3-30b-a3b.sh three", "colocated", "16 x H100 (79.6 GiB), 8 more for servers"),
    ],
)
def test_a_recipe_plans_before_it_trains(models: Path, call: str, place: str, says: str) -> None:
    script, *arguments = call.split()
    several = {"NNODES": "3", "NODE_RANK": "0"} if "three" in arguments else {}
    given = {"PYTHON": sys.executable, "MODELS": str(models), "PLACE": place, "PLAN_ONLY": "1", **several}
    command = ["bash", str(RECIPES / script), *arguments]
    done = subprocess.run(command, env={**os.environ, **given}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert says in done.stdout and "\nFits: " in done.stdout


@pytest.mark.parametrize("name", HARDWARE)
def test_a_recipe_can_be_walked(models: Path, name: str) -> None:
    from sdpg_megatron.mcore.shapes import walk

    ranks = HARDWARE[name][0][1]
    config = recipe(models, name)
    plan = make_plan(config, find_gpu("H200"), ranks)
    (stage,) = walk(config, ranks)
    assert stage.parameters == plan.stages[0].numel
    columns = plan.arch.padded_vocab(config.parallel.tensor) // config.parallel.tensor
    assert stage.shapes == ((config.rollout.max_response_tokens, columns),)


def test_a_walk_over_pipeline_stages(models: Path) -> None:
    from sdpg_megatron.mcore.shapes import walk

    changes = ("parallel.pipeline=2", "parallel.virtual_pipeline=2", "parallel.tensor=2", "parallel.sequence=true")
    config = recipe(models, "qwen3-4b", *changes)
    plan = make_plan(config, find_gpu("H100"), 4)
    stages = walk(config, 4)
    assert [stage.parameters for stage in stages] == [stage.numel for stage in plan.stages]
    assert [len(stage.shapes) for stage in stages] == [2, 2]
    assert stages[0].shapes[0] == (3072, 1, 2560)  # half of 6144 tokens on each of two ranks


def test_what_does_not_fit_says_what_helps(models: Path) -> None:
    plan = plan_of(models, "qwen3-4b", "model.recompute=false", ranks=8)
    assert not plan.fits and plan.fullest.fullest == "update"
    advice = advise(plan)
    (recompute,) = [one for one in advice if one.change == "model.recompute=true"]
    assert recompute.fits and recompute.peak == plan_of(models, "qwen3-4b", ranks=8).fullest.peak
    assert [one.fits for one in advice] == sorted((one.fits for one in advice), reverse=True)


def test_a_server_without_room_is_said(models: Path) -> None:
    small = ("rollout.sglang.mem_fraction=0.1", "rollout.sglang.tensor=1")
    plan = plan_of(models, "qwen3-8b", *small, ranks=8)
    assert not plan.fits and not plan.served
    assert "rollout.sglang.mem_fraction=0.7" in [one.change for one in advise(plan)]


@pytest.mark.parametrize(
    ("more", "less"),
    [
        ((), ("optimizer.micro_batch_tokens=8192",)),
        (("model.recompute=false",), ()),
        ((), ("parallel.tensor=2", "parallel.sequence=true")),
        ((), ("parallel.pipeline=2",)),
        (("optimizer.distributed=false",), ()),
    ],
)
def test_what_saves_memory(models: Path, more: tuple[str, ...], less: tuple[str, ...]) -> None:
    peaks = [
        max(stage.total("update") for stage in plan_of(models, "qwen3-4b", *changes, ranks=8).stages)
        for changes in (more, less)
    ]
    assert peaks[1] < peaks[0]


def test_the_command(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["plan", str(RECIPES / "qwen3-4b.yaml"), f"model.path={models / 'Qwen3-4B'}", "--ranks", "8"]
    assert main(call) == 0
    text = capsys.readouterr().out
    assert "4.02 billion parameters" in text and "\nFits: " in text
    assert main([*call, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["model"]["parameters"] == PUBLISHED["Qwen3-4B"] and data["fits"]
    assert set(data["seconds"]) == {"rollout", "passes", "update", "publish"}
    assert main([*call, "model.recompute=false"]) == 2
    assert "model.recompute=true" in capsys.readouterr().out


def test_unknown_gpus_and_numbers_of_ranks_are_refused(models: Path) -> None:
    with pytest.raises(ConfigError, match="H100"):
        find_gpu("H10")
    assert find_gpu("h100") is GPUS["H100"]
    config = recipe(models, "qwen3-8b")
    with pytest.raises(ConfigError, match="multiple of 2"):
        Grid.of(config.parallel, 3)
