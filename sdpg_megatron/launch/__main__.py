"""Entry point of ``python -m sdpg_megatron.launch``, which `scripts/launch.sh` executes on each machine of a run."""

import sys

from sdpg_megatron.process.signals import exit_at_once


def run() -> int:
    """Call `command.main`; Ctrl-C is handled while it is imported."""
    exit_at_once()
    from sdpg_megatron.launch.command import main

    return main()


if __name__ == "__main__":
    sys.exit(run())
