#!/usr/bin/env bash
# Qwen3-1.7B as in the paper, with one of its methods: data, training, evaluation, conversion.
#
#   bash examples/recipes/qwen3-1.7b.sh sdpg-urkl                        or sdpg-ufkl, grpo, rlsd, opcd, dapo, opsd
#   PLACE=disaggregated bash examples/recipes/qwen3-1.7b.sh grpo         4 GPUs train, 4 generate
#   PLAN_ONLY=1 bash examples/recipes/qwen3-1.7b.sh sdpg-urkl            requirements only
#
# Needs 8 H100 (80 GB). Not run on GPUs yet. common.sh has further options; arguments after the method are key=value.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

method=${1:?expected $PAPER_METHODS}
shift
objective=()
paper_objective "$method"

prepare Qwen/Qwen3-1.7B paper
train_and_evaluate "runs/qwen3-1.7b/$method" examples/recipes/qwen3-1.7b.yaml H100 4 1 "${objective[@]}" "$@"
