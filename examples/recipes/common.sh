# shellcheck shell=bash
# What the recipes share; each of them says what it is for. Sourced, never run.
#
#   PYTHON       interpreter that has the package (default: the one of .venv, or python3)
#   MODELS       folder of models (default: runs/models); a model that is not there is fetched from huggingface.co
#   PLACE        colocated: servers share the trainer's GPUs, and take turns with it (default)
#                disaggregated: half of the GPUs train, the other half generate
#   PLAN_ONLY    set to anything: say what is needed, and train nothing
#   TRAINING_NODES machines with ranks, where others have servers alone (default: NNODES)
#   RANKS_PER_NODE and the others of scripts/launch.sh, for more than one machine
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
if [[ -z "${PYTHON:-}" && -x .venv/bin/python ]]; then PYTHON=.venv/bin/python; fi
export PYTHON="${PYTHON:-python3}" PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
MODELS="${MODELS:-runs/models}"

# prepare REPOSITORY: the model and the data, unless they are there.
prepare() {
  folder="$MODELS/${1##*/}"
  [[ -e "$folder/config.json" ]] || hf download "$1" --local-dir "$folder"
  [[ -n "${PLAN_ONLY:-}" || -e runs/data/math/train.jsonl ]] ||
    "$PYTHON" tools/prepare_data.py runs/data/math --train dapo-math-17k --eval aime-2024 aime-2025 amc-2023
}

# train_and_evaluate RUN CONFIG GPU SERVERS TENSOR key=value ...: where it fits, in the folder RUN, which then has the
# trained model twice: RUN/model for Hugging Face, RUN/megatron for Megatron-LM. Where servers have GPUs of their own,
# SERVERS of TENSOR GPUs each take them from the machine's.
train_and_evaluate() {
  local run=$1 config=$2 gpu=$3 servers=$4 tensor=$5 ranks=${RANKS_PER_NODE:-8} nodes=${TRAINING_NODES:-${NNODES:-1}}
  shift 5
  local changes=("model.path=$folder" "run_dir=$run")
  if [[ "${PLACE:-colocated}" == disaggregated ]]; then
    ranks=$((ranks - servers * tensor))
    changes+=("rollout.sglang.colocated=false" "rollout.sglang.sink=broadcast" "rollout.sglang.mem_fraction=0.85")
    changes+=("rollout.sglang.servers=$servers" "rollout.sglang.tensor=$tensor")
  fi
  changes+=("$@")
  "$PYTHON" -m sdpg_megatron plan "$config" --gpu "$gpu" --ranks $((ranks * nodes)) "${changes[@]}"
  [[ -z "${PLAN_ONLY:-}" ]] || exit 0
  RANKS_PER_NODE=$ranks bash scripts/launch.sh "$config" "${changes[@]}"
  [[ "${NODE_RANK:-0}" == 0 ]] || return 0
  "$PYTHON" -m sdpg_megatron eval "$run" --out "$run/final" eval.samples=32
  [[ -e "$run/megatron" ]] || "$PYTHON" tools/convert_hf_to_megatron.py "$run/model" "$run/megatron"
}
