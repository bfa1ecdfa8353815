"""Becomes an SGLang server, with its API keys read from standard input instead of the command line.

Run by path, by the interpreter that has sglang; everything else imports nothing from here:

    python serve.py ARGUMENT... <<< '{"--api-key": "..."}'

Linux shows every user each process's command line, and SGLang 0.5.23 takes the keys from there or from a file.
"""

from __future__ import annotations

import ctypes
import json
import os
import runpy
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Run sglang.launch_server as ``python -m`` would, in this process."""
    # Where the guard itself was killed, nobody is left to end this process. Its children watch it in the same way.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # Python put this file's folder first; its siblings must not be taken for top-level modules.
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [folder for folder in sys.path if os.path.abspath(folder) != here]
    sys.argv += [f"{name}={key}" for name, key in json.load(sys.stdin).items()]
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
