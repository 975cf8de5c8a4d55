"""Which parts of a student are trained: frozen ones, and LoRA adapters (arXiv 2106.09685, by peft) beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import InputError
from .pretrained import loading_under, vision_towers


@dataclass
class LoRAOptions:
    """Low-rank adapters; all other weights stay as they are."""

    rank: int = 16
    """Rank of the adapters."""
    alpha: float = 32.0
    """An adapter's output is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Dropout of an adapter's input."""
    modules: list[str] = field(default_factory=list)
    """Names of the parts whose linear layers get adapters, as in student.freeze; empty: all that are not frozen."""


def named(name: str, patterns: Sequence[str]) -> bool:
    """Whether a dotted name has a pattern's names in it: ``vision_tower``, ``layers.0``, ``layers.*.mlp``."""
    return any(fnmatchcase(f".{name}.", f"*.{pattern}.*") for pattern in patterns)


def freeze(model: Any, patterns: Sequence[str]) -> None:
    """Keeps the parameters under the named parts as they are; a vision tower frozen whole keeps no graph.

    Raises:
        InputError: a pattern names nothing.
    """
    parameters = list(model.named_parameters(remove_duplicate=False))  # tied weights have two names
    for pattern in patterns:
        chosen = [parameter for name, parameter in parameters if named(name, [pattern])]
        if not chosen:
            raise InputError(
                f"student.freeze: no part of the model is named {pattern!r}; its parts are {_parts(model)}"
            )
        for parameter in chosen:
            parameter.requires_grad_(False)
    for tower in vision_towers(model):
        if not any(parameter.requires_grad for parameter in tower.parameters()):
            # gradient checkpointing makes a tower's inputs want gradients, and so a graph that leads nowhere
            tower.forward = torch.no_grad()(tower.forward)


def check_trainable(model: nn.Module) -> None:
    """Refuses a model of which nothing is trained.

    Raises:
        InputError.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError("student.freeze leaves nothing that is trained: name fewer parts")


def adapted_layers(model: Any, options: LoRAOptions, frozen: Sequence[str]) -> list[str]:
    """Names of the linear layers that get adapters.

    Raises:
        InputError: the language head is named, or a name has no linear layer.
    """
    head = model.get_output_embeddings()
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    for pattern in options.modules:
        chosen = [name for name in layers if named(name, [pattern])]
        if any(layers[name] is head for name in chosen):
            raise InputError(
                f"student.lora.modules: {pattern!r} is the language head, which the fused loss reads as one matrix: "
                "name other parts, or train the head whole without student.lora"
            )
        if not chosen:
            raise InputError(
                f"student.lora.modules: no linear layer is named {pattern!r}; the model's parts are {_parts(model)}"
            )
    targets = [
        name
        for name, layer in layers.items()
        if layer is not head and not named(name, frozen) and (not options.modules or named(name, options.modules))
    ]
    if not targets:
        raise InputError("student.lora: no linear layer is left that is not frozen")
    return targets


def with_adapters(model: Any, options: LoRAOptions, frozen: Sequence[str], seed: int) -> Any:
    """The model with fresh adapters: a PeftModel, which starts as the model itself.

    Args:
        model: a transformers model.
        options: LoRAOptions.
        frozen: parts that get none.
        seed: of the adapters' weights.

    Raises:
        InputError: peft is not installed, the language head is named, or a name has no linear layer.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise InputError("student.lora needs peft: pip install 'vlm-taid[peft]'") from error
    targets = adapted_layers(model, options, frozen)
    config = LoraConfig(
        r=options.rank, lora_alpha=options.alpha, lora_dropout=options.dropout, target_modules=targets  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def without_adapters(model: Any) -> Any:
    """The transformers model that carries the adapters; any other model as it is."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def save_merged(load: Callable[[], Any], adapter: Path, output: Path) -> None:
    """Writes the student with its adapters added to its weights, as an ordinary model; for one rank.

    Args:
        load: makes the student that the adapters were trained on.
        adapter: the folder of the adapters.
        output: where the model goes.
    """
    from peft import PeftModel

    with loading_under(0):  # whole, whatever the run's ZeRO stage
        merged: Any = PeftModel.from_pretrained(load(), str(adapter)).merge_and_unload()  # pyright: ignore
    merged.save_pretrained(output)


def _parts(model: nn.Module) -> str:
    names = [
        name
        for name, child in model.named_modules()
        if name and name.count(".") <= 1 and next(child.parameters(), None) is not None
    ]
    return ", ".join(names)
