#!/usr/bin/env bash
# Builds the wheel and tries it where nothing of the repository is at hand: a new environment, an empty directory.
#
# Usage: tests/wheel_check.sh PYTHON    (the interpreter that has `build` and `hatchling`)
set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$1
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
log=$scratch/log

# Runs a step and shows what it printed only if it failed.
step() {
  local name=$1
  shift
  "$@" >"$log" 2>&1 || {
    cat "$log" >&2
    echo "wheel check failed: $name" >&2
    exit 1
  }
}

cd "$repository"
step "build" "$python" -m build --wheel --no-isolation --outdir "$scratch/dist" .
step "new environment" "$python" -m venv "$scratch/venv"
installed=$scratch/venv/bin
pip=("$installed/python" -m pip --disable-pip-version-check install -c "$repository/constraints.txt")
step "install torch" "${pip[@]}" torch
step "install the wheel" "${pip[@]}" "$scratch"/dist/bitplan-*.whl

mkdir "$scratch/empty"
cd "$scratch/empty"
step "bitplan --help" "$installed/bitplan" --help
step "smoke script" "$installed/python" "$repository/tests/wheel_smoke.py"
echo "wheel check passed: $(basename "$scratch"/dist/bitplan-*.whl)"
