"""Students (and small teachers) made from parts: a timm vision tower, a fresh projector, a decoder, a processor.

What is made is transformers' own: ``FastVlmForConditionalGeneration`` with a ``LlavaProcessor`` where the tower is
convolutional, ``PerceptionLMForConditionalGeneration`` with its processor where it gives tokens. A saved folder loads
with ``AutoModelForImageTextToText`` and ``AutoProcessor``, and needs no code of this package.

Shapes: B rows, C channels, H and W rows and columns of the tower's last feature map, L its tokens.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import timm
import torch
from accelerate import PartialState
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    GenerationConfig,
    LlavaProcessor,
    PerceptionLMConfig,
    PerceptionLMForConditionalGeneration,
    PerceptionLMImageProcessor,
    PerceptionLMProcessor,
    PerceptionLMVideoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TimmWrapperConfig,
)

from .errors import InputError
from .pretrained import ModelOptions, load_model
from .pruning import PruneOptions, kept_layers, prune
from .trainable import LoRAOptions

TURN_START, TURN_END, PADDING = "<|im_start|>", "<|im_end|>", "<|pad|>"
IMAGE, VIDEO = "<image>", "<video>"

# ChatML with image parts. A turn ends with its end token and a newline; the prompt of an answer is the assistant's
# opening. Contents are plain strings, or lists of {"type": "image"} and {"type": "text", "text": ...}.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' -}}"
    "{%- if message['content'] is string -%}"
    "{{- message['content'] -}}"
    "{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{- '<image>' -}}"
    "{%- elif part['type'] == 'text' -%}{{- part['text'] -}}"
    "{%- else -%}{{- raise_exception('a part is text or image, not ' + part['type']) -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{{- '<|im_end|>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)


def train_tokenizer(texts: Iterable[str], vocabulary_size: int = 512) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a ChatML chat template that takes image parts.

    Any text can be written with it, because all 256 bytes are tokens. The end of a turn is the end-of-sequence token.

    Args:
        texts: what the merges are learned from; the same texts in the same order give the same tokenizer.
        vocabulary_size: tokens at most, special ones included; fewer where the texts hold no more pairs to merge.

    Raises:
        InputError: the size leaves no room for the bytes and the special tokens.
    """
    special = [PADDING, TURN_START, TURN_END, IMAGE]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocabulary_size < len(special) + len(alphabet):
        raise InputError(
            f"a byte-level vocabulary has at least {len(special) + len(alphabet)} tokens, not {vocabulary_size}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    roles = ["system\n", "user\n", "assistant\n"]
    tokenizer.train_from_iterator([*roles, *texts], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=TURN_START,
        eos_token=TURN_END,
        pad_token=PADDING,
        additional_special_tokens=[IMAGE],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",  # prompts of a batch then end together, as generate needs; training masks by lengths
    )


def assemble(
    tower: str,
    text_config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerFast,
    image_size: int,
    *,
    tower_args: Mapping[str, Any] | None = None,
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5),
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5),
    vocabulary_size: int | None = None,
    weights: str | None = None,
    pooling: int = 1,
) -> tuple[Any, Any]:
    """A vision-language model with fresh weights, those of the tower aside if asked, and its processor.

    An image becomes (image_size / stride)^2 tokens, where the stride is the tower's, or its patch times ``pooling``.
    The weights come from torch's global generator: seed it for the same weights again. The model is in fp32 and in
    eval mode.

    Args:
        tower: timm's name of a vision tower: convolutional with features [B, C, H, W], or one of tokens [B, L, C].
        text_config: a decoder's config (Qwen2Config, LlamaConfig, ...). It is changed: the vocabulary's size and
            special ids become the tokenizer's, its dtype is cleared. Its ``tie_word_embeddings`` holds for the model.
        tokenizer: a tokenizer with the ``<image>`` token and a chat template that writes it once per image; for a
            tower of tokens also with the attributes ``image_token`` and ``video_token``.
        image_size: pixels of the square that every image is resized to, a multiple of the tower's stride.
        tower_args: further arguments of ``timm.create_model``, as {"output_stride": 16}.
        image_mean: what is taken from the three colours, which are in 0..1.
        image_std: what they are divided by then.
        vocabulary_size: rows of the embedding and the head; None: as many as the tokenizer has tokens.
        weights: the tower's: a safetensors file with timm's names, or "hub" for those that timm fetches; None: fresh.
        pooling: tokens' side of the squares that the projector averages into one; for towers of tokens.

    Returns:
        The model and the processor.

    Raises:
        InputError: timm does not know the tower, its features have another layout, its weights cannot be loaded, the
            image size is no multiple of its stride, or the tokenizer has no ``<image>`` token.
    """
    arguments = dict(tower_args or {})
    image_id = cast(int, tokenizer.convert_tokens_to_ids(IMAGE))
    if image_id is None or image_id == tokenizer.unk_token_id:
        raise InputError(f"the tokenizer has no {IMAGE} token; add it as a special token first")
    fresh_tower = _tower(tower, arguments, weights)
    of_tokens = hasattr(fresh_tower, "num_prefix_tokens")
    if of_tokens:
        if fresh_tower.num_prefix_tokens > 1:
            raise InputError(
                f"the vision tower {tower!r} has {fresh_tower.num_prefix_tokens} tokens before its patches"
            )
        # PerceptionLM reads the width from embed_dim
        arguments |= {"img_size": image_size, "global_pool": "", "embed_dim": fresh_tower.embed_dim}
        fresh_tower = _tower(tower, arguments, weights)
    elif pooling != 1:
        raise InputError(f"pooling is for towers of tokens; {tower!r} is convolutional")
    channels, stride = _features(fresh_tower, tower, image_size)
    if (image_size // stride) % pooling:
        raise InputError(f"pooling {pooling} does not divide the {image_size // stride} tokens of the picture's side")

    tie = bool(text_config.tie_word_embeddings)
    text_config.vocab_size = vocabulary_size or len(tokenizer)
    text_config.bos_token_id = tokenizer.bos_token_id
    text_config.eos_token_id = tokenizer.eos_token_id
    text_config.pad_token_id = tokenizer.pad_token_id
    text_config.dtype = None  # a dtype of its own would build the decoder in another precision than the rest
    vision: dict[str, Any] = {"architecture": tower, "do_pooling": False, "hidden_size": channels}
    vision_config = TimmWrapperConfig(**vision, model_args=arguments or None)
    if of_tokens:
        config = PerceptionLMConfig(
            vision_config=vision_config,
            text_config=text_config,
            vision_use_cls_token=fresh_tower.num_prefix_tokens == 1,
            projector_pooling_ratio=pooling,
            image_token_id=image_id,
            video_token_id=cast(int, tokenizer.convert_tokens_to_ids(VIDEO)),
            tie_word_embeddings=tie,
        )
        model = PerceptionLMForConditionalGeneration(config).eval()
        processor = _tile_processor(tokenizer, image_size, stride, pooling, image_mean, image_std)
    else:
        config = FastVlmConfig(
            vision_config=vision_config,
            text_config=text_config,
            image_token_index=image_id,
            image_seq_length=(image_size // stride) ** 2,
            tie_word_embeddings=tie,
        )
        model = FastVlmForConditionalGeneration(config).eval()
        processor = _square_processor(tokenizer, image_size, stride, image_mean, image_std)
    # transformers draws every convolution from one narrow normal distribution; timm's own start is the one that trains
    model.model.vision_tower.timm_model.load_state_dict(fresh_tower.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model, processor


def _tower(name: str, arguments: Mapping[str, Any], weights: str | None) -> Any:
    """timm's tower without its classifier.

    Raises:
        InputError: timm cannot make it, or the weights cannot be loaded.
    """
    file = None if weights in (None, "hub") else Path(cast(str, weights))
    if file is not None and (file.suffix != ".safetensors" or not file.is_file()):
        raise InputError(f"{file}: expected a .safetensors file with the weights of timm's {name}")
    overlay = None if file is None else {"file": str(file)}
    try:
        return timm.create_model(
            name, pretrained=weights is not None, pretrained_cfg_overlay=overlay, num_classes=0, **arguments
        )
    except (RuntimeError, TypeError, KeyError, OSError) as error:
        source = "" if weights is None else f" and the weights {weights}"
        raise InputError(
            f"timm cannot make the vision tower {name!r} with {dict(arguments)}{source}: {error}"
        ) from error


def _square_processor(tokenizer, image_size: int, stride: int, mean, std) -> LlavaProcessor:
    square = {"height": image_size, "width": image_size}
    image_processor = CLIPImageProcessor(
        do_resize=True,
        size=square,  # the whole image, not its middle: a question may be about a corner
        do_center_crop=False,
        crop_size=square,  # LlavaProcessor counts image tokens by it
        image_mean=list(mean),
        image_std=list(std),
        do_convert_rgb=True,
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=stride,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=tokenizer.chat_template,
        image_token=IMAGE,
    )


def _tile_processor(tokenizer, image_size: int, patch: int, pooling: int, mean, std) -> PerceptionLMProcessor:
    size: Any = {"height": image_size, "width": image_size}
    normalised: dict[str, Any] = {"image_mean": list(mean), "image_std": list(std)}
    return PerceptionLMProcessor(
        PerceptionLMVideoProcessor(size=size, **normalised),
        PerceptionLMImageProcessor(vision_input_type="vanilla", tile_size=image_size, max_num_tiles=1, **normalised),
        tokenizer,
        patch_size=patch,
        pooling_ratio=pooling,
        chat_template=tokenizer.chat_template,
    )


@torch.no_grad()
def inherit(student: PreTrainedModel, teacher: PreTrainedModel, layers: Sequence[int]) -> list[str]:
    """Gives a smaller student of the teacher's family the teacher's weights, wherever a tensor has the same place.

    The student's decoder layer i takes the teacher's layer ``layers[i]``. A tensor without a counterpart of its name
    and shape keeps its fresh weights.

    Args:
        student: the model that is changed.
        teacher: a model with the student's module names.
        layers: one of the teacher's decoder layers for each of the student's, in order.

    Returns:
        The names of the student's tensors that stayed fresh.

    Raises:
        InputError: ``layers`` does not name one layer of the teacher for each of the student's.
    """
    counts = [model.config.get_text_config().num_hidden_layers for model in (student, teacher)]
    if len(layers) != counts[0] or not all(0 <= layer < counts[1] for layer in layers):
        raise InputError(f"{counts[0]} of the teacher's {counts[1]} decoder layers are wanted, not {list(layers)}")
    source, fresh = teacher.state_dict(), []
    for name, tensor in student.state_dict().items():
        place = re.sub(r"(language_model\.layers\.)(\d+)", lambda found: f"{found[1]}{layers[int(found[2])]}", name)
        if place in source and source[place].shape == tensor.shape:
            tensor.copy_(source[place])
        else:
            fresh.append(name)
    return fresh


@torch.no_grad()
def _features(tower: Any, name: str, image_size: int) -> tuple[int, int]:
    """The channels and the stride of a tower's features, read off its output for one blank image."""
    training = tower.training
    features = tower.eval().forward_features(torch.zeros(1, 3, image_size, image_size))
    tower.train(training)
    shape = tuple(features.shape)
    if len(shape) == 3 and hasattr(tower, "num_prefix_tokens"):
        channels, side = shape[2], math.isqrt(shape[1] - tower.num_prefix_tokens)
        square = side * side == shape[1] - tower.num_prefix_tokens
    elif len(shape) == 4 and shape[1] == tower.num_features:
        channels, side, square = shape[1], shape[2], shape[2] == shape[3]
    else:
        raise InputError(f"the vision tower {name!r} gives features {shape}, neither [B, C, H, W] nor [B, L, C]")
    if not square or image_size % side:
        raise InputError(f"image_size {image_size} is no multiple of the stride of {name!r}, which gives {shape}")
    return channels, image_size // side


@dataclass
class StudentOptions(ModelOptions):
    """The student: a model that is trained."""

    tower_mode: Literal["eval", "train"] = "eval"
    """Vision towers in eval mode while they are trained (BatchNorm statistics and dropout off), or in train mode."""
    freeze: list[str] = field(default_factory=list)
    """Parts that are not trained, by their names in the model: vision_tower, layers.0, embed_tokens (* is any text)."""
    lora: LoRAOptions | None = None
    """Train low-rank adapters alone; the saved model has them added to its weights."""
    prune: PruneOptions | None = None
    """Keep some of the decoder's layers alone, evenly spaced with the first and the last: {layers: 10}."""


def load_student(options: StudentOptions) -> Any:
    """The model that is trained, pruned if that is asked for.

    Raises:
        InputError: as ``load_model``, or the model cannot be pruned so.
    """
    model = load_model(options)
    if options.prune is None:
        return model
    count = model.config.get_text_config().num_hidden_layers
    prune(model, options.prune)
    kept = ", ".join(map(str, kept_layers(count, options.prune.layers)))
    PartialState().print(f"student.prune: of {options.path}'s {count} decoder layers {kept} are kept")
    return model
