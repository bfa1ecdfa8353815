"""Format a plan as text or JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from sdpg_megatron.estimate.advice import Advice
from sdpg_megatron.estimate.duration import ASSUMED, step_seconds
from sdpg_megatron.estimate.gpus import GIB
from sdpg_megatron.estimate.load import MEAN_LENGTH
from sdpg_megatron.estimate.memory import CONTEXT, FRAGMENTS, StageMemory, room
from sdpg_megatron.estimate.plan import Plan
from sdpg_megatron.estimate.shards import count_active, count_parameters

PHASES = ("rollout", "passes", "update", "publish")
LEADER = {"gather": "first ranks get", "publish": "the leader sends"}


def as_data(plan: Plan, advice: list[Advice]) -> dict[str, Any]:
    """All numbers of a plan, in bytes and seconds."""
    return {
        "model": {"parameters": count_parameters(plan.arch), "active": count_active(plan.arch)},
        "gpu": {"name": plan.gpu.name, "memory": plan.gpu.memory, "room": room(plan.gpu.memory)},
        "ranks": plan.grid.world,
        "server_gpus": plan.server_gpus,
        "fits": plan.fits,
        "stages": [_stage(stage) for stage in plan.stages],
        "server": None
        if plan.server is None
        else {
            "weights": plan.server.weights,
            "keys_and_values": plan.server.pool,
            "per_token": plan.server.token,
            "longest_sequences": plan.server.sequences,
        },
        "sent_per_step": {kind: dict(flow.sent) for kind, flow in plan.traffic.items()},
        "seconds": dict(plan.seconds),
        "advice": [{"change": a.change, "peak": a.peak, "fits": a.fits} for a in advice],
    }


def _stage(stage: StageMemory) -> dict[str, Any]:
    return {
        "stage": stage.stage,
        "parameters": stage.numel,
        "phases": {phase: stage.parts(phase) for phase in PHASES if phase in stage.phases},
        "host": dict(stage.host),
        "fullest": stage.fullest,
        "peak": stage.peak,
    }


def as_json(plan: Plan, advice: list[Advice]) -> str:
    return json.dumps(as_data(plan, advice), indent=2) + "\n"


def as_text(plan: Plan, advice: list[Advice]) -> str:
    return "\n".join([*_head(plan), "", *_memory(plan), "", *_communication(plan), "", *_verdict(plan, advice)]) + "\n"


def _head(plan: Plan) -> Iterator[str]:
    arch, grid = plan.arch, plan.grid
    experts = f", {arch.experts.count} experts a layer" if arch.experts else ""
    yield (
        f"{plan.config.model.path.name} ({arch.family}): {count_parameters(arch) / 1e9:.2f} billion parameters, "
        f"{arch.num_layers} layers{experts}"
    )
    servers = f", {plan.server_gpus} more for servers" if plan.server_gpus else ""
    yield f"{grid.world} x {plan.gpu.name} ({plan.gpu.memory / GIB:.1f} GiB){servers}: {grid.describe()}"


def _memory(plan: Plan) -> Iterator[str]:
    stage = plan.fullest
    phases = [phase for phase in PHASES if phase in stage.phases]
    columns = [stage.parts(phase) for phase in phases]
    names = list(dict.fromkeys(name for column in columns for name in column))
    where = f", of pipeline stage {stage.stage}" if len(plan.stages) > 1 else ""
    yield f"GiB on the fullest rank{where}:"
    yield f"  {'':26}" + "".join(f"{phase:>10}" for phase in phases)
    for name in names:
        cells = "".join(f"{column[name] / GIB:10.2f}" if name in column else f"{'-':>10}" for column in columns)
        yield f"  {name:26}{cells}"
    yield f"  {'all':26}" + "".join(f"{stage.total(phase) / GIB:10.2f}" for phase in phases)
    if len(plan.stages) > 1:
        yield "  peak by stage: " + ", ".join(f"{stage.peak / GIB:.1f}" for stage in plan.stages)
    if stage.host:
        parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in stage.host.items())
        yield f"  host memory of a rank: {parts}"
    if plan.server is not None:
        served = plan.server
        yield (
            f"  a server's GPU: weights {served.weights / GIB:.2f}, keys and values {max(0.0, served.pool) / GIB:.2f}: "
            f"{served.sequences} of the longest sequences ({served.token / 1024:.0f} KiB a token)"
        )


def _communication(plan: Plan) -> Iterator[str]:
    yield "A rollout step, estimated: mean lengths " + (
        f"{MEAN_LENGTH:.0%} of the limits"
        + (f", the teacher reads {plan.load.gated:.0%} of the responses" if plan.load.gated else "")
    )
    for kind, flow in plan.traffic.items():
        where = "within a machine" if flow.local else "between machines"
        sender = LEADER.get(kind, "a rank sends")
        sent = ", ".join(f"{size / 1e9:9.2f} GB in {phase}" for phase, size in flow.sent.items())
        yield f"  {kind:10} {sender:16} {sent}, {where}"
    times = ", ".join(f"{phase} {plan.seconds[phase]:.0f} s" for phase in PHASES)
    yield f"  {times}; together {step_seconds(plan.seconds, plan.config.rollout.ahead):.0f} s" + (
        ", as a rollout overlaps the passes and updates of the step before" if plan.config.rollout.ahead else ""
    )
    yield (
        f"  assumed: {ASSUMED.products:.0%} of peak operations, {ASSUMED.reading:.0%} of memory bandwidth in servers, "
        f"{ASSUMED.sending:.0%} of links"
    )


def _verdict(plan: Plan, advice: list[Advice]) -> Iterator[str]:
    peak, limit = plan.fullest.peak / GIB, room(plan.gpu.memory) / GIB
    yield (
        f"{'Fits' if plan.fits else 'Does not fit'}: {plan.fullest.fullest} needs {peak:.1f} GiB of {limit:.1f} "
        f"({FRAGMENTS:.0%} kept for fragments; {CONTEXT / GIB:.0f} GiB assumed for CUDA and NCCL)"
    )
    if not plan.served:
        yield "A server has no room for a single sequence."
    if advice:
        yield "Changes that help, each alone:"
    for one in advice:
        yield f"  {one.change:64} {one.peak / GIB:7.1f} GiB{', fits' if one.fits else ''}"
