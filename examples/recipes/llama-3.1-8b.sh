#!/usr/bin/env bash
# Llama-3.1-8B-Instruct learns mathematics with SDPG: data, training, evaluation, conversion.
#
#   bash examples/recipes/llama-3.1-8b.sh
#   PLACE=disaggregated bash examples/recipes/llama-3.1-8b.sh              4 GPUs train, 4 generate
#   PLAN_ONLY=1 bash examples/recipes/llama-3.1-8b.sh                      requirements only
#
# Needs 8 H100 (80 GB). Not run on GPUs yet. common.sh has further options; arguments are key=value.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

prepare meta-llama/Llama-3.1-8B-Instruct
train_and_evaluate runs/llama-3.1-8b examples/recipes/llama-3.1-8b.yaml H100 2 2 "$@"
