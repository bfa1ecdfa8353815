"""Convert a Megatron checkpoint or a run to a Hugging Face folder, with ``sdpg-megatron convert``.

python tools/convert_megatron_to_hf.py CHECKPOINT TARGET [--like FOLDER] [--dtype bfloat16] [--verify]
"""

from __future__ import annotations

import sys

from sdpg_megatron.__main__ import run

if __name__ == "__main__":
    sys.exit(run(["convert", *sys.argv[1:], "--to", "huggingface"]))
