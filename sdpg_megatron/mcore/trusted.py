"""What megatron-core takes for safe in a checkpoint."""

from __future__ import annotations

from typing import Any


def trusted_globals() -> list[Any]:
    """Classes that the arguments in a Megatron-LM checkpoint may consist of, besides plain data."""
    from megatron.core.safe_globals import SAFE_GLOBALS

    return list(SAFE_GLOBALS)
