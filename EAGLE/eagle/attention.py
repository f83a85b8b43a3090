"""Selection of PyTorch's attention kernels."""

from __future__ import annotations

import torch


def leave_out_cudnn_attention() -> None:
    """Disables cuDNN's kernel for `scaled_dot_product_attention` in this process. Newer GPUs prefer it.

    cuDNN makes a plan for each new shape and stride of queries, keys and mask, which takes tens of milliseconds on the
    host. A draft tree on a growing cache has new shapes in each cycle and at each level. (Reported for H100; not
    measured here.)
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
