"""State of linear-attention layers, from which the tokens of a rejected branch can be removed.

Such a layer sums up all tokens in a state of fixed size, so the rows of rejected tokens cannot be dropped as those of a
KV cache. The state after the last accepted token stays as it is while a chain of drafted tokens is verified. If all of
them are accepted, the verified state replaces it. Otherwise the layer alone, not the model, reads the accepted tokens
again. A tree would need a state for each branch, so these models verify chains.

Needs a release of transformers whose `Cache` has states of this kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin


@dataclass
class State:
    """Of one sequence: ``conv`` [1, C, K] the last inputs of the convolution, ``recurrent`` [1, heads, D, D]."""

    conv: Tensor | None = None
    recurrent: Tensor | None = None


class StateLayer(LinearAttentionCacheLayerMixin):
    """One layer's states of the sequences of a batch."""

    def __init__(self, states: Sequence[State]) -> None:
        super().__init__()
        self.states = list(states)
        self.record_past = True  # transformers must not change the convolution's state in place
        self._module: nn.Module | None = None
        self._inputs: Tensor | None = None  # [B, n, H] what the module read since the last accepted token
        self._verified: tuple[Tensor, Tensor | None] | None = None  # the states after these

    @classmethod
    def empty(cls, batch: int) -> StateLayer:
        return cls([State() for _ in range(batch)])

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: states are stored as they come."""

    @property
    def has_previous_state(self) -> dict[int, bool]:
        return {0: self.states[0].conv is not None}

    @has_previous_state.setter
    def has_previous_state(self, value: Any) -> None:
        """transformers' class sets it when it is made."""

    @property
    def conv_states(self) -> dict[int, Tensor | None]:
        return {0: joined([state.conv for state in self.states])}

    @conv_states.setter
    def conv_states(self, value: Any) -> None:
        """As `has_previous_state`."""

    @property
    def recurrent_states(self) -> dict[int, Tensor | None]:
        return {0: joined([state.recurrent for state in self.states])}

    @recurrent_states.setter
    def recurrent_states(self, value: Any) -> None:
        """As `has_previous_state`."""

    def note(self, module: nn.Module, inputs: Tensor) -> None:
        """Called before each forward of the layer's module, with what it will read, [B, n, H]."""
        if self.states[0].conv is not None:
            self._module, self._inputs = module, inputs

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: Any
    ) -> Tensor:
        """New inputs of the convolution [B, C, n]; returns them behind the stored ones."""
        size = conv_kernel_size or conv_states.shape[-1]
        before = self.conv_states[0]
        if before is None:
            full = nn.functional.pad(conv_states, (max(size - conv_states.shape[-1], 0), 0))
        else:
            full = torch.cat([before, conv_states], dim=-1)
        self._verified = (full[..., -size:], None)
        return full

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """The state after all tokens of the forward. A prompt's is kept at once, that of drafted tokens by `keep`."""
        assert self._verified is not None
        self._verified = (self._verified[0], recurrent_states)
        if self.states[0].conv is None:
            for index, state in enumerate(self.states):
                self._commit(index, state)
        return recurrent_states

    def _commit(self, index: int, state: State) -> None:
        assert self._verified is not None
        conv, recurrent = self._verified
        state.conv = conv[index : index + 1].clone()  # not a view of all inputs
        state.recurrent = None if recurrent is None else recurrent[index : index + 1]

    def discard(self) -> None:
        """Forgets the tokens since the last accepted one."""
        self._verified = self._inputs = None

    def keep(self, counts: Sequence[int]) -> None:
        """Accepts the first ``counts[b]`` tokens of the last forward for each sequence b, and forgets the others."""
        assert self._inputs is not None and self._module is not None
        for index, (count, state) in enumerate(zip(counts, self.states, strict=True)):
            if count == self._inputs.shape[1]:
                self._commit(index, state)
                continue
            replay = StateLayer([State(state.conv, state.recurrent)])
            number: Any = self._module.layer_idx
            cache = Cache(layers=[replay] * (number + 1))
            self._module(self._inputs[index : index + 1, :count], **{cache_name(self._module): cache})
            replay._commit(0, state)
        self.discard()

    def sequence(self, index: int) -> StateLayer:
        """One sequence, whose changes are this layer's too."""
        return StateLayer([self.states[index]])

    def select(self, kept: Sequence[int]) -> StateLayer:
        """The given sequences."""
        return StateLayer([self.states[index] for index in kept])


def joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """States of all sequences, [B, ...]. None before the first prompt is read."""
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    return known[0] if len(known) == 1 else torch.cat(known)


def cache_name(module: nn.Module) -> str:
    """What a linear-attention module calls its cache: `cache` in newer releases of transformers."""
    return "cache" if "cache" in signature(type(module).forward).parameters else "cache_params"


def note_inputs(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    """A forward pre-hook of linear-attention modules: tells the layer of the request's cache what is read."""
    cache = named.get(cache_name(module))
    layer = None if cache is None else cache.layers[module.layer_idx]
    if isinstance(layer, StateLayer):
        layer.note(module, named["hidden_states"] if "hidden_states" in named else arguments[0])
