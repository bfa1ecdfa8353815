#!/usr/bin/env bash
# Compare methods on one small task with equal settings: a sweep of SDPG's beta with one seed, then three seeds each.
#
#   bash examples/compare_methods.sh
#
# Runs take about five minutes each on one CPU core and are written to runs/compare. The script can be interrupted and
# started again. Several instances can run at the same time; each takes runs that are neither finished nor running.
# Each instance ends with tables and plots of the finished runs. docs/evidence.md has the results.
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/setup.sh"

RUNS=runs/compare
BETA=1 # beta of the comparison, chosen from the sweep (docs/evidence.md)

# run NAME SEED key=value ...: complete one run, unless it is finished or another instance is running it.
run() {
  local name=$1 seed=$2 folder="$RUNS/$1/seed_$2"
  shift 2
  mkdir -p "$folder"
  (
    flock --nonblock 9 || exit 0
    [[ ! -e "$folder/summary.json" ]] || exit 0
    echo "$name, seed $seed"
    "$PYTHON" -m sdpg_megatron train examples/smollm2/comparison.yaml model.path="$SMOLLM2" \
      run_dir="$folder" seed="$seed" "$@"
    rm -r "$folder/checkpoints"
  ) 9>"$folder/lock"
}

mkdir -p "$RUNS/sdpg_urkl"
[[ -e runs/data/addition ]] || "$PYTHON" tools/make_addition.py runs/data/addition
for beta in 0.001 0.01 0.1 1; do
  run "sdpg_beta_$beta" 0 objective.name=sdpg objective.beta="$beta"
done
[[ -e "$RUNS/sdpg_urkl/seed_0" ]] || ln -s "../sdpg_beta_$BETA/seed_0" "$RUNS/sdpg_urkl/seed_0"
for seed in 0 1 2; do
  run rpg "$seed" objective.name=rpg
  run grpo "$seed" objective.name=grpo
  run opsd "$seed" objective.name=opsd
  run rlsd "$seed" objective.name=rlsd
  run dapo "$seed" objective.name=dapo
  run sdpg_urkl "$seed" objective.name=sdpg objective.beta="$BETA" objective.reference=urkl
  run sdpg_unrelated_hint "$seed" objective.name=sdpg objective.beta="$BETA" data.context_of=other
  run sdpg_ufkl "$seed" objective.name=sdpg objective.beta="$BETA" objective.reference=ufkl
done
exec "$PYTHON" tools/report_comparison.py "$RUNS"
