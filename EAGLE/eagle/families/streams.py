"""What enters chosen layers of a text model: the features of drafts that read several layers.

Stream ``i`` is the residual stream that layer ``i`` reads, so stream 0 is the input embeddings, and stream ``N`` of a
model of ``N`` layers is what the final norm reads. It is taken where the layer reads it. So what a family adds between
layers (DeepStack's picture features) is part of it, in every release of transformers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Streams:
    """The streams of the layers ``layers``, each [B, S, H], of the last forward."""

    def __init__(self, layers: Sequence[int]) -> None:
        self.layers, self.read = tuple(layers), dict[int, Tensor]()

    def joined(self) -> Tensor | None:
        """[B, S, n * H] on the device of the last one, in the order of ``layers``. None if no layer was asked for."""
        if not self.layers:
            return None
        parts = [self.read[index] for index in self.layers]
        return torch.cat([part.to(parts[-1].device) for part in parts], dim=-1)


class StreamReader:
    """Hooks on the layers of one text model.

    A layer has a hook from the first time that it is asked for. What it records belongs to the thread that runs the
    forward, so requests of other threads are not seen.

    Attributes:
        traced: where a forward that is being compiled records (layer, stream). None if nobody asks.
    """

    def __init__(self) -> None:
        self.traced: list[tuple[int, Tensor]] | None = None
        self._hooked: set[int] = set()
        self._lock, self._current = threading.Lock(), threading.local()

    def attach(self, text_model: Any, layers: Sequence[int]) -> None:
        """Puts hooks on the layers that have none."""
        with self._lock:
            for index in set(layers) - self._hooked:
                module = text_model.norm if index == len(text_model.layers) else text_model.layers[index]
                module.register_forward_pre_hook(self._hook(index), with_kwargs=True)
                self._hooked.add(index)

    @contextmanager
    def open(self, text_model: Any, layers: Sequence[int]) -> Iterator[Streams]:
        """Records the streams of ``layers`` in this thread's forwards of the text model, always the same one."""
        streams = Streams(layers)
        if not layers:
            yield streams
            return
        self.attach(text_model, layers)
        self._current.streams = streams
        try:
            yield streams
        finally:
            self._current.streams = None

    def _hook(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            entering = arguments[0] if arguments else named["hidden_states"]
            if torch.compiler.is_compiling():  # cannot look into a thread's own state
                if self.traced is not None:
                    self.traced.append((index, entering))
                return
            streams = getattr(self._current, "streams", None)
            if streams is not None and index in streams.layers:
                streams.read[index] = entering

        return hook
