"""Runs sglang.launch_server with its API keys from standard input instead of the command line.

Every user of a Linux machine can read command lines, and SGLang 0.5.23 takes keys only from there or from a file. Run
by path, by the servers' interpreter, without this package:

    python serve.py ARGUMENT... <<< '{"--api-key": "..."}'
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
    # End this process if the guard is killed. SGLang's child processes watch their parent in the same way.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # Python put this file's folder first; its modules must not shadow top-level ones.
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [folder for folder in sys.path if os.path.abspath(folder) != here]
    sys.argv += [f"{name}={key}" for name, key in json.load(sys.stdin).items()]
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
