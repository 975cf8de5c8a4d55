"""footprint: what a model needs, from its config alone: parameters, operations, activations.

Models are built as fake tensors, which have shapes and no memory. A forward of a row through the decoder tells its
operations and the bytes that it keeps for its backward, whatever the family. Pictures go through the model's own
processor and, as fake tensors, through its vision tower and projector.

Legend: B rows, T positions, H width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)
from transformers.initialization import no_init_weights

from .data import Conversation, Part, Turn
from .errors import InputError
from .pretrained import ModelOptions, check_folder, load_processor, vision_towers
from .pruning import pruned_config
from .streams import StreamEncoder
from .students import StudentOptions
from .trainable import LoRAOptions, adapted_layers, freeze


@dataclass(frozen=True)
class Pictures:
    """The pictures of a row, all of one size in pixels."""

    count: int
    width: int
    height: int

    @classmethod
    def of(cls, count: int, size: str) -> Pictures | None:
        """``count`` pictures of a size as "896x448"; None for no picture.

        Raises:
            InputError: the size is written otherwise.
        """
        found = re.fullmatch(r"(\d+)x(\d+)", size)
        if found is None or min(map(int, found.groups())) < 1:
            raise InputError(f"--picture_size is {size!r}: width x height in pixels is expected, as 896x448")
        return cls(count, int(found[1]), int(found[2])) if count > 0 else None


@dataclass(frozen=True)
class Footprint:
    """What one model needs, found without its weights."""

    parameters: int
    trained: int
    """Parameters that are trained: all, the ones that are not frozen, or the adapters."""
    head_rows: int
    width: int
    length: int
    flops: float
    """Operations of one forward of a row of ``length`` tokens, without the language head and the pictures."""
    vision: int
    """Parameters outside the decoder and the head: towers and projectors."""
    activations: tuple[float, float] = (0.0, 0.0)
    """Bytes that one row's forward keeps for its backward, without and with gradient checkpointing, pictures too."""
    picture_flops: float = 0.0
    """Operations of one forward of a row's pictures."""
    pictures_kept: tuple[float, float] = (0.0, 0.0)
    """What of them is kept of the pictures; of a frozen tower nothing is."""
    trained_head: bool = True
    trained_tower: bool = False


def footprint(
    options: ModelOptions, length: int, dtype: torch.dtype, *, trained: bool = True, pictures: Pictures | None = None
) -> Footprint:
    """Measures a model on fake tensors.

    Args:
        options: folder or hub id, of which the config is read; frozen parts and adapters of a StudentOptions count.
        length: tokens of a row.
        dtype: of weights and activations.
        trained: find the activations too.
        pictures: a row's; their processor is read. Their tokens are part of ``length``.

    Raises:
        InputError: the config or the processor cannot be read, the family cannot run on fake tensors, or a frozen
            part's name is unknown.
    """
    check_folder(options.path)
    try:
        config = AutoConfig.from_pretrained(options.path, trust_remote_code=options.trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(f"{options.path}: its config cannot be read: {str(error).splitlines()[0]}") from error
    if isinstance(options, StudentOptions) and options.prune is not None:
        config = pruned_config(config, options.prune)
    is_vlm = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    auto: Any = AutoModelForImageTextToText if is_vlm else AutoModelForCausalLM
    inputs = _picture_inputs(options, pictures, dtype) if is_vlm and pictures is not None else None
    activations = kept = (0.0, 0.0)
    fake = _Fake(allow_non_fake_inputs=True)
    try:
        with fake:
            with no_init_weights():  # some look at the values that they drew
                model = auto.from_config(config, dtype=dtype, trust_remote_code=options.trust_remote_code).train()
            model.tie_weights()
            decoder, head = model.get_decoder() if is_vlm else model.base_model, model.get_output_embeddings()
            parameters = sum(parameter.numel() for parameter in model.parameters())
            inside = {id(p): p.numel() for p in [*decoder.parameters(), *head.parameters()]}
            if isinstance(options, StudentOptions):
                freeze(model, options.freeze)
                if options.lora is not None:
                    _adapt(model, options.lora, options.freeze)
            wanted = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
            counted = FlopCounterMode(display=False)
            with counted, torch.no_grad():
                hidden_BTH = decoder(input_ids=torch.zeros(1, length, dtype=torch.long), use_cache=False)[0]
            of_pictures = 0.0 if inputs is None else _picture_flops(fake, model, decoder, inputs)
            if trained:
                activations = _activations(decoder, length, hidden_BTH.untyped_storage().nbytes())
                if inputs is not None:
                    plain = _kept(model, lambda: _to_decoder(fake, model, decoder, inputs))
                    model.gradient_checkpointing_enable({"use_reentrant": False})
                    kept = plain, _kept(model, lambda: _to_decoder(fake, model, decoder, inputs))
    except RuntimeError as error:
        raise InputError(
            f"{options.path}: it cannot be run without weights, so no plan can be made: {error}"
        ) from error
    return Footprint(
        parameters, wanted, head.weight.shape[0], hidden_BTH.shape[-1], length, float(counted.get_total_flops()),
        parameters - sum(inside.values()), (activations[0] + kept[0], activations[1] + kept[1]), of_pictures, kept,
        head.weight.requires_grad, any(p.requires_grad for tower in vision_towers(model) for p in tower.parameters()),
    )  # fmt: skip


def _adapt(model: Any, options: LoRAOptions, frozen: Sequence[str]) -> None:
    """LoRA adapters where peft would put them, which itself cannot move fake tensors."""
    model.requires_grad_(False)
    for name in adapted_layers(model, options, frozen):
        layer: Any = model.get_submodule(name)
        layer.down = nn.Linear(layer.in_features, options.rank, bias=False)
        layer.up = nn.Linear(options.rank, layer.out_features, bias=False)

        def add(layer: Any, inputs: Any, output: Tensor) -> Tensor:
            x = inputs[0].to(layer.down.weight.dtype)  # peft keeps adapters in fp32
            return output + (layer.up(layer.down(x)) * (options.alpha / options.rank)).to(output.dtype)

        layer.register_forward_hook(add)


class _Fake(FakeTensorMode):
    """Where ``real``, what is made of real tensors alone stays real: pictures and their sizes are then known.

    A list of numbers that a model is built from is known everywhere: timm reads its drop rates off a linspace.
    """

    real = False
    numbers = (torch.ops.aten.linspace.default, torch.ops.aten.unbind.int, torch.ops.aten._local_scalar_dense.default)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        keeps = self.real or func in self.numbers
        if not keeps or any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs))):
            return super().__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))


class _DecoderReached(Exception):
    pass


def _picture_inputs(options: ModelOptions, pictures: Pictures, dtype: torch.dtype) -> dict[str, Any]:
    """A row of blank pictures as the model's processor makes it."""
    encoder = StreamEncoder(load_processor(options.path, trust_remote_code=options.trust_remote_code))
    blank = [Part(image=Image.new("RGB", (pictures.width, pictures.height))) for _ in range(pictures.count)]
    turns = (Turn("user", (*blank, Part("?"))), Turn("assistant", (Part("!"),)))
    encoded = encoder.encode_batch([Conversation(turns)])
    if encoded.refused:
        raise InputError(f"{options.path}: {encoded.refused[0]}")
    return {
        key: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in encoded.inputs.items()
    }


def _to_decoder(fake: _Fake, model: Any, decoder: Any, inputs: dict[str, Any]) -> None:
    """Runs the model on a row of pictures up to its decoder."""

    def stop(*_: Any) -> None:
        raise _DecoderReached

    hook, fake.real = decoder.register_forward_pre_hook(stop), True
    try:
        model.base_model(**inputs, use_cache=False)
    except _DecoderReached:
        pass
    except RuntimeError as error:
        raise InputError(
            f"this {type(model).__name__}'s vision part looks at the pictures' values, so it cannot be run without "
            f"weights: leave --pictures out ({error})"
        ) from error
    finally:
        hook.remove()
        fake.real = False


def _picture_flops(fake: _Fake, model: Any, decoder: Any, inputs: dict[str, Any]) -> float:
    counted = FlopCounterMode(display=False)
    with counted, torch.no_grad():
        _to_decoder(fake, model, decoder, inputs)
    return float(counted.get_total_flops())


def _kept(model: Any, forward: Callable[[], Any]) -> float:
    """Bytes that autograd keeps of a forward for its backward, weights aside."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # holds them, so that no address comes twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return float(sum(storage.nbytes() for storage in kept.values()))


def _activations(decoder: Any, length: int, hidden: int) -> tuple[float, float]:
    """Bytes that one row's forward keeps for its backward, without and with gradient checkpointing.

    Checkpointed, each layer keeps its input of ``hidden`` bytes, and one layer at a time all that it needs.
    """
    whole = _kept(decoder, lambda: decoder(input_ids=torch.zeros(1, length, dtype=torch.long), use_cache=False))
    layers = decoder.config.get_text_config().num_hidden_layers
    return whole, layers * hidden + whole / layers
