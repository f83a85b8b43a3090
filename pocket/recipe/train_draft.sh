#!/usr/bin/env bash
# Makes a pocket draft: conversations in pocket/build/draft-*, then the pipeline's own steps 2 to 4. Resumes.
#   pocket/recipe/train_draft.sh                   pocket/llava-msd
#   TARGET=qwen2vl pocket/recipe/train_draft.sh    pocket/qwen2vl-msd
# Environment: TARGET, IMAGES, TEXTS (conversations to write), BUILD (where the work lies), OUT (where the draft goes, in
# the place of the one above); STATES_ONLY=1 ends before the training; further flags go to main_deepspeed.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python="${PYTHON:-.venv/bin/python}"
command -v "$python" >/dev/null || python="$(command -v python3)"
target="${TARGET:-llava}"
case "$target" in
    llava) FAMILY=llava_v15 ;;
    qwen2vl) FAMILY=qwen2_vl ;;
    *) echo "error: TARGET is llava or qwen2vl, not $target" >&2; exit 2 ;;
esac
build="${BUILD:-pocket/build/draft-$target}"
export FAMILY WORK="$build" BASE="pocket/$target" PICTURES="$build/data" PYTHON="$python"
export TEXT="$build/data/train_t.json" IMAGE="$build/data/train_v.json"

[ -f "$IMAGE" ] || "$python" -m pocket.recipe.make_data --out "$build/data" --images "${IMAGES:-2400}" --texts "${TEXTS:-1000}" --seed 7
[ -f "$build/image.json" ] || scripts/2_convert.sh
scripts/3_allocate.sh
[ -z "${STATES_ONLY:-}" ] || exit 0
DS_CONFIG=pocket_ds_config.json CONFIG="pocket_${target}_config.json" scripts/4_train.sh "$@"

out="${OUT:-pocket/$target-msd}"
mkdir -p "$out"
cp "$build/checkpoints/final/"{config.json,model.safetensors,provenance.json} "$out/"
