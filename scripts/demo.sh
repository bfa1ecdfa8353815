#!/usr/bin/env bash
# SmolLM2-135M-Instruct learns two-digit addition, on this machine, from one command.
#
#   bash scripts/demo.sh [key=value ...]     overrides of examples/smollm2/addition.yaml
#
# Everything is written under runs/demo. Ctrl-C leaves a run that the next call continues; a finished run says so.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
"$PYTHON" tools/make_addition.py runs/data/addition
exec "$PYTHON" -m sdpg_megatron train examples/smollm2/addition.yaml model.path="$SMOLLM2" "$@"
