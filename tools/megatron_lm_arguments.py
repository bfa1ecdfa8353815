"""Print Megatron-LM's model arguments for a Hugging Face folder, as on a command line.

torchrun ... -m sdpg_megatron.plugins.megatron_lm $(python tools/megatron_lm_arguments.py Qwen3-1.7B) ...
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from sdpg_megatron.architecture import read_architecture
from sdpg_megatron.errors import SdpgError
from sdpg_megatron.plugins.megatron_lm.arguments import model_flags


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with config.json")
    folder = parser.parse_args().folder
    try:
        sys.stdout.write(shlex.join(model_flags(read_architecture(folder), folder)) + "\n")
    except SdpgError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
