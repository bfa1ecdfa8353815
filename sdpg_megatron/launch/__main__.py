"""``python -m sdpg_megatron.launch``: what `scripts/launch.sh` becomes, on each machine of a run."""

import sys

from sdpg_megatron.process.signals import exit_at_once


def run() -> int:
    """`command.main`, with Ctrl-C handled while it is imported."""
    exit_at_once()
    from sdpg_megatron.launch.command import main

    return main()


if __name__ == "__main__":
    sys.exit(run())
