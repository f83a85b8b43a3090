#!/usr/bin/env bash
# Step 4: train the draft head on step 3's hidden states: text first, then a rising share of images. Resumes where it stopped.
# ONLINE=1 leaves out step 3: the base model reads the conversations of step 2 beside the draft.
#   scripts/4_train.sh                                            the embedded model
#   BASE=liuhaotian/llava-v1.5-7b CONFIG=llava_v15_7B_config.json DEVICES=localhost:0,1,2,3 scripts/4_train.sh
#   DRAFT_KIND=eagle3 BASE=Qwen/Qwen3-VL-4B-Instruct scripts/4_train.sh   an EAGLE-3 head (docs/eagle3.md)
#   HOSTFILE=hosts scripts/4_train.sh                             on several machines (docs/training.md)
#   scripts/4_train.sh --epochs 2                                 further flags go to main_deepspeed.py
# Environment: BASE, CONFIG and DS_CONFIG (a path, or the name of one shipped in EAGLE/eagle/train; CONFIG is auto by default,
# a draft with the sizes of BASE, except for the embedded model), DRAFT_KIND (msd, eagle3, block or vispec: the kind of CONFIG=auto),
# DEVICES, HOSTFILE, PORT, WORK as in step 2, CKPT (where checkpoints go; the draft is CKPT/final). With ONLINE also PICTURES and COUNT
# as in step 3.
set -euo pipefail
if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then # the comment above
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
    exit 0
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-.venv/bin/python}"
command -v "$python" >/dev/null || python="$(command -v python3)"
work="${WORK:-outputs/pipeline}"
PATH="$(cd "$(dirname "$(command -v "$python")")" && pwd):$PATH"  # DeepSpeed starts the `python` it finds
if ! command -v deepspeed >/dev/null; then
    echo "error: deepspeed is not installed for $python: run step 1, or set PYTHON" >&2
    exit 2
fi

data=(--tmpdir_v "$work/hidden_v" --tmpdir_t "$work/hidden_t")
if [ -n "${ONLINE:-}" ] && [ "$ONLINE" != 0 ]; then
    data=(--online --annotations_v "$work/image.json" --annotations_t "$work/text.json"
        --image-folder "${PICTURES:-pocket/data}" ${COUNT:+--limit "$COUNT"})
fi

config=auto
[ "${BASE:-pocket/llava}" != pocket/llava ] || [ -n "${DRAFT_KIND:-}" ] || config=pocket_llava_config.json
flags=(--deepspeed_config "${DS_CONFIG:-ds_config.json}" "${data[@]}" --basepath "${BASE:-pocket/llava}"
    --cpdir "${CKPT:-$work/checkpoints}" --config "${CONFIG:-$config}" --resume
    ${DRAFT_KIND:+--draft-kind "$DRAFT_KIND"} "$@")
where=(--include "${DEVICES:-localhost:0}")
if [ -n "${HOSTFILE:-}" ]; then # DeepSpeed would use this machine alone if there is no such file
    [ -f "$HOSTFILE" ] || { echo "error: no such file: HOSTFILE=$HOSTFILE" >&2; exit 2; }
    where=(--hostfile "$HOSTFILE" ${DEVICES:+--include "$DEVICES"})
fi
# before the launcher, whose own lines would be around the error
checkpoints="$("$python" -m eagle.train.main_deepspeed "${flags[@]}" --check)"
stopped=
status=0
trap 'stopped=1' INT
# DeepSpeed's runner would answer Ctrl-C with a traceback. It ignores the signal; the launcher that it starts handles it.
(
    trap '' INT
    exec deepspeed --master_port "${PORT:-29504}" "${where[@]}" EAGLE/eagle/train/main_deepspeed.py \
        "${flags[@]}"
) || status=$?
if [ -n "$stopped" ]; then
    if [ -f "$checkpoints/latest" ]; then
        echo "stopped; the same command resumes from $checkpoints/$(cat "$checkpoints/latest")" >&2
    else
        echo "stopped before the first checkpoint; the same command starts again" >&2
    fi
    exit 130
fi
exit "$status"
