#!/usr/bin/env bash
# Step 2: make the two annotation files uniform (ids as text, ShareGPT's variants resolved).
#   scripts/2_convert.sh                                          the embedded training sample
#   TEXT=ShareGPT_V3_unfiltered_cleaned_split.json IMAGE=llava_v1_5_mix665k.json scripts/2_convert.sh
# Environment: TEXT, IMAGE (annotation files), WORK (where the results go: WORK/text.json, WORK/image.json).
set -euo pipefail
if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then # the comment above
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
    exit 0
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-.venv/bin/python}"
command -v "$python" >/dev/null || python="$(command -v python3)"
work="${WORK:-outputs/pipeline}"

mkdir -p "$work"
"$python" -m eagle.ge_data.convert --input "${TEXT:-pocket/data/train_t.json}" --output "$work/text.json"
"$python" -m eagle.ge_data.convert --input "${IMAGE:-pocket/data/train_v.json}" --output "$work/image.json"
