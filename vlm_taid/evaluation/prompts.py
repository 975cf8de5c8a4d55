"""How a row becomes what the model is asked: the question phrased, the options listed, pictures put at their marks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_taid.errors import BadRow, InputError
from vlm_taid.evaluation.columns import is_empty, options_of

_PLACEHOLDER = re.compile(r"\{(question|capitalized_question|options|hint)\}")
_NUMBERED = re.compile(r"<image (\d+)>")


@dataclass(frozen=True)
class Prompt:
    """How questions are phrased.

    Args:
        text: with ``{question}`` in it, or ``{capitalized_question}``, which is Python's ``capitalize`` of it.
        choices: the same for rows with options, with ``{options}`` ("A. red" and so on, a line each); ``text`` if None.
        hint: put in front where a row has a hint, with ``{hint}`` in it.
    """

    text: str = "{question}"
    choices: str | None = None
    hint: str | None = None

    def of(self, row: Mapping[str, Any], name: str) -> str:
        """The row's prompt; BadRow if it has no question."""
        options = options_of(row)
        template = self.choices if self.choices is not None and options else self.text
        if is_empty(row.get("question")) and "question}" in template:
            columns = ", ".join(map(str, row)) or "none"
            raise BadRow(name, f"column 'question' is missing or empty; the row's columns are {columns}")
        question = str(row.get("question"))
        values = {
            "question": question,
            "capitalized_question": question.capitalize(),
            "options": "\n".join(f"{letter}. {text}" for letter, text in options.items()),
            "hint": str(row.get("hint")),
        }
        front = self.hint if self.hint is not None and not is_empty(row.get("hint")) else ""
        return _PLACEHOLDER.sub(lambda mark: values[mark[1]], front + template)  # braces in a question stay braces


def prompt_of(value: Any, where: str) -> Prompt:
    """A prompt from a text, or from the keys ``text``, ``choices`` and ``hint``; InputError says where it is wrong."""
    if isinstance(value, str):
        return Prompt(value)
    known = {"text", "choices", "hint"}
    if isinstance(value, Mapping) and set(value) <= known and all(isinstance(text, str) for text in value.values()):
        return Prompt(**value)
    raise InputError(f"{where}: a prompt is a text, or has the keys {', '.join(sorted(known))}; it is {value!r}")


def placed(text: str, pictures: Sequence[Any], name: str) -> tuple[str, list[Any]]:
    """``<image 2>`` becomes the plain mark, with the second picture for it; a picture that no mark names is left out.

    Without such marks text and pictures are as they were.

    Raises:
        BadRow: a mark has no picture.
    """
    numbers = [int(number) for number in _NUMBERED.findall(text)]
    if not numbers:
        return text, list(pictures)
    for number in numbers:
        if not 1 <= number <= len(pictures):
            raise BadRow(name, f"column question: it names <image {number}>, but the row has {len(pictures)} pictures")
    return _NUMBERED.sub("<image>", text), [pictures[number - 1] for number in numbers]
