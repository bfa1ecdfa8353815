#!/usr/bin/env bash
# Functions for the scripts that make virtual environments; sourced. Messages begin with the script's NAME.

say() { printf '%s: %s\n' "$NAME" "$*" >&2; }
die() {
  say "error: $*"
  exit 1
}

# Print the first interpreter of a version, such as 3.12, that runs: a name on PATH may be a shim that does not.
find_python() {
  local candidate
  for candidate in "python$1" python3 "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1"*/bin/python; do
    if "$candidate" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$1')" 2>/dev/null; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  return 1
}

# Set VENV, an absolute path, and PYTHON, and make the environment unless it exists: VERSION FOLDER.
# SDPG_PYTHON, if set, is the interpreter to use.
choose_environment() {
  local base="${SDPG_PYTHON:-}" version
  if [[ -z "$base" ]]; then
    base="$(find_python "$1")" || die "found no Python $1. Fix: install it, or set SDPG_PYTHON to it"
  fi
  version="$("$base" -c 'import sys; print("%d.%d" % sys.version_info[:2])')" ||
    die "$base does not run. Fix: set SDPG_PYTHON to a Python $1"
  [[ "$version" == "$1" ]] || die "$base is Python $version, expected $1. Fix: set SDPG_PYTHON to one"
  VENV="$2"
  [[ "$VENV" == /* ]] || VENV="$PWD/$VENV"
  PYTHON="$VENV/bin/python"
  "$PYTHON" -m pip --version >/dev/null 2>&1 || "$base" -m venv "$VENV"
}
