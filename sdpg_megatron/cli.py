"""The command line: ``sdpg-megatron train CONFIG [key=value ...]``, alone or under torchrun."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from sdpg_megatron import __version__
from sdpg_megatron.config import dump, load
from sdpg_megatron.errors import SdpgError

INTERRUPTED = 130
"""Exit code of a run that was asked to stop and can continue."""

EXPECTED_WARNINGS = (
    ".*Apex (is|are) not installed",
    "full scope is deprecated",
    "When using async grad allreduce",
    "The .grad attribute of a Tensor that is not a leaf",
    "`torch.distributed.*` is deprecated",
)
"""What megatron-core says on any machine without Transformer Engine, and what torch says about megatron-core."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code: 0 done, 2 a mistake in the input, 130 interrupted and able to continue."""
    parser = _parser()
    options, more = parser.parse_known_args(arguments)  # argparse leaves what follows an option in the middle
    if unknown := [argument for argument in more if argument.startswith("-")]:
        parser.error(f"unknown option {unknown[0]}")
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        return _train(options.config, [*options.overrides, *more], options.dry_run)
    except SdpgError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 2
    except KeyboardInterrupt:  # before the first step, or a second time
        sys.stderr.write("stopped; the same command continues from the last checkpoint\n")
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sdpg-megatron", description="Self-Distilled Policy Gradient on Megatron-core."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train",
        help="run, or continue, a training run",
        description="Run, or continue, the run that CONFIG describes. Several ranks: torchrun --nproc-per-node N -m "
        "sdpg_megatron train CONFIG ...",
    )
    train.add_argument("config", type=Path, metavar="CONFIG", help="YAML file; see examples/")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. objective.beta=0.01 parallel.tensor=2")
    train.add_argument("--dry-run", action="store_true", help="check everything and print the resolved configuration")
    return parser


def _train(path: Path, overrides: Sequence[str], dry_run: bool) -> int:
    config = load(path, overrides)
    from sdpg_megatron.train.inputs import load_inputs  # torch takes seconds to import, Megatron more

    inputs = load_inputs(config)
    if dry_run:
        sys.stdout.write(dump(config))
        return 0
    from sdpg_megatron.train.loop import Outcome, done_message, train

    outcome = train(config, inputs)
    if outcome is Outcome.ALREADY_DONE and os.environ.get("RANK", "0") == "0":
        sys.stdout.write(done_message(config.run_dir) + "\n")
    return INTERRUPTED if outcome is Outcome.INTERRUPTED else 0


if __name__ == "__main__":
    sys.exit(main())
