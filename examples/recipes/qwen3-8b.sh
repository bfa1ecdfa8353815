#!/usr/bin/env bash
# Qwen3-8B learns mathematics with SDPG: data, training, evaluation, conversion.
#
#   bash examples/recipes/qwen3-8b.sh
#   PLACE=disaggregated bash examples/recipes/qwen3-8b.sh              4 GPUs train, 4 generate
#   PLAN_ONLY=1 bash examples/recipes/qwen3-8b.sh                      requirements only
#
# Needs 8 H100 (80 GB). Not run on GPUs yet. common.sh has further options; arguments are key=value.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

prepare Qwen/Qwen3-8B
train_and_evaluate runs/qwen3-8b examples/recipes/qwen3-8b.yaml H100 2 2 "$@"
