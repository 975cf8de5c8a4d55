"""The way of a task's rows to the model: row -> prompt -> batch, in the DataLoader's workers."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from vlm_taid.data.conversation import Conversation
from vlm_taid.errors import BadRow, InputError
from vlm_taid.evaluation.generation import padded, rendered
from vlm_taid.evaluation.rows import Rows
from vlm_taid.evaluation.tasks import Task

# Rows are sorted by length within a window of so many batches: most of the padding saved, few pictures held at a time.
BATCHES_PER_WINDOW = 4


@dataclass
class Row:
    """A question on its way: what the sample line will say of it, and what the model gets.

    Args:
        doc_id: index in the task's rows.
        doc: the row's columns, pictures replaced by their hashes.
        references: the right answers, at least one.
        category: its group, or None.
        prompt: the rendered text.
        images: the pictures that the model gets.
        image_from: whose pictures these are, if another row's.
        error: why the row could not be asked; then the rest says nothing.
    """

    doc_id: int
    doc: dict[str, Any]
    references: list[str]
    category: str | None
    prompt: str
    images: list[Image.Image] = field(repr=False)
    image_from: int | None = None
    error: str | None = None

    @staticmethod
    def failed(doc_id: int, error: str) -> Row:
        """A row that could not be asked."""
        return Row(doc_id, {}, [], None, "", [], error=error)


def image_sha256(image: Image.Image) -> str:
    """The hash of a picture's size, mode and pixels (not of the file: two encodings of the same picture are equal)."""
    digest = hashlib.sha256(f"{image.mode}{image.size}".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


def text_sha256(text: str) -> str:
    """The hash of a text's UTF-8 bytes."""
    return hashlib.sha256(text.encode()).hexdigest()


def json_line(value: Any) -> str:
    """One line of JSON with sorted keys; what JSON cannot hold (dates, arrays) is written as its text."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)


def other_rows(count: int, seed: int) -> list[int]:
    """For each row, another one: a random permutation of one cycle (Sattolo 1986), fixed by the seed."""
    order, generator = list(range(count)), random.Random(seed)
    for last in range(count - 1, 0, -1):
        chosen = generator.randrange(last)
        order[last], order[chosen] = order[chosen], order[last]
    return order


def other_images(rows: Sequence[Conversation], order: Sequence[int], doc_id: int) -> tuple[list[Image.Image], int]:
    """Pictures of another row that differ from the row's own, as many as it has, and that row's index.

    Raises:
        InputError: every row has the same pictures.
    """
    own = [image_sha256(image) for image in rows[doc_id].images]
    other = order[doc_id]
    while other != doc_id:
        images = rows[other].images
        if images and image_sha256(images[0]) not in own:
            return [images[position % len(images)] for position in range(len(own))], other
        other = order[other]
    raise InputError("shuffle_images: all rows show the same picture, there is no other one to take")


def batches_of(rows: Sequence[Row], batch_size: int) -> Iterator[list[Row]]:
    """The rows by the length of their prompts, longest first; a batch's rows all have pictures or all have none."""
    longest_first = sorted(rows, key=lambda row: -len(row.prompt))
    for some in ([row for row in longest_first if row.images], [row for row in longest_first if not row.images]):
        for start in range(0, len(some), batch_size):
            yield some[start : start + batch_size]


class PromptBatches(IterableDataset):
    """Model inputs, batch by batch: rows read, prompts rendered, pictures processed, left-padded.

    The rows of a window are sorted by prompt length; a batch's rows all have pictures or all have none. Yields
    ``(rows, inputs)``, where the rows' pictures are dropped, or an InputError to be raised by the reader:
    raised here, a DataLoader would put its worker's traceback before the message.

    Args:
        task: the questions.
        rows: the task's rows.
        doc_ids: which of them.
        processor: a processor, or a tokenizer for text-only models; with a chat template.
        batch_size: rows in a batch.
        shuffle_seed: if not None, each question gets the picture of another row, by this seed.
        on_error: what a row that cannot be asked does: stop yields its error as said, record ``([row], None)``.
    """

    def __init__(
        self,
        task: Task,
        rows: Rows,
        doc_ids: Sequence[int],
        processor: Any,
        batch_size: int,
        shuffle_seed: int | None = None,
        on_error: Literal["stop", "record"] = "stop",
    ):
        self.task, self.rows, self.doc_ids, self.on_error = task, rows, doc_ids, on_error
        self.processor, self.batch_size = processor, batch_size
        self.order = None if shuffle_seed is None else other_rows(len(rows), shuffle_seed)

    def __iter__(self) -> Iterator[tuple[list[Row], Any] | InputError]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        window = BATCHES_PER_WINDOW * self.batch_size
        starts = range(0, len(self.doc_ids), window)[first::step]
        try:
            for start in starts:
                yield from self.window(self.doc_ids[start : start + window])
        except InputError as error:
            yield error

    def window(self, doc_ids: Sequence[int]) -> Iterator[tuple[list[Row], Any]]:
        """The batches of these rows; BadRow if one cannot be asked and that is not to be recorded."""
        read: list[Row] = []
        for doc_id in doc_ids:
            try:
                read.append(self._row(doc_id))
            except BadRow as error:
                if self.on_error == "stop":
                    raise
                yield [Row.failed(doc_id, str(error))], None
        for batch in batches_of(read, self.batch_size):
            inputs = padded(self.processor, [row.prompt for row in batch], [row.images for row in batch])
            for row in batch:
                row.images = []
            yield batch, inputs

    def _row(self, doc_id: int) -> Row:
        conversation = self.rows[doc_id]
        prompt = rendered(self.processor, conversation)
        references = self.task.references(conversation.fields, conversation.row)
        images, image_from = conversation.images, None
        if images and self.order is not None:
            images, image_from = other_images(self.rows, self.order, doc_id)
        category = conversation.fields.get(self.task.category)
        return Row(
            doc_id=doc_id,
            doc={**conversation.fields, "image": [image_sha256(image) for image in conversation.images]},
            references=references,
            category=None if category is None else str(category),
            prompt=prompt,
            images=images,
            image_from=image_from,
        )
