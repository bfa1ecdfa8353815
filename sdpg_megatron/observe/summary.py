"""What a finished run says about itself, in one small file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter

from sdpg_megatron.errors import CheckpointError, reason_of
from sdpg_megatron.observe.files import write_whole

SUMMARY_FILE = "summary.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Held-out accuracy before and after training; None where the run has no held-out prompts."""

    accuracy_before: float | None
    """Mean over sampled responses."""
    accuracy_after: float | None
    greedy_before: float | None
    greedy_after: float | None
    reward: float | None = None
    """Mean of the last step's responses; None where there is none."""
    steps: int
    seconds: float
    """Wall-clock training time over all calls that the run took."""


_SUMMARY = TypeAdapter(Summary)


def write_summary(run_dir: Path, summary: Summary) -> Path:
    """Write summary.json whole or not at all; returns its path. Raises `WriteError` where the disk refuses."""
    return write_whole(run_dir / SUMMARY_FILE, json.dumps(asdict(summary), indent=2) + "\n")


def read_summary(run_dir: Path) -> Summary | None:
    """Return the summary of a finished run, None where there is none. Raises `CheckpointError` where it is damaged."""
    path = run_dir / SUMMARY_FILE
    if not path.exists():
        return None
    try:
        return _SUMMARY.validate_json(path.read_bytes(), strict=True)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: found {reason_of(error)}, expected the summary of a finished run. "
            "Fix: remove it; the run's own command writes it anew"
        ) from error
