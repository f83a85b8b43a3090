"""Drafts for a small language model that this project did not make: SmolLM2-135M-Instruct.

    export WORK=outputs/smollm2 OMP_NUM_THREADS=1
    experiments/real_language/train.sh --epochs 6 --validation-limit 8            # base, its answers, MSD draft
    FEATURE_LAYERS=auto STATES_ONLY=1 experiments/real_language/train.sh          # the states for EAGLE-3 heads
    python -m experiments.real_language.kinds cost --work $WORK                   # seconds of a step of each kind
    python -m experiments.real_language.kinds train --work $WORK --kinds eagle3-3
    python -m experiments.real_language.kinds train --work $WORK --kinds block    # can run beside the one above
    python -m experiments.real_language.kinds evaluate table --work $WORK         # greedy, then T = 1
    python -m experiments.real_language.kinds table --work $WORK                  # of what is there

Each command can be stopped and started again.
"""
