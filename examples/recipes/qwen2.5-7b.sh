#!/usr/bin/env bash
# Qwen2.5-7B-Instruct learns mathematics with SDPG: data, training, evaluation, conversion.
#
#   bash examples/recipes/qwen2.5-7b.sh
#   PLACE=disaggregated bash examples/recipes/qwen2.5-7b.sh              4 GPUs train, 4 generate
#   PLAN_ONLY=1 bash examples/recipes/qwen2.5-7b.sh                      requirements only
#
# Needs 8 H100 (80 GB). Not run on GPUs yet. common.sh has further options; arguments are key=value.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

prepare Qwen/Qwen2.5-7B-Instruct
train_and_evaluate runs/qwen2.5-7b examples/recipes/qwen2.5-7b.yaml H100 2 2 "$@"
