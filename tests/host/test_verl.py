"""SDPG as an engine of verl: real methods of verl's engine on CPUs, in the interpreter of $SDPG_VERL_PYTHON.

`verl_cpu.py` runs them; scripts/install_verl_cpu.sh makes such an interpreter. The tests of settings and batches need
none.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from sdpg_megatron.config import ObjectiveConfig
from sdpg_megatron.errors import ConfigError, DataError
from sdpg_megatron.objectives import build_objective
from sdpg_megatron.plugins.verl.rows import read_rows, teacher_prompts, uniform_temperature
from sdpg_megatron.plugins.verl.settings import CONFIG_VARIABLE, check_engine, read_settings
from tests.tiny import tiny_model, tiny_tokenizer

PYTHON_VARIABLE = "SDPG_VERL_PYTHON"
PYTHON = os.environ.get(PYTHON_VARIABLE, "")
ROOT = Path(__file__).parents[2]
VOCAB = 512
"""Without padding at every layout: verl's own log-probs count padded columns, which this package's never do."""
REASON = f"needs verl: set {PYTHON_VARIABLE} to an interpreter that has it (scripts/install_verl_cpu.sh)"
needs_verl = pytest.mark.skipif(not PYTHON, reason=REASON)

SINGLE = ("equal", "verl", "v0", "dynamic", "padded", "log_probs", "worker", "errors", "trainer")
RUNS = {"tensor": 2, "pipeline": 2, "virtual": 2, "context": 2, "data": 2}
"""Layouts beside one rank, with their number of ranks."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("verl-model")
    tiny_model("qwen3", tied=False, seed=3, vocab=VOCAB).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[dict[str, Any], Path]]:
    """Results of a layout's run and the folder of its gradients; each layout runs once."""
    done: dict[str, tuple[dict[str, Any], Path]] = {}

    def results(layout: str) -> tuple[dict[str, Any], Path]:
        if layout not in done:
            out = tmp_path_factory.mktemp(layout)
            checks = SINGLE if layout == "single" else ("equal", "verl") if layout == "tensor" else ("equal",)
            launched(folder, out, layout, checks)
            done[layout] = json.loads((out / f"{layout}.json").read_text()), out
        return done[layout]

    return results


def launched(folder: Path, out: Path, layout: str, checks: tuple[str, ...]) -> None:
    ranks = RUNS.get(layout, 1)
    command = [PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["-m", "tests.host.verl_cpu", str(folder), str(out), layout, *checks]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-8000:]}"


Run = Callable[[str], tuple[dict[str, Any], Path]]


# --- with verl


@needs_verl
def test_the_environment_variables_select_the_engine(run: Run) -> None:
    found, _ = run("single")
    assert found["engine"] == "SDPGEngine"


@needs_verl
@pytest.mark.parametrize("form", ["mean", "per_token"])
@pytest.mark.parametrize("layout", ["single", "tensor", "pipeline", "virtual", "data"])
def test_loss_and_gradients_equal_those_of_the_forward_step(run: Run, layout: str, form: str) -> None:
    found = run(layout)[0]["equal"][form]
    assert found["loss"] == pytest.approx(found["expected"], rel=1e-6)
    assert found["kl"] == pytest.approx(found["expected_kl"], rel=1e-6)
    assert found["kl"] > 1e-3
    assert found["metrics"]["train/loss"] == pytest.approx(found["expected"], rel=1e-6)
    assert found["differences"]["whole"] < 1e-6
    assert found["differences"]["worst"] < 3e-6


@needs_verl
@pytest.mark.parametrize("form", ["mean", "per_token"])
@pytest.mark.parametrize("layout", ["tensor", "pipeline", "virtual", "context", "data"])
def test_the_layout_changes_nothing(run: Run, layout: str, form: str) -> None:
    (one, one_out), (several, several_out) = run("single"), run(layout)
    assert several["equal"][form]["loss"] == pytest.approx(one["equal"][form]["loss"], rel=2e-6)
    names = ("distill/kl", "train/loss", "train/entropy", "distill/gate_rate")
    expected, found = one["equal"][form]["metrics"], several["equal"][form]["metrics"]
    assert {n: found[n] for n in names} == pytest.approx({n: expected[n] for n in names}, rel=2e-6)
    if layout in ("context", "data"):  # the others shard the parameters
        grads, reference = (torch.load(path / f"grads-{form}.pt") for path in (several_out, one_out))
        worst = max(float((grads[name] - grad).norm() / grad.norm()) for name, grad in reference.items())
        assert worst < 2e-6


@needs_verl
@pytest.mark.parametrize("layout", ["single", "tensor"])
@pytest.mark.parametrize(
    "mode",
    ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean", "weighted"],
)
def test_without_distillation_it_is_verls_own_loss(run: Run, layout: str, mode: str) -> None:
    found = run(layout)[0]["verl"][mode]
    assert found["loss"] == pytest.approx(found["expected"], rel=2e-6)
    assert found["differences"]["whole"] < 2e-6


@needs_verl
@pytest.mark.parametrize("way", ["v0", "dynamic", "padded"])
def test_padding_and_other_micro_batches_change_nothing(run: Run, way: str) -> None:
    found = run("single")[0][way]
    assert found["loss"] == pytest.approx(found["expected"], rel=1e-6)
    assert found["differences"]["whole"] < 1e-6


@needs_verl
def test_log_probs_are_verls_own(run: Run) -> None:
    assert run("single")[0]["log_probs"] == {"names": ["entropy", "log_probs"], "same": True}


@needs_verl
def test_updates_of_verls_worker(run: Run) -> None:
    found = run("single")[0]["worker"]
    updates = found["updates"]
    # the schedule advances with verl's updates, not with its mini-batches
    assert [update["distill/beta"] for update in updates] == pytest.approx([0.7 / 4, 0.7 * 2 / 4, 0.7 * 3 / 4])
    assert found["changed"]
    assert {"loss", "grad_norm", "lr", "train/loss", "train/entropy", "distill/kl", "policy/ratio"} <= updates[0].keys()
    assert updates[0]["grad_norm"] > 0 and updates[0]["distill/kl"] > 0


@needs_verl
def test_messages(run: Run) -> None:
    found = run("single")[0]["errors"]
    assert found["teacher"].startswith("DataError: field teacher_prompt_ids of verl's batch: found none (there are ")
    assert found["teacher"].endswith("dataset.PrivilegedDataset, or objective.beta to 0")
    assert found["reference"].startswith("ConfigError: objective.alpha: found 0.3")
    assert found["entropy"].startswith("ConfigError: actor_rollout_ref.actor.entropy_coeff: found 0.1, expected 0")
    assert found["loss"].startswith("ConfigError: loss function of the worker: found 'max', expected verl's ppo_loss")
    assert found["finite"].startswith("NonFiniteLossError: training step 0: found ")


@needs_verl
def test_teacher_prompts_travel_from_a_file_to_the_engine(run: Run) -> None:
    found = run("single")[0]["trainer"]
    first, second = found["found"]
    assert "What is 12 + 34? The answer is 0." in first and "46 The answer is 1." in second
    assert first.endswith("<|im_start|>assistant\n")
    assert "extra_info" in found["fields"]


# --- without verl


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], Any]:
    def read(tree: dict[str, Any], total_steps: int = 400) -> Any:
        path = tmp_path / "sdpg.yaml"
        path.write_text(yaml.safe_dump(tree))
        monkeypatch.setenv(CONFIG_VARIABLE, str(path))
        return read_settings(total_steps, "model")

    return read


def test_settings(settings: Callable[..., Any]) -> None:
    config = settings({"objective": {"beta": 0.5, "alpha": 0.0}, "head": {"chunk_rows": 64}}, total_steps=3)
    assert (config.objective.beta, config.head.chunk_rows, config.total_optimizer_steps) == (0.5, 64, 3)


@pytest.mark.parametrize(
    ("tree", "found"),
    [
        ({"objective": {"aggregation": "token-mean"}}, "objective.aggregation: found 'token-mean', expected no value"),
        ({"objective": {"correction": "truncate"}}, "remove it: algorithm.rollout_correction decides"),
        ({"model": {"path": "x"}}, "model: found 'model', expected only the sections objective and head"),
        ({"objective": {"betta": 1}}, "did you mean 'beta'"),
        ({"objective": {"teacher": "ema"}}, "objective.teacher: found 'ema', expected current"),
        ({"objective": {"context": "peer"}}, "objective.context: found 'peer', expected data"),
        ({"objective": {"distill_average": "gated"}}, "objective.distill_average: found 'gated', expected all"),
        ({"objective": {"name": "rlsd"}}, "with rlsd set objective.credit_ratio to current"),
    ],
)
def test_settings_that_cannot_work(settings: Callable[..., Any], tree: dict[str, Any], found: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings(tree)
    assert found in str(caught.value)


def test_the_variable_and_the_number_of_steps_are_needed(
    settings: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"optim\.total_training_steps: found -1, expected at least 1"):
        settings({}, total_steps=-1)
    monkeypatch.delenv(CONFIG_VARIABLE)
    with pytest.raises(ConfigError, match="SDPG_CONFIG: found None"):
        read_settings(400, "model")


def engine_of(**changes: Any) -> tuple[Any, Any]:
    engine = {
        "use_fused_kernels": False,
        "dynamic_context_parallel": False,
        "context_parallel_size": 1,
        "use_remove_padding": True,
        "router_replay": SimpleNamespace(mode="disabled"),
        "use_megatron_fsdp": False,
        "dtype": "bfloat16",
    }
    model = {"mtp": SimpleNamespace(enable=False), "hf_config": SimpleNamespace(), "local_path": "model"}
    return (
        SimpleNamespace(**{name: changes.get(name, value) for name, value in engine.items()}),
        SimpleNamespace(**{name: changes.get(name, value) for name, value in model.items()}),
    )


def test_an_engine_that_works() -> None:
    check_engine(*engine_of(context_parallel_size=2))


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"use_fused_kernels": True}, "actor_rollout_ref.model.use_fused_kernels: found True, expected false"),
        ({"mtp": SimpleNamespace(enable=True)}, "actor_rollout_ref.model.mtp.enable: found True"),
        ({"hf_config": SimpleNamespace(vision_config={})}, "expected a model of text only"),
        ({"dynamic_context_parallel": True}, "use context_parallel_size"),
        ({"context_parallel_size": 2, "use_remove_padding": False}, "context_parallel_size: found 2, expected 1"),
        ({"router_replay": SimpleNamespace(mode="R3")}, "router_replay.mode: found 'R3', expected disabled"),
        ({"use_megatron_fsdp": True}, "use_megatron_fsdp: found True"),
        ({"dtype": "float16"}, "dtype: found 'float16', expected bfloat16"),
    ],
)
def test_engines_that_cannot_work(changes: dict[str, Any], found: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_engine(*engine_of(**changes))
    assert found in str(caught.value)


def nested(*rows: list[Any]) -> torch.Tensor:
    return torch.nested.as_nested_tensor([torch.tensor(row) for row in rows], layout=torch.jagged)


def data_of(**changes: Any) -> dict[str, Any]:
    data = {
        "input_ids": nested([1, 2, 3, 4], [5, 6, 7]),
        "prompts": nested([1, 2], [5]),
        "responses": nested([3, 4], [6, 7]),
        "response_mask": nested([1, 1], [0, 1]),
        "advantages": nested([0.5, 0.5], [0.0, 0.25]),
        "old_log_probs": nested([-1.0, -2.0], [-3.0, -4.0]),
        "extra_info": [{"teacher_prompt_ids": [8, 9]}, {"teacher_prompt_ids": [8]}],
    }
    return {**data, **changes}


OBJECTIVE = build_objective(ObjectiveConfig(), 400)


def test_rows() -> None:
    data = data_of(advantages=nested([0.5, 0.5], [0.25, 0.25]))
    rows = read_rows(data, OBJECTIVE, distills=True, stop_ids=[4])
    first, second = rows.samples
    assert (first.student_prompt.tolist(), first.teacher_prompt.tolist(), first.response.tolist()) == (
        [1, 2],
        [8, 9],
        [3, 4],
    )
    assert first.gates.tolist() == [True, False]  # 4 is a stop token
    assert second.gates.tolist() == [False, True]  # the first token was not sampled
    assert rows.tokens["advantages_T"].tolist() == [0.5, 0.5, 0.25]
    assert rows.tokens["old_logprobs_T"].tolist() == [-1.0, -2.0, -4.0]
    assert rows.mask_BN.tolist() == [[True, True], [False, True]]


def test_rows_without_a_teacher() -> None:
    data = data_of()
    del data["extra_info"]
    assert not any(sample.gate for sample in read_rows(data, OBJECTIVE, distills=False).samples)
    with pytest.raises(DataError, match="field teacher_prompt_ids of verl's batch"):
        read_rows(data, OBJECTIVE, distills=True)
    data["advantages"] = nested([-0.5, -0.5], [0.0, 0.0])  # nothing to distil, so nothing is missing
    assert not any(sample.gate for sample in read_rows(data, OBJECTIVE, distills=True).samples)


def test_a_sample_without_a_teacher_prompt_is_not_distilled() -> None:
    data = data_of(extra_info=[{"teacher_prompt_ids": None}, {"teacher_prompt_ids": [8]}])
    assert [sample.gate for sample in read_rows(data, OBJECTIVE, distills=True).samples] == [False, True]


def test_where_teacher_prompts_are_found() -> None:
    def found(data: dict[str, Any]) -> list[list[int]]:
        return [prompt.tolist() for prompt in teacher_prompts(data, 2) or []]

    by_loop = [{"teacher_prompt_ids": [1]}, {}]
    assert found(data_of()) == [[8, 9], [8]]
    assert found(data_of(extra_fields=by_loop)) == [[1], [8]]
    assert found(data_of(extra_fields=by_loop, teacher_prompt_ids=nested([2], [3, 4]))) == [[2], [3, 4]]
    assert found(data_of(teacher_prompt_ids=[[2], [3, 4]])) == [[2], [3, 4]]
    with pytest.raises(DataError, match="a padded tensor"):
        found(data_of(teacher_prompt_ids=torch.zeros(2, 3)))


def test_one_temperature() -> None:
    assert uniform_temperature({"temperature": 0.5}) == 0.5
    assert uniform_temperature({"temperature": torch.tensor([0.5, 0.5])}) == 0.5
    with pytest.raises(ConfigError, match="expected one temperature for all samples"):
        uniform_temperature({"temperature": torch.tensor([0.5, 1.0])})
