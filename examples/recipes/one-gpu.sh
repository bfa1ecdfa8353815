#!/usr/bin/env bash
# Qwen3-0.6B or Qwen3-1.7B learns mathematics with SDPG on one GPU: data, training, evaluation, conversion.
#
#   bash examples/recipes/one-gpu.sh 0.6b                              or 1.7b
#   bash examples/recipes/one-gpu.sh 1.7b rollout.max_response_tokens=14336    16k tokens with the prompt
#   PLAN_ONLY=1 bash examples/recipes/one-gpu.sh 1.7b                  requirements only
#
# Needs one H100 (80 GB). Not run on GPUs yet. common.sh has further options; arguments after the size are key=value.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

case "${1:-}" in
  0.6b | 1.7b) size=${1^^} ;;
  *) die "size: found ${1:-nothing}, expected 0.6b or 1.7b. Fix: name one of these" ;;
esac
[[ "$PLACE" == colocated ]] || die "PLACE: found $PLACE, expected colocated: one GPU has no place for servers alone"
shift

prepare "Qwen/Qwen3-$size"
RANKS_PER_NODE=1 train_and_evaluate "runs/one-gpu/$size" examples/recipes/one-gpu.yaml H100 1 1 "$@"
