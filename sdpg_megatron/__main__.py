"""Entry point of ``python -m sdpg_megatron`` and of the ``sdpg-megatron`` command."""

import sys
from collections.abc import Sequence

from sdpg_megatron.process.signals import exit_at_once


def run(arguments: Sequence[str] | None = None) -> int:
    """Call `cli.main`; Ctrl-C is handled while it is imported."""
    exit_at_once()
    from sdpg_megatron.cli import main

    return main(arguments)


if __name__ == "__main__":
    sys.exit(run())
