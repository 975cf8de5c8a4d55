"""`vlm-taid inspect`: rows of a recipe's data, as both models read them, before anything is trained."""

from __future__ import annotations

from itertools import islice, takewhile
from pathlib import Path

from rich.console import Console

from ..data import Conversation, ConversationDataset, StreamedRows
from ..errors import BadRow, InputError
from ..pairing import paired_collator
from ..recipe import Recipe
from ..streams import PairedCollator
from .page import page
from .predictions import Models
from .rows import InspectedRow, inspect_row
from .terminal import show


def inspect(recipe: Recipe, rows: int = 4, html: Path | None = None, models: bool = False) -> list[InspectedRow]:
    """Shows rows of the training data, evenly spread over it, and what is refused of them.

    Args:
        recipe: its models' processors, its data and its pairing count; nothing is trained or written but the page.
        rows: how many rows.
        html: a page to write, in one file that needs nothing else.
        models: load both models too, and show what they predict at each answer token.

    Returns:
        The rows, inspected; ``refused`` says of each whether training would take it.

    Raises:
        InputError: the recipe, a processor, the data or a model cannot be used.
    """
    if rows < 1:
        raise InputError(f"--rows is {rows}: at least 1 is needed")
    chosen = _rows(recipe, rows)
    collator = paired_collator(recipe)
    if models and collator.teacher is None:
        raise InputError("--models compares a student with a teacher, and this recipe trains without one")
    loaded = Models(recipe, collator) if models else None
    found = []
    for conversation in chosen:
        row, batch = inspect_row(conversation, collator)
        if loaded is not None and batch is not None:
            row.predictions = loaded.predict(batch)
        found.append(row)
    lines = summary(recipe, collator, found)
    show(Console(), lines, found)
    if html is not None:
        html.parent.mkdir(parents=True, exist_ok=True)
        html.write_text(page(lines, found), encoding="utf-8")
        print(f"page: {html}")
    return found


def _rows(recipe: Recipe, count: int) -> list[Conversation | BadRow]:
    """Rows from all over the data, or the first ones of a stream."""
    if recipe.data.streaming:
        stream = StreamedRows(recipe.data.train, on_bad_row="skip", allow_urls=recipe.data.allow_urls, shuffled=False)
        first = takewhile(lambda read: max(at[0] for at in read[1][1]) == 0, stream.read(0, 1))
        return [row for row, _ in islice(first, count)]
    data = ConversationDataset(recipe.data.train, on_bad_row="skip", allow_urls=recipe.data.allow_urls)
    count = min(count, len(data))
    return [data[number * len(data) // count] for number in range(count)]


def summary(recipe: Recipe, collator: PairedCollator, rows: list[InspectedRow]) -> list[str]:
    """What holds for all rows, a line each."""
    lines = [f"student: {recipe.student.path}"]
    options = recipe.teacher
    if collator.teacher is not None and options is not None:
        more = [f"system prompt {options.system!r}"] if options.system is not None else []
        more += [f"{key}: {value}" for key, value in options.image_settings.items()]
        lines.append(f"teacher: {options.path}" + (f", with {', '.join(more)} of its own" if more else ""))
        lines.append(
            "one encoding serves both models: equal tokenizer, template and picture settings"
            if collator.shared
            else "each model has its own token stream"
        )
    if collator.vocabulary is not None:
        lines += str(collator.vocabulary.report()).splitlines()
    refused = sum(row.refused is not None for row in rows)
    lines.append(f"{len(rows)} rows inspected, {refused} of them would be refused")
    return lines
