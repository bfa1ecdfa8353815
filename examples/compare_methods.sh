#!/usr/bin/env bash
# Methods side by side on one small task, under equal settings: a sweep of SDPG's beta on one seed, then three seeds of each.
#
#   bash examples/compare_methods.sh
#
# The runs, about five minutes each on one CPU core, are written under runs/compare. The script may be stopped and called
# again, and several calls may work side by side: each takes runs that are neither done nor taken. Tables and pictures of
# what is done are written at the end of each call. docs/evidence.md has what came of it.
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/setup.sh"

RUNS=runs/compare
BETA=1 # of the comparison; docs/evidence.md says why

# run NAME SEED key=value ...: one run to its end, unless it is done or another call is at it.
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
