"""lmms-eval's command line with our models in it, also where another plugin of lmms-eval is broken.

python -m lmms_eval_msd --model llava_msd --model_args pretrained=BASE --use_msd --msd_model_path DRAFT --tasks chartqa
"""

from __future__ import annotations

from lmms_eval.cli.dispatch import main
from lmms_eval.models import MODEL_REGISTRY_V2

from lmms_eval_msd.plugins import complete

if __name__ == "__main__":
    complete(MODEL_REGISTRY_V2)
    main()
