"""PairedCollator: conversations become a PairedBatch, in the DataLoader's workers.

Legend: T positions, N paired answer tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from ..data import Conversation, DataOptions
from ..errors import BadRow
from .alignment import Alignment, align
from .batch import PairedBatch
from .blocks import joining
from .encoder import EncodedBatch, Stream, StreamEncoder
from .packing import packed
from .vocabulary import SharedVocabulary

Pack = list[Conversation | BadRow]


@dataclass(frozen=True)
class TeacherRow:
    """A row as the teacher reads it.

    Args:
        name: where the row came from.
        ids_T: its token ids.
        positions_N: the predicting positions that pair.
        images: its pictures.
    """

    name: str
    ids_T: torch.Tensor
    positions_N: Sequence[int]
    images: Sequence[Image.Image]


class PairedCollator:
    """Encodes rows for both models and pairs their answers.

    Where a model takes pictures and no row of a batch has one, a filler row with a picture and without answers is
    added: every rank must enter the same modules. A batch with no row left holds the filler alone.

    A list among the rows is a pack: the batch then has one sequence for each pack (``packing``), for both models alike.

    Args:
        student: the student's encoder.
        teacher: the teacher's; the same object when one encoding serves both, None for ``sft``.
        vocabulary: their shared vocabulary; None when there is no second stream.
        options: DataOptions; ``on_bad_row`` and ``min_paired_share`` are used.
        stored: called with the rows of a batch, in the worker; gives tensors that come with it, a stored teacher's.
    """

    def __init__(
        self,
        student: StreamEncoder,
        teacher: StreamEncoder | None = None,
        vocabulary: SharedVocabulary | None = None,
        options: DataOptions | None = None,
        stored: Callable[[Sequence[TeacherRow]], dict[str, torch.Tensor]] | None = None,
    ):
        self.student, self.teacher, self.vocabulary = student, teacher, vocabulary
        self.options = options or DataOptions(train=[])
        self.stored = stored
        self.shared = teacher is None or teacher is student
        self.takes_images = student.takes_images or (teacher is not None and teacher.takes_images)

    def __call__(self, conversations: Sequence[Conversation | BadRow | Pack]) -> PairedBatch:
        """Raises:
        BadRow: a row cannot be used and ``on_bad_row`` is ``error``.
        """
        with joining():
            return self._collated(conversations)

    def _collated(self, conversations: Sequence[Conversation | BadRow | Pack]) -> PairedBatch:
        packs = [row for row in conversations if isinstance(row, list)]
        pack_of = [number for number, pack in enumerate(packs) for _ in pack]
        if packs:
            conversations = [row for pack in packs for row in pack]
        refused = [row for row in conversations if isinstance(row, BadRow)]
        given = {place: row for place, row in enumerate(conversations) if isinstance(row, Conversation)}
        places = list(given)
        while True:
            rows = [given[place] for place in places]
            fill = not rows or (self.takes_images and not any(row.images for row in rows))
            student = self.student.encode_batch([*rows, self.student.filler] if fill else rows)
            teacher = student
            if self.teacher is not None and not self.shared and not student.refused:
                teacher = self.teacher.encode_batch([*rows, self.teacher.filler] if fill else rows)
            bad = {**student.refused, **teacher.refused}
            if len(rows) in bad:
                raise bad[len(rows)]
            pairs: list[Alignment] = []
            if not bad:
                for index in range(len(rows)):
                    try:
                        pairs.append(self._pair(student.streams[index], teacher.streams[index]))
                    except BadRow as error:
                        bad[index] = error.with_traceback(None)  # whose frames would hold the batch
            if bad and self.options.on_bad_row == "error":
                raise next(iter(bad.values()))
            if not bad:
                break
            refused += bad.values()
            places = [place for index, place in enumerate(places) if index not in bad]
        row_of = [place for place, pair in zip(places, pairs, strict=True) for _ in pair.target_ids_N]
        stored = {}
        if self.stored is not None:
            theirs = zip(places, teacher.streams, pairs, strict=False)  # the filler has a stream too
            stored = self.stored(
                [
                    TeacherRow(given[place].row, stream.input_ids_T, pair.teacher_positions_N, given[place].images)
                    for place, stream, pair in theirs
                ]
            )
        groups: list[list[int]] | None = [[] for _ in packs] if packs else None
        if groups is not None:
            for index, place in enumerate(places):
                groups[pack_of[place]].append(index)
            groups[-1] += [len(rows)] if fill else []
        batch = self._batch(student, teacher, pairs, groups)
        if stored:
            batch["teacher"] = None
        return PairedBatch(
            **batch,
            stored=stored,
            row_of_N=torch.tensor(row_of, dtype=torch.long),
            num_rows=len(conversations),
            rows=[given[place].index for place in places],
            refused=[str(row) for row in refused],
            pairing=[
                float(len(pairs)),
                sum(pair.content_share for pair in pairs),
                float(sum(pair.first_unpaired for pair in pairs)),
                sum(pair.identical_next_share for pair in pairs),
            ],
        )

    def _pair(self, student: Stream, teacher: Stream) -> Alignment:
        if self.shared:
            positions = [
                i - 1
                for answer in student.answers
                for i in [*answer.tokens, *([] if answer.end_of_turn is None else [answer.end_of_turn])]
                if i > 0
            ]
            if not positions:
                raise BadRow(student.row, "the row has no answer token: it has no assistant turn, or an empty one")
            return Alignment(positions, positions, student.input_ids_T[1:][positions].tolist(), 1.0, 0, 1.0)
        assert self.vocabulary is not None
        options = self.options
        return align(student, teacher, self.vocabulary, pair=options.pair, min_paired_share=options.min_paired_share)

    def tokens(self, conversation: Conversation | BadRow) -> int:
        """Tokens of a row in the longer of its streams; 0 for a row that is refused."""
        if isinstance(conversation, BadRow):
            return 0
        encoders = [self.student] if self.shared or self.teacher is None else [self.student, self.teacher]
        lengths = [encoder.length(conversation) for encoder in encoders]
        return max(lengths) if all(lengths) else 0  # the collator says why when the row's turn comes

    def _batch(
        self, student: EncodedBatch, teacher: EncodedBatch, pairs: list[Alignment], groups: list[list[int]] | None
    ) -> dict[str, Any]:
        inputs, student_rows_N = self._laid(student, [pair.student_positions_N for pair in pairs], groups, self.student)
        theirs, teacher_rows_N = inputs, student_rows_N
        if not self.shared and self.teacher is not None:
            positions = [pair.teacher_positions_N for pair in pairs]
            theirs, teacher_rows_N = self._laid(teacher, positions, groups, self.teacher)
        return {
            "student": inputs,
            "teacher": None if self.teacher is None else theirs,
            "student_rows_N": student_rows_N,
            "teacher_rows_N": teacher_rows_N,
            "labels_N": torch.tensor([i for pair in pairs for i in pair.target_ids_N], dtype=torch.long),
        }

    def _laid(
        self,
        batch: EncodedBatch,
        positions: list[list[int]],
        groups: list[list[int]] | None,
        encoder: StreamEncoder,
    ) -> tuple[dict[str, Any], torch.Tensor]:
        """A model's inputs, and its rows' positions in them."""
        inputs, length = batch.inputs, batch.inputs["input_ids"].shape[1]
        starts = [row * length for row in range(len(batch.streams))]
        if groups is not None:
            lengths = [len(stream.input_ids_T) for stream in batch.streams]
            inputs, starts = packed(inputs, lengths, groups, encoder.tokenizer.pad_token_id)
        flat = [start + i for start, row in zip(starts, positions, strict=False) for i in row]  # the filler has none
        return inputs, torch.tensor(flat, dtype=torch.long)
