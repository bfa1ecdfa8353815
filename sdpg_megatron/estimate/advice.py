"""Suggested changes for runs that do not fit. Each suggestion is planned in turn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sdpg_megatron.config.load import apply_override, parse
from sdpg_megatron.errors import ConfigError
from sdpg_megatron.estimate.plan import Plan, make_plan

WORTH = 0.02
"""Smallest saving that is suggested, as a share of the peak."""


@dataclass(frozen=True, slots=True)
class Advice:
    change: str
    """Overrides, as on the command line."""
    peak: float
    """Peak bytes of the fullest rank after the change."""
    fits: bool
    sequences: int | None
    """Number of longest sequences that a server has memory for after the change."""


def advise(plan: Plan) -> list[Advice]:
    """Changes that reduce the peak or make a server fit, sufficient ones first; empty if the run fits."""
    if plan.fits:
        return []
    found = []
    for changes, ranks in _proposals(plan):
        try:
            tree = plan.config.model_dump(mode="json")
            for change in changes:
                apply_override(tree, change)
            other = make_plan(parse(tree), plan.gpu, ranks)
        except ConfigError:  # not possible for the model or layout
            continue
        saves = plan.over > 0 and other.fullest.peak < plan.fullest.peak * (1 - WORTH)
        if saves or (not plan.served and other.served):
            named = list(changes) + ([f"--ranks {ranks}"] if ranks != plan.grid.world else [])
            sequences = None if other.server is None else other.server.sequences
            found.append(Advice(" ".join(named), other.fullest.peak, other.fits, sequences))
    return sorted(found, key=lambda advice: (not advice.fits, advice.peak))


def _proposals(plan: Plan) -> Iterator[tuple[tuple[str, ...], int]]:
    config, world = plan.config, plan.grid.world
    parallel, optimizer, served = config.parallel, config.optimizer, config.rollout.sglang
    if not config.model.recompute:
        yield ("model.recompute=true",), world
    if optimizer.micro_batch_tokens:
        yield (f"optimizer.micro_batch_tokens={optimizer.micro_batch_tokens // 2}",), world
    elif optimizer.micro_batch_size > 1:
        yield (f"optimizer.micro_batch_size={optimizer.micro_batch_size // 2}",), world
        yield ("optimizer.micro_batch_size=1",), world
    if not optimizer.distributed:
        yield ("optimizer.distributed=true",), world
    if config.model.dtype == "float32":
        yield ("model.dtype=bfloat16",), world
    if config.head.schedule != "recompute":
        yield ("head.schedule=recompute",), world
    yield from ((changes, ranks) for ranks in (world, 2 * world) for changes in _layouts(plan))
    yield (), 2 * world
    if config.rollout.engine == "sglang":
        for share in (0.5, 0.7, 0.9):
            yield (f"rollout.sglang.mem_fraction={share}",), world
        fewer = (f"rollout.sglang.servers={served.servers // 2}",) if served.servers > 1 else ()
        yield (f"rollout.sglang.tensor={2 * served.tensor}", *fewer), world
    if parallel.tensor > 1 and not parallel.sequence:
        yield ("parallel.sequence=true",), world


def _layouts(plan: Plan) -> Iterator[tuple[str, ...]]:
    parallel = plan.config.parallel
    yield f"parallel.tensor={2 * parallel.tensor}", "parallel.sequence=true"
    yield (f"parallel.pipeline={2 * parallel.pipeline}",)
    yield (f"parallel.context={2 * parallel.context}",)
    if plan.arch.experts is not None:
        yield (f"parallel.expert={2 * parallel.expert}",)
