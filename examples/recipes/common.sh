# shellcheck shell=bash
# Functions shared by the recipes, to be sourced. Exit codes are those of scripts/launch.sh; signals are forwarded.
# After exit code 75 and after any failure, the same command continues.
#
#   PYTHON       interpreter with the package installed (default: .venv/bin/python, else python3)
#   MODELS       folder of models (default: runs/models); missing models are downloaded from huggingface.co
#   PLACE        colocated: servers share the trainer's GPUs (default)
#                disaggregated: half of the GPUs train, the other half generate
#   PLAN_ONLY    if set, print the requirements, from the model's config.json only, without training
#   NNODES, NODE_RANK, ROLLOUT_NODES, RANKS_PER_NODE and the other variables of scripts/launch.sh, for several machines
#                with a shared disk: machine 0 downloads model and data
#   PREPARE_SECONDS  time limit of the other machines' wait for it, in seconds (default 3600)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
if [[ -z "${PYTHON:-}" && -x .venv/bin/python ]]; then PYTHON=.venv/bin/python; fi
export PYTHON="${PYTHON:-python3}" PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
MODELS="${MODELS:-runs/models}"
hf="$(dirname "$PYTHON")/hf" # from the same environment, active or not
[[ -x "$hf" ]] || hf=hf
node=0
if ((${NNODES:-1} > 1)); then node="${NODE_RANK:-${SLURM_NODEID:-0}}"; fi

die() {
  printf 'recipe: %s\n' "$*" >&2
  exit 2
}

case "${PLACE:=colocated}" in
  colocated | disaggregated) ;;
  *) die "PLACE: found $PLACE, expected colocated or disaggregated. Fix: set it to one of these" ;;
esac

# forwarded COMMAND ...: run it and forward signals to it, which bash does not do. It has its own process group, so that
# a signal to the recipe's group reaches it once: a second signal has another meaning.
forwarded() {
  local child="" code=0 signal caught=""
  for signal in TERM INT HUP; do
    # shellcheck disable=SC2064  # expand the signal now, the child later
    trap "caught=$signal; [[ -z \"\$child\" ]] || kill -s $signal \"\$child\" 2>/dev/null || true" "$signal"
  done
  set -m
  "$@" </dev/null &
  child=$!
  set +m
  [[ -z "$caught" ]] || kill -s "$caught" "$child" 2>/dev/null || true
  while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done # a signal interrupts wait, but not the child
  wait "$child" || code=$?
  trap - TERM INT HUP
  if [[ -n "$caught" ]] && ((code == 0)); then code=75; fi # it ended first; do not go on
  return "$code"
}

there() { [[ -e "$1/$2" && ! -e "$1/.incomplete" ]]; }

# fill FOLDER FILE COMMAND ...: fill the folder by the command, unless FILE exists and no call was interrupted.
fill() {
  local folder=$1 file=$2 until=$((SECONDS + ${PREPARE_SECONDS:-3600}))
  shift 2
  while ((node)) && ! there "$folder" "$file"; do
    ((SECONDS < until)) || die "$folder: not filled by machine 0 in ${PREPARE_SECONDS:-3600} seconds. Fix: see its" \
      "output; where machines share no disk, put it there on each; or raise PREPARE_SECONDS"
    sleep 1
  done
  if there "$folder" "$file"; then return; fi
  mkdir -p "$folder"
  : >"$folder/.incomplete"
  forwarded "$@"
  rm "$folder/.incomplete"
}

# paper_objective METHOD: set `objective` to the SDPG paper's settings (arXiv 2606.04036) of the method, or to the
# method's defaults where the paper has none. Other fields have the defaults of config/method_defaults.py.
# shellcheck disable=SC2034  # the recipes read `objective`
paper_objective() {
  local mean=objective.aggregation=group-token-mean # eq. 2.2, 3.4 and appendix B: mean per prompt, then over prompts
  local kl=objective.alpha=0.001                    # section 4.1: 1e-3 for all baselines, clipped at 0.2 / 0.2
  case $1 in
    sdpg-urkl | sdpg-ufkl) objective=(objective.name=sdpg "objective.reference=${1#sdpg-}" "$mean") ;;
    grpo | rlsd) objective=("objective.name=$1" "$mean" "$kl") ;;
    # Appendix C: only reverse KL over the whole vocabulary to the current teacher, on all responses. Appendix D.2 names
    # the missing reference as the difference from SDPG. docs/methods.md has its authors' settings.
    opcd) objective=(objective.name=opcd "$mean") ;;
    dapo | opsd) objective=("objective.name=$1") ;; # not in the paper
    *) die "method: found $1, expected $PAPER_METHODS. Fix: name one of these" ;;
  esac
}
PAPER_METHODS="sdpg-urkl, sdpg-ufkl, grpo, rlsd, opcd, dapo or opsd"

# prepare REPOSITORY [paper]: download model and data if missing. With "paper" the data are those of the SDPG paper: the
# English problems of DAPO-Math-17k (section 4.1: 13.9k), in the prompt of its figure 4.
prepare() {
  local data=runs/data/math train=dapo-math-17k instruction=boxed
  if [[ "${2:-}" == paper ]]; then data=runs/data/sdpg train=dapo-math-17k-en instruction=paper; fi
  folder="$MODELS/${1##*/}"
  if [[ -z "${PLAN_ONLY:-}" ]]; then
    fill "$folder" config.json "$hf" download "$1" --local-dir "$folder"
    fill "$data" train.jsonl "$PYTHON" tools/prepare_data.py "$data" \
      --train "$train" --eval aime-2024 aime-2025 amc-2023 --instruction "$instruction"
  elif [[ ! -e "$folder/config.json" ]]; then
    mkdir -p "$folder"
    : >"$folder/.incomplete" # files that only training needs are missing
    forwarded "$hf" download "$1" config.json --local-dir "$folder"
  fi
}

# train_and_evaluate RUN CONFIG GPU SERVERS TENSOR key=value ...: train in the folder RUN if the model fits the GPUs.
# RUN then has the trained model in two formats: RUN/model (Hugging Face) and RUN/megatron (Megatron-LM). Disaggregated
# servers, SERVERS of TENSOR GPUs each, use GPUs of the machine; with ROLLOUT_NODES each of those has SERVERS_PER_NODE.
train_and_evaluate() {
  local run=$1 config=$2 gpu=$3 servers=$4 tensor=$5 ranks=${RANKS_PER_NODE:-8} nodes=${NNODES:-1} apart=() served=()
  shift 5
  local changes=("model.path=$folder" "run_dir=$run")
  IFS=$', \t' read -ra apart <<<"${ROLLOUT_NODES:-}"
  if ((${#apart[@]})); then
    nodes=$((nodes - ${#apart[@]}))
    servers=$((${SERVERS_PER_NODE:?ROLLOUT_NODES needs it} * ${#apart[@]}))
  elif [[ "$PLACE" == disaggregated ]]; then
    ranks=$((ranks - servers * tensor))
  fi
  if ((${#apart[@]})) || [[ "$PLACE" == disaggregated ]]; then
    changes+=("rollout.sglang.colocated=false" "rollout.sglang.transport=broadcast" "rollout.sglang.mem_fraction=0.85")
    changes+=("rollout.sglang.servers=$servers" "rollout.sglang.tensor=$tensor")
  fi
  changes+=("$@")
  "$PYTHON" -m sdpg_megatron plan "$config" --gpu "$gpu" --ranks $((ranks * nodes)) "${changes[@]}"
  [[ -z "${PLAN_ONLY:-}" ]] || exit 0
  ((node)) || "$PYTHON" -m sdpg_megatron train "$config" --dry-run --ranks $((ranks * nodes)) "${changes[@]}"
  RANKS_PER_NODE=$ranks forwarded bash scripts/launch.sh "$config" "${changes[@]}"
  ((node == 0)) || return 0
  # The launcher's servers have ended, but are still in the run's configuration; this machine's GPUs are free now.
  [[ "${SERVERS_PER_NODE:-0}" == 0 ]] || served=("rollout.sglang.urls=[]" "rollout.sglang.servers=$((ranks / tensor))")
  forwarded "$PYTHON" -m sdpg_megatron eval "$run" --out "$run/final" eval.samples=32 "${served[@]}"
  [[ -e "$run/megatron" ]] || forwarded "$PYTHON" tools/convert_hf_to_megatron.py "$run/model" "$run/megatron"
}
