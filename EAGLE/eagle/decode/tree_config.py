"""Bounds of the draft tree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from llava.errors import UserError
from llava.strict import read_strict, strict_dataclass

BATCH_NODES = {"cpu": 60, "accelerator": 128, "large": 256}
"""Nodes of all trees of a batch that one forward verifies fast. On a CPU measured (`msd throughput`, docs/decoding.md);
for accelerators estimated, not measured: a forward of so many rows still mostly waits for the weights on an RTX 4090,
and on a large GPU such as an A100, H100 or H200."""
LARGE_PROCESSORS, LARGE_MEMORY = 100, 36 * 2**30
"""A large GPU has at least so many multiprocessors and so many bytes of memory (an A100 of 40 GB: 108 and 39.4 GiB)."""


@strict_dataclass
class TreeConfig:
    """A draft tree's bounds (EAGLE-2, arXiv 2406.16858, section 4).

    Attributes:
        depth: draft steps after the first one, so a path has at most ``depth + 1`` drafted tokens.
        top_k: nodes kept at each level, and children tried for each of them.
        total_tokens: nodes that the target verifies in one forward, the root included.
        adaptive: depth and nodes are upper bounds; each cycle chooses within them (`eagle.decode.adaptive`).

    Raises:
        UserError: a value is not a whole number, or out of bounds.
    """

    depth: int = Field(5, ge=0, le=256)
    top_k: int = Field(10, ge=1, le=1024)
    total_tokens: int = Field(60, ge=1, le=4096)
    adaptive: bool = False

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any], where: str | Path = "tree settings") -> TreeConfig:
        return read_strict(cls, settings, where)

    @classmethod
    def for_device(cls, device: torch.device | str) -> TreeConfig:
        """The default tree. A CPU verifies 8 to 16 nodes, an accelerator 60, in little more time than one node."""
        if torch.device(device).type == "cpu":
            return cls(depth=6, top_k=3, total_tokens=12)
        return cls()

    @classmethod
    def named(cls, tree: TreeConfig | str, device: torch.device | str) -> TreeConfig:
        """The tree that "auto" or "fixed" means on a device. A `TreeConfig` is returned unchanged.

        Raises:
            UserError: another name.
        """
        if isinstance(tree, TreeConfig):
            return tree
        kinds = {"auto": cls.auto, "fixed": cls.for_device}
        if not isinstance(tree, str) or tree not in kinds:
            raise UserError(f"tree={tree!r}", fix='give "auto", "fixed" or a TreeConfig')
        return kinds[tree](device)

    @classmethod
    def auto(cls, device: torch.device | str) -> TreeConfig:
        """Bounds of an adaptive tree."""
        if torch.device(device).type == "cpu":
            return cls(depth=10, top_k=3, total_tokens=32, adaptive=True)
        return cls(depth=10, top_k=10, total_tokens=96, adaptive=True)

    def as_chain(self) -> TreeConfig:
        """The same depth, with one node at each level."""
        return replace(self, top_k=1, total_tokens=min(self.total_tokens, self.depth + 2))

    def for_batch(self, batch: int, device: torch.device | str) -> TreeConfig:
        """The tree of each sequence if ``batch`` of them are verified in one forward. Unchanged until all trees
        together have more nodes than this tree or `BATCH_NODES`, then a share of these."""
        most = BATCH_NODES[device_class(device)]
        nodes = max(1, min(self.total_tokens, max(self.total_tokens, most) // batch))
        return TreeConfig(self.depth, -(-self.top_k * nodes // self.total_tokens), nodes) if batch > 1 else self

    def nodes_within(self, tokens_left: int) -> int:
        """Nodes of a tree of these bounds if so many new tokens are wanted, with ``top_k`` children of each node."""
        if tokens_left <= 1:
            return 1
        return min(self.total_tokens, 1 + self.top_k + self.shortened(tokens_left).depth * self.top_k**2)

    def shortened(self, tokens_left: int) -> TreeConfig:
        """The same tree, no deeper than ``tokens_left`` new tokens can use (the bonus token is one of them)."""
        if tokens_left <= 1:
            return TreeConfig(depth=0, top_k=self.top_k, total_tokens=1)
        return replace(self, depth=min(self.depth, tokens_left - 2))


def device_class(device: torch.device | str) -> str:
    """The key of `BATCH_NODES` for a device. A part of a GPU (MIG) has the processors and memory of the part."""
    kind = torch.device(device).type
    if kind != "cuda" or not torch.cuda.is_available():
        return "cpu" if kind == "cpu" else "accelerator"
    about = torch.cuda.get_device_properties(device)
    large = about.multi_processor_count >= LARGE_PROCESSORS and about.total_memory >= LARGE_MEMORY
    return "large" if large else "accelerator"
