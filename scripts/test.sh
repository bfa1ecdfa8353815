#!/usr/bin/env bash
# Set up and run the tests; arguments go to pytest:
#
#   bash scripts/test.sh                          all that need no SGLang, two at a time, without the slow ones
#   bash scripts/test.sh --all                    with the slow ones (tests/slow.py): once before a release
#   bash scripts/test.sh --sglang [--all]         those that need SGLang, with one for CPUs (install_sglang_cpu.sh)
#   bash scripts/test.sh --host                   host programs, such as Megatron-LM's, in .venv-312 with Python 3.12
#   bash scripts/test.sh tests/unit -k config     some of them
#   SDPG_PYTHON=python3.12 bash scripts/test.sh   the same in .venv-312, with the newest megatron-core of Python 3.12
#   SDPG_CONSTRAINTS=scripts/constraints-lowest.txt bash scripts/test.sh
#                                                 the same with the lowest versions that pyproject.toml allows: once
#                                                 before a release, with Python 3.11
#
# With SDPG_SGLANG_PYTHON set to an interpreter that has sglang, --sglang uses that one and installs none; --host then
# also runs the host programs' test with a server. tests/host/test_verl.py and test_slime.py say what they need.
sglang=false options=()
if [[ "${1:-}" == --host ]]; then
  NAME='test'
  source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
  SDPG_PYTHON="${SDPG_PYTHON:-$(find_python 3.12 || true)}"
  [[ -n "$SDPG_PYTHON" ]] || die "found no Python 3.12. Fix: install it, or set SDPG_PYTHON to it"
  shift
  if (($# == 0)); then set -- tests/host tests/sglang/test_megatron_lm.py; fi
fi
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
while [[ "${1:-}" == --sglang || "${1:-}" == --all ]]; do
  if [[ "$1" == --sglang ]]; then sglang=true; else options+=(--all); fi
  shift
done
if [[ "$sglang" == true ]]; then
  SDPG_SGLANG_PYTHON="${SDPG_SGLANG_PYTHON:-$(SDPG_PYTHON='' bash scripts/install_sglang_cpu.sh)}"
  export SDPG_SGLANG_PYTHON
  if (($# == 0)); then set -- tests/sglang; fi
elif (($# == 0)); then
  # Each worker takes the next file (tests/conftest.py), in the order of the folders: the longest, tests/dist, first.
  set -- --numprocesses 2 --dist loadscope --no-loadscope-reorder
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
fi
exec "$PYTHON" -m pytest "${options[@]}" "$@"
