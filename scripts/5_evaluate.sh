#!/usr/bin/env bash
# Step 5: evaluate a base model alone and with MSD on lmms-eval's tasks, then compare scores, answers and speed. Beside MSD
# the strongest plain decoding answers each question too: the speed-up is over it.
#   scripts/5_evaluate.sh                                             pocket/llava with the draft of step 4, else the shipped one
#   BASE=liuhaotian/llava-v1.5-7b DRAFT=lucylyn/MSD-LLaVA1.5-7B scripts/5_evaluate.sh
#   scripts/5_evaluate.sh BASE DRAFT chartqa,textvqa_val              the same as arguments
# Environment: BASE, DRAFT (default: the draft of step 4, in WORK or CKPT), OTHER (a second draft to compare with; default:
# the shipped one beside a draft of step 4 for pocket/llava; OTHER= for none), TASKS, LIMIT, OUT, MODEL (llava_msd
# and the others in docs/evaluation.md), NUM_PROCESSES, PORT, BATCH_SIZE, GEN_KWARGS,
# MODEL_ARGS (more of lmms-eval's model arguments, such as dtype=float32), QUESTIONS (a FILE.jsonl to ask instead of
# ChartQA's test split, in chartqa and chartqa_msd; the pocket LLaVA gets its own).
# Results: OUT/DATE/compare.md (DATE in UTC; the page; outputs/evaluate by default), compare.json, compare.png, and lmms-eval's own.
set -euo pipefail
if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then # the comment above
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
    exit 0
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root="$PWD"

base="${1:-${BASE:-pocket/llava}}"
draft="${2:-${DRAFT:-}}"
tasks="${3:-${TASKS:-chartqa}}"
out="${OUT:-outputs/evaluate}"
questions="${QUESTIONS:-}"
about=
other="${OTHER:-}"
if [ -z "$draft" ]; then # the one that step 4 trained: the draft of its end, else the newest checkpoint
    checkpoints="${CKPT:-${WORK:-outputs/pipeline}/checkpoints}"
    if [ -f "$checkpoints/latest" ] && ! [ "$checkpoints/final" -nt "$checkpoints/latest" ]; then
        draft="$checkpoints/$(cat "$checkpoints/latest")"
        about=" (newest checkpoint of step 4, whose training has not ended)"
    elif [ -d "$checkpoints/final" ]; then
        draft="$checkpoints/final"
        about=" (of step 4)"
    elif [ "$base" = pocket/llava ]; then
        draft=pocket/llava-msd
        about=" (shipped; step 4 has made none in $checkpoints)"
    else
        echo "error: no draft for $base: set DRAFT, or train one with step 4 (none is in $checkpoints)" >&2
        exit 2
    fi
    if [ "$base" = pocket/llava ] && [ "$draft" != pocket/llava-msd ]; then
        other="${OTHER-pocket/llava-msd}"
    fi
fi
if [ "$base" = pocket/llava ]; then
    case ",$tasks," in
        *,chartqa,* | *,chartqa_msd,*) questions="${questions:-pocket/data/heldout.jsonl}" ;;
    esac
fi
if [ -f "$draft/provenance.json" ]; then # of training: the step of the draft and the steps of the whole run
    number() { sed -n 's/^  "'"$1"'": \([0-9]*\),\{0,1\}$/\1/p' "$draft/provenance.json"; }
    step="$(number step)" total="$(number total_steps)"
    [ "${step:-0}" -ge "${total:-0}" ] || about=" (trained for $step of $total steps)"
fi
echo "base model: $base"
echo "draft:      $draft$about"
[ -z "$other" ] || echo "also:       $other"

python="${PYTHON:-$root/.venv/bin/python}"
[ -x "$python" ] || python="$(command -v "$python" || command -v python3)"

# the evaluation may run in another folder
absolute() { if [ -e "$1" ]; then realpath "$1"; else echo "$1"; fi; }
base="$(absolute "$base")"
draft="$(absolute "$draft")"
[ -z "$other" ] || other="$(absolute "$other")"
mkdir -p "$out"
out="$(realpath "$out")"

if [ -n "$questions" ]; then
    "$python" -m lmms_eval_msd.offline --jsonl "$questions" --out "$out/data"
    cd "$out/data"
fi

processes="${NUM_PROCESSES:-1}"
launch=("$python") # `accelerate launch` would add a traceback to Ctrl-C, and starts several processes on accelerators alone
[ "$processes" = 1 ] ||
    launch=("$python" -m torch.distributed.run --nproc_per_node="$processes" --master_port="${PORT:-29506}")

evaluate() { # folder, then flags
    local folder="$1"
    shift
    "${launch[@]}" -m lmms_eval_msd --model "${MODEL:-llava_msd}" --model_args "pretrained=$base${MODEL_ARGS:+,$MODEL_ARGS}" \
        --tasks "$tasks" --batch_size "${BATCH_SIZE:-1}" --gen_kwargs "${GEN_KWARGS:-temperature=0}" ${LIMIT:+--limit "$LIMIT"} \
        --log_samples --timezone UTC --output_path "$folder" "$@"
}

# results of their own for each call: what an earlier one left behind is not compared; in UTC, as lmms-eval's files below
stamp="$(date -u +%Y%m%d_%H%M%S)"
evaluate "$out/$stamp/base"
evaluate "$out/$stamp/msd" --use_msd --msd_model_path "$draft" --msd_baseline measure
runs=("$out/$stamp/msd")
if [ -n "$other" ]; then
    evaluate "$out/$stamp/other" --use_msd --msd_model_path "$other" --msd_baseline measure
    runs+=("$out/$stamp/other")
fi
"$python" -m lmms_eval_msd.compare --base "$out/$stamp/base" --msd "${runs[@]}" --out "$out/$stamp"
case "$base" in
    "$root"/pocket/*)
        echo "The pocket models answer in whole sentences, which the scores of ChartQA count as wrong: equal answers, τ and speed"
        echo "are what to compare here."
        ;;
esac
