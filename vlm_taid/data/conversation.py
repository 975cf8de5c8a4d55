"""Conversation: the one form that every row of every data format becomes.

A conversation is a list of turns; a turn is a role and a list of parts; a part is a text or a picture.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from PIL import Image

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Part:
    """A piece of a turn.

    Args:
        text: a text; or
        image: a picture (RGB, already opened and checked).

    Raises:
        ValueError: both or none are given.
    """

    text: str | None = None
    image: Image.Image | None = None

    def __post_init__(self):
        if (self.text is None) == (self.image is None):
            raise ValueError("a Part is either a text or an image")


@dataclass(frozen=True)
class Turn:
    """What one role says.

    Args:
        role: system, user or assistant.
        parts: texts and pictures in order; pictures stand where the text mentions them.
    """

    role: Role
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """The turn's texts, joined."""
        return "".join(part.text for part in self.parts if part.text is not None)


@dataclass(frozen=True)
class Conversation:
    """One row: turns, and where it came from.

    Args:
        turns: in order. Assistant turns are the answers: what is supervised.
        row: the row's origin as ``file:number``, for messages.
        templated: render through the chat template. False for plain text (pre-training rows and plain
            prompt-completion pairs): the turns' texts are joined as they are and followed by the end-of-text token.
        index: the row's place in the dataset that it was read from, or None.
        fields: the row's other columns (id, answers, category, ...), for evaluation.
    """

    turns: tuple[Turn, ...]
    row: str = "row"
    templated: bool = True
    index: int | None = None
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def images(self) -> list[Image.Image]:
        """All pictures, in the order in which they are mentioned."""
        return [part.image for turn in self.turns for part in turn.parts if part.image is not None]

    def messages(self, structured: bool = True) -> list[dict[str, Any]]:
        """The turns as transformers chat messages.

        Args:
            structured: content as a list of ``{"type": "image"}`` and ``{"type": "text", "text": ...}`` (what
                processors' templates read); else as one string (what tokenizers' templates read).
        """
        if not structured:
            return [{"role": turn.role, "content": turn.text} for turn in self.turns]
        return [
            {
                "role": turn.role,
                "content": [
                    {"type": "image"} if part.text is None else {"type": "text", "text": part.text}
                    for part in turn.parts
                ],
            }
            for turn in self.turns
        ]
