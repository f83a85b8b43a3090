"""Lets a torchvision built for another torch be imported: declares the two operators that its import asks for.

For the test environment only, where torch comes without CUDA and torchvision with it. Transformers uses functions of
torchvision that are written in Python; the operators themselves are never called. Loaded by a ``.pth`` file, so that
every process of the environment has it; it does nothing until torchvision is imported.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from typing import Any

KEPT: list[Any] = []  # a library's operators live as long as the library


class DeclareOperators(MetaPathFinder):
    """A finder that finds nothing. It declares the operators when torchvision is looked for."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name != "torchvision":
            return
        sys.meta_path.remove(self)
        import torch

        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        KEPT.append(library)


sys.meta_path.insert(0, DeclareOperators())
