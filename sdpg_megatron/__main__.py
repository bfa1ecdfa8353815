"""``python -m sdpg_megatron``: the same as the ``sdpg-megatron`` command."""

import sys

from sdpg_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main())
