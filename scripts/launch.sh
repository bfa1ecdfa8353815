#!/usr/bin/env bash
# Start, or continue, a training run on one machine or on many. On each of them:
#
#   bash scripts/launch.sh CONFIG [key=value ...] [--branch-from RUN[@STEP]]
#
#   RANKS_PER_NODE=8 bash scripts/launch.sh my.yaml parallel.tensor=4                          one machine
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 RANKS_PER_NODE=8 bash scripts/launch.sh my.yaml    the first of two
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=10.0.0.1 RANKS_PER_NODE=8 bash scripts/launch.sh my.yaml    the second
#
# Exit code 0: done. 75: stopped by a signal (to any one machine) and saved. After 75 as after any failure, the same
# commands continue. scripts/slurm.sbatch calls this under Slurm; docs/launching.md says more. Choices, by environment:
#
#   NNODES            machines of the run (default 1)
#   NODE_RANK         this machine's number, from 0 (default: Slurm's)
#   MASTER_ADDR       address of machine 0, as the others reach it
#   MASTER_PORT       there: torchrun's store; the launchers use the port after it (default 29500; one machine: a free one)
#   RANKS_PER_NODE    ranks of the trainer on this machine: the same on all, or 0 for one with servers alone
#                     (default: its GPUs, 1 without any; to be set where it has servers on GPUs, too)
#   SERVERS_PER_NODE  SGLang servers on this machine, started as rollout.sglang says and used by all (default 0: what the
#                     configuration says)
#   ROLLOUT_NODES     numbers of the machines that are to have servers and no ranks, such as "2 3" or 2,3; the others then
#                     have ranks and no servers
#   MEET_SECONDS      until all machines must be there (default 600)
#   LOST_SECONDS      of silence after which a machine is given up, and with it this start of the run (default 60)
#   CODE_FILE         file in which machine 0 leaves its exit code (default: none)
#   PYTHON            interpreter (default: the one of .venv, or python3)
set -euo pipefail

die() {
  printf 'launch: %s\n' "$*" >&2
  exit 2
}

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [[ -z "${PYTHON:-}" && -x "$root/.venv/bin/python" ]]; then PYTHON="$root/.venv/bin/python"; fi
PYTHON="${PYTHON:-python3}"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
"$PYTHON" -c 'import importlib.util as u, sys; sys.exit(not (u.find_spec("megatron") and u.find_spec("torch")))' ||
  die "$PYTHON lacks torch or megatron-core. Fix: bash scripts/setup.sh, or set PYTHON to an interpreter that has them"

NNODES="${NNODES:-1}"
if ((NNODES > 1)); then
  NODE_RANK="${NODE_RANK:-${SLURM_NODEID:-}}"
  [[ -n "$NODE_RANK" ]] || die "NODE_RANK is not set. Fix: set it to this machine's number, from 0"
  [[ -n "${MASTER_ADDR:-}" ]] || die "MASTER_ADDR is not set. Fix: set it to the address of machine 0"
fi
SERVERS_PER_NODE="${SERVERS_PER_NODE:-0}"
if [[ -n "${ROLLOUT_NODES:-}" ]]; then
  IFS=$', \t\n' read -rd '' -a rollout_nodes <<<"$ROLLOUT_NODES" || true
  servers=0
  for node in "${rollout_nodes[@]}"; do
    if ! [[ "$node" =~ ^(0|[1-9][0-9]{0,5})$ ]] || ((node >= NNODES)); then
      die "ROLLOUT_NODES is '$ROLLOUT_NODES', and '$node' is no machine. Fix: numbers from 0 to $((NNODES - 1)), such as 2,3"
    fi
    if [[ "$node" == "${NODE_RANK:-0}" ]]; then RANKS_PER_NODE=0 servers="$SERVERS_PER_NODE"; fi
  done
  SERVERS_PER_NODE="$servers"
fi

# CUDA's list, where it is set, ends at the first entry that is no GPU.
count_gpus() {
  if [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
    tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | awk '!/^ *([0-9]+|GPU-.+|MIG-.+) *$/ { exit } { n++ } END { print n + 0 }'
  else
    (nvidia-smi --list-gpus 2>/dev/null || true) | awk '/^GPU/ { n++ } END { print n + 0 }'
  fi
}
if [[ -z "${RANKS_PER_NODE:-}" ]]; then
  gpus="$(count_gpus)"
  if ((gpus > 0 && SERVERS_PER_NODE > 0)); then
    die "RANKS_PER_NODE is not set, and servers take some of this machine's $gpus GPUs." \
      "Fix: set it to the number that SERVERS_PER_NODE times rollout.sglang.tensor leaves"
  fi
  RANKS_PER_NODE="$((gpus > 0 ? gpus : 1))"
fi

# --- The environment of ranks and servers. What is set already stays.

# Threads of each process's CPU work. torch would take all cores for each, torchrun one.
ranks=$((RANKS_PER_NODE > 0 ? RANKS_PER_NODE : 1))
cores="$(nproc)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}"

# Kernels reach the GPU in the order in which they were launched. Megatron's tensor and sequence parallelism rely on it to
# start communication before the computation that hides it. SGLang sets its own.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"

# NCCL says what fails, and nothing else. INFO shows which network and algorithm it took.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# A collective that fails or exceeds parallel.timeout ends its rank, and so the run. 0 would let it wait for ever.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"

# NCCL_SOCKET_IFNAME, NCCL_IB_HCA: left to NCCL, which finds the network by itself; set them where it takes a wrong one.
# GLOO_SOCKET_IFNAME: if not set, the interface that reaches the other machines (Gloo's choice is often the loopback).
# SDPG_SGLANG_PYTHON: an interpreter that has sglang, where PYTHON has none.

exec "$PYTHON" -m sdpg_megatron.launch --nodes "$NNODES" --node "${NODE_RANK:-0}" --ranks "$RANKS_PER_NODE" \
  --servers "$SERVERS_PER_NODE" --address "${MASTER_ADDR:-127.0.0.1}" --port "${MASTER_PORT:-$((NNODES > 1 ? 29500 : 0))}" \
  --meet-seconds "${MEET_SECONDS:-600}" --lost-seconds "${LOST_SECONDS:-60}" ${CODE_FILE:+--code-file "$CODE_FILE"} "$@"
