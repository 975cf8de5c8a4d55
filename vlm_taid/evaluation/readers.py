"""Tasks, and the way of their rows to the model: row -> prompt -> batch, in the DataLoader's workers."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from vlm_taid.data.conversation import Conversation
from vlm_taid.data.sources import ConversationDataset, SourceOptions
from vlm_taid.data.templates import left_out_begin
from vlm_taid.errors import BadRow, InputError
from vlm_taid.evaluation.metrics import metric, reference_texts

# Rows are sorted by length within a window of so many batches: most of the padding saved, few pictures held at a time.
BATCHES_PER_WINDOW = 4


class Rows(Sequence[Conversation]):
    """A source's rows, each ending with its question. Pictures are opened when a row is read: BadRow if broken."""

    def __init__(self, source: SourceOptions):
        self._dataset = ConversationDataset([source], on_bad_row="error", need_answer=False)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Conversation:  # pyright: ignore[reportIncompatibleMethodOverride]
        row = self._dataset[index]
        if isinstance(row, BadRow):
            raise row
        return row


@dataclass
class Task:
    """One file of questions and how its answers are scored.

    Args:
        name: the task's name in the results.
        source: the file, in the ``vqa`` format: image, question, answer or answers; ``source.prompt`` phrases it.
        metric: a name of `vlm_taid.evaluation.metrics.METRICS`.
        max_new_tokens: the longest answer, in tokens.
        category: the column that groups rows for a score each; rows without it have none.
    """

    name: str
    source: SourceOptions
    metric: str = "vqa_accuracy"
    max_new_tokens: int = 16
    category: str = "category"

    def __post_init__(self):
        metric(self.metric)
        if self.max_new_tokens < 1:
            raise InputError(f"task {self.name}: max_new_tokens is {self.max_new_tokens}, at least 1 is needed")

    def rows(self) -> Rows:
        """The task's rows; InputError if the file cannot be read or holds none."""
        return Rows(self.source)

    def config(self) -> dict[str, Any]:
        """What of the task goes into the results' ``configs``."""
        return {
            "metric": self.metric,
            "flavor": metric(self.metric).flavor,
            "prompt": self.source.prompt,
            "dataset": asdict(self.source),
            "generation_kwargs": {"max_new_tokens": self.max_new_tokens, "do_sample": False},
        }


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
    """

    doc_id: int
    doc: dict[str, Any]
    references: list[str]
    category: str | None
    prompt: str
    images: list[Image.Image] = field(repr=False)
    image_from: int | None = None


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


def references_of(fields: Mapping[str, Any], row: str) -> list[str]:
    """A row's reference answers, from its ``answers`` or else ``answer`` column; BadRow if there are none."""
    references = reference_texts(fields.get("answers")) or reference_texts(fields.get("answer"))
    if not references:
        raise BadRow(row, "no reference answer (column answer or answers)")
    return references


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
    """

    def __init__(
        self,
        task: Task,
        rows: Sequence[Conversation],
        doc_ids: Sequence[int],
        processor: Any,
        batch_size: int,
        shuffle_seed: int | None = None,
    ):
        self.task, self.rows, self.doc_ids = task, rows, doc_ids
        self.processor, self.batch_size = processor, batch_size
        self.order = None if shuffle_seed is None else other_rows(len(rows), shuffle_seed)
        self.multimodal = hasattr(processor, "tokenizer")

    def __iter__(self) -> Iterator[tuple[list[Row], Any] | InputError]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        window = BATCHES_PER_WINDOW * self.batch_size
        starts = range(0, len(self.doc_ids), window)[first::step]
        try:
            for start in starts:
                yield from self._window(self.doc_ids[start : start + window])
        except InputError as error:
            yield error

    def _window(self, doc_ids: Sequence[int]) -> Iterator[tuple[list[Row], Any]]:
        conversations = [self.rows[doc_id] for doc_id in doc_ids]
        messages = [conversation.messages(structured=self.multimodal) for conversation in conversations]
        prompts = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        begin = left_out_begin(self.processor)
        prompts = [prompt if prompt.startswith(begin) else begin + prompt for prompt in prompts]
        read = [self._row(*item) for item in zip(doc_ids, conversations, prompts, strict=True)]
        read.sort(key=lambda row: -len(row.prompt))
        for rows in ([row for row in read if row.images], [row for row in read if not row.images]):
            for start in range(0, len(rows), self.batch_size):
                batch = rows[start : start + self.batch_size]
                inputs = self._inputs(batch)
                for row in batch:
                    row.images = []
                yield batch, inputs

    def _row(self, doc_id: int, conversation: Conversation, prompt: str) -> Row:
        if conversation.images and not self.multimodal:
            raise BadRow(conversation.row, "has a picture, but the model reads text only")
        images, image_from = conversation.images, None
        if images and self.order is not None:
            images, image_from = other_images(self.rows, self.order, doc_id)
        category = conversation.fields.get(self.task.category)
        return Row(
            doc_id=doc_id,
            doc={
                "question": conversation.turns[-1].text,
                **conversation.fields,
                "image": [image_sha256(image) for image in conversation.images],
            },
            references=references_of(conversation.fields, conversation.row),
            category=None if category is None else str(category),
            prompt=prompt,
            images=images,
            image_from=image_from,
        )

    def _inputs(self, batch: Sequence[Row]) -> Any:
        # the prompt has its special tokens, the begin of text too
        process = partial(
            self.processor, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt"
        )
        texts = [row.prompt for row in batch]
        if batch[0].images:
            return process(text=texts, images=[row.images for row in batch])
        return process(text=texts)
