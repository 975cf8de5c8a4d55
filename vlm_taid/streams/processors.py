"""How a processor is called on rendered rows: one way for all, and two small tables for families that need another.

PaliGemma has no chat template, its processor's own call adds text that its offsets leave out and refuses rows without
a picture, and its attention mask depends on where the answer begins. PerceptionLM's own call refuses pictures of
different numbers of tiles.

Legend: B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

if TYPE_CHECKING:
    from .encoder import Stream

# What a processor without a chat template is trained on.
TEMPLATES = {
    # big_vision's preprocessing: pictures, begin of text, prompt, newline; then the suffix and its end.
    "PaliGemmaProcessor": (
        "{%- if messages | map(attribute='role') | list not in (['user'], ['user', 'assistant']) -%}"
        "{{- raise_exception('PaliGemma takes one question and one answer: split the conversation') -}}{%- endif -%}"
        "{%- for part in messages[0]['content'] if part['type'] == 'image' -%}{{- '<image>' -}}{%- endfor -%}"
        "{{- bos_token -}}"
        "{%- for part in messages[0]['content'] if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}"
        "{{- '\n' -}}"
        "{%- if messages | length > 1 -%}"
        "{%- for part in messages[1]['content'] -%}{{- part['text'] -}}{%- endfor -%}{{- eos_token -}}"
        "{%- endif -%}"
    )
}

# Processors that are called in parts, and how they put their pictures' pixels together.
TOGETHER: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "PaliGemmaProcessor": torch.stack,
    "PerceptionLMProcessor": lambda tiles: torch.cat(tiles)[None],  # the model flattens pictures and tiles
}


def process(
    processor: Any, texts: list[str], images: Sequence[Sequence[Image.Image]] | None, padding_side: str = "right"
) -> dict[str, Any]:
    """Padded inputs of a model, with ``offset_mapping`` [B, T, 2], and ``text_replacement_offsets``, each row's list
    of image marks and what was written in their place.

    Args:
        processor: a processor, or a tokenizer for text alone.
        texts: rendered rows with an image mark for each picture.
        images: each row's pictures; None for a tokenizer.
        padding_side: left for prompts, from whose ends a model generates.
    """
    options: dict[str, Any] = {
        "padding": True,
        "padding_side": padding_side,
        "return_tensors": "pt",
        "add_special_tokens": False,  # the template has written them
        "return_offsets_mapping": True,
    }
    if images is None:
        return {**processor(texts, **options), "text_replacement_offsets": [[]] * len(texts)}
    if type(processor).__name__ in TOGETHER:
        return _in_parts(processor, texts, images, options)
    if any(images):
        options["images"] = [list(row) for row in images]
    with _recorded(processor) as replaced_B:
        inputs = dict(processor(text=texts, **options))
    return {**inputs, "text_replacement_offsets": replaced_B or [[]] * len(texts)}


@contextmanager
def _recorded(processor: Any) -> Iterator[list[list[dict[str, Any]]]]:
    """What a processor writes in the place of image marks while the context lasts.

    ``return_text_replacement_offsets=True`` asks for the same, and fails with InternVL and Idefics3 where a batch's
    first row has no image: they make a tensor of its empty list.
    """
    replaced_B: list[list[dict[str, Any]]] = []
    own = processor.get_text_with_replacements

    def recording(*args: Any, **kwargs: Any) -> tuple[list[str], list[list[dict[str, Any]]]]:
        texts, replaced = own(*args, **kwargs)
        replaced_B.extend(replaced)
        return texts, replaced

    processor.get_text_with_replacements = recording
    try:
        yield replaced_B
    finally:
        del processor.get_text_with_replacements


def _in_parts(
    processor: Any, texts: list[str], images: Sequence[Sequence[Image.Image]], options: dict[str, Any]
) -> dict[str, Any]:
    """What a processor's own call does: the pictures, the text with their tokens, the tokenizer."""
    pictures = [image for row in images for image in row]
    processed = processor.image_processor(pictures) if pictures else {}
    marks = [processor.replace_image_token(processed, image_idx=index) for index in range(len(pictures))]
    texts, replaced = processor.get_text_with_replacements(list(texts), images_replacements=marks)
    inputs = dict(processor.tokenizer(texts, **options))
    inputs["text_replacement_offsets"] = replaced
    if pictures:
        inputs["pixel_values"] = TOGETHER[type(processor).__name__](list(processed["pixel_values"]))
    return inputs


def finish(processor: Any, inputs: dict[str, Any], streams: Sequence[Stream]) -> None:
    """Adds what the model's inputs lack until the answers are found: PaliGemma's ``token_type_ids`` [B, T].

    Its prefix (0) sees itself whole, its suffix (1) only what came before: without them the prompt would see the
    answer.
    """
    if type(processor).__name__ == "PaliGemmaProcessor":
        types_BT = torch.zeros_like(inputs["input_ids"])
        for row, stream in enumerate(streams):
            supervised = [i for answer in stream.answers for i in [*answer.tokens, answer.end_of_turn] if i is not None]
            if supervised:
                types_BT[row, min(supervised) :] = 1
        inputs["token_type_ids"] = types_BT
