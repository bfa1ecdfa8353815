#!/usr/bin/env bash
# Qwen3-30B-A3B, a mixture of experts, learns mathematics with SDPG: data, training, evaluation, conversion.
#
#   bash examples/recipes/qwen3-30b-a3b.sh                                                   8 H200, colocated
#
#   Three machines of 8 H100: two train, the third generates. On each, with its index as NODE_RANK:
#   NNODES=3 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash examples/recipes/qwen3-30b-a3b.sh three
#
#   PLAN_ONLY=1 bash examples/recipes/qwen3-30b-a3b.sh                                       requirements only
#
# Not run on GPUs yet. common.sh has further options; further arguments are key=value. To use the result with
# Megatron-LM's tools: python -m sdpg_megatron convert runs/qwen3-30b-a3b/model converted --to megatron
if [[ "${1:-}" == three ]]; then
  shift
  export NNODES="${NNODES:-3}" ROLLOUT_NODES=2 SERVERS_PER_NODE=4
fi
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

gpu=H200
if [[ -n "${ROLLOUT_NODES:-}" ]]; then
  gpu=H100
elif [[ "$PLACE" == disaggregated ]]; then
  die "PLACE: found disaggregated, but half of 8 GPUs cannot train Qwen3-30B-A3B. Fix: three machines:" \
    "bash examples/recipes/qwen3-30b-a3b.sh three"
fi
prepare Qwen/Qwen3-30B-A3B
train_and_evaluate runs/qwen3-30b-a3b examples/recipes/qwen3-30b-a3b.yaml "$gpu" 4 2 "$@"
