"""`sdpg-megatron`, but with infinite gradients in the optimizer steps that $SDPG_TEST_SPOILT lists, as ``2,3``."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Collection
from typing import Any

from sdpg_megatron.cli import main

VARIABLE = "SDPG_TEST_SPOILT"


def spoil(steps: Collection[int]) -> None:
    from sdpg_megatron.mcore import policy_trainer

    update, schedule = policy_trainer.PolicyTrainer.update, policy_trainer.passes.run_schedule
    current = -1

    def updating(self: Any, batches: Any, context: Any) -> Any:
        nonlocal current
        current = context.step
        return update(self, batches, context)

    def running(chunks: Any, *arguments: Any, **options: Any) -> Any:
        found = schedule(chunks, *arguments, **options)
        if current in steps and not options.get("forward_only"):
            next(chunks[0].parameters()).main_grad.fill_(math.inf)
        return found

    policy_trainer.PolicyTrainer.update, policy_trainer.passes.run_schedule = updating, running  # type: ignore[method-assign]


if __name__ == "__main__":
    spoil([int(step) for step in os.environ[VARIABLE].split(",")])
    sys.exit(main())
