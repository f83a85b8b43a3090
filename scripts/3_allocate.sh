#!/usr/bin/env bash
# Step 3: run the base model over the conversations of step 2 and store its hidden states. Can be killed and run again.
#   scripts/3_allocate.sh                                         the embedded model and training sample
#   BASE=liuhaotian/llava-v1.5-7b PICTURES=image_data COUNT=68000 scripts/3_allocate.sh
#   HIDDEN_DTYPE=int8 REGENERATE=1 DRAFT=owner/draft scripts/3_allocate.sh   half of the disk; the base's own answers
#   scripts/3_allocate.sh --batch-tokens 16384                    further flags go to eagle.ge_data.allocation
# Environment: BASE, FAMILY (conversation template of BASE: llava_v15 by default, others in docs/families.md), PICTURES
# (folder of the pictures), COUNT (records of each file, all by default; fewer than are stored removes nothing), GPUS
# (0,1,...; all by default), HIDDEN_DTYPE (auto or int8), FEATURE_LAYERS (auto or 2,18,33: also what enters these layers,
# for EAGLE-3 heads), MAX_LENGTH (tokens of a conversation), SHARD (I/N: part I of N, from 0, one for each machine; each
# needs its own WORK with the files of step 2; docs/data.md joins them), SHARD_SIZE (records of a shard), WORK as in step 2.
# REGENERATE (1: the base answers itself) with DRAFT (which speeds it up), TEMPERATURE and MAX_NEW_TOKENS. Results:
# WORK/hidden_t, WORK/hidden_v.
set -euo pipefail
if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then # the comment above
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
    exit 0
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-.venv/bin/python}"
command -v "$python" >/dev/null || python="$(command -v python3)"
work="${WORK:-outputs/pipeline}"

answers=()
if [ -n "${REGENERATE:-}" ] && [ "$REGENERATE" != 0 ]; then
    answers=(--regenerate ${DRAFT:+--msd-model "$DRAFT"} ${TEMPERATURE:+--temperature "$TEMPERATURE"}
        ${MAX_NEW_TOKENS:+--max-new-tokens "$MAX_NEW_TOKENS"})
fi

for kind in t v; do
    case "$kind" in t) file=text.json ;; v) file=image.json ;; esac
    "$python" -m eagle.ge_data.allocation --outdir "$work/hidden_$kind" --model_type "${FAMILY:-llava_v15}_$kind" \
        --model "${BASE:-pocket/llava}" --image_data_path "${PICTURES:-pocket/data}" --json_data_path "$work/$file" \
        ${COUNT:+--limit "$COUNT"} ${GPUS:+--gpus "$GPUS"} ${HIDDEN_DTYPE:+--hidden-dtype "$HIDDEN_DTYPE"} \
        ${FEATURE_LAYERS:+--feature-layers "$FEATURE_LAYERS"} \
        ${MAX_LENGTH:+--max-length "$MAX_LENGTH"} ${SHARD:+--shard "$SHARD"} \
        ${SHARD_SIZE:+--shard-size "$SHARD_SIZE"} ${answers[@]+"${answers[@]}"} "$@"
done
