"""Megatron-LM's own `pretrain()` with the plugin: it trains, on every layout; saves and continues; refuses clearly.

Needs a megatron-core with `megatron.training` (0.17 or newer, Python 3.12):

    bash scripts/test.sh --host
    PYTHONPATH=<checkout of Megatron-LM> bash scripts/test.sh tests/host/test_megatron_lm.py    another version, or 3.11
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sdpg_megatron.architecture import read_architecture
from sdpg_megatron.plugins.megatron_lm.arguments import model_flags
from tests.e2e.runs import LIMIT, metrics, preloaded, rank_environments, train, write_run

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(
        importlib.util.find_spec("megatron.training") is None,
        reason="needs megatron.training, which megatron-core packages for Python 3.12",
    ),
]
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one": (1, []),
    "tp2": (2, ["--tensor-model-parallel-size", "2"]),
    "vpp2": (2, ["--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage", "1"]),
    "dp2_overlap": (2, ["--overlap-grad-reduce", "--overlap-param-gather"]),
    "tp2_sp_pp2": (
        4,
        ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--pipeline-model-parallel-size", "2"],
    ),
}
PROGRAM, MADE = "tests.host.megatron_lm_cpu", "tests.host.made_batch"


def arguments(folder: Path, *more: str, iterations: int = 2, model: Path | None = None) -> list[str]:
    """Command line of a run of `write_host_run`. `model`: another model than the run's."""
    model = model or folder / "hf"
    flags = model_flags(read_architecture(model), model)
    fixed = (
        "--dataloader-type external --calculate-per-token-loss --distributed-backend gloo --transformer-impl local "
        "--no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-dropout-fusion "
        "--no-bias-swiglu-fusion --no-rope-fusion --use-distributed-optimizer --micro-batch-size 4 "
        f"--global-batch-size 16 --train-iters {iterations} --lr 1e-3 --lr-decay-style constant --adam-eps 1e-2 "
        "--log-interval 1"
    )
    return ["--sdpg", str(folder / "run.yaml"), *flags, *fixed.split(), *more]


def write_host_run(folder: Path, **changes: Any) -> Path:
    """A run as of `write_run`, without what Megatron-LM's arguments decide."""
    path = write_run(folder, **changes)
    config = yaml.safe_load(path.read_text())
    for section in ("steps", "eval", "checkpoint"):
        config.pop(section)
    config["optimizer"] = changes.get("optimizer", {})
    del config["data"]["eval"]
    path.write_text(yaml.safe_dump(config))
    return folder


def pretrain(
    folder: Path, *more: str, ranks: int = 1, iterations: int = 2, model: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the program to its end; arguments as of `arguments`."""
    return launched(PROGRAM, arguments(folder, *more, iterations=iterations, model=model), ranks)


def launched(module: str, line: list[str], ranks: int) -> subprocess.CompletedProcess[str]:
    """Run a module on ranks with the variables of torchrun, which Megatron-LM needs for one rank too."""
    return preloaded().run(module, line, rank_environments(ranks, launched=True), LIMIT)


def logged(output: str) -> list[dict[str, float]]:
    """Metrics that Megatron-LM printed, by iteration.

    It leaves out those that are not above 0; here they are 0. In the second iteration of a call it prints the mean of
    two.
    """
    found: list[dict[str, float]] = []
    for line in re.findall(r"^.* iteration +\d+/.*$", output, re.MULTILINE):
        pairs = re.findall(r"([A-Za-z_/ ]+): +([-+.\dE]+|nan|inf) ", line)
        found.append(defaultdict(float, {name.strip(): float(value) for name, value in pairs}))
    if len(found) > 1:
        first, second = found[0], found[1]
        found[1] = defaultdict(float, {n: 2 * x - first[n] if "/" in n else x for n, x in second.items()})
    return found


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """Metrics of the run on one rank."""
    done = pretrain(write_host_run(tmp_path_factory.mktemp("one")))
    assert done.returncode == 0, done.stderr
    return logged(done.stdout)


def test_the_logger_shows_the_metrics(one: list[dict[str, float]]) -> None:
    assert len(one) == 2
    for found in one:
        assert {"train/loss", "distill/kl", "reward/mean", "rollout/length", "grad norm"} <= found.keys()
        assert found["distill/kl"] > 0 and found["rollout/logprob_diff_mean"] < 1e-5


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one"])
def test_every_layout_trains_alike(layout: str, one: list[dict[str, float]], tmp_path: Path) -> None:
    ranks, flags = LAYOUTS[layout]
    done = pretrain(write_host_run(tmp_path), *flags, ranks=ranks)
    assert done.returncode == 0, done.stderr
    found = logged(done.stdout)
    assert len(found) == 2
    if not layout.startswith("dp"):  # each replica draws other responses
        assert found[0]["train/loss"] == pytest.approx(one[0]["train/loss"], rel=1e-5)
        assert found[0]["distill/kl"] == pytest.approx(one[0]["distill/kl"], rel=1e-5)
        assert found[0]["grad norm"] == pytest.approx(one[0]["grad norm"], rel=1e-4)


@pytest.mark.parametrize("layout", ["one", "vpp2", "tp2_sp_pp2"])
def test_a_made_batch_gives_our_own_numbers(layout: str, tmp_path: Path) -> None:
    """Loss, KL and every gradient of Megatron-LM's step equal those of `PolicyTrainer` on the same batch."""
    ranks, flags = LAYOUTS[layout]
    folder = write_host_run(tmp_path)
    line = arguments(folder, *flags, iterations=1)
    line += ["--sdpg-set", "rollout.mismatch_limit=null"]  # the batch's log-probs are made up
    for out, which in (("host.pt", []), ("own.pt", ["--own"])):
        done = launched(MADE, [str(tmp_path / out), *line, *which], ranks)
        assert done.returncode == 0, done.stderr
    host, own = torch.load(tmp_path / "host.pt"), torch.load(tmp_path / "own.pt")
    assert host["metrics"]["train/loss"] == pytest.approx(own["metrics"]["train/loss"], rel=1e-6)
    assert host["metrics"]["distill/kl"] == pytest.approx(own["metrics"]["distill/kl"], rel=1e-6)
    assert host["gradients"].keys() == own["gradients"].keys()
    for name, gradient in own["gradients"].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(
            host["gradients"][name], gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max())
        )


def test_a_run_is_our_own_trainers_and_continues(tmp_path: Path) -> None:
    """Four iterations, saved and loaded after the second, are the four steps of `sdpg-megatron train`."""
    for name in ("own", "host"):
        (tmp_path / name).mkdir()
    optimizer = {"lr": 1e-3, "eps": 1e-2, "weight_decay": 0.01, "warmup_steps": 0, "micro_batch_size": 4}
    own = train(write_run(tmp_path / "own", optimizer=optimizer, eval={"every": 0, "samples": 1}))
    assert own.returncode == 0, own.stderr
    folder, save = write_host_run(tmp_path / "host"), str(tmp_path / "saved")
    saving = ["--save", save, "--save-interval", "2"]
    first = pretrain(folder, *saving, "--exit-interval", "2", iterations=4)
    assert first.returncode == 0, first.stderr
    second = pretrain(folder, *saving, "--load", save, iterations=4)
    assert second.returncode == 0, second.stderr
    found, expected = [*logged(first.stdout), *logged(second.stdout)], metrics(tmp_path / "own" / "run")[1:]
    assert len(found) == len(expected) == 4
    for here, there in zip(found, expected, strict=True):
        assert here["grad norm"] == pytest.approx(there["optimizer/grad_norm"], abs=1e-3), "it has three decimals"
        for name in ("train/loss", "train/entropy", "distill/kl", "reference/kl", "reward/mean"):
            assert here[name] == pytest.approx(there[name], rel=1e-5, abs=1e-7), name
    positions = [json.loads(line)["step"] for line in (folder / "run" / "cursors.jsonl").read_text().splitlines()]
    assert positions == [1, 2, 3, 4]


def test_mini_batches_share_a_rollout(tmp_path: Path) -> None:
    folder = write_host_run(tmp_path, optimizer={"minibatches": 2})
    done = pretrain(folder, "--global-batch-size", "8", iterations=4)
    assert done.returncode == 0, done.stderr
    found = logged(done.stdout)
    assert [m["reward/mean"] for m in found[::2]] == [m["reward/mean"] for m in found[1::2]]
    assert found[0]["policy/ratio"] == 1.0 != found[1]["policy/ratio"], "the second is off-policy"


def test_a_batch_that_is_too_small_is_refused(tmp_path: Path) -> None:
    done = pretrain(write_host_run(tmp_path), "--global-batch-size", "8")
    assert done.returncode == 1
    assert "error: --global-batch-size: found 8, expected room for 4 micro-batches" in done.stderr
