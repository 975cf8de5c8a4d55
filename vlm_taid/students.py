"""Students (and small teachers) made from parts: a timm vision tower, a fresh projector, a decoder, a processor.

What is made is transformers' own ``FastVlmForConditionalGeneration`` with a ``LlavaProcessor``: a saved folder loads
with ``AutoModelForImageTextToText`` and ``AutoProcessor``, and needs no code of this package.

Shapes: B rows, C channels, H and W rows and columns of the tower's last feature map.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import timm
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    GenerationConfig,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TimmWrapperConfig,
)

from .errors import InputError
from .pretrained import ModelOptions
from .trainable import LoRAOptions

TURN_START, TURN_END, PADDING, IMAGE = "<|im_start|>", "<|im_end|>", "<|pad|>", "<image>"

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
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5),
) -> tuple[FastVlmForConditionalGeneration, LlavaProcessor]:
    """A vision-language model with fresh weights, and its processor.

    An image becomes (image_size / stride)^2 tokens, where the stride is the tower's. The weights come from torch's
    global generator: seed it for the same weights again. The model is in fp32 and in eval mode.

    Args:
        tower: timm's name of a convolutional vision tower, one whose features are [B, C, H, W].
        text_config: a decoder's config (Qwen2Config, LlamaConfig, ...). It is changed: the vocabulary's size and
            special ids become the tokenizer's, its dtype is cleared. Its ``tie_word_embeddings`` holds for the model.
        tokenizer: a tokenizer with the ``<image>`` token and a chat template that writes it once per image.
        image_size: pixels of the square that every image is resized to, a multiple of the tower's stride.
        tower_args: further arguments of ``timm.create_model``, as {"output_stride": 16}.
        image_mean: what is taken from the three colours, which are in 0..1.
        image_std: what they are divided by then.

    Returns:
        The model and the processor.

    Raises:
        InputError: timm does not know the tower, its features are not [B, C, H, W], the image size is no multiple of
            its stride, or the tokenizer has no ``<image>`` token.
    """
    arguments = dict(tower_args or {})
    image_id = cast(int, tokenizer.convert_tokens_to_ids(IMAGE))
    if image_id is None or image_id == tokenizer.unk_token_id:
        raise InputError(f"the tokenizer has no {IMAGE} token; add it as a special token first")
    try:
        fresh_tower = timm.create_model(tower, pretrained=False, num_classes=0, **arguments)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"timm cannot make the vision tower {tower!r} with {arguments}: {error}") from error
    channels, stride = _feature_map(fresh_tower, tower, image_size)

    tie = bool(text_config.tie_word_embeddings)
    text_config.vocab_size = len(tokenizer)
    text_config.bos_token_id = tokenizer.bos_token_id
    text_config.eos_token_id = tokenizer.eos_token_id
    text_config.pad_token_id = tokenizer.pad_token_id
    text_config.dtype = None  # a dtype of its own would build the decoder in another precision than the rest
    vision: dict[str, Any] = {"architecture": tower, "do_pooling": False, "hidden_size": channels}
    vision_config = TimmWrapperConfig(**vision, model_args=arguments or None)
    config = FastVlmConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=image_id,
        image_seq_length=(image_size // stride) ** 2,
        tie_word_embeddings=tie,
    )
    model = FastVlmForConditionalGeneration(config).eval()
    # transformers draws every convolution from one narrow normal distribution; timm's own start is the one that trains
    model.model.vision_tower.timm_model.load_state_dict(fresh_tower.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    square = {"height": image_size, "width": image_size}
    image_processor = CLIPImageProcessor(
        do_resize=True,
        size=square,  # the whole image, not its middle: a question may be about a corner
        do_center_crop=False,
        crop_size=square,  # LlavaProcessor counts image tokens by it
        image_mean=list(image_mean),
        image_std=list(image_std),
        do_convert_rgb=True,
    )
    processor = LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=stride,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=tokenizer.chat_template,
        image_token=IMAGE,
    )
    return model, processor


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
def _feature_map(tower: torch.nn.Module, name: str, image_size: int) -> tuple[int, int]:
    """The channels and the stride of a tower's last feature map, read off its output for one blank image."""
    training = tower.training
    features = tower.eval().forward_features(torch.zeros(1, 3, image_size, image_size))  # pyright: ignore[reportCallIssue]
    tower.train(training)
    shape = tuple(features.shape)
    if len(shape) != 4 or shape[1] != getattr(tower, "num_features", shape[1]):
        raise InputError(
            f"the vision tower {name!r} gives features {shape}, not [B, C, H, W]: take a convolutional one"
        )
    _, channels, height, width = shape
    if height != width or image_size % height:
        raise InputError(
            f"image_size {image_size} is no multiple of the stride of {name!r}, which gives {height}x{width}"
        )
    return channels, image_size // height


@dataclass
class StudentOptions(ModelOptions):
    """The student: a model that is trained."""

    tower_mode: Literal["eval", "train"] = "eval"
    """Vision towers in eval mode while they are trained (BatchNorm statistics and dropout off), or in train mode."""
    freeze: list[str] = field(default_factory=list)
    """Parts that are not trained, by their names in the model: vision_tower, layers.0, embed_tokens (* is any text)."""
    lora: LoRAOptions | None = None
    """Train low-rank adapters alone; the saved model has them added to its weights."""
