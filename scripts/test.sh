#!/usr/bin/env bash
# Set up and run the tests; arguments go to pytest:
#
#   bash scripts/test.sh                          all of them
#   bash scripts/test.sh tests/unit -k config     some of them
#   SDPG_PYTHON=python3.12 bash scripts/test.sh   the same in .venv-312, with the newest megatron-core of Python 3.12
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec "$PYTHON" -m pytest "$@"
