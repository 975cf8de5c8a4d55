"""The inspection in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from .rows import InspectedRow, Piece, StreamView

COLOURS = ("cyan", "yellow", "green", "magenta", "blue", "red")  # of pairs, in turn


def show(console: Console, summary: list[str], rows: list[InspectedRow]) -> None:
    """Prints the summary and each row."""
    for line in summary:
        console.print(line, highlight=False, markup=False)
    for row in rows:
        parts = Table.grid(padding=(0, 1))
        parts.add_column(style="bold", no_wrap=True)
        parts.add_column()
        for name, view in (("student" if row.teacher else "stream", row.student), ("teacher", row.teacher)):
            if view is not None:
                parts.add_row(name, _stream(view))
                parts.add_row("", Text(counts(view), style="dim"))
        parts.add_row("pairs" if row.refused is None else "", Text(verdict(row)))
        title = Text(row.name) + Text("  refused" if row.refused else "", style="bold red")
        console.print(Panel(parts, title=title, title_align="left", border_style="red" if row.refused else "dim"))
        if row.predictions:
            console.print(_predictions(row))


def counts(view: StreamView) -> str:
    """A stream's sizes in words."""
    seen = ", ".join(f"{image.width} x {image.height}" for image in view.pictures.images)
    words = f"{view.tokens} tokens, {view.image_tokens} of them the pictures', {view.answer_tokens} the answers'"
    return (
        words
        + (f"; pictures of {seen} pixels" if seen else "")
        + (f"; {view.pictures.note}" if view.pictures.note else "")
    )


def verdict(row: InspectedRow) -> str:
    """What pairs, or why the row is refused."""
    if row.refused is not None:
        return f"refused: {row.refused}"
    if row.teacher is None:
        return f"{row.pairs} answer tokens, one stream for all"
    first = f", {row.first_unpaired} answers whose first token is unpaired" if row.first_unpaired else ""
    return (
        f"{row.pairs} pairs: {row.content_share:.0%} of the student's answer tokens{first}; the next token is the same "
        f"in {row.identical_next_share:.0%} of them"
    )


def chip(piece: Piece, times: str) -> str:
    """A picture's tokens in words."""
    marks = f" + {piece.marks} marks" if piece.marks else ""
    return f"{piece.text} {times} {piece.count - piece.marks}{marks}"


def visible(text: str) -> str:
    """A token's text with its blanks, line ends and other characters without a shape made visible."""
    text = text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·")
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def _stream(view: StreamView) -> Text:
    text = Text()
    for piece in view.pieces:
        if piece.kind == "image":
            text.append(f"[{chip(piece, 'x')}]", style="reverse dim")
        elif piece.pair is not None:
            text.append(visible(piece.text), style=f"underline {COLOURS[piece.pair % len(COLOURS)]}")
        elif piece.kind == "answer":
            text.append(visible(piece.text), style="bold strike")
        else:
            text.append(piece.text, style="dim" if piece.kind == "special" else "")
    return text


def _predictions(row: InspectedRow) -> Table:
    table = Table("answer token", "student", "teacher", "KL, nats", title="predictions", title_justify="left")
    for prediction in row.predictions:
        sides = [
            "  ".join(f"{visible(token)} {p:.2f}" for token, p in side)
            for side in (prediction.student, prediction.teacher)
        ]
        table.add_row(Text(visible(prediction.token)), *map(Text, sides), f"{prediction.kl:.4f}")
    return table
