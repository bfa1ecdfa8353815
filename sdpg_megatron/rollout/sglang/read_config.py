"""Prints the settings that the installed transformers reads from a config.json, as one line of JSON.

SGLang takes a model's settings from this object. Run by path, by the servers' interpreter, without this package:

    python -I read_config.py FOLDER ATTRIBUTE...
"""

from __future__ import annotations

import json
import sys
from typing import Any


def main(folder: str, *names: str) -> None:
    """Print the version of transformers, the rotary base and scaling factor, and the named attributes."""
    import transformers

    config: Any = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    found = {name: getattr(config, name) for name in names if hasattr(config, name)}
    if int(transformers.__version__.partition(".")[0]) >= 5:
        rotary = config.rope_parameters
        base = rotary["rope_theta"]
    else:  # keeps unknown keys such as `rope_parameters`, but does not use them
        base, rotary = config.rope_theta, config.rope_scaling or {}
    found |= {"rotary base": base, "rotary scaling factor": rotary.get("factor")}
    sys.stdout.write(json.dumps({"version": transformers.__version__, "settings": found}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
