"""Peak memory of two updates, compared with the estimate of `sdpg_megatron.estimate`.

    python -m benchmarks.plan

On a CPU: a dense model with random weights, SDPG with all of its terms, one rank. The estimate is for the micro-batch
that is run. The measured memory is that of the process less its memory before the model was built.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory import MIB, peak_memory
from sdpg_megatron import objectives
from sdpg_megatron.architecture import read_architecture
from sdpg_megatron.config import RunConfig
from sdpg_megatron.config.load import parse
from sdpg_megatron.estimate.load import Load
from sdpg_megatron.estimate.memory import StageMemory, stage_memory
from sdpg_megatron.estimate.shards import Grid
from sdpg_megatron.records import ScoredGroup

SHAPE = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 16384,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
}
PROMPT, RESPONSE, GROUPS, SIZE = 128, 384, 1, 4


def write_model(folder: Path) -> Path:
    """Write config.json and random weights."""
    from safetensors.torch import save_file

    from sdpg_megatron.weights import hf_shapes

    (folder / "config.json").write_text(json.dumps(SHAPE))
    shapes = hf_shapes(read_architecture(folder))
    save_file({name: torch.randn(shape) * 0.02 for name, shape in shapes.items()}, folder / "model.safetensors")
    return folder


def config_of(folder: Path, changes: dict[str, Any]) -> RunConfig:
    """Configuration of the run. `changes`: fields by section."""
    tree: dict[str, Any] = {
        "run_dir": "unused",
        "steps": 4,
        "model": {"path": str(folder)},
        "data": {"train": [], "max_prompt_tokens": PROMPT},
        "rollout": {"prompts_per_step": GROUPS, "group_size": SIZE, "max_response_tokens": RESPONSE},
        "objective": {"beta_warmup_steps": 0, "beta_decay_steps": 0},
        "optimizer": {"warmup_steps": 0, "micro_batch_size": SIZE},
        "checkpoint": {"asynchronous": False},
    }
    for section, fields in changes.items():
        tree[section] = {**tree.get(section, {}), **fields}
    return parse(tree)


def plan_of(config: RunConfig) -> StageMemory:
    """Estimate for a CPU. As in `groups_of`, half of the responses have a teacher."""
    load = Load.of(config, 1)
    read = SIZE // 2 * GROUPS
    load = dataclasses.replace(load, teacher_rows=read * RESPONSE, teacher=read * (PROMPT + RESPONSE))
    return stage_memory(read_architecture(config.model.path), config, Grid.of(config.parallel), load, 0, None)


def groups_of(vocab: int) -> list[ScoredGroup]:
    """Groups of prompts and responses of maximum length, half of them correct."""
    from benchmarks.step_data import given_groups

    draw = random.Random(0)
    groups = given_groups([RESPONSE] * SIZE * GROUPS, SIZE, vocab)
    prompt = tuple(draw.randrange(vocab) for _ in range(PROMPT))

    def whole(scored: ScoredGroup) -> ScoredGroup:
        asked = dataclasses.replace(scored.group.prompt, student_tokens=prompt, teacher_tokens=prompt)
        return dataclasses.replace(scored, group=dataclasses.replace(scored.group, prompt=asked))

    return [whole(scored) for scored in groups]


def measure(config: RunConfig) -> int:
    """Peak bytes of two optimizer steps, including the model."""
    from sdpg_megatron.batching.collate import PackingLayout
    from sdpg_megatron.batching.micro_batches import Limit
    from sdpg_megatron.batching.samples import make_samples
    from sdpg_megatron.batching.step_batch import build_step
    from sdpg_megatron.mcore import parallel
    from sdpg_megatron.mcore.policy_trainer import PolicyTrainer
    from sdpg_megatron.objectives.base import StepContext

    ranks = parallel.initialize(config.parallel, 0)
    arch = read_architecture(config.model.path)
    groups = groups_of(arch.vocab_size)
    with peak_memory(torch.device("cpu")) as found:
        objective = objectives.build_objective(config.objective, config.total_optimizer_steps)
        policy_trainer = PolicyTrainer(config, arch, objective, ranks)
        for step in range(2):
            samples = make_samples(groups, config.objective, distill_enabled=objective.distill_enabled)
            batch = build_step(
                samples,
                regularized=True,
                limit=Limit.of(config),
                layout=PackingLayout.of(config, ranks),
                device=policy_trainer.device,
            )
            policy_trainer.begin(step)
            batches = policy_trainer.with_reference(batch.micro_batches)
            policy_trainer.update(batches, StepContext(step, config.total_optimizer_steps))
    return found[0]


CASES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "recompute": {"model": {"recompute": True}},
    "head.schedule=recompute": {"head": {"schedule": "recompute"}},
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Planned and measured memory of an update, on a CPU.")
    parser.add_argument("case", nargs="?", choices=CASES, default="as it is")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(write_model(Path(folder)), CASES[options.case])
        plan = plan_of(config)
        planned = plan.total("update") + sum(plan.host.values())
        found = measure(config)
    parts = {name: round(size / MIB) for name, size in {**plan.parts("update"), **plan.host}.items()}
    report = {"case": options.case, "planned_mib": round(planned / MIB), "measured_mib": round(found / MIB)}
    sys.stdout.write(json.dumps({**report, "ratio": round(found / planned, 3), "parts_mib": parts}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
