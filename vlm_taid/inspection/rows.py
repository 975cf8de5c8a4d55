"""A row as both models read it: its tokens as text, its pictures, its pairs, or why it is refused.

Legend: T positions, N paired answer tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal

from ..data import Conversation
from ..errors import BadRow
from ..streams import PairedBatch, PairedCollator, Stream, StreamEncoder
from .pictures import Seen, seen_pictures

Kind = Literal["context", "special", "image", "answer", "paired"]


@dataclass(frozen=True)
class Piece:
    """A token, or all tokens of a picture.

    Args:
        text: what it stands for.
        kind: ``paired`` and ``answer`` (unpaired) are answers' tokens, ends of turn included; the others are not.
        pair: its pair's number, if it is paired.
        count: its tokens.
        marks: those of a picture's tokens that are no image tokens, but frame it or break its lines.
    """

    text: str
    kind: Kind
    pair: int | None = None
    count: int = 1
    marks: int = 0


@dataclass(frozen=True)
class StreamView:
    """One model's stream of a row: its pieces in order, its tokens, those of them that are pictures', its pictures."""

    pieces: list[Piece]
    tokens: int
    image_tokens: int
    answer_tokens: int
    pictures: Seen


@dataclass
class Prediction:
    """What the two models predict at a pair: up to 5 tokens with their probabilities, and KL(teacher || student)."""

    token: str
    student: list[tuple[str, float]]
    teacher: list[tuple[str, float]]
    kl: float


@dataclass
class InspectedRow:
    """A row, inspected.

    Args:
        name: where it comes from.
        refused: why training would refuse it; None for a good one.
        student, teacher: its streams, as far as they could be made; no teacher where one encoding serves both.
        pairs: its pairs.
        content_share, first_unpaired, identical_next_share: as ``Alignment`` has them.
        predictions: one a pair, if the models were asked.
    """

    name: str
    refused: str | None = None
    student: StreamView | None = None
    teacher: StreamView | None = None
    pairs: int = 0
    content_share: float = 0.0
    first_unpaired: int = 0
    identical_next_share: float = 0.0
    predictions: list[Prediction] = field(default_factory=list)


def inspect_row(row: Conversation | BadRow, collator: PairedCollator) -> tuple[InspectedRow, PairedBatch | None]:
    """The row as the two models read it, and its batch if it is good."""
    if isinstance(row, BadRow):
        return InspectedRow(row.row, row.reason), None
    found, batch = InspectedRow(row.row), None
    try:
        batch = collator([row])
        if batch["refused"]:  # on_bad_row: skip
            found.refused, batch = batch["refused"][0].removeprefix(f"{row.row}: "), None
    except BadRow as error:
        found.refused = error.reason
    at_student, at_teacher = [], []
    if batch is not None:  # the row is the batch's first: its places are its positions
        at_student, at_teacher = batch["student_rows_N"].tolist(), batch["teacher_rows_N"].tolist()
        found.pairs = len(at_student)
        _, found.content_share, unpaired, found.identical_next_share = batch["pairing"]
        found.first_unpaired = int(unpaired)
    found.student = _view(row, collator.student, at_student)
    if collator.teacher is not None and not collator.shared:
        found.teacher = _view(row, collator.teacher, at_teacher)
    return found, batch


def _view(row: Conversation, encoder: StreamEncoder, positions_N: list[int]) -> StreamView | None:
    """The row's stream; None if the encoder refuses the row."""
    batch = encoder.encode_batch([row])
    if batch.refused:
        return None
    stream = batch.streams[0]
    pair_of = {position + 1: number for number, position in enumerate(positions_N)}  # the token that is predicted
    supervised = {i for answer in stream.answers for i in [*answer.tokens, answer.end_of_turn] if i is not None}
    pieces = list(_pieces(stream, encoder, pair_of, supervised))
    images = sum(piece.count - piece.marks for piece in pieces if piece.kind == "image")
    return StreamView(pieces, len(stream.input_ids_T), images, len(supervised), seen_pictures(encoder, batch.inputs))


def _pieces(stream: Stream, encoder: StreamEncoder, pair_of: dict[int, int], supervised: set[int]) -> Iterator[Piece]:
    ids = stream.input_ids_T.tolist()
    image_id = getattr(encoder.processor, "image_token_id", None)
    special = encoder.token_bytes.special
    picture_T = _picture_of(stream, encoder)
    for picture, run in groupby(range(len(ids)), key=lambda i: picture_T[i]):
        if picture is not None:
            its_ids = [ids[i] for i in run]
            marks = sum(i != image_id for i in its_ids)
            yield Piece(str(encoder.processor.image_token), "image", None, len(its_ids), marks)
            continue
        for i in run:
            kind: Kind = "paired" if i in pair_of else "answer" if i in supervised else "context"
            if kind == "context" and ids[i] in special:
                kind = "special"
            yield Piece(encoder.token_bytes.text(ids[i]), kind, pair_of.get(i))


def _picture_of(stream: Stream, encoder: StreamEncoder) -> list[int | None]:
    """For each token the number of the picture that it stands for, or None."""
    if not stream.images:
        return [None] * len(stream.input_ids_T)
    encoded = encoder.tokenizer(stream.text, add_special_tokens=False, return_offsets_mapping=True)
    assert encoded["input_ids"] == stream.input_ids_T.tolist()
    return [
        next((n for n, (start, stop) in enumerate(stream.images) if start <= begin < end <= stop), None)
        for begin, end in encoded["offset_mapping"]
    ]
