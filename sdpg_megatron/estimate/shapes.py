"""Shape check of a run's model without memory or other ranks, the last step of ``train --dry-run``.

It runs in a subprocess, as one rank of each pipeline stage in turn. Megatron's groups use torch's fake process group,
with collectives that do nothing, and the model is on the meta device, where tensors have only shapes. Both are private
test utilities of torch; the check is skipped for a torch that has moved them.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from sdpg_megatron.architecture import Architecture, read_architecture
from sdpg_megatron.config import RunConfig
from sdpg_megatron.errors import ConfigError
from sdpg_megatron.weights.map import ExpertShare, check_local, weight_map

FAKE_GROUPS, FAKE_COLLECTIVES = (
    "torch.testing._internal.distributed.fake_pg",
    "torch.distributed._tools.fake_collectives",
)
META = torch.device("meta")


@dataclass(frozen=True, slots=True)
class StageShapes:
    """Shapes of one rank of a pipeline stage, with all its model chunks."""

    stage: int
    parameters: int
    shapes: tuple[tuple[int, ...], ...]
    """Output of each chunk for a sequence of the greatest length; of the last one the rows' logits. Empty if shapes
    depend on values: in context-parallel attention, and if the ranks of a mixture gather all tokens."""

    def __str__(self) -> str:
        passes = ", ".join("x".join(map(str, shape)) for shape in self.shapes) or "not walked"
        return f"stage {self.stage}: {self.parameters:,} parameters a rank; forward and back: {passes}"


def walk(config: RunConfig, ranks: int) -> list[StageShapes]:
    """Build a run's model for `ranks` ranks and pass one sequence forward and back, in a subprocess.

    Raises:
        ConfigError: Megatron cannot build the model, or shapes do not fit; with the end of the subprocess's errors.
    """
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    given = json.dumps({"config": config.model_dump(mode="json"), "ranks": ranks})
    command = [sys.executable, "-W", "ignore", "-m", "sdpg_megatron.estimate.shapes"]
    done = subprocess.run(command, input=given, capture_output=True, encoding="utf-8", env=environment)
    if done.returncode:
        errors = done.stderr.strip().splitlines()[-30:] or ["no message"]
        expected = f"a model that {ranks} ranks can hold and run"
        raise ConfigError("model, parallel", "\n".join(errors), expected, "choose another layout, or report this")
    found = json.loads(done.stdout.splitlines()[-1])
    return [
        StageShapes(one["stage"], one["parameters"], tuple(tuple(shape) for shape in one["shapes"])) for one in found
    ]


def main() -> int:
    """Read a configuration and a number of ranks from stdin; write a line of JSON to stdout."""
    warnings.simplefilter("ignore")
    given = json.load(sys.stdin)
    config = RunConfig.model_validate(given["config"])
    # Transformer Engine's layers and fused gradient accumulation need a GPU. Plain layers have the same shapes.
    model = config.model.model_copy(update={"spec": "local", "gradient_accumulation_fusion": False})
    plain = config.model_copy(update={"model": model})
    found = [asdict(stage) for stage in _stages(plain, given["ranks"])]
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


def _stages(config: RunConfig, world: int) -> Iterator[StageShapes]:
    from sdpg_megatron.mcore.compat import device

    groups = importlib.import_module(FAKE_GROUPS)
    importlib.import_module(FAKE_COLLECTIVES)  # registers collectives of meta tensors
    device.CPU = META  # device for Megatron's CUDA requests
    device.install()
    arch = read_architecture(config.model.path)
    stages = config.parallel.pipeline
    for stage in sorted({0, min(1, stages - 1), stages - 1}):  # inner stages have equal shapes
        dist.init_process_group("fake", store=groups.FakeStore(), rank=stage * (world // stages), world_size=world)
        yield _walk_stage(config, arch, stage)
        dist.destroy_process_group()


def _walk_stage(config: RunConfig, arch: Architecture, stage: int) -> StageShapes:
    from megatron.core import parallel_state, tensor_parallel

    from sdpg_megatron.mcore import parallel
    from sdpg_megatron.mcore.model import build_chunks, named_parameters

    wanted = config.parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=wanted.tensor,
        pipeline_model_parallel_size=wanted.pipeline,
        virtual_pipeline_model_parallel_size=wanted.virtual_pipeline,
        context_parallel_size=wanted.context,
        expert_model_parallel_size=wanted.expert,
        expert_tensor_parallel_size=wanted.expert_tensor_size,
        create_gloo_process_groups=False,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(0)
    ranks = parallel.current()
    chunks = build_chunks(arch, config.model, wanted, ranks)
    held = {name: tuple(parameter.shape) for name, parameter in named_parameters(chunks)}
    share = ExpertShare(ranks.expert, ranks.expert_size, ranks.expert_tensor, ranks.expert_tensor_size)
    check_local(weight_map(arch), held, wanted.tensor, share)
    gathered = arch.experts is not None and wanted.dispatcher == "allgather"
    shapes: tuple[tuple[int, ...], ...] = ()
    if wanted.context == 1 and not gathered:
        _level(chunks)
        shapes = tuple(_pass(config, arch, chunk) for chunk in chunks)
    parallel_state.destroy_model_parallel()
    return StageShapes(stage, sum(map(math.prod, held.values())), shapes)


def _level(chunks: Sequence[torch.nn.Module]) -> None:
    """Make mixtures send equally many tokens to each expert: the real numbers depend on values."""
    from megatron.core.transformer.moe.moe_layer import MoELayer

    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, MoELayer):
                dispatcher: Any = module.token_dispatcher
                dispatcher.drop_and_pad = True
                dispatcher.moe_expert_capacity_factor = 1.0
                router: Any = module.router  # Megatron keeps its weights on the host until they are used
                router.to(META)


def _pass(config: RunConfig, arch: Architecture, chunk: torch.nn.Module) -> tuple[int, ...]:
    """Pass a padded sequence of the greatest length through a chunk and back; through the head after the last."""
    from sdpg_megatron.mcore.forward_step import last_hidden
    from sdpg_megatron.mcore.model import output_weight

    tensor = config.parallel.tensor
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    length = -(-longest // tensor) * tensor
    if not chunk.pre_process:
        part = length // (tensor if config.parallel.sequence else 1)
        dtype = getattr(torch, config.model.dtype)
        given = torch.empty(part, 1, arch.hidden_size, dtype=dtype, device=META, requires_grad=True)
        chunk.set_input_tensor(given)  # type: ignore[operator]
    out = last_hidden(chunk, torch.zeros(1, length, dtype=torch.int64, device=META))
    if chunk.post_process:
        rows_TH = out.flatten(0, 1)[: config.rollout.max_response_tokens]
        out = rows_TH @ output_weight(chunk).T
    out.backward(torch.empty_like(out))  # type: ignore[no-untyped-call]
    without = [name for name, parameter in chunk.named_parameters() if parameter.grad is None]
    assert not without, f"no gradient of {without}"
    return tuple(out.shape)


if __name__ == "__main__":
    sys.exit(main())
