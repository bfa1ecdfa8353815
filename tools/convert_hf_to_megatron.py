"""Convert a Hugging Face folder to a Megatron checkpoint, with ``sdpg-megatron convert``.

python tools/convert_hf_to_megatron.py FOLDER TARGET [--dtype bfloat16] [--verify]
"""

from __future__ import annotations

import sys

from sdpg_megatron.__main__ import run

if __name__ == "__main__":
    sys.exit(run(["convert", *sys.argv[1:], "--to", "megatron"]))
