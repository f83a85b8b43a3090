#!/usr/bin/env bash
# Step 1: make the virtual environment and install the three packages, editable, with all extras and the test tools.
#   scripts/1_setup.sh                                    into .venv with python3
#   PYTHON=python3.12 VENV=~/envs/msd scripts/1_setup.sh  another Python, another place
set -euo pipefail
if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then # the comment above
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
    exit 0
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python="${PYTHON:-python3}"
venv="${VENV:-.venv}"

if ! "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))'; then
    echo "error: Python 3.10 to 3.12 needed, $("$python" --version 2>&1 || true) found (set PYTHON)" >&2
    exit 2
fi

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install -e ./LLaVA -e "./EAGLE[dev]" -e ./lmms-eval
