"""Whether state files that somebody else's code is going to unpickle hold data alone.

DeepSpeed reads its own files with full unpickling, in which a file can name any function and have it called. So they
are looked through first: reading the names in a file runs nothing.
"""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError

from torch.serialization import get_unsafe_globals_in_checkpoint

DEEPSPEED = {
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
}
"""Plain classes that DeepSpeed's states hold beside tensors."""


def check_states(folder: Path) -> None:
    """Refuses ``*.pt`` files below ``folder`` that name something else than tensors, plain data and `DEEPSPEED`.

    Raises:
        UnpicklingError: a file does; or it is not in torch's format.
    """
    for file in sorted(folder.rglob("*.pt")):
        try:
            foreign = set(get_unsafe_globals_in_checkpoint(file)) - DEEPSPEED
        except (RuntimeError, ValueError, EOFError) as error:
            raise UnpicklingError(f"{file.name} is not in torch's format") from error
        if foreign:
            raise UnpicklingError(f"{file.name} names {', '.join(sorted(foreign))}")
