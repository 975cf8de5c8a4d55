"""What the columns of the public benchmarks mean: options, right answers, pictures. Rows are never changed.

One reader for all, since their columns do not contradict each other: VLMEvalKit's files (``index``, ``A`` to ``Z``,
base64 pictures that may be another row's index) and the hub's data sets (``choices``, ``options``, ``image_1`` ...).
"""

from __future__ import annotations

import ast
import base64
import binascii
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from vlm_taid.errors import BadRow
from vlm_taid.evaluation.metrics import reference_texts

LONGEST_INDEX = 64  # VLMEvalKit: a shorter text in the image column is the index of the row that has the picture
_PATH = re.compile(r".{1,255}\.(png|jpe?g|webp|gif|bmp|tiff?|ppm|jp2)", re.IGNORECASE)
_INLINE = re.compile(r"\(?\b([A-H])\)?\s*[:.)]\s*")


def is_empty(value: Any) -> bool:
    """Whether a cell says nothing: None, NaN, blanks, or "nan", as tables write an empty one."""
    return is_blank(value) or (isinstance(value, str) and value.strip() == "nan")


def is_blank(value: Any) -> bool:
    """Whether a reference is none: as `is_empty`, but the words "nan" and "none" are answers that people give."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def renamed(row: Mapping[str, Any], aliases: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The row with our column names too: each takes the first of its aliases that the row has."""
    found = dict(row)
    for ours, theirs in aliases.items():
        column = next((name for name in theirs if not is_empty(row.get(name))), None)
        if column is not None:
            found[ours] = row[column]
    return found


def text_of_list(value: Any) -> list[Any] | None:
    """A list, a tuple or an array's list; or one that is written as text (``"['a', 'b']"``); None for all else."""
    if isinstance(value, str):
        if not value.strip().startswith("[") or not value.strip().endswith("]"):
            return None
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else None


def options_of(row: Mapping[str, Any]) -> dict[str, str]:
    """The options by letter; empty if the row is no multiple choice.

    Columns ``A``, ``B``, ... (empty ones are none), or ``options`` or ``choices`` (a list, or its text).
    """
    lettered = {letter: str(row[letter]) for letter in string.ascii_uppercase if not is_empty(row.get(letter))}
    if lettered:
        return lettered
    for column in ("options", "choices"):
        texts = text_of_list(row.get(column))
        if texts:
            return dict(zip(string.ascii_uppercase, map(str, texts), strict=False))
    return {}


def options_in(question: str) -> dict[str, str]:
    """The options that stand inside a question, after "Options:" (MMStar on the hub): ``A: red, B: blue``."""
    _, found, tail = question.rpartition("Options:")
    if not found:
        return {}
    pieces = _INLINE.split(tail)[1:]
    letters, texts = pieces[::2], pieces[1::2]
    if letters != list(string.ascii_uppercase[: len(letters)]):
        return {}
    return {letter: text.strip().rstrip(",;").strip() for letter, text in zip(letters, texts, strict=True)}


def choices_of(row: Mapping[str, Any]) -> dict[str, str]:
    """The options of a multiple-choice row: its columns', else those inside its question, else the letters alone.

    Letters alone (A to D, without texts) if the answer is a capital letter: then an answer can be read by its letter.
    """
    options = options_of(row) or options_in(str(row.get("question")))
    if not options and str(row.get("answer")).strip() in tuple("ABCD"):
        return dict.fromkeys("ABCD", "")
    return options


def right_letter(row: Mapping[str, Any], options: Mapping[str, str], *, text_first: bool = False) -> str | None:
    """The letter of the right option: ``answer`` as a letter, an index from 0 or an option's text; None if neither.

    Options may be numbers: then "1" is the index (AI2D, ScienceQA), or the option with ``text_first`` (MathVista).
    """
    text, letters = str(row.get("answer")).strip(), list(options)
    by_text = next((letter for letter, option in options.items() if option.strip() == text), None)
    if text_first and by_text is not None:
        return by_text
    if text in options:
        return text
    if text.isdecimal() and int(text) < len(letters):
        return letters[int(text)]
    return by_text


def references_of(row: Mapping[str, Any], name: str, *, choice: bool = False) -> list[str]:
    """A row's right answers: the letter if it is a ``choice``, else ``answers``, ``answer`` or ``gt_answer``.

    Args:
        row: the columns.
        name: the row's name, for messages.
        choice: the task is multiple choice where a row has options.

    Raises:
        BadRow: there is none.
    """
    options = choices_of(row) if choice else {}
    if options:
        letter = right_letter(row, options)
        if letter is None:
            raise BadRow(
                name, f"column answer is {row.get('answer')!r}, expected a letter of {', '.join(options)} or its index"
            )
        return [letter]
    for column in ("answers", "answer", "gt_answer"):
        value = row.get(column)
        listed = text_of_list(value)
        texts = [text for text in reference_texts(value if listed is None else listed) if not is_blank(text)]
        if texts and not is_blank(value):
            return texts
    raise BadRow(name, "no reference answer (column answer or answers): fill it in or drop the row")


def pictures_of(row: Mapping[str, Any], name: str) -> list[Any]:
    """A row's pictures, as the image reader takes them, base64 decoded.

    Columns ``image`` or ``images`` (one or a list, or its text), else ``image_1``, ``image_2``, ... (an empty one is
    left out), else ``image_path``, else ``decoded_image``.

    Raises:
        BadRow: a base64 text is damaged; the message names the column.
    """
    for column in ("decoded_image", "image", "images"):
        value = row.get(column)
        listed = text_of_list(value)
        values = [value] if listed is None else listed
        found = [_decoded(item, name, column) for item in values if not is_empty(item)]
        if found:
            return found
    numbered = sorted((int(key[6:]), key) for key in row if re.fullmatch(r"image_\d+", key))
    found = [_decoded(row[key], name, key) for _, key in numbered if not is_empty(row[key])]
    if found or is_empty(row.get("image_path")):
        return found
    listed = text_of_list(row["image_path"])
    return [row["image_path"]] if listed is None else listed


def _decoded(value: Any, name: str, column: str) -> Any:
    """base64 as bytes; a path, bytes or a picture as it is."""
    if not isinstance(value, str) or len(value) <= LONGEST_INDEX or _PATH.fullmatch(value) or "://" in value[:16]:
        return value
    try:
        return base64.b64decode(value.partition(",")[2] if value.startswith("data:") else value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRow(
            name, f"column {column}: neither a path nor base64 ({error}): {value[:24]!r}... of {len(value)} characters"
        ) from None
