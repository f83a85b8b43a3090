#!/usr/bin/env bash
# Step 3: run the base model over the conversations of step 2 and store its hidden states. Can be killed and run again.
#   scripts/3_allocate.sh                                         the embedded model and training sample
#   BASE=liuhaotian/llava-v1.5-7b PICTURES=image_data COUNT=68000 scripts/3_allocate.sh
# Environment: BASE, FAMILY (llava_v15 or qwen2_vl), PICTURES (folder of the pictures), COUNT (rows of each file; all
# by default), GPUS (0,1,...; all by default), WORK as in step 2. Results: WORK/hidden_t, WORK/hidden_v.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-.venv/bin/python}"
command -v "$python" >/dev/null || python="$(command -v python3)"
work="${WORK:-outputs/pipeline}"

for kind in t v; do
    case "$kind" in t) file=text.json ;; v) file=image.json ;; esac
    "$python" -m eagle.ge_data.allocation --outdir "$work/hidden_$kind" --model_type "${FAMILY:-llava_v15}_$kind" \
        --model "${BASE:-pocket/llava}" --image_data_path "${PICTURES:-pocket/data}" --json_data_path "$work/$file" \
        ${COUNT:+--limit "$COUNT"} ${GPUS:+--gpus "$GPUS"}
done
