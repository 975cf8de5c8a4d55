"""Prompts: a row up to its last answer, as a model reads it when it is to write that answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..data import Conversation
from ..errors import BadRow
from .encoder import StreamEncoder
from .processors import process


def encode_prompts(encoder: StreamEncoder, conversations: Sequence[Conversation]) -> dict[str, Any]:
    """Model inputs of the rows' prompts, padded on the left, so that generation goes on from their last tokens.

    A prompt is the text that stands before the last answer in the stream that is trained on, to the letter.

    Args:
        encoder: of the model that is to answer.
        conversations: rows that the encoder takes; a picture in the last answer or after it is not possible.

    Raises:
        BadRow: a row's answers cannot be found in its text.
    """
    texts = []
    for rendered in encoder.renderer(conversations):
        if isinstance(rendered, BadRow):
            raise rendered
        texts.append(rendered.text[: rendered.spans[-1][0]])
    images = [conversation.images for conversation in conversations] if encoder.takes_images else None
    return process(encoder.processor, texts, images, padding_side="left").inputs
