"""A vision-language model from a timm vision tower and a causal language model, in transformers' own classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from transformers import AutoTokenizer, set_seed

from .errors import InputError
from .pretrained import ModelOptions, check_folder, load_model
from .students import IMAGE, VIDEO, assemble

# Put in front of a text-only template: content that comes in parts becomes text, with a mark at each picture.
PARTS_TO_TEXT = (
    "{%- set flat = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- set flat_message = namespace(text='') -%}"
    "{%- if message.content is string -%}{%- set flat_message.text = message.content -%}"
    "{%- else -%}{%- for part in message.content -%}"
    "{%- set flat_message.text = flat_message.text + ('" + IMAGE + "' if part.type == 'image' else part.text) -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- set flat.messages = flat.messages + [dict(message, content=flat_message.text)] -%}"
    "{%- endfor -%}"
    "{%- set messages = flat.messages -%}"
)


def assemble_pretrained(
    vision: str,
    language: str,
    output: Path,
    vision_weights: str = "hub",
    image_size: int | None = None,
    pooling: int = 1,
    seed: int = 0,
) -> Path:
    """Assemble a vision-language model: a tower and a language model with their weights, a projector with fresh ones.

    A convolutional tower goes into FastVLM's class, a tower of tokens (ViT) into PerceptionLM's.

    Args:
        vision: The vision tower, as timm/NAME.
        language: Folder or hub id of a causal language model with a chat template.
        output: Folder to write the model and its processor to.
        vision_weights: The tower's weights: a .safetensors file with timm's names, hub (timm fetches them), or fresh.
        image_size: Pixels of the square that every image is resized to; the tower's own if not given.
        pooling: Towers of tokens alone: the projector averages squares of this many tokens' side into one.
        seed: Seed of the fresh weights.

    Returns:
        The output folder.

    Raises:
        InputError: a part is missing or does not fit; the message says which, and what would.
    """
    if output.exists() and any(output.iterdir()):
        raise InputError(f"{output} is not empty: name a new folder")
    kind, _, name = vision.partition("/")
    if kind != "timm" or not timm.is_model(name):
        raise InputError(f"--vision {vision}: expected timm/NAME with a name that timm.list_models() has")
    set_seed(seed)
    tokenizer = _tokenizer(language)
    decoder: Any = load_model(ModelOptions(language))
    if getattr(decoder.config, "vision_config", None) is not None:
        raise InputError(f"--language {language}: a vision-language model; expected a causal language model")
    head = decoder.get_output_embeddings()
    if len(tokenizer) > head.weight.shape[0]:
        decoder.resize_token_embeddings(len(tokenizer))
    source = timm.get_pretrained_cfg(name)
    assert source is not None  # timm.is_model
    model, processor = assemble(
        name,
        decoder.config,
        tokenizer,
        image_size or source.input_size[-1],
        vocabulary_size=decoder.get_input_embeddings().weight.shape[0],
        weights=None if vision_weights == "fresh" else vision_weights,
        pooling=pooling,
        image_mean=source.mean,
        image_std=source.std,
    )
    model.get_decoder().load_state_dict(decoder.base_model.state_dict())
    model.get_output_embeddings().load_state_dict(decoder.get_output_embeddings().state_dict())
    _prove(model, decoder, language)
    model.save_pretrained(output)
    processor.save_pretrained(output)
    return output


def _tokenizer(language: str) -> Any:
    check_folder(language)
    marks = {"image_token": IMAGE, "video_token": VIDEO}
    try:
        tokenizer = AutoTokenizer.from_pretrained(language, extra_special_tokens=marks)
    except (OSError, ValueError) as error:
        raise InputError(f"--language {language}: its tokenizer cannot be loaded: {error}") from error
    template = tokenizer.chat_template
    if not isinstance(template, str):
        raise InputError(f"--language {language}: its tokenizer has no chat template: add a chat_template.jinja")
    tokenizer.chat_template = PARTS_TO_TEXT + template
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@torch.no_grad()
def _prove(model: Any, decoder: Any, language: str) -> None:
    """Refuses a decoder that loses something in the new class, as a head that scales or caps its logits."""
    ids_BT = torch.arange(16)[None] % decoder.config.vocab_size
    ours_BTV, theirs_BTV = model(input_ids=ids_BT).logits, decoder.eval()(input_ids=ids_BT).logits
    if not torch.allclose(ours_BTV, theirs_BTV, rtol=1e-4, atol=1e-4):
        raise InputError(
            f"--language {language}: {type(decoder).__name__} gives other logits inside {type(model).__name__} (by up "
            f"to {float((ours_BTV - theirs_BTV).abs().max()):.3g}): a head that scales or caps logits is not carried"
        )
