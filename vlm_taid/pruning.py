"""Pruning: a student that keeps some of its decoder's layers."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .errors import InputError


@dataclass
class PruneOptions:
    """Which of the loaded model's layers the student keeps."""

    layers: int
    """Decoder layers to keep, evenly spaced with the first and the last."""


def kept_layers(count: int, layers: int) -> list[int]:
    """The layers that are kept of ``count``, evenly spaced with the first and the last: of 30, 10 are 0, 3, 6, 10, ...

    Raises:
        InputError: not from 2 to ``count`` - 1 are wanted.
    """
    if not 2 <= layers < count:
        raise InputError(f"student.prune.layers is {layers}: the model has {count}, so 2 to {count - 1} can be kept")
    return [round(i * (count - 1) / (layers - 1)) for i in range(layers)]


def pruned_config(config: Any, options: PruneOptions) -> Any:
    """A copy of a model's config that has the kept layers; what it lists for each layer is kept with them."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    count = text.num_hidden_layers
    kept = kept_layers(count, options.layers)
    for key, value in vars(text).items():
        if isinstance(value, list) and len(value) == count and ("layer" in key or "block" in key):
            setattr(text, key, [value[layer] for layer in kept])
    text.num_hidden_layers = options.layers
    return config


def prune(model: Any, options: PruneOptions) -> None:
    """Removes a model's other decoder layers, in place; what remains is an ordinary model of its class.

    Args:
        model: a causal language model, or a vision-language model, of which the text part is pruned.
        options: PruneOptions.

    Raises:
        InputError: fewer or more layers are wanted than can be kept, the decoder has no list of layers, or one with
            the kept layers is more than those layers.
    """
    decoder = model.get_decoder()
    name = type(decoder).__name__
    count = model.config.get_text_config().num_hidden_layers
    kept = kept_layers(count, options.layers)
    layers: Any = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) != count:
        raise InputError(f"student.prune: {name} has no list of its {count} layers: prune it into a folder of its own")
    config = pruned_config(model.config, options)
    with torch.device("meta"):
        wanted = _shapes(type(model)(config))
    decoder.layers = nn.ModuleList(layers[layer] for layer in kept)
    found = _shapes(model)
    for key in sorted(wanted.keys() | found.keys()):
        if wanted.get(key) != found.get(key):
            raise InputError(
                f"student.prune: {type(model).__name__} cannot be pruned: its layers are not alike ({key} would be "
                f"{wanted.get(key)} and is {found.get(key)})"
            )
    for place, layer in enumerate(decoder.layers):
        for module in layer.modules():  # where the layer's keys and values are in a cache
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", place)  # noqa: B010
    _take_config(model, config)


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """A ZeRO-3 weight tells its whole shape."""
    return {key: tuple(getattr(value, "ds_shape", value.shape)) for key, value in model.named_parameters()}


def _take_config(model: Any, config: Any) -> None:
    """Changes the configs that the model's parts hold, which are shared and may be copies."""
    pruned = config.get_text_config()
    for module in model.modules():
        own: Any = getattr(module, "config", None)
        text = own.get_text_config() if hasattr(own, "get_text_config") else None
        if type(text) is type(pruned):
            vars(text).update(copy.deepcopy(vars(pruned)))
