#!/usr/bin/env bash
# Set up a virtual environment with a verl whose engine runs on CPUs, for tests/host/test_verl.py; verl's own extras need
# NVIDIA GPUs. Prints the environment's interpreter:
#
#   export SDPG_VERL_PYTHON="$(bash scripts/install_verl_cpu.sh)"
#
# A second call takes a moment. Choices, all by environment variable:
#   SDPG_PYTHON     interpreter, 3.12 (default: one that is found)
#   SDPG_VERL_VENV  virtual environment (default .venv-verl)
#   SDPG_TORCH      requirement for torch (default torch==2.11.0)
#
# What is in it: verl without the packages that it requires, and those that its engine, trainer and data set import
# (scripts/constraints-verl-cpu.txt).
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"

NAME=install_verl_cpu
source scripts/environment.sh

install_packages() {
  local torch="${SDPG_TORCH:-torch==2.11.0}" pins=scripts/constraints-verl-cpu.txt stamp="$VENV/sdpg-setup-stamp" inputs
  inputs="$torch $(cat "$pins" scripts/install_verl_cpu.sh scripts/environment.sh | cksum)"
  if [[ -f "$stamp" && "$(<"$stamp")" == "$inputs" ]]; then return; fi
  local pip=("$PYTHON" -m pip --disable-pip-version-check install --quiet)
  say "installing into $VENV (some minutes the first time): $torch"
  "${pip[@]}" "$torch" # first and alone: the packages below would otherwise choose a build of their own
  say "installing what verl's engine imports"
  "${pip[@]}" --requirement "$pins"
  say "installing verl" # after the packages that it requires: pip would list, as errors, the many left out
  "${pip[@]}" --no-deps verl==0.9.1
  say "checking that its engine imports"
  "$PYTHON" -W ignore -c 'import verl.workers.engine.megatron, verl.workers.engine_workers, verl.trainer.ppo.v1' >&2 ||
    die "verl does not import. Fix: remove $VENV and try again; if it stays so, a pinned package is missing"
  printf '%s' "$inputs" >"$stamp"
}

choose_environment 3.12 "${SDPG_VERL_VENV:-.venv-verl}"
install_packages >&2
printf '%s\n' "$PYTHON"
