# shellcheck shell=bash
# What the recipes share; each of them says what it is for. Sourced, never run. Exit codes are scripts/launch.sh's,
# and a signal is passed on: after 75, as after any failure, the same command continues.
#
#   PYTHON       interpreter that has the package (default: the one of .venv, or python3)
#   MODELS       folder of models (default: runs/models); a model that is not there is fetched from huggingface.co
#   PLACE        colocated: servers share the trainer's GPUs, and take turns with it (default)
#                disaggregated: half of the GPUs train, the other half generate
#   PLAN_ONLY    set to anything: say what is needed, from the model's config.json alone, and train nothing
#   NNODES, NODE_RANK, ROLLOUT_NODES, RANKS_PER_NODE and the others of scripts/launch.sh, for more than one machine:
#                machine 0 fetches model and data, for a disk that all of them share
#   PREPARE_SECONDS  for which the others wait for that (default 3600)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
if [[ -z "${PYTHON:-}" && -x .venv/bin/python ]]; then PYTHON=.venv/bin/python; fi
export PYTHON="${PYTHON:-python3}" PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
MODELS="${MODELS:-runs/models}"
hf="$(dirname "$PYTHON")/hf" # of the same environment, which need not be active
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

# forwarded COMMAND ...: run it, and pass signals on to it: bash in the foreground would not. It is alone in a process
# group, so that what is sent to all of the recipe's reaches it once: a second signal means more.
forwarded() {
  local child="" code=0 signal caught=""
  for signal in TERM INT HUP; do
    # shellcheck disable=SC2064  # the signal is this one, the child a later one
    trap "caught=$signal; [[ -z \"\$child\" ]] || kill -s $signal \"\$child\" 2>/dev/null || true" "$signal"
  done
  set -m
  "$@" </dev/null &
  child=$!
  set +m
  [[ -z "$caught" ]] || kill -s "$caught" "$child" 2>/dev/null || true
  while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done # a signal ends a wait, not the child
  wait "$child" || code=$?
  trap - TERM INT HUP
  if [[ -n "$caught" ]] && ((code == 0)); then code=75; fi # it was done before it heard of it; what follows is not
  return "$code"
}

there() { [[ -e "$1/$2" && ! -e "$1/.incomplete" ]]; }

# fill FOLDER FILE COMMAND ...: have the command fill it, unless FILE is there and no call was interrupted.
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

# paper_objective METHOD: sets `objective` to what the SDPG paper (arXiv 2606.04036) trains the method with, and to the
# method's own defaults where the paper has none. What is not set here is the default in sdpg_megatron/config/method_defaults.py.
# shellcheck disable=SC2034  # the recipes read `objective`
paper_objective() {
  local mean=objective.aggregation=group-token-mean # eq. 2.2, 3.4 and appendix B: per prompt, then over prompts
  local kl=objective.alpha=0.001                    # section 4.1: 1e-3 for all baselines, clipped at 0.2 / 0.2
  case $1 in
    sdpg-urkl | sdpg-ufkl) objective=(objective.name=sdpg "objective.reference=${1#sdpg-}" "$mean") ;;
    grpo | rlsd) objective=("objective.name=$1" "$mean" "$kl") ;;
    # Appendix C: reverse KL over the whole vocabulary to the current teacher, on all responses, and nothing else:
    # appendix D.2 names the lack of a reference as what tells it from SDPG. Its own authors' settings: docs/methods.md.
    opcd) objective=(objective.name=opcd "$mean") ;;
    dapo | opsd) objective=("objective.name=$1") ;; # not in the paper
    *) die "method: found $1, expected $PAPER_METHODS. Fix: name one of these" ;;
  esac
}
PAPER_METHODS="sdpg-urkl, sdpg-ufkl, grpo, rlsd, opcd, dapo or opsd"

# prepare REPOSITORY [paper]: the model and the data, unless they are there. With "paper" the data are the SDPG paper's:
# the English problems of DAPO-Math-17k (section 4.1: 13.9k of them), in the prompt of its figure 4.
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
    : >"$folder/.incomplete" # the rest is for a call that trains
    forwarded "$hf" download "$1" config.json --local-dir "$folder"
  fi
}

# train_and_evaluate RUN CONFIG GPU SERVERS TENSOR key=value ...: where it fits, in the folder RUN, which then has the
# trained model twice: RUN/model for Hugging Face, RUN/megatron for Megatron-LM. Where servers have GPUs of their own,
# SERVERS of TENSOR GPUs each take them from the machine's, or ROLLOUT_NODES has SERVERS_PER_NODE of them each.
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
  # The launcher's servers have ended with it, but are in the run's configuration; now this machine's GPUs are free.
  [[ "${SERVERS_PER_NODE:-0}" == 0 ]] || served=("rollout.sglang.urls=[]" "rollout.sglang.servers=$((ranks / tensor))")
  forwarded "$PYTHON" -m sdpg_megatron eval "$run" --out "$run/final" eval.samples=32 "${served[@]}"
  [[ -e "$run/megatron" ]] || forwarded "$PYTHON" tools/convert_hf_to_megatron.py "$run/model" "$run/megatron"
}
