"""How a processor is called on rendered rows: one way for all, and two small tables for families that need another.

PaliGemma has no chat template, its processor's own call adds text that its offsets leave out and refuses rows without
a picture, and its attention mask depends on where the answer begins. PerceptionLM's own call refuses pictures of
different numbers of tiles.

Legend: B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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


class Offsets(Sequence[tuple[int, int]]):
    """Where a row's tokens stand in its text, in characters, looked up one by one.

    Most tokens of a row with pictures are image tokens, which nobody asks for: all offsets as Python's lists, or as the
    tensor that ``return_offsets_mapping`` makes, would cost more than the tokenizer's own work.
    """

    def __init__(self, encoding: Any, length: int):
        self._encoding, self._length = encoding, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self._length:
            raise IndexError(index)
        return self._encoding.token_to_chars(index)


@dataclass
class Processed:
    """What a processor makes of rows.

    Args:
        inputs: the model's, padded (``input_ids`` [B, T], pixels, ...).
        encodings_B: each row's tokens as the tokenizer wrote them (``tokenizers.Encoding``).
        replaced_B: each row's image marks, and what was written in their place.
    """

    inputs: dict[str, Any]
    encodings_B: list[Any]
    replaced_B: list[list[dict[str, Any]]]


def process(
    processor: Any, texts: list[str], images: Sequence[Sequence[Image.Image]] | None, padding_side: str = "right"
) -> Processed:
    """Rows as their processor makes them a model's inputs.

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
    }
    nothing = [[]] * len(texts)
    if images is None:
        encoded = processor(texts, **options)
        return Processed(dict(encoded), encoded.encodings, nothing)
    if type(processor).__name__ in TOGETHER:
        return _in_parts(processor, texts, images, options)
    if any(images):
        options["images"] = [list(row) for row in images]
    with _Listener(processor) as heard:
        inputs = dict(processor(text=texts, **options))
    return Processed(inputs, heard.encodings_B, heard.replaced_B or nothing)


@dataclass
class _Listener:
    """Hears what a processor does inside its call: what it writes for image marks, and what its tokenizer answers.

    Its own options give less: ``return_text_replacement_offsets`` fails with InternVL and Idefics3 where a batch's
    first row has no image (they make a tensor of its empty list), and for ``return_offsets_mapping`` see ``Offsets``.
    """

    processor: Any
    encodings_B: list[Any] = field(default_factory=list)
    replaced_B: list[list[dict[str, Any]]] = field(default_factory=list)

    def __enter__(self) -> _Listener:
        self._write, self._tokenizer = self.processor.get_text_with_replacements, self.processor.tokenizer
        self.processor.get_text_with_replacements = self._written
        self.processor.tokenizer = self
        return self

    def __exit__(self, *error: object) -> None:
        self.processor.tokenizer = self._tokenizer
        del self.processor.get_text_with_replacements

    def _written(self, *args: Any, **kwargs: Any) -> tuple[list[str], list[list[dict[str, Any]]]]:
        texts, replaced = self._write(*args, **kwargs)
        self.replaced_B = replaced
        return texts, replaced

    def __call__(self, text: Any, *args: Any, **kwargs: Any) -> Any:
        """In the tokenizer's place."""
        encoded = self._tokenizer(text, *args, **kwargs)
        if isinstance(text, list):
            self.encodings_B = encoded.encodings
        return encoded

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def _in_parts(
    processor: Any, texts: list[str], images: Sequence[Sequence[Image.Image]], options: dict[str, Any]
) -> Processed:
    """What a processor's own call does: the pictures, the text with their tokens, the tokenizer."""
    pictures = [image for row in images for image in row]
    processed = processor.image_processor(pictures) if pictures else {}
    marks = [processor.replace_image_token(processed, image_idx=index) for index in range(len(pictures))]
    texts, replaced = processor.get_text_with_replacements(list(texts), images_replacements=marks)
    encoded = processor.tokenizer(texts, **options)
    inputs = dict(encoded)
    if pictures:
        inputs["pixel_values"] = TOGETHER[type(processor).__name__](list(processed["pixel_values"]))
    return Processed(inputs, encoded.encodings, replaced)


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
