#!/usr/bin/env bash
# Qwen3-4B as in the paper, with one of its methods: data, training, evaluation, conversion.
#
#   bash examples/recipes/qwen3-4b.sh sdpg-urkl                        or sdpg-ufkl, grpo, dapo, rlsd, opsd
#   PLACE=disaggregated bash examples/recipes/qwen3-4b.sh grpo         4 GPUs train, 4 generate
#   PLAN_ONLY=1 bash examples/recipes/qwen3-4b.sh sdpg-urkl            what it needs
#
# Needs 8 H100 (80 GB). Not run on GPUs yet. common.sh has the other choices; what follows the method is key=value.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

method=${1:?expected sdpg-urkl, sdpg-ufkl, grpo, dapo, rlsd or opsd}
shift
case $method in
  sdpg-urkl | sdpg-ufkl)
    objective=(objective.name=sdpg objective.reference="${method#sdpg-}" objective.aggregation=group-token-mean)
    ;;
  grpo | dapo | rlsd | opsd) objective=(objective.name="$method") ;;
  *) echo "unknown method $method" >&2 && exit 2 ;;
esac

prepare Qwen/Qwen3-4B
train_and_evaluate "runs/qwen3-4b/$method" examples/recipes/qwen3-4b.yaml H100 4 1 "${objective[@]}" "$@"
