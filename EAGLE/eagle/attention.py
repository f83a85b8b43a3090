"""Which of PyTorch's attention kernels may be chosen."""

from __future__ import annotations

import torch


def leave_out_cudnn_attention() -> None:
    """Keeps `scaled_dot_product_attention` of this process from cuDNN's kernel, which it prefers on newer GPUs.

    cuDNN makes a plan for each new shape and stride of queries, keys and mask, which takes the host tens of
    milliseconds. A draft tree on a growing cache has new ones in each cycle and at each level. (Reported of H100s; not
    measured here.)
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
