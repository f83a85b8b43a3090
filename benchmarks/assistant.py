"""A small assistant for transformers' assisted decoding: the first layers of the target, which see the picture too."""

from __future__ import annotations

import copy
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from eagle.decode.msd import MSDModel
from eagle.families import load_target
from llava.errors import UserError

LAYERS = "layers:"


def assistant_for(model: MSDModel, named: str) -> PreTrainedModel:
    """The assistant that ``named`` names: ``layers:N`` for the first N layers of the target, else a folder or hub name.

    Raises:
        UserError: N is not below the target's number of layers, or the model cannot be loaded.
    """
    if named.startswith(LAYERS):
        return first_layers(model.target.model, named.removeprefix(LAYERS))
    return load_target(named, dtype=model.dtype, device_map=str(model.device)).model


def first_layers(model: PreTrainedModel, count: str) -> PreTrainedModel:
    """A model of the first ``count`` decoder layers, with the target's own tower, embedding, norm and head. It shares
    all weights, so it takes no memory. It was not trained to answer after these layers, so it is a weak assistant."""
    depth = model.config.get_text_config().num_hidden_layers
    if not count.isdigit() or not 0 < int(count) < depth:
        raise UserError(f"assistant of '{count}' layers", fix=f"the target has {depth}: give fewer")
    small = shallow(model)
    small.model = shallow(model.model)
    text = shallow(model.model.language_model)
    small.model.language_model = text
    text.layers = nn.ModuleList(list(text.layers)[: int(count)])
    small.config = copy.deepcopy(model.config)
    own = small.config.get_text_config()
    own.num_hidden_layers = int(count)
    if getattr(own, "layer_types", None):
        own.layer_types = own.layer_types[: int(count)]
    small.model.config, text.config = small.config, own
    small.generation_config = copy.deepcopy(model.generation_config)
    return small


def shallow(module: Any) -> Any:
    """A module with the same children, which can be replaced without changing the first one."""
    twin = copy.copy(module)
    twin._modules = dict(cast(nn.Module, module)._modules)
    return twin
