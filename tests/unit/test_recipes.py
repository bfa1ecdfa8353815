"""What the recipes' scripts call, with stand-ins for the programs that fetch, train and evaluate."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from sdpg_megatron import objectives
from sdpg_megatron.cli import main
from sdpg_megatron.config import RunConfig
from sdpg_megatron.config.load import dump, load_config
from sdpg_megatron.estimate.gpus import find_gpu
from sdpg_megatron.estimate.plan import make_plan
from sdpg_megatron.objectives.methods import RLSD, SDPG
from tests.server_python import write_server_python
from tests.tiny import EOS, TURN_END, tiny_tokenizer, write_hollow_weights

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "tests" / "fixtures" / "configs"
METHODS = ("sdpg-urkl", "sdpg-ufkl", "grpo", "rlsd", "opcd", "dapo", "opsd")
PAPERS = ("qwen3-1.7b", "qwen3-4b")
DENSE = (*PAPERS, "qwen3-8b", "qwen2.5-7b", "llama-3.1-8b")
CALLS = [f"{name} {method}" for name in PAPERS for method in METHODS] + list(DENSE[2:])
SHARED = [(call, "colocated", ("H100", 8, 0)) for call in CALLS] + [("qwen3-30b-a3b", "colocated", ("H200", 8, 0))]
ONE_GPU = [f"one-gpu {size}{long}" for size in ("0.6b", "1.7b") for long in ("", " rollout.max_response_tokens=14336")]
SHARED += [(call, "colocated", ("H100", 1, 0)) for call in ONE_GPU]
APART = [(call, "disaggregated", ("H100", 4, 4)) for call in CALLS]
APART += [("qwen3-30b-a3b three", place, ("H100", 16, 8)) for place in ("colocated", "disaggregated")]
"""GPU, ranks and GPUs of servers alone, as docs/plan.md has them."""

OPTIONS = "{{ date_string }}{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
"""Of the real models' chat templates."""
PYTHON = """#!/usr/bin/env bash
[[ $1 != -c ]] || exit 0
printf '%s\\n' "$$ ${WORLD_SIZE:-}" "$@" "" >>"$CALLS"
case "$1 ${2:-}" in
  "tools/prepare_data.py "*) mkdir -p "$2" && cp data/* "$2" ;;
  "-m sdpg_megatron.launch") eval "${LAUNCH:-}" ;;
esac
"""
HF = """#!/usr/bin/env bash
printf '%s\\n' "$$ hf" "$@" "" >>"$CALLS"
folder="${!#}"
if [[ $3 == config.json ]]; then cp "hub/$2/config.json" "$folder"; exit; fi
cp "hub/$2"/* "$folder"
eval "${HF:-}"
"""
HANGING = """
until=0
trap 'echo TERM >>"$CALLS.signals"; ((until)) || until=$((SECONDS + 2))' TERM
touch "$CALLS.ready"
until ((until && SECONDS >= until)); do
  sleep 1 >/dev/null 2>&1 & # a trap waits for what is in the foreground
  wait
done
exit "$CODE"
"""
"""Saves for a second or two after it was asked to stop."""


@dataclass
class Sandbox:
    """A copy of the recipes where nothing is there yet."""

    root: Path

    def start(self, call: str, **environment: str) -> subprocess.Popen[str]:
        script, *arguments = call.split()
        given = {**os.environ, "PYTHON": "bin/python", "CALLS": str(self.root / "calls"), **environment}
        return subprocess.Popen(
            ["bash", f"examples/recipes/{script}.sh", *arguments],
            cwd=self.root,
            env=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, call: str, **environment: str) -> tuple[int, str]:
        """The exit code, and what was said."""
        process = self.start(call, **environment)
        said, _ = process.communicate(timeout=120)
        return process.returncode, said

    def last_pid(self) -> int:
        """Of what was called last."""
        return int((self.root / "calls").read_text().split("\n\n")[-2].split()[0])

    def calls(self) -> list[list[str]]:
        """Each with WORLD_SIZE, or hf, in front."""
        there = self.root / "calls"
        blocks = there.read_text().split("\n\n")[:-1] if there.exists() else []
        there.unlink(missing_ok=True)
        return [[lines[0].partition(" ")[2], *lines[1:]] for lines in (block.splitlines() for block in blocks)]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipes' models by repository, without weights."""
    root, tokenizer = tmp_path_factory.mktemp("hub"), tiny_tokenizer()
    tokenizer.chat_template += OPTIONS
    stops = tokenizer.convert_tokens_to_ids([EOS, TURN_END])
    for config in CONFIGS.glob("*.json"):
        folder = root / ("meta-llama" if config.stem.startswith("Llama") else "Qwen") / config.stem
        tokenizer.save_pretrained(folder)
        shutil.copy(config, folder / "config.json")
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    return root


@pytest.fixture
def sandbox(tmp_path: Path, hub: Path) -> Iterator[Sandbox]:
    shutil.copytree(ROOT / "examples" / "recipes", tmp_path / "examples" / "recipes")
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "launch.sh", tmp_path / "scripts")
    (tmp_path / "bin").mkdir()
    for name, text in (("python", PYTHON), ("hf", HF)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "hub").symlink_to(hub)
    (tmp_path / "data").mkdir()
    for name in ("train", "aime-2024", "aime-2025", "amc-2023"):
        rows = [{"question": f"What is {n} + {len(name)}?", "answer": str(n + len(name))} for n in range(200)]
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    yield Sandbox(tmp_path)


def planned(sandbox: Sandbox, call: str, place: str = "colocated") -> list[str]:
    """The arguments of the plan that PLAN_ONLY makes."""
    code, said = sandbox.run(call, PLACE=place, PLAN_ONLY="1")
    assert code == 0, said
    *_, (_, *plan) = sandbox.calls()
    assert plan[:3] == ["-m", "sdpg_megatron", "plan"]
    return plan[2:]


def configured(sandbox: Sandbox, call: str) -> RunConfig:
    _, config, *more = planned(sandbox, call)
    return load_config(sandbox.root / config, [argument for argument in more if "=" in argument])


@pytest.mark.parametrize(("call", "place", "hardware"), SHARED + APART)
def test_a_recipe_fits_its_hardware(
    sandbox: Sandbox,
    call: str,
    place: str,
    hardware: tuple[str, int, int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    arguments = planned(sandbox, call, place)
    monkeypatch.chdir(sandbox.root)
    code = main([*arguments, "--json"])
    plan = json.loads(capsys.readouterr().out)
    assert code == 0 and plan["fits"] and not plan["advice"]
    assert (plan["gpu"]["name"], plan["ranks"], plan["server_gpus"]) == hardware
    assert plan["server"]["longest_sequences"] >= 8
    assert main(arguments) == 0
    publish = next(line for line in capsys.readouterr().out.splitlines() if "the leader sends" in line)
    assert publish.endswith("between machines" if hardware[1] > 8 else "within a machine")


def test_there_is_hardware_for_every_recipe() -> None:
    names = {call.split()[0] for call, *_ in SHARED}
    assert names == {call.split()[0] for call, *_ in APART} | {"one-gpu"}
    recipes = ROOT / "examples" / "recipes"
    assert {path.stem for path in recipes.glob("*.yaml")} == names
    assert {path.stem for path in recipes.glob("*.sh")} == {*names, "common"}


@pytest.mark.parametrize("call", ["qwen3-4b sdpg-ufkl", "one-gpu 0.6b", "qwen3-30b-a3b"])
def test_a_recipe_walks_its_model_before_it_trains(
    sandbox: Sandbox, call: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    code, said = sandbox.run(call)
    assert code == 0, said
    calls = sandbox.calls()
    names = [next(word for word in words[1:] if word not in ("-m", "sdpg_megatron")) for words in calls]
    assert names == [
        "download",
        "tools/prepare_data.py",
        "plan",
        "train",
        "sdpg_megatron.launch",
        "eval",
        "tools/convert_hf_to_megatron.py",
    ]
    _, _, _, *dry = calls[3]
    assert "--dry-run" in dry
    world = int(dry[dry.index("--ranks") + 1])
    monkeypatch.chdir(sandbox.root)
    monkeypatch.setenv("SDPG_SGLANG_PYTHON", str(write_server_python(sandbox.root / "server-python")))
    config = load_config(Path(dry[1]), [argument for argument in dry if "=" in argument])
    write_hollow_weights(config.model.path)
    monkeypatch.setattr(
        "sdpg_megatron.train.dry_run.check_values", lambda folder, arch: None
    )  # tens of gigabytes of zeros
    assert main(dry) == 0
    plan = make_plan(config, find_gpu("H200"), world)
    columns = plan.arch.padded_vocab(config.parallel.tensor) // config.parallel.tensor
    shapes = f"{config.rollout.max_response_tokens}x{columns}"
    expected = f"stage 0: {plan.stages[0].numel:,} parameters a rank; forward and back: {shapes}"
    assert capsys.readouterr().err.strip().splitlines()[-1] == expected
    launched = [argument for argument in calls[4] if "=" in argument]
    assert launched == [argument for argument in dry if "=" in argument], "what was checked is not what is trained"


PAPER = {
    "steps": 400,
    "prompts": (128, 8, 16),  # of a step, responses to each, of a mini-batch
    "tokens": 2048,
    "sampling": (1.0, 1.0),
    "optimizer": ("constant", 1e-6, 80, 0.1, 1.0, 0.9, 0.999),  # 10 of the 400 steps are 80 of 3200
    "eval": (10, 32, 1.0, 1.0, ["aime-2024", "aime-2025", "amc-2023"]),
}
"""arXiv 2606.04036."""
OBJECTIVES: dict[str, dict[str, Any]] = {
    "sdpg-urkl": {"clip": (0.2, 0.28, 10.0), "beta": 1e-3, "alpha": 1e-3, "reference": "urkl", "gate": True},
    "sdpg-ufkl": {"clip": (0.2, 0.28, 10.0), "beta": 1e-3, "alpha": 1e-3, "reference": "ufkl", "gate": True},
    "grpo": {"clip": (0.2, 0.2, None), "beta": 0, "alpha": 1e-3, "reference": "ufkl"},
    "rlsd": {"clip": (0.2, 0.2, 3.0), "beta": 0, "alpha": 1e-3, "reference": "ufkl", "credit_ratio": "rollout"},
    "opcd": {"beta": 1, "alpha": 0, "divergence": "reverse_kl", "top_k": None, "teacher": "current", "gate": False},
    "dapo": {"clip": (0.2, 0.28, None), "beta": 0, "alpha": 0},
    "opsd": {"beta": 1, "alpha": 0, "divergence": "jsd", "jsd_beta": 0.5, "teacher": "initial", "gate": False},
}
AGGREGATION = {"dapo": "token-mean", "opsd": "sequence-mean"}
"""Of methods that the paper does not have; its own mean is over each prompt's tokens."""


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("name", "response"), [("qwen3-1.7b", 2048), ("qwen3-4b", 4096)])
def test_a_paper_s_recipe_has_the_paper_s_settings(sandbox: Sandbox, name: str, response: int, method: str) -> None:
    config = configured(sandbox, f"{name} {method}")
    rollout, optimizer, evaluation = config.rollout, config.optimizer, config.eval
    found = {
        "steps": config.steps,
        "prompts": (rollout.prompts_per_step, rollout.group_size, rollout.prompts_per_step // optimizer.minibatches),
        "tokens": config.data.max_prompt_tokens,
        "sampling": (rollout.temperature, rollout.top_p),
        "optimizer": (
            optimizer.schedule,
            optimizer.lr,
            optimizer.warmup_steps,
            optimizer.weight_decay,
            optimizer.clip_grad,
            optimizer.beta1,
            optimizer.beta2,
        ),
        "eval": (
            evaluation.every,
            evaluation.samples,
            evaluation.temperature,
            evaluation.top_p,
            [path.stem for path in config.data.eval],
        ),
    }
    assert found == PAPER and rollout.max_response_tokens == response
    objective = config.objective.model_dump()
    objective["clip"] = tuple(objective[part] for part in ("clip_low", "clip_high", "dual_clip"))
    assert {field: objective[field] for field in OBJECTIVES[method]} == OBJECTIVES[method]
    assert config.objective.aggregation == AGGREGATION.get(method, "group-token-mean")
    assert config.selection.drop_dead == (method == "dapo")
    built = objectives.build_objective(config.objective, config.total_optimizer_steps)
    if isinstance(built, SDPG):
        schedule = built.schedule
        assert (schedule.warmup_steps, schedule.decay_steps, schedule.total_steps) == (8 * 50, 8 * 350, 8 * 400)
    if isinstance(built, RLSD):
        ends = [built.schedule.at(8 * rollout - 1) for rollout in (1, 25, 50)]  # at a rollout's last mini-batch
        assert ends == pytest.approx([0.49, 0.25, 0.0])
        assert config.objective.credit_clip == 0.2


def test_the_papers_recipes_have_its_prompts_and_the_others_do_not(sandbox: Sandbox) -> None:
    paper = ("data/sdpg", "dapo-math-17k-en", "paper", "verify", True)
    found = {}
    for call in ("qwen3-4b grpo", "qwen3-1.7b opcd", "qwen3-8b"):
        assert sandbox.run(call)[0] == 0
        calls = sandbox.calls()
        prepare = next(words for words in calls if words[1] == "tools/prepare_data.py")
        named = dict(pairwise(prepare))
        plan = next(words for words in calls if words[3] == "plan")
        config = load_config(sandbox.root / plan[4])
        assert {str(path.parent) for path in (*config.data.train, *config.data.eval)} == {prepare[2]}
        shutil.rmtree(sandbox.root / "runs" / "data")
        thinks = config.data.template_options["enable_thinking"]
        folder = prepare[2].removeprefix("runs/")
        found[call] = (folder, named["--train"], named["--instruction"], config.data.context_template, thinks)
    assert found == {
        "qwen3-4b grpo": paper,
        "qwen3-1.7b opcd": paper,
        "qwen3-8b": ("data/math", "dapo-math-17k", "boxed", "answer", False),
    }


def test_a_method_that_a_recipe_does_not_have_is_refused(sandbox: Sandbox) -> None:
    code, said = sandbox.run("qwen3-4b ppo")
    assert code == 2 and "method: found ppo, expected sdpg-urkl" in said and not sandbox.calls()
    code, said = sandbox.run("qwen3-4b")
    assert code and all(method in said for method in METHODS)


def test_an_evaluation_starts_servers_where_the_launcher_s_have_ended(sandbox: Sandbox) -> None:
    from sdpg_megatron.train.eval_command import for_evaluation
    from sdpg_megatron.train.eval_target import find_eval_target

    machines = {"NNODES": "3", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "RANKS_PER_NODE": "4"}
    code, said = sandbox.run("qwen3-30b-a3b three", **machines)
    assert code == 0, said
    calls = sandbox.calls()
    _, launch, evaluate, _ = calls[-4:]
    assert launch[launch.index("--ranks") + 1] == "4" and launch[launch.index("--servers") + 1] == "0"
    config = Path(next(argument for argument in launch if argument.endswith(".yaml")))
    run_dir = sandbox.root / "runs" / "qwen3-30b-a3b"
    (run_dir / "model").mkdir(parents=True)
    changes = [argument for argument in launch if "=" in argument]
    lost = "rollout.sglang.urls=[http://10.0.0.3:20000, http://10.0.0.3:20001]"
    (run_dir / "config.yaml").write_text(dump(load_config(sandbox.root / config, [*changes, lost])))
    assert evaluate[3] == "eval"
    eval_target = find_eval_target(run_dir, 0, [argument for argument in evaluate if "=" in argument])
    served = for_evaluation(eval_target.config, run_dir, run_dir).rollout.sglang
    assert not served.urls and served.first_gpu == 0
    assert (served.servers, served.tensor) == (2, 2), "on machine 0"


def test_a_machine_of_servers_takes_part_in_nothing_else(sandbox: Sandbox, hub: Path) -> None:
    shutil.copytree(hub / "Qwen" / "Qwen3-30B-A3B", sandbox.root / "runs" / "models" / "Qwen3-30B-A3B")
    shutil.copytree(sandbox.root / "data", sandbox.root / "runs" / "data" / "math")
    code, said = sandbox.run("qwen3-30b-a3b three", NNODES="3", NODE_RANK="2", MASTER_ADDR="127.0.0.1")
    assert code == 0, said
    plan, launch = sandbox.calls()
    assert plan[3] == "plan" and launch[launch.index("--ranks") + 1] == "0"
    assert launch[launch.index("--servers") + 1] == "4"


@pytest.mark.parametrize(
    ("call", "place", "says"),
    [
        ("qwen3-30b-a3b", "disaggregated", "qwen3-30b-a3b.sh three"),
        ("one-gpu 0.6b", "disaggregated", "expected colocated"),
        ("one-gpu 4b", "colocated", "size: found 4b, expected 0.6b or 1.7b"),
        ("qwen3-8b", "disagregated", "expected colocated or disaggregated"),
    ],
)
def test_places_that_a_recipe_does_not_have_are_refused(sandbox: Sandbox, call: str, place: str, says: str) -> None:
    code, said = sandbox.run(call, PLACE=place)
    assert code == 2 and says in said
    assert not sandbox.calls()


def test_an_interrupted_download_is_taken_up_again(sandbox: Sandbox) -> None:
    code, _ = sandbox.run("qwen3-8b", HF="exit 3")
    assert code == 3 and [words[:2] for words in sandbox.calls()] == [["hf", "download"]]
    assert (sandbox.root / "runs/models/Qwen3-8B/config.json").exists()
    assert sandbox.run("qwen3-8b")[0] == 0
    assert [words[:3] for words in sandbox.calls() if words[0] == "hf"] == [["hf", "download", "Qwen/Qwen3-8B"]]
    assert sandbox.run("qwen3-8b")[0] == 0
    assert all("prepare_data" not in words[1] and words[0] != "hf" for words in sandbox.calls())


def test_a_plan_fetches_a_description_alone(sandbox: Sandbox) -> None:
    folder = "runs/models/Qwen3-8B"
    assert sandbox.run("qwen3-8b", PLAN_ONLY="1")[0] == 0
    assert sandbox.calls()[0] == ["hf", "download", "Qwen/Qwen3-8B", "config.json", "--local-dir", folder]
    assert sandbox.run("qwen3-8b", PLAN_ONLY="1")[0] == 0
    assert len(sandbox.calls()) == 1
    assert sandbox.run("qwen3-8b")[0] == 0
    assert sandbox.calls()[0] == ["hf", "download", "Qwen/Qwen3-8B", "--local-dir", folder]


def test_machine_0_fetches_for_all(sandbox: Sandbox) -> None:
    machines = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1"}
    code, said = sandbox.run("qwen3-8b", NODE_RANK="1", PREPARE_SECONDS="1", **machines)
    assert code == 2 and "Qwen3-8B: not filled by machine 0 in 1 seconds" in said
    assert not sandbox.calls()
    second = sandbox.start("qwen3-8b", NODE_RANK="1", CALLS=str(sandbox.root / "second"), **machines)
    code, said = sandbox.run("qwen3-8b", NODE_RANK="0", HF="sleep 1; rm -f second", **machines)
    assert code == 0, said
    said, _ = second.communicate(timeout=60)
    assert second.returncode == 0, said
    assert "hf" in [words[0] for words in sandbox.calls()]
    (sandbox.root / "second").rename(sandbox.root / "calls")
    plan, launch = sandbox.calls()
    assert plan[3] == "plan" and plan[plan.index("--ranks") + 1] == "16" and launch[2] == "sdpg_megatron.launch"


@pytest.mark.parametrize("whole", [False, True], ids=["the recipe", "its process group"])
@pytest.mark.parametrize(("left", "code"), [("75", 75), ("0", 75), ("70", 70)])
def test_a_signal_reaches_the_training_once(sandbox: Sandbox, left: str, code: int, whole: bool) -> None:
    process = sandbox.start("qwen3-8b", LAUNCH=HANGING, CODE=left)
    try:
        deadline = time.monotonic() + 60
        while not (sandbox.root / "calls.ready").exists():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        (os.killpg if whole else os.kill)(process.pid, signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
    finally:
        for pid in (process.pid, sandbox.last_pid()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert process.returncode == code, said
    assert (sandbox.root / "calls.signals").read_text() == "TERM\n"
    assert sandbox.calls()[-1][2] == "sdpg_megatron.launch", "it went on"
