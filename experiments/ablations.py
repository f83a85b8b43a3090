"""The engine with one of its savings taken back, for `experiments.savings`: the plain way to do the same work.

Each entry of `WAYS` is a context in which a pair decodes as if the saving had not been made. Answers stay the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from eagle import kv_cache as cache
from eagle.decode import accept, drafter, masks, tree
from eagle.decode import decoder as decode
from eagle.decode.accept import Accepted
from eagle.decode.msd import MSDModel
from eagle.decode.tree import DraftTree
from eagle.drafts.msd import DraftModel

Way = Callable[[MSDModel], AbstractContextManager[None]]


@contextmanager
def projections_apart(pair: MSDModel) -> Iterator[None]:
    """Query, key and value, and the two halves of the feed-forward, as products of their own."""
    assert pair.draft is not None
    layer = pair.draft.layer
    joined = layer.self_attn.fused, layer.mlp.fused
    layer.self_attn.fused, layer.mlp.fused = [], []
    try:
        yield
    finally:
        layer.self_attn.fused, layer.mlp.fused = joined


def weights_output_major(pair: MSDModel) -> AbstractContextManager[None]:
    """All weights as `nn.Linear` has them. The copies are made once, here."""
    assert pair.draft is not None
    layer = pair.draft.layer
    parts = [pair.target.text_model, pair.target.model.get_output_embeddings(), pair.draft]
    found = [module for part in parts for module in part.modules() if isinstance(module, nn.Linear)]
    changed = [m for m in [*found, *layer.self_attn.fused, *layer.mlp.fused] if not m.weight.is_contiguous()]
    laid, plain = [m.weight.data for m in changed], [m.weight.data.contiguous() for m in changed]

    @contextmanager
    def change() -> Iterator[None]:
        for module, weight in zip(changed, plain, strict=True):
            module.weight.data = weight
        try:
            yield
        finally:
            for module, weight in zip(changed, laid, strict=True):
                module.weight.data = weight

    return _Again(change)


class _Again(AbstractContextManager[None]):
    """A context that can be entered more than once."""

    def __init__(self, make: Callable[[], AbstractContextManager[None]]) -> None:
        self._make = make

    def __enter__(self) -> None:
        self._open = self._make()
        self._open.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)


def masks_anew(pair: MSDModel) -> AbstractContextManager[None]:
    """A whole mask is made for each forward."""

    def window(self: masks.MaskBuffer, pasts: Sequence[int], blocks: Tensor) -> Tensor:
        return masks.batch_mask(pasts, blocks, self._buffer.dtype)

    return patched((masks.MaskBuffer, "window", window))


def angles_anew(pair: MSDModel) -> AbstractContextManager[None]:
    """The draft computes its rotary angles in each forward."""

    def rope(self: drafter.Drafter, offset: int, count: int) -> tuple[Tensor, Tensor]:
        start = self._lengths[0] + self._shift[0] + offset
        positions = torch.arange(start, start + count, device=self.draft.device).unsqueeze(0)
        angles: tuple[Tensor, Tensor] = self.draft.rotary(positions, self.draft.dtype)
        return angles

    return patched((drafter.Drafter, "_rope", rope))


def caches_selected_anew(pair: MSDModel) -> AbstractContextManager[None]:
    """The accepted rows are kept by selecting all rows of all layers again."""

    def keep(self: cache.KVCache, bases: Sequence[int], paths: Sequence[Sequence[int]]) -> None:
        base, path = bases[0], paths[0]
        rows = torch.tensor([*range(base), *(base + node for node in path)])
        for layer in self.layers:
            index, count = rows.to(layer.store_k.device), len(rows)
            layer.store_k[:, :, :count] = layer.store_k.index_select(2, index)
            layer.store_v[:, :, :count] = layer.store_v.index_select(2, index)
        self.truncate([base + len(path)])

    return patched((cache.KVCache, "keep", keep))


def ancestors_by_a_loop(pair: MSDModel) -> AbstractContextManager[None]:
    """The mask of a tree is filled node by node."""

    def ancestor_mask(parents: Tensor, depth: int | None = None) -> Tensor:
        mask = torch.eye(len(parents), dtype=torch.bool, device=parents.device)
        for node, parent in enumerate(parents.tolist()):
            if parent >= 0:
                mask[node] |= mask[parent]
        return mask

    return patched((tree, "ancestor_mask", ancestor_mask))


def acceptance_by_a_loop(pair: MSDModel) -> AbstractContextManager[None]:
    """The accepted path is walked node by node, with a copy to the host for each choice."""

    def walk(trees: Sequence[DraftTree], chosen: Sequence[Tensor]) -> list[Accepted]:
        def of(one: DraftTree, choices: Tensor) -> Accepted:
            return accept.accept_step_by_step(one, lambda node, added: int(choices[node]))

        return [of(one, choices) for one, choices in zip(trees, chosen, strict=True)]

    return patched((decode, "accept_all_at_once", walk))


def every_row_of_the_prompt(pair: MSDModel) -> AbstractContextManager[None]:
    """The target's head, and the draft's layer, on all rows of the prompt."""
    forward, head = DraftModel.forward, pair.target.head

    def read(self: DraftModel, *arguments: Any, last_only: bool = False, **named: Any) -> Tensor:
        output = forward(self, *arguments, **named)
        return output[:, -1:] if last_only else output

    each = type(pair.target).prefill_each

    def prefill_each(self: Any, inputs: Any, store: Any) -> Iterator[Any]:
        for prefill in each(self, inputs, store):
            head(prefill.hidden)
            yield prefill

    return patched((DraftModel, "forward", read), (type(pair.target), "prefill_each", prefill_each))


def patched(*changes: tuple[Any, str, Any]) -> AbstractContextManager[None]:
    """A context in which these attributes are others."""

    @contextmanager
    def change() -> Iterator[None]:
        patches = [mock.patch.object(*each) for each in changes]
        for each in patches:
            each.start()
        try:
            yield
        finally:
            for each in patches:
                each.stop()

    return _Again(change)


WAYS: dict[str, Way] = {
    "the draft's projections joined": lambda pair: _Again(lambda: projections_apart(pair)),
    "weights input-major (float32 on a CPU)": weights_output_major,
    "masks are windows on one buffer": masks_anew,
    "the draft's angles kept": angles_anew,
    "only accepted rows of the cache moved": caches_selected_anew,
    "a tree's mask without a loop": ancestors_by_a_loop,
    "acceptance without a loop, one copy to the host": acceptance_by_a_loop,
    "of the prompt, head and draft layer on the last row only": every_row_of_the_prompt,
}
"""Name of each saving, and how to decode without it."""
