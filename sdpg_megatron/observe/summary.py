"""Summary of a finished run, as a small JSON file."""

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
    """Held-out accuracy before and after training; None without held-out prompts."""

    accuracy_before: float | None
    """Mean over sampled responses."""
    accuracy_after: float | None
    greedy_before: float | None
    greedy_after: float | None
    reward: float | None = None
    """Mean over the last step's responses; None if there are none."""
    steps: int
    seconds: float
    """Wall-clock training time over all calls of the run."""


_SUMMARY = TypeAdapter(Summary)


def write_summary(run_dir: Path, summary: Summary) -> Path:
    """Write summary.json atomically; returns its path. Raises `WriteError`."""
    return write_whole(run_dir / SUMMARY_FILE, json.dumps(asdict(summary), indent=2) + "\n")


def read_summary(run_dir: Path) -> Summary | None:
    """Read the summary of a finished run; None if there is none. Raises `CheckpointError` if it is damaged."""
    path = run_dir / SUMMARY_FILE
    if not path.exists():
        return None
    try:
        return _SUMMARY.validate_json(path.read_bytes(), strict=True)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: found {reason_of(error)}, expected the summary of a finished run. "
            "Fix: remove it; the run's own command writes it again"
        ) from error
