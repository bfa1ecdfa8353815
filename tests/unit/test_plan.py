"""Plans of the recipes' models and layouts, and what the command says."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest

from sdpg_megatron.architecture import check_served, read_architecture
from sdpg_megatron.cli import main
from sdpg_megatron.config import RunConfig, SGLangConfig
from sdpg_megatron.config.load import load_config
from sdpg_megatron.errors import ConfigError
from sdpg_megatron.estimate.advice import advise
from sdpg_megatron.estimate.gpus import GPUS, find_gpu
from sdpg_megatron.estimate.plan import Plan, make_plan
from sdpg_megatron.estimate.shards import Grid, count_active, count_parameters

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "examples" / "recipes"
CONFIGS = ROOT / "tests" / "fixtures" / "configs"
APART = ("rollout.sglang.colocated=false", "rollout.sglang.transport=broadcast")
PUBLISHED = {
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen2.5-7B-Instruct": 7_615_616_512,
    "Llama-3.1-8B-Instruct": 8_030_261_248,
}
"""Parameters, tied ones once."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders with a config.json and nothing else."""
    root = tmp_path_factory.mktemp("models")
    for config in CONFIGS.glob("*.json"):
        (root / config.stem).mkdir()
        shutil.copy(config, root / config.stem / "config.json")
    return root


def recipe(models: Path, name: str, *changes: str) -> RunConfig:
    config = load_config(RECIPES / f"{name}.yaml")
    return load_config(RECIPES / f"{name}.yaml", [f"model.path={models / config.model.path.name}", *changes])


def plan_of(models: Path, name: str, *changes: str, gpu: str = "H100", ranks: int | None = None) -> Plan:
    return make_plan(recipe(models, name, *changes), find_gpu(gpu), ranks)


def test_parameters_are_the_published_ones(models: Path) -> None:
    found = {name: count_parameters(read_architecture(models / name)) for name in PUBLISHED}
    assert found == PUBLISHED
    assert 2.5e9 < count_active(read_architecture(models / "Qwen3-30B-A3B")) < 3.3e9


@pytest.mark.parametrize(
    ("method", "phases"),
    [("grpo", set()), ("dapo", set()), ("rlsd", {"passes"}), ("opsd", {"passes", "update"})],
)
@pytest.mark.parametrize("name", ["qwen3-1.7b", "qwen3-4b"])
def test_a_method_keeps_its_teachers_rows_as_long_as_it_reads_them(
    models: Path, name: str, method: str, phases: set[str]
) -> None:
    """rlsd takes log-probs of them before the update."""
    plan = plan_of(models, name, f"objective.name={method}", ranks=8)
    assert {phase for phase, parts in plan.fullest.phases.items() if parts.get("teacher rows")} == phases
    assert bool(plan.load.teacher_rows) == bool(phases)


def test_a_walk_over_pipeline_stages(models: Path) -> None:
    from sdpg_megatron.estimate.shapes import walk

    changes = ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "parallel.tensor=2", "parallel.sequence=true"]
    changes += ["rollout.sglang.servers=4"]
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
    assert {kind: set(sent) for kind, sent in data["sent_per_step"].items()} == {
        "data": {"update"},
        "publish": {"publish"},
    }
    assert main([*call, "model.recompute=false"]) == 2
    assert "model.recompute=true" in capsys.readouterr().out


def test_unknown_gpus_and_numbers_of_ranks_are_refused(models: Path) -> None:
    with pytest.raises(ConfigError, match="H100"):
        find_gpu("H10")
    assert find_gpu("h100") is GPUS["H100"]
    config = recipe(models, "qwen3-8b")
    with pytest.raises(ConfigError, match="multiple of 2"):
        Grid.of(config.parallel, 3)


@pytest.mark.parametrize("name", ["qwen3-8b", "qwen3-30b-a3b"])
def test_tensor_parallel_ranks_exchange_what_attention_and_dense_networks_need(models: Path, name: str) -> None:
    """Token dispatch has groups of its own: a mixture's layers gather and scatter at their attention alone."""
    plan = plan_of(models, name, ranks=8)
    halves = 1 if plan.arch.experts else 2
    tokens = plan.load.mean_student / plan.grid.data
    of_half = plan.arch.num_layers * plan.arch.hidden_size * 2 * (1 / 2)  # bfloat16; one of two ranks
    rows = plan.load.mean_responses / plan.grid.data * plan.arch.hidden_size * 4 * 2 * (1 / 2)
    sent = plan.traffic["tensor"].sent
    # Old and reference log-probs, the teacher on half: a gather and a scatter each.
    assert sent["passes"] == pytest.approx(2.5 * 2 * halves * of_half * tokens)
    # Forward twice, as activations are recomputed; backward with inputs gathered once more; the head's gradient.
    assert sent["update"] == pytest.approx((2 * 2 + 3) * halves * of_half * tokens + rows)
    assert ("expert" in plan.traffic) == (halves == 1)


@pytest.mark.parametrize(
    ("changes", "ranks", "local"),
    [
        ((), 8, True),
        (("rollout.sglang.servers=2", *APART), 4, True),
        (("rollout.sglang.servers=2", *APART), 8, False),
        (("rollout.sglang.urls=[http://10.0.0.2:30000]", *APART), 4, False),
        (("rollout.engine=hf",), 16, True),
    ],
)
def test_a_publish_goes_as_far_as_the_servers_are(
    models: Path, changes: tuple[str, ...], ranks: int, local: bool
) -> None:
    assert plan_of(models, "qwen3-8b", *changes, ranks=ranks).traffic["publish"].local == local


def test_shards_are_gathered_before_they_are_published(models: Path) -> None:
    whole = 2 * PUBLISHED["Qwen3-8B"]
    alone = plan_of(models, "qwen3-8b", "parallel.tensor=1", "parallel.sequence=false", ranks=8)
    assert "gather" not in alone.traffic
    halves = plan_of(models, "qwen3-8b", ranks=8)
    assert halves.traffic["gather"].sent["publish"] == pytest.approx(whole / 2, rel=0.01)
    assert halves.seconds["publish"] > alone.seconds["publish"]
    # Stages join two quarters each, and the second sends its half on.
    stages = plan_of(models, "qwen3-8b", "parallel.pipeline=2", ranks=8)
    assert stages.traffic["gather"].sent["publish"] == pytest.approx(whole, rel=0.01)
    mixture = plan_of(models, "qwen3-30b-a3b", ranks=8)
    assert mixture.traffic["gather"].sent["publish"] > 0.8 * 2 * PUBLISHED["Qwen3-30B-A3B"]


@pytest.mark.parametrize(
    ("changes", "ranks", "says"),
    [
        ((), 4, "servers x tensor x data: found '8 x 1 x 1', expected at most the 4 GPUs"),
        (("rollout.sglang.tensor=2",), 16, "servers x tensor x data: found '8 x 2 x 1', expected at most the 8 GPUs"),
        (("rollout.sglang.tensor=3", "rollout.sglang.servers=2"), 8, r"tensor: found 3, .*32 attention heads.*1, 2, 4"),
        (("rollout.sglang.tensor=3", *APART), 8, r"tensor: found 3, .*32 attention heads"),
    ],
)
def test_servers_that_the_devices_or_the_model_do_not_allow_are_refused(
    models: Path, changes: tuple[str, ...], ranks: int, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        plan_of(models, "qwen3-4b", *changes, ranks=ranks)


@pytest.mark.parametrize(("name", "tensor", "fits"), [("Qwen3-4B", 16, True), ("Qwen3-8B", 64, False)])
def test_several_ranks_of_a_server_may_have_one_key_value_head(
    models: Path, name: str, tensor: int, fits: bool
) -> None:
    with nullcontext() if fits else pytest.raises(ConfigError, match=f"found {tensor}, .*one of: 1, 2, 4, 8, 16, 32$"):
        check_served(read_architecture(models / name), SGLangConfig(tensor=tensor))


def test_a_run_refuses_servers_that_cannot_have_the_model(models: Path) -> None:
    from sdpg_megatron.train.inputs import load_model_inputs

    with pytest.raises(ConfigError, match=r"rollout\.sglang\.tensor: found 3"):
        load_model_inputs(recipe(models, "qwen3-4b", "rollout.sglang.tensor=3"))
