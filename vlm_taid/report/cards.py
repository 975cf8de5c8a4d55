"""Held-out rows as cards: picture, question, references, the models' answers; and what opens when one is chosen."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from html import escape
from typing import Any

from PIL import Image

from vlm_taid.evaluation.comparison import Comparison
from vlm_taid.evaluation.gallery import SYMBOLS, Card, Gallery
from vlm_taid.report.probabilities import Reader, Token

SMALL = 96  # pixels; pictures up to this side are kept as they are, and drawn pixel by pixel


def _picture(image: Image.Image, side: int) -> str:
    """A picture as a data URL: losslessly when it is small, else shrunk, as JPEG."""
    buffer = io.BytesIO()
    if max(image.size) <= SMALL:
        image.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        image = image.copy()
        image.thumbnail((side, side))
        image.save(buffer, "JPEG", quality=80)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _card(card: Card, side: int) -> str:
    images = card.row.images
    # several share the place of one
    side = side if len(images) < 2 else side * 2 // 3
    pictures = []
    for number, image in enumerate(images, 1):
        small = ' class="small"' if max(image.size) <= SMALL else ""
        which = f" {number} of {len(images)}" if len(images) > 1 else ""
        alt = f"Picture{which}, {image.width} x {image.height} pixels, to the question: {card.question}"
        pictures.append(f'<img{small} src="{_picture(image, side)}" alt="{escape(alt)}">')
    several = " several" if len(images) > 1 else ""
    picture = f'<span class="pictures{several}">{"".join(pictures)}</span>' if pictures else ""
    options = "".join(f"<span>{letter}. {escape(text)}</span>" for letter, text in card.options.items())
    answers = "".join(
        f'<span class="{answer.verdict}">{SYMBOLS[answer.verdict]} {escape(f"{answer.label}: {answer.shown}")}</span>'
        for answer in card.answers
    )
    references = " | ".join(card.references[:3]) + (" | …" if len(card.references) > 3 else "")
    return (
        f'<button type="button" class="card" aria-haspopup="dialog">{picture}<span class="text">'
        f"<strong>{escape(card.question)}</strong>{options}<span>reference: {escape(references)}</span>{answers}"
        "</span></button>"
    )


def grid(shown: Gallery, comparison: Comparison, side: int) -> str:
    """The task's cards.

    Args:
        shown: which.
        comparison: the evaluations that they come from.
        side: pixels of a picture's longer side at most.
    """
    single = len(comparison.plain) == 1
    differ = "the answer is wrong" if single else f"a model does not answer as {comparison.reference} does"
    verdicts = {answer.verdict for card in shown.cards for answer in card.answers}
    meaning = {"open": "no answer or no score yet"}
    legend = ", ".join(
        f"{symbol} {meaning.get(verdict, verdict)}" for verdict, symbol in SYMBOLS.items() if verdict in verdicts
    )
    note = (
        f"Chosen to show differences, not at random: on {shown.differing:,} of {shown.rows:,} rows {differ}; "
        f"some of these come first, then some of the others. {legend}. Enter opens a card, arrow keys move."
    )
    cards = "".join(_card(card, side) for card in shown.cards)
    return f'<h2>Held-out rows: {escape(shown.task)}</h2><p>{escape(note)}</p><div class="grid">{cards}</div>'


def details(card: Card, readers: Mapping[str, Reader]) -> dict[str, Any]:
    """What a card shows when it is opened, as JSON's plain values.

    Args:
        card: the row.
        readers: the models that are asked how probable the answers are, by label.
    """
    who: dict[str, list[str]] = {card.right[0].strip(): ["reference"]}
    for answer in card.answers:
        who.setdefault((answer.text or "").strip(), []).append(answer.label)
    texts = [text for text in who if text] if readers else []
    read = {label: list(reader.read(card.row, texts)) for label, reader in readers.items()}
    return {
        "question": card.question,
        "options": [f"{letter}. {text}" for letter, text in card.options.items()],
        "references": card.references,
        "answers": [
            {"label": a.label, "text": a.shown, "verdict": a.verdict, "symbol": SYMBOLS[a.verdict]}
            for a in card.answers
        ],
        "choices": [
            {
                "text": text,
                "of": ", ".join(who[text]),
                "tokens": {label: [_plain(token) for token in answers[place]] for label, answers in read.items()},
            }
            for place, text in enumerate(texts)
        ],
    }


def _plain(token: Token) -> list[Any]:
    top = [[text, round(probability, 4)] for text, probability in token.top]
    return [token.text, round(token.probability, 4), top]
