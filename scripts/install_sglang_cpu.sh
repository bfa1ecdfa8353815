#!/usr/bin/env bash
# Set up a virtual environment with an SGLang that serves on CPUs, for the tests of tests/sglang and for trying things
# out; SGLang's own way to install it needs an NVIDIA GPU. Prints the environment's interpreter:
#
#   export SDPG_SGLANG_PYTHON="$(bash scripts/install_sglang_cpu.sh)"
#
# A second call takes a moment. Choices, all by environment variable:
#   SDPG_PYTHON       interpreter, 3.11 (default: one that is found)
#   SDPG_SGLANG_VENV  virtual environment (default .venv-sglang)
#   SDPG_TORCH        requirement for torch (default torch==2.13.0)
#
# What is in it: sglang without the packages that it requires for GPUs, those that its server imports on a CPU
# (scripts/constraints-sglang-cpu.txt), and two stand-ins (tools/sglang_cpu) for what no package index has for CPUs.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"

NAME=install_sglang_cpu
source scripts/environment.sh

install_packages() {
  local torch="${SDPG_TORCH:-torch==2.13.0}" pins=scripts/constraints-sglang-cpu.txt stamp="$VENV/sdpg-setup-stamp"
  local inputs site
  inputs="$torch $ROOT $(cat "$pins" scripts/install_sglang_cpu.sh scripts/environment.sh | cksum)"
  if [[ -f "$stamp" && "$(<"$stamp")" == "$inputs" ]]; then return; fi
  local pip=("$PYTHON" -m pip --disable-pip-version-check install --quiet)
  say "installing into $VENV (some minutes the first time): $torch"
  "${pip[@]}" "$torch" # first and alone: the packages below would otherwise choose a build of their own
  say "installing what SGLang's server imports"
  "${pip[@]}" --requirement "$pins"
  say "installing sglang" # after the packages that it requires: pip would list, as errors, the many left out
  "${pip[@]}" --no-deps sglang==0.5.23 torchvision==0.28.0
  site="$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
  printf '%s\nimport sglang_cpu_gaps\n' "$ROOT/tools/sglang_cpu" >"$site/sdpg_sglang_cpu.pth"
  say "checking that it imports"
  SGLANG_USE_CPU_ENGINE=1 "$PYTHON" -W ignore -c 'import sglang.srt.entrypoints.http_server, sglang.srt.managers.scheduler' ||
    die "SGLang does not import. Fix: remove $VENV and try again; if it stays so, a pinned package is missing"
  printf '%s' "$inputs" >"$stamp"
}

choose_environment 3.11 "${SDPG_SGLANG_VENV:-.venv-sglang}"
install_packages >&2
printf '%s\n' "$PYTHON"
